"""One query, on one page: read → letterbox → Triton → Milvus → vote."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.contract import ATTENTION_MAP, EMBEDDING, LUNG_AGREEMENT, LUNG_MASK
from cxr_retrieval.errors import UsageError
from cxr_retrieval.image import Letterbox, letterbox, read_radiograph
from cxr_retrieval.store import Neighbour, Store
from cxr_retrieval.triton import TritonClient
from cxr_retrieval.voting import DEFAULT_K, Vote, weighted_vote

MIN_LUNG_SHARE: Final = 0.05
"""Of the radiograph's area; an adult's lungs cover a quarter to a half of a frontal film."""
MIN_LUNG_AGREEMENT: Final = 0.9
"""Mean Dice coefficient of the five networks with their ensemble (LUNG_AGREEMENT)."""


@dataclass(frozen=True)
class Explanation:
    """What the pictures need, all on the 256×256 square: radiograph and mask uint8, attention in [0, 1]."""

    square: NDArray[np.uint8]
    box: Letterbox
    lung_mask: NDArray[np.uint8]
    attention: NDArray[np.float32]


@dataclass(frozen=True)
class QueryResult:
    """The answer to one radiograph."""

    image_id: str
    model_version: str
    prediction: Vote
    neighbours: tuple[Neighbour, ...]
    timings_ms: dict[str, float]
    warnings: tuple[str, ...]
    explanation: Explanation

    def as_json(self) -> dict[str, Any]:
        """The published JSON form of a query result."""
        return {
            "image_id": self.image_id,
            "model_version": self.model_version,
            "prediction": {
                "label": self.prediction.label,
                "confidence": self.prediction.confidence,
                "scores": dict(self.prediction.scores),
            },
            "neighbours": [
                {
                    "rank": rank,
                    "image_id": hit.case.image_id,
                    "similarity": hit.similarity,
                    "label": hit.case.label,
                    "metadata": {
                        **{
                            name: value
                            for name, value in (("patient_id", hit.case.patient_id), ("source", hit.case.source))
                            if value is not None
                        },
                        **hit.case.metadata,
                    },
                }
                for rank, hit in enumerate(self.neighbours, start=1)
            ],
            "timings_ms": {name: round(value, 2) for name, value in self.timings_ms.items()},
            "warnings": list(self.warnings),
        }


def query(image: Path, triton: TritonClient, store: Store, *, top_k: int = DEFAULT_K, where: str = "") -> QueryResult:
    """Retrieves the `top_k` most similar confirmed cases and lets them vote.

    Args:
        where: Milvus boolean expression that cases must meet, such as `age > 60`.

    Raises:
        ImageError: The file is unusable.
        UsageError: No case meets the expression, or it is malformed.
        InferenceError, StoreError: Triton or Milvus cannot serve.
    """
    timings: dict[str, float] = {}
    with _timed(timings, "read"):
        radiograph = read_radiograph(image)
        square, box = letterbox(radiograph.pixels)
    with _timed(timings, "infer"):
        outputs = triton.infer(square[None, None], (EMBEDDING, ATTENTION_MAP, LUNG_MASK, LUNG_AGREEMENT))
    embedding = np.asarray(outputs[EMBEDDING.name][0], np.float32)
    with _timed(timings, "search"):
        neighbours = store.search(embedding, top_k, where)
    if not neighbours:
        raise UsageError(
            "no case to compare with",
            expected="at least one gallery image" + (f" that meets {where!r}" if where else ""),
            got="none",
            next_step="relax --where, or ingest cases",
        )
    with _timed(timings, "vote"):
        prediction = weighted_vote([(hit.case.label, hit.similarity) for hit in neighbours])
    timings["total"] = sum(timings.values())
    mask = np.asarray(outputs[LUNG_MASK.name][0, 0], np.uint8)
    warnings = [*radiograph.warnings, *lung_warnings(mask, box, float(outputs[LUNG_AGREEMENT.name][0, 0]))]
    if len(neighbours) < top_k:
        warnings.append(f"only {len(neighbours)} of {top_k} neighbours: the gallery holds no more that qualify")
    explanation = Explanation(square, box, mask, np.asarray(outputs[ATTENTION_MAP.name][0, 0], np.float32))
    return QueryResult(image.name, triton.model_version, prediction, tuple(neighbours), timings, tuple(warnings), explanation)


def lung_warnings(mask: NDArray[np.uint8], box: Letterbox, agreement: float) -> list[str]:
    """Says so when hardly any lung was found, or the networks disagree about it; the vote then rests on shaky ground."""
    share = float(box.crop(mask).astype(np.bool_).mean())
    if share < MIN_LUNG_SHARE:
        return [f"lungs not found reliably: they cover {share:.0%} of the picture; is this a frontal chest radiograph?"]
    if agreement < MIN_LUNG_AGREEMENT:
        return [
            f"lungs not found reliably: the networks agree to {agreement:.2f} only (usually above {MIN_LUNG_AGREEMENT:.2f}); "
            "look at the outline before you trust the vote"
        ]
    return []


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Generator[None]:
    started = time.perf_counter()
    yield
    timings[name] = 1000 * (time.perf_counter() - started)
