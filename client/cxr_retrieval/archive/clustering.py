"""A gallery's cases → clusters, kept with it: `cxr cluster`.

A clustering is in force once all its cases have their label and the gallery keeps what is known of the clusters, and not before: the
former one is out of force from the first label that is written. Ingest nothing meanwhile: rows are read, and written back with a label.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval import __version__
from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.archive.watching import Expected, Settled
from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.aliases import PREFIX
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE
from cxr_retrieval.gallery.communities import DEFAULT_NEIGHBOURS, DEFAULT_SEEDS, communities, graph, library
from cxr_retrieval.gallery.projection import Nearest
from cxr_retrieval.gallery.store import CLUSTERS, Store, of_run
from cxr_retrieval.retrieval.clusters import Clustering, Growing, as_text, clustered, require

_AT_ONCE: Final = 200
"""Cases whose nearest are asked for in one call."""
_WRITTEN: Final = 500
"""Cases whose labels are written between two looks at `stop`."""

Vectors = NDArray[np.float32]
Edges = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""As `communities.graph` takes them."""
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Found:
    """Clusters that are not kept yet.

    Attributes:
        of: Key → label of its cluster, and its strength.
        vectors: Key → the vector by which it belongs there.
    """

    clustering: Clustering
    of: dict[str, tuple[str, float]]
    vectors: dict[str, Vectors]


def find_clusters(
    store: Store, patience: Patience, advance: Advance = lambda _: None, *, k: int = DEFAULT_NEIGHBOURS, seeds: int = DEFAULT_SEEDS
) -> Found | None:
    """Finds the `k` nearest of each case, and communities in the graph of these; changes nothing.

    Args:
        patience: How long Milvus is waited for; its `stop` ends this early.
        advance: Told of each case whose nearest are known.

    Returns:
        None if it was stopped.

    Raises:
        UsageError: Too few cases, too many clusters, or a gallery made before there were any.
        SetupError: scikit-network is not installed.
        StoreError: Milvus cannot serve.
    """
    library()  # what is missing is said before the work begins
    store.refuse_without_clusters()
    keys, labels, vectors = patience.until("milvus", lambda: _cases(store), probe=store.probe)
    if len(keys) <= k:
        raise UsageError(
            "too few cases to cluster" if keys else "no case to cluster",
            expected=f"more than {k}, the nearest that each has edges to",
            got=str(len(keys)),
            next_step="ingest more" + (", or give fewer --neighbours" if len(keys) > 1 else ""),
        )
    patience.watch(Expected(len(keys)))
    try:
        edges = (_asked if store.has_index else _compared)(store, keys, vectors, k, patience, advance)
        found = graph(len(keys), *edges)
        parts = communities(found, seeds, lambda _: _unless(patience.stop))
    except InterruptedError:
        return None
    version = store.collection.removeprefix(PREFIX)
    about = {"version": __version__, "made": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "seeds": seeds}
    clustering = clustered(keys, labels, found, parts, model_version=version, k=k, about=about)
    strengths = found.sum(axis=1).tolist()
    of = {key: (clustering.label(number), strength) for key, number, strength in zip(keys, parts.of.tolist(), strengths, strict=True)}
    return Found(clustering, of, dict(zip(keys, vectors, strict=True)))


def keep_clusters(store: Store, found: Found, patience: Patience, advance: Advance = lambda _: None) -> bool:
    """Writes each case's label, and then puts the clustering in force; safe to repeat, as what has been written is not written again.

    Args:
        advance: Told of each case that has its label.

    Returns:
        Whether it is in force; not if it was stopped, and then none is.

    Raises:
        StoreError: Milvus cannot serve.
    """
    patience.until("milvus", lambda: store.keep({CLUSTERS: ""}), probe=store.probe)
    for keys in _chunks(iter(found.of)):
        if patience.stop.is_set():
            return False
        of, vectors = {key: found.of[key] for key in keys}, {key: found.vectors[key] for key in keys}
        patience.until("milvus", lambda of=of, vectors=vectors: store.assign(of, vectors), probe=store.probe)
        advance(len(keys))
    patience.until("milvus", lambda: _in_force(store, found.clustering), probe=store.probe)
    return True


@dataclass(frozen=True)
class Added:
    """New cases that have been put into clusters.

    Attributes:
        clustering: With them.
        cases: Cluster's number → how many came to it.
        whole: Whether all were; not if it was stopped, and then the others are in none yet.
    """

    clustering: Clustering
    cases: dict[int, int]
    whole: bool


