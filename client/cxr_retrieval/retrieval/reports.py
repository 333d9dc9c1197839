"""Questions in words: which cases' films, or reports, are like a text, alone or together with a film (Yu et al. 2021).

Films and texts are brought into one subspace by a multimodal network that Triton serves beside the ensemble; the gallery is of the space
`reports` (`gallery/spaces.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.contract import IMAGE_VECTOR, MULTIMODAL_TEXT_LEAF, MULTIMODAL_TEXT_MODEL, TEXT_VECTOR, TOKENIZER_PARAMETER
from cxr_retrieval.errors import InferenceError, UsageError
from cxr_retrieval.gallery.spaces import REPORTS
from cxr_retrieval.gallery.store import Clause, Neighbour, Store
from cxr_retrieval.inference.tokens import read_tokenizer, tokens_of
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.retrieval.summary import Summary, summarise
from cxr_retrieval.retrieval.voting import DEFAULT_K, Vote, weighted_vote
from cxr_retrieval.settings import Match

DEFAULT_TEXT_WEIGHT: Final = 0.5
MOST_CHARACTERS: Final = 2000
"""Of a question; of a report more is read, as far as there is room for its subwords."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Wording:
    """A text beside a film: its vector `[128]`, and how much it counts, in [0, 1]; the film counts for the rest."""

    vector: Vectors
    weight: float

    def joined(self, images: NDArray[np.generic]) -> Vectors:
        """IMAGE_VECTOR `[…, 128]` with it: the similarity to a case is the same mean of both similarities."""
        return (1.0 - self.weight) * np.asarray(images, np.float32) + np.float32(self.weight) * self.vector


@dataclass(frozen=True)
class ReportReader:
    """What makes vectors of texts, as the server says: its tokenizer."""

    tokenizer: Any = field(repr=False)

    @classmethod
    def served_by(cls, triton: TritonClient) -> ReportReader:
        """The one that this server has.

        Raises:
            InferenceError: It has none.
            SetupError: The extra for it is not installed.
        """
        triton.version_of(MULTIMODAL_TEXT_MODEL)
        parameters = triton.parameters(MULTIMODAL_TEXT_MODEL) or {}
        if TOKENIZER_PARAMETER not in parameters:
            raise InferenceError(
                f"the model {MULTIMODAL_TEXT_MODEL} does not say how it reads text",
                expected=f"parameter {TOKENIZER_PARAMETER} in its config.pbtxt",
                next_step="build it anew with `cxr build multimodal`",
            )
        return cls(read_tokenizer(parameters[TOKENIZER_PARAMETER]))

    def vectors(self, triton: TritonClient, texts: Sequence[str]) -> Vectors:
        """TEXT_VECTOR of each, `[n, 128]`.

        Raises:
            InferenceError: Triton cannot serve.
        """
        found = triton.infer_further(MULTIMODAL_TEXT_LEAF, (tokens_of(self.tokenizer, texts),))
        return np.asarray(found[TEXT_VECTOR.name], np.float32)

    def worded(self, triton: TritonClient, text: str, weight: float = DEFAULT_TEXT_WEIGHT) -> Wording:
        """A question's text.

        Raises:
            UsageError: It says nothing, says too much, or the weight is none.
            InferenceError: Triton cannot serve.
        """
        if not 0.0 <= weight <= 1.0:  # nor is NaN
            raise UsageError(
                "a weight that does not weigh text against film", expected="0 to 1", got=str(weight), next_step="correct --text-weight"
            )
        if not text.strip() or len(text) > MOST_CHARACTERS:
            raise UsageError(
                "no such question",
                expected=f"words such as 'bilateral ground glass, no effusion', at most {MOST_CHARACTERS} characters",
                got=f"{len(text)} characters" if text.strip() else "nothing",
                next_step="correct --text",
            )
        return Wording(self.vectors(triton, [text])[0], weight)


@dataclass(frozen=True, repr=False)
class TextAnswer:
    """The answer to a text without a film: cases, nearest first, and what their labels say by weight of similarity.

    No film was looked at, so nothing was refused, and how far to trust the shares has not been measured.
    """

    model_version: str
    text: str
    match: Match
    prediction: Vote
    neighbours: tuple[Neighbour, ...]
    timings_ms: Mapping[str, float]
    warnings: tuple[str, ...] = ()

    @property
    def summary(self) -> Summary:
        """What is known of the neighbours."""
        return summarise(hit.case for hit in self.neighbours)

    def __repr__(self) -> str:
        """In short, and without ids of cases: a notebook keeps it."""
        said = f"{self.prediction.label}, share {self.prediction.confidence:.2f}"
        return f"<TextAnswer: {said}, {len(self.neighbours)} neighbours, model {self.model_version}>"

    def as_json(self) -> dict[str, Any]:
        """The published JSON form of a query result, `image_id` null, and the question beside it."""
        findings = self.prediction.findings
        return {
            "image_id": None,
            "text": self.text,
            "match": self.match.value,
            "model_version": self.model_version,
            "prediction": {
                "label": self.prediction.label,
                "confidence": self.prediction.confidence,
                "scores": dict(self.prediction.scores),
                **({"findings": dict(findings)} if findings else {}),
                "calibrated": None,
                "set": None,
                "abstained": None,
            },
            "neighbours": [{"rank": rank, **hit.as_json()} for rank, hit in enumerate(self.neighbours, start=1)],
            "summary": self.summary.as_json(),
            "timings_ms": {name: round(value, 2) for name, value in self.timings_ms.items()},
            "warnings": list(self.warnings),
            "ood": {"score": None, "refused": False, "reason": None},
        }


def query_text(
    text: str,
    reader: ReportReader,
    triton: TritonClient,
    store: Store,
    *,
    top_k: int = DEFAULT_K,
    where: Clause | None = None,
    match: Match = Match.film,
) -> TextAnswer:
    """The cases whose films (or reports) are most like a text.

    Raises:
        UsageError: The gallery is of another space, no case is left, or it is no question (`ReportReader.worded`).
        InferenceError, StoreError: Triton or Milvus cannot serve.
    """
    if store.space is not REPORTS:
        raise UsageError(
            "this gallery cannot be asked in words",
            expected=f"one of the space {REPORTS.name.value}",
            got=store.space.name.value,
            next_step="`cxr ingest --space reports`, on a server with a multimodal network",
        )
    started = time.perf_counter()
    vector = reader.worded(triton, text).vector
    asked = time.perf_counter()
    hits = store.search(store.space.question({IMAGE_VECTOR.name: vector}, match), top_k, where or Clause("", ""))
    searched = time.perf_counter()
    if not hits:
        raise UsageError("no case to compare with", expected="at least one that meets --where", next_step="relax --where, ingest cases")
    few = [f"only {len(hits)} of {top_k} neighbours: the gallery holds no more that qualify"] if len(hits) < top_k else []
    return TextAnswer(
        store.model_version,
        text,
        match,
        weighted_vote([(hit.case.label, hit.similarity) for hit in hits]),
        tuple(hits),
        {"infer": 1000 * (asked - started), "search": 1000 * (searched - asked), "total": 1000 * (searched - started)},
        tuple(few),
    )
