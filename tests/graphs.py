"""Graphs of made-up cases: vectors in clumps, and edges to the nearest."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.gallery.communities import graph

Vectors = NDArray[np.float64]


def clumps(count: int, parts: int, *, spread: float, seed: int = 0, size: int = 20) -> tuple[Vectors, NDArray[np.int64]]:
    """Unit vectors `[count, size]` about so many centres, and which centre each is about."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(parts, size))
    of = random.integers(parts, size=count)
    vectors = centres[of] + spread * random.normal(size=(count, size))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), of


def nearest_graph(vectors: Vectors, k: int) -> Any:
    """Weights of the graph in which each has edges to its `k` nearest."""
    alike = vectors @ vectors.T
    np.fill_diagonal(alike, -np.inf)
    others = np.argsort(-alike, axis=1, kind="stable")[:, :k]
    cases = np.repeat(np.arange(len(vectors)), k)
    return graph(len(vectors), cases, others.ravel(), alike[cases, others.ravel()])


def drawn(count: int, parts: int, *, spread: float, k: int = 10) -> tuple[Any, NDArray[np.int64]]:
    """Such a graph, and its parts."""
    vectors, of = clumps(count, parts, spread=spread)
    return nearest_graph(vectors, k), of


def networkx_of(weights: Any) -> Any:
    """The same graph for networkx."""
    return nx.from_scipy_sparse_array(weights)
