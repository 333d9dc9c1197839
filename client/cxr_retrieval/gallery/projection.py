"""Embeddings as points in the plane, near each other where the embeddings are: t-SNE (van der Maaten and Hinton 2008) by openTSNE, which
the extra `map` installs.

Its gradient is that of Barnes and Hut for few cases, interpolated by FFT (Linderman et al. 2019) for many, so that 50,000 take minutes
on one core. It begins at the first two principal components, which keeps in their places what lies far apart (Kobak and Berens 2019), and
draws nothing by chance: the same embeddings in the same order give the same points, to the bit on one machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.errors import SetupError
from cxr_retrieval.gallery.milvus import one_blas_thread

Floats = NDArray[np.float32]
Advance = Callable[[int], None]
"""Is told how many more cases are done; may raise, which ends what is under way."""

PERPLEXITY: Final = 30
"""About how many cases each is drawn to."""
NEIGHBOURS: Final = 3 * PERPLEXITY
"""As many of each case's nearest count; others draw it by less than they can be told from nothing."""
_EARLY_STEPS: Final = 250
_STEPS: Final = 250
_EARLY_EXAGGERATION: Final = 12
_TOLD_EVERY: Final = 10
"""Steps."""
_BY_TREE: Final = 3000
"""Cases up to which Barnes and Hut are faster."""
_FEWEST: Final = 4
"""Cases that a layout is worth; fewer lie as their principal components say."""
_SMALL: Final = 1e-4
"""How far apart the points are where they begin; t-SNE wants it so."""
_ROWS: Final = 512
"""Compared at once with all others: 100 MB for 50,000."""


@dataclass(frozen=True)
class Nearest:
    """Of each case the `k` others that are most like it, nearest first: their numbers `[n, k]` and cosine similarities `[n, k]`."""

    numbers: NDArray[np.int64]
    similarities: Floats

    @staticmethod
    def of(queries: Floats, among: Floats, k: int, advance: Advance = lambda _: None, *, themselves: bool = False) -> Nearest:
        """By comparing each with all; of equally near ones the first.

        Args:
            queries: `[m, d]`, unit length.
            among: `[n, d]`, unit length.
            themselves: Both are the same cases, of which none counts for itself.
        """
        numbers = np.empty((len(queries), k), np.int64)
        similarities = np.empty((len(queries), k), np.float32)
        for start in range(0, len(queries), _ROWS):
            own = np.arange(start, min(start + _ROWS, len(queries)))
            with one_blas_thread():  # the work is finding the first, not the product
                alike = queries[own] @ among.T
            if themselves:
                alike[own - start, own] = -np.inf
            numbers[own], similarities[own] = _first(alike, k)
            advance(len(own))
        return Nearest(numbers, similarities)


def _first(alike: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
    some = np.sort(np.argpartition(-alike, min(k, alike.shape[1] - 1), axis=1)[:, :k], axis=1)
    found = np.take_along_axis(alike, some, 1)
    order = np.argsort(-found, axis=1, kind="stable")
    return np.take_along_axis(some, order, 1), np.take_along_axis(found, order, 1)


def project(vectors: Floats, nearest: Nearest, advance: Advance = lambda _: None) -> Floats:
    """Points `[n, 2]`, the farthest of them at a distance of 1 from the middle in x or y.

    Args:
        vectors: `[n, d]`, unit length.
        nearest: Of each, NEIGHBOURS others or all there are.

    Raises:
        SetupError: openTSNE is not installed.
    """
    count = len(vectors)
    points = _principal(vectors)
    if count >= _FEWEST:
        tsne, affinity, neighbours = _library()
        distances = np.sqrt(np.maximum(2 - 2 * nearest.similarities.astype(np.float64), 0))
        given = neighbours.PrecomputedNeighbors(nearest.numbers, distances)
        perplexity = min(PERPLEXITY, nearest.numbers.shape[1] / 3)
        attraction = affinity.PerplexityBasedNN(knn_index=given, perplexity=perplexity, n_jobs=1, random_state=0)
        method = "bh" if count <= _BY_TREE else "fft"
        drawn: Any = tsne.TSNEEmbedding(points, attraction, negative_gradient_method=method, n_jobs=1, random_state=0)
        done = _Told(count, advance)
        how = {"inplace": True, "learning_rate": "auto", "callbacks": [done], "callbacks_every_iters": _TOLD_EVERY}
        drawn.optimize(_EARLY_STEPS, exaggeration=_EARLY_EXAGGERATION, momentum=0.5, **how)
        drawn.optimize(_STEPS, momentum=0.8, **how)
        points = np.asarray(drawn, np.float64)
        done.rest()
    else:
        advance(count)
    points = points - (points.max(axis=0, initial=0) + points.min(axis=0, initial=0)) / 2
    return (points / max(float(np.abs(points).max(initial=0)), 1e-12)).astype(np.float32)


def place(points: Floats, nearest: Nearest, weights: Floats) -> Floats:
    """Where further cases lie `[m, 2]`: at the mean of their nearest ones' points, by weight `[m, k]`."""
    shares = weights / weights.sum(axis=1, keepdims=True)
    return np.einsum("mk,mkc->mc", shares, points[nearest.numbers]).astype(np.float32)


class _Told:
    """Counts steps as cases, so that all steps come to all cases."""

    def __init__(self, count: int, advance: Advance) -> None:
        self._count, self._advance = count, advance
        self._steps = self._cases = 0

    def __call__(self, step: int, error: float, embedding: object) -> bool:
        self._steps += _TOLD_EVERY
        self._to(min(self._count, self._count * self._steps // (_EARLY_STEPS + _STEPS)))
        return False

    def rest(self) -> None:
        self._to(self._count)

    def _to(self, cases: int) -> None:
        self._advance(cases - self._cases)
        self._cases = cases


def _principal(vectors: Floats) -> NDArray[np.float64]:
    """The first two principal components, small, and not two cases at the very same place: equal ones would never part."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64, keepdims=True) if len(vectors) else np.zeros((0, 2))
    _, axes = np.linalg.eigh(centred.T @ centred)
    two = axes[:, :-3:-1]
    two = two * np.sign(two[np.abs(two).argmax(axis=0), [0, 1]])
    points = centred @ two
    spread = float(points[:, 0].std()) if len(points) else 0.0
    nudged = np.random.default_rng(0).normal(size=points.shape)
    return _SMALL * (points / max(spread, 1e-12) + 0.01 * nudged)


def _library() -> tuple[Any, Any, Any]:
    try:
        import openTSNE
        from openTSNE import affinity, nearest_neighbors
    except ImportError as error:
        raise SetupError(
            "a map cannot be computed here",
            expected="the package openTSNE",
            got=str(error),
            next_step="pip install 'cxr-retrieval[map]'",
        ) from error
    return openTSNE, affinity, nearest_neighbors
