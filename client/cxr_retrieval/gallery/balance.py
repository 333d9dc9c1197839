"""Semantic against visual: how what was learnt and what lungs look like become one similarity.

A film has two vectors of unit length, EMBEDDING e, learnt from labels, and APPEARANCE a, found without them. At a balance b the
similarity of two films is

    (1 − b) · cos(e, e′) + b · cos(a, a′)

in [−1, 1]: 0 asks for what was learnt alone, 1 for appearance alone. A gallery keeps [e′ ; a′] in one field; asked with
[(1 − b)·e ; b·a] it finds just this by one inner product, whatever the balance (docs/balance.md, also on Milvus' `hybrid_search`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.contract import APPEARANCE, APPEARANCE_SIZE, EMBEDDING, EMBEDDING_SIZE
from cxr_retrieval.errors import UsageError

DEFAULT_BALANCE: Final = 0.25
"""How it was chosen: docs/balance.md. Calibrated confidence and the gate's distance hold for it alone."""
PARTS: Final = (EMBEDDING, APPEARANCE)
"""What of a film is compared, in the order in which both stand side by side."""
VECTOR_SIZE: Final = EMBEDDING_SIZE + APPEARANCE_SIZE
_SHORTEST: Final = 1e-12

Vectors = NDArray[np.float32]
Float = TypeVar("Float", np.float32, np.float64)


class Likeness(NamedTuple):
    """Of two films, in [−1, 1]: as they are compared, and the cosine similarities of both parts."""

    similarity: float
    semantic: float
    visual: float


def checked(balance: float) -> float:
    """The balance itself.

    Raises:
        UsageError: Not in [0, 1].
    """
    if not 0.0 <= balance <= 1.0:  # nor is NaN
        raise UsageError(
            "a balance that does not weigh one against the other",
            expected="0 (what was learnt from labels alone) to 1 (what lungs look like alone)",
            got=str(balance),
            next_step="correct --balance",
        )
    return balance


def side_by_side(outputs: Mapping[str, NDArray[np.generic]]) -> Vectors:
    """`[…, 120]` of Triton's answer (EMBEDDING `[…, 64]`, APPEARANCE `[…, 56]`); each part has unit length."""
    return np.concatenate([_of_unit_length(np.asarray(outputs[part.name], np.float32)) for part in PARTS], axis=-1)


def halves(vectors: NDArray[Float]) -> tuple[NDArray[Float], NDArray[Float]]:
    """EMBEDDING `[…, 64]` and APPEARANCE `[…, 56]` of `[…, 120]`."""
    return vectors[..., :EMBEDDING_SIZE], vectors[..., EMBEDDING_SIZE:]


def blended(embeddings: Vectors, appearances: Vectors, balance: float) -> Vectors:
    """Both side by side, so weighed that the inner product of two is their similarity at this balance; of unit length."""
    return np.concatenate([math.sqrt(1.0 - checked(balance)) * embeddings, math.sqrt(balance) * appearances], axis=-1, dtype=np.float32)


def comparable(vectors: Vectors, balance: float) -> Vectors:
    """`blended` of `[…, 120]`: for exact comparison of many with many."""
    return blended(*halves(vectors), balance)


def weighed(vectors: Vectors, balance: float) -> Vectors:
    """What a gallery is asked with for `[…, 120]`: its inner products with what is stored are similarities at this balance."""
    embedding, appearance = halves(vectors)
    return np.concatenate([(1.0 - checked(balance)) * embedding, balance * appearance], axis=-1, dtype=np.float32)


def likeness(query: Vectors, stored: Vectors, balance: float) -> Likeness:
    """Of what is asked `[120]` with a film `[120]`; what marks have moved (`retrieval/feedback.py`) has no parts of unit length."""
    asked, given = query.astype(np.float64), stored.astype(np.float64)
    products = [float(a @ b) for a, b in zip(halves(asked), halves(given), strict=True)]
    lengths = [math.sqrt(float(a @ a) * float(b @ b)) for a, b in zip(halves(asked), halves(given), strict=True)]
    semantic, visual = (_within(product / max(length, _SHORTEST)) for product, length in zip(products, lengths, strict=True))
    return Likeness(_within((1.0 - balance) * products[0] + balance * products[1]), semantic, visual)


def _of_unit_length(vectors: Vectors) -> Vectors:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _SHORTEST)


def _within(similarity: float) -> float:
    return min(1.0, max(-1.0, similarity))
