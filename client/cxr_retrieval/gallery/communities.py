"""Cases as a graph of similar ones, and communities in it of high weighted modularity (Haq et al. 2020, sections 2.2 and 2.3).

An edge joins two cases of which one is among the other's nearest; its weight w is their similarity, or 0 where that is negative. With the
strength of a case, s_i = Σ_j w_ij, and m the sum of all weights, weighted modularity (Newman 2004) is

    Q = 1/(2m) · Σ_ij (w_ij − s_i·s_j / 2m) · [c_i = c_j]

The paper joins communities by the greedy method of Clauset et al. 2004 (CNM). Here it is Louvain's (Blondel et al. 2008), of
scikit-network, which the extra `cluster` installs: it finds more modularity in less time (docs/clusters.md), and begins with the cases in
an order drawn by chance, so that several runs show how far the communities are chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.errors import SetupError

DEFAULT_NEIGHBOURS: Final = 10
"""Of each case, that it has edges to."""
DEFAULT_SEEDS: Final = 5
_TOLERANCE: Final = 1e-6
"""Modularity that a further pass must gain."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Communities:
    """Of the runs with several seeds the one of most modularity.

    Attributes:
        of: Each case's community `[n]`, numbered from 0, the largest first.
        modularities: Q of each run, in order of seed.
        agreements: Adjusted Rand index of each two runs, 1 for the same communities, about 0 for chance; none of a single run.
    """

    of: Integers
    modularities: tuple[float, ...]
    agreements: tuple[float, ...]


def graph(count: int, cases: Integers, others: Integers, similarities: Floats) -> Any:
    """The weights, a symmetric SciPy CSR array `[count, count]` with an empty diagonal.

    Args:
        cases, others: `[e]`, numbers of the two ends of each edge; an edge may come from both ends.
        similarities: `[e]`, in [−1, 1].

    Raises:
        SetupError: As `library`.
    """
    sparse, _ = library()
    meant = (similarities > 0) & (cases != others)
    one_way = sparse.coo_array((similarities[meant], (cases[meant], others[meant])), shape=(count, count)).tocsr()
    return one_way.maximum(one_way.T).tocsr()


def modularity(weights: Any, of: Integers) -> float:
    """Q of communities `[n]`; 0 for a graph without edges."""
    total = float(weights.sum())
    if not total:
        return 0.0
    edges = weights.tocoo()
    inside = float(edges.data[of[edges.row] == of[edges.col]].sum())
    strengths = np.bincount(of, weights.sum(axis=1))
    return inside / total - float(((strengths / total) ** 2).sum())


def gain(weight: float, strength: float, other: float, total: float) -> float:
    """ΔQ of joining two sets of cases that have been apart.

    Args:
        weight: Of all edges between them.
        strength, other: Sums of the strengths of each.
        total: m, the weight of all edges of the graph.
    """
    return weight / total - strength * other / (2.0 * total**2)


def communities(weights: Any, seeds: int = DEFAULT_SEEDS, advance: Callable[[int], None] = lambda _: None) -> Communities:
    """Runs Louvain's method with the seeds 0 to `seeds − 1`; the same graph gives the same communities.

    Args:
        weights: As `graph` gives them.
        advance: Told of each run that has ended; may raise, which ends the others.
    """
    runs: list[Integers] = []
    for seed in range(seeds):
        runs.append(_numbered(_louvain(weights, seed)))
        advance(1)
    found = tuple(modularity(weights, run) for run in runs)
    best = max(range(seeds), key=lambda run: (found[run], -run))
    return Communities(runs[best], found, tuple(adjusted_rand(one, other) for one, other in combinations(runs, 2)))


def adjusted_rand(one: Integers, other: Integers) -> float:
    """Adjusted Rand index of two ways to part the same cases (Hubert and Arabie 1985)."""
    if len(one) < 2:
        return 1.0
    pairs = _pairs(np.unique(np.stack([one, other]), axis=1, return_counts=True)[1])
    ours, theirs = (_pairs(np.unique(side, return_counts=True)[1]) for side in (one, other))
    by_chance = ours * theirs / _pairs(np.array([len(one)]))
    most = (ours + theirs) / 2
    return 1.0 if most == by_chance else (pairs - by_chance) / (most - by_chance)


def between(weights: Any, of: Integers) -> Any:
    """Weights of all edges between communities, CSR `[c, c]`; within one they count twice, on the diagonal."""
    sparse, _ = library()
    edges = weights.tocoo()
    size = int(of.max(initial=-1)) + 1
    return sparse.coo_array((edges.data, (of[edges.row], of[edges.col])), shape=(size, size)).tocsr()


def _louvain(weights: Any, seed: int) -> Integers:
    if not weights.nnz:
        return np.arange(weights.shape[0])
    sparse, louvain = library()
    method = louvain(
        modularity="newman",
        tol_optimization=_TOLERANCE,
        tol_aggregation=_TOLERANCE,
        shuffle_nodes=True,
        sort_clusters=False,
        return_probs=False,
        return_aggregate=False,
        random_state=seed,
    )
    return np.asarray(method.fit_predict(sparse.csr_matrix(weights)), np.int64)


def _numbered(of: Integers) -> Integers:
    """The largest first, equally large ones in the order of their first cases."""
    _, first, inverse, counts = np.unique(of, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.arange(len(order))
    return numbers[inverse]


def _pairs(counts: Sequence[int] | Integers) -> float:
    sizes = np.asarray(counts, np.float64)
    return float((sizes * (sizes - 1) / 2).sum())


def library() -> tuple[Any, Any]:
    """SciPy's sparse arrays and scikit-network's Louvain, loaded when they are first needed.

    Raises:
        SetupError: scikit-network is not installed.
    """
    try:
        from scipy import sparse
        from sknetwork.clustering import Louvain
    except ImportError as error:
        raise SetupError(
            "a gallery cannot be clustered here",
            expected="the package scikit-network",
            got=str(error),
            next_step="pip install 'cxr-retrieval[cluster]'",
        ) from error
    return sparse, Louvain
