"""By which vectors the films of a gallery are compared: each gallery is of one space.

    film       EMBEDDING and APPEARANCE of the ensemble, at a balance (`balance.py`); of every server
    findings   FINDING_FEATURES of a multi-label network (Haq et al. 2020), where one is served
    reports    IMAGE_VECTOR and TEXT_VECTOR of a multimodal network (Yu et al. 2021), in one subspace, where one is served

A case of the third has both side by side, and a last number that says whether it lacks a report: [i ; t ; 0] or [i ; 0 ; 1]. All stored
vectors of a space are equally long, so that Milvus' cosine ranks as an inner product does, and a question weighs their parts as it likes:
Milvus' `hybrid_search` would fuse the best of two lists, which misses what is second in both (docs/balance.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.contract import (
    FINDING_FEATURE_SIZE,
    FINDING_FEATURES,
    IMAGE_VECTOR,
    MULTILABEL_MODEL,
    MULTIMODAL_IMAGE_MODEL,
    SUBSPACE_SIZE,
    TEXT_VECTOR,
    TensorSpec,
)
from cxr_retrieval.gallery import balance as film
from cxr_retrieval.gallery.balance import Likeness
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.settings import Match, SpaceName

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Space:
    """A space of one part.

    Attributes:
        outputs: What Triton is asked for of a film.
        model: Whose outputs they are; "": the ensemble's.
        size: Numbers of a stored vector.
        parts: Of unit length each, that it consists of.
    """

    name: SpaceName
    model: str
    outputs: tuple[TensorSpec, ...]
    size: int
    parts: int = 1

    def version(self, triton: TritonClient) -> str:
        """Under which a gallery of what this server computes is kept: the ensemble's model version, or one of the further model.

        Raises:
            InferenceError: It serves no such model.
        """
        return f"{self.name.value}_{triton.version_of(self.model)}" if self.model else triton.model_version

    @property
    def length(self) -> float:
        """Of every stored vector (L2)."""
        return math.sqrt(self.parts)

    def vector(self, outputs: Mapping[str, NDArray[np.generic]]) -> Vectors:
        """What is stored of a film, `[…, size]`, of Triton's answer."""
        found = np.asarray(outputs[self.outputs[0].name], np.float32)
        return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)

    def question(self, outputs: Mapping[str, NDArray[np.generic]], match: Match = Match.film) -> Vectors:
        """What is asked with a film, `[…, size]`. `match`: which side of the cases is compared, where they have two."""
        del match
        return self.vector(outputs)

    def as_question(self, vectors: Vectors) -> Vectors:
        """Of stored vectors: what is asked for films like these."""
        return vectors

    def asked(self, vectors: Vectors, balance: float) -> Vectors:
        """Of questions, what a gallery is asked with: its inner products with stored vectors are similarities."""
        del balance
        return vectors

    def comparable(self, vectors: Vectors, balance: float) -> Vectors:
        """Of stored vectors, such that the inner product of two is their similarity."""
        del balance
        return vectors

    def likeness(self, query: Vectors, stored: Vectors, balance: float) -> Likeness:
        """Of a question with a film; of a space that has no parts to balance all three are one number."""
        del balance
        similarity = min(1.0, max(-1.0, float(query.astype(np.float64) @ stored.astype(np.float64))))
        return Likeness(similarity, similarity, similarity)


class _FilmSpace(Space):
    """`balance.py`."""

    def vector(self, outputs: Mapping[str, NDArray[np.generic]]) -> Vectors:
        return film.side_by_side(outputs)

    def asked(self, vectors: Vectors, balance: float) -> Vectors:
        return film.weighed(vectors, balance)

    def comparable(self, vectors: Vectors, balance: float) -> Vectors:
        return film.comparable(vectors, balance)

    def likeness(self, query: Vectors, stored: Vectors, balance: float) -> Likeness:
        return film.likeness(query, stored, balance)


class _ReportSpace(Space):
    """Films and texts in one subspace."""

    def vector(self, outputs: Mapping[str, NDArray[np.generic]]) -> Vectors:
        """TEXT_VECTOR is among the outputs if there is a report."""
        image = np.asarray(outputs[IMAGE_VECTOR.name], np.float32)
        lacks = np.ones((*image.shape[:-1], 1), np.float32)
        if TEXT_VECTOR.name in outputs:
            return np.concatenate([image, np.asarray(outputs[TEXT_VECTOR.name], np.float32), 0 * lacks], axis=-1)
        return np.concatenate([image, np.zeros_like(image), lacks], axis=-1)

    def question(self, outputs: Mapping[str, NDArray[np.generic]], match: Match = Match.film) -> Vectors:
        """IMAGE_VECTOR against the cases' films; or against their reports, where those that have none come last."""
        asked = np.asarray(outputs[IMAGE_VECTOR.name], np.float32)
        nothing, last = np.zeros_like(asked), np.zeros((*asked.shape[:-1], 1), np.float32)
        return np.concatenate([asked, nothing, last] if match is Match.film else [nothing, asked, last - 1], axis=-1)

    def as_question(self, vectors: Vectors) -> Vectors:
        return np.concatenate([vectors[..., :SUBSPACE_SIZE], np.zeros_like(vectors[..., SUBSPACE_SIZE:])], axis=-1)

    def comparable(self, vectors: Vectors, balance: float) -> Vectors:
        """By their films alone: not every case has a report."""
        del balance
        return vectors[..., :SUBSPACE_SIZE]


FILM: Final = _FilmSpace(SpaceName.film, "", film.PARTS, film.VECTOR_SIZE, len(film.PARTS))
FINDINGS: Final = Space(SpaceName.findings, MULTILABEL_MODEL, (FINDING_FEATURES,), FINDING_FEATURE_SIZE)
REPORTS: Final = _ReportSpace(SpaceName.reports, MULTIMODAL_IMAGE_MODEL, (IMAGE_VECTOR,), 2 * SUBSPACE_SIZE + 1, 2)
SPACES: Final[Mapping[SpaceName, Space]] = {space.name: space for space in (FILM, FINDINGS, REPORTS)}