def add_new(store: Store, patience: Patience, advance: Advance = lambda _: None, *, dry_run: bool = False) -> Added:
    """Puts the cases that are in no cluster, in order of key, each into the one that gains most weighted modularity by its edges to the `k`
    nearest cases that are in one by then. No other case changes.

    Args:
        dry_run: Write nothing; then no case draws one that comes after it.

    Raises:
        UsageError: The gallery has no clusters.
        StoreError: Milvus cannot serve.
    """
    clustering = require(store.clusters)
    new = patience.until("milvus", lambda: _unplaced(store, clustering), probe=store.probe)
    patience.watch(Expected(len(new)))
    growing, cases, run = Growing(clustering), dict[int, int](), of_run(clustering.run)
    for keys in _chunks(iter(new)):
        if patience.stop.is_set():
            return Added(growing.now(), cases, whole=False)
        labels, vectors = patience.until("milvus", lambda keys=keys: _told(store, keys), probe=store.probe)
        there = [key for key in keys if key in vectors]
        asked = np.array([vectors[key] for key in there], np.float32).reshape(len(there), -1)
        nearest = [
            hits
            for start in range(0, len(there), _AT_ONCE)
            for hits in patience.until(
                "milvus", lambda some=asked[start : start + _AT_ONCE]: store.nearest(some, clustering.k, run), probe=store.probe
            )
        ]
        of: dict[str, tuple[str, float]] = {}
        for key, hits in zip(there, nearest, strict=True):
            placed = [(number, hit.similarity) for hit in hits if (number := clustering.number(hit.cluster)) is not None]
            number, strength = growing.take(labels[key], placed)
            of[key] = clustering.label(number), strength
            cases[number] = cases.get(number, 0) + 1
        if not dry_run:
            patience.until("milvus", lambda of=of, vectors=vectors: store.assign(of, vectors), probe=store.probe)
            patience.until("milvus", lambda: store.keep({CLUSTERS: as_text(growing.now())}), probe=store.probe)
        advance(len(keys))
        patience.watch(Settled({"assigned": len(there)}))
    if new and not dry_run:
        patience.until("milvus", store.publish, probe=store.probe)
    return Added(growing.now(), cases, whole=True)


def _cases(store: Store) -> tuple[list[str], list[str], Vectors]:
    """Keys, labels and vectors `[n, size]` of all cases, in order of key."""
    rows = store.rows(["key", "label", "embedding"])
    held = sorted(((str(row["key"]), str(row["label"]), np.array(row["embedding"], np.float32)) for row in rows), key=lambda one: one[0])
    return [key for key, _, _ in held], [label for _, label, _ in held], np.array([vector for _, _, vector in held], np.float32)


def _told(store: Store, keys: Sequence[str]) -> tuple[dict[str, str], dict[str, Vectors]]:
    rows = store.rows_of(keys)
    return {key: str(row["label"]) for key, row in rows.items()}, {key: np.array(row["embedding"], np.float32) for key, row in rows.items()}


def _unplaced(store: Store, clustering: Clustering) -> list[str]:
    return sorted(key for key, label in store.assigned() if clustering.number(label) is None)


def _in_force(store: Store, clustering: Clustering) -> None:
    store.publish()
    store.keep({CLUSTERS: as_text(clustering)})


def _asked(store: Store, keys: Sequence[str], vectors: Vectors, k: int, patience: Patience, advance: Advance) -> Edges:
    """By the index of a Milvus server, so many cases at a call."""
    numbers = {key: number for number, key in enumerate(keys)}
    edges: list[tuple[int, int, float]] = []
    for start in range(0, len(keys), _AT_ONCE):
        _unless(patience.stop)
        some = vectors[start : start + _AT_ONCE]
        nearest = patience.until("milvus", lambda some=some: store.nearest(some, k + 1), probe=store.probe)
        for case, hits in enumerate(nearest, start):
            others = [hit for hit in hits if hit.key != keys[case]][:k]
            edges += [(case, numbers[hit.key], hit.similarity) for hit in others if hit.key in numbers]  # the rest has been stored since
        advance(len(some))
        patience.watch(Settled({"compared": len(some)}))
    cases, others, similarities = zip(*edges, strict=True)
    return np.array(cases, np.int64), np.array(others, np.int64), np.array(similarities)


def _compared(store: Store, keys: Sequence[str], vectors: Vectors, k: int, patience: Patience, advance: Advance) -> Edges:
    """By comparing each with all, here; Milvus Lite would, too, one case after the other."""

    def told(count: int) -> None:
        advance(count)
        patience.watch(Settled({"compared": count}))
        _unless(patience.stop)

    alike = store.space.comparable(vectors, DEFAULT_BALANCE)
    nearest = Nearest.of(alike, alike, k, told, themselves=True)
    return np.repeat(np.arange(len(keys)), k), nearest.numbers.ravel(), nearest.similarities.ravel().astype(np.float64)


def _chunks(keys: Iterator[str]) -> Iterator[list[str]]:
    while some := list(islice(keys, _WRITTEN)):
        yield some


def _unless(stop: threading.Event) -> None:
    if stop.is_set():
        raise InterruptedError
