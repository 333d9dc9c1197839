"""What clusters give and cost beside plain nearest neighbours: label sets in common, vectors compared, time. Run by hand:

    PYTHONPATH=tests python tests/benchmark/clusters.py [SIZE...]
    PYTHONPATH=tests python tests/benchmark/clusters.py --real FOLDER MANIFEST
    PYTHONPATH=tests python tests/benchmark/clusters.py --gallery lite|server SIZE...

In the first two forms everything runs in this process, on one thread: numpy compares with all, FAISS's HNSW (with the parameters of a gallery on a Milvus server)
finds the nearest, and `retrieval/clusters.py` grows the regions, asking both as it would ask Milvus. The second form takes a run's vectors,
`vectors-train.npz` as the gallery and `vectors-val.npz` as the queries: of `cxr train embedder`, with `label|raw_finding` of a manifest as
label sets, or of `cxr train multilabel`, with `label`. The third
puts the mixture into a gallery on Milvus Lite or a Milvus server, clusters it as `cxr cluster` does, and asks for ten cases of each query.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import networkx as nx
import numpy as np
from galleries import milvus_server, synthetic_entries
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from cxr_retrieval.archive.clustering import find_clusters, keep_clusters
from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.cases.labels import SEPARATOR
from cxr_retrieval.cases.pseudonyms import open_pseudonyms
from cxr_retrieval.evaluation.gains import Gains, gains, label_sets
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, VECTOR_SIZE, comparable
from cxr_retrieval.gallery.communities import DEFAULT_NEIGHBOURS, Communities, communities, graph, modularity
from cxr_retrieval.gallery.projection import Nearest
from cxr_retrieval.gallery.store import Case, Clause, Neighbour, Store, within
from cxr_retrieval.retrieval.clusters import Clustering, clustered, grown, hits_wanted
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings
from vectors import with_unit_parts

K: Final = 50
"""Cases retrieved, as in table 1 of the paper."""
QUERIES: Final = 200
SEEDS: Final = 3
_LABELS: Final = tuple(f"finding {number:02d}" for number in range(13))
_SETS: Final = 60
_NOISE: Final = 1.3
_STRAY: Final = 0.15
"""Of the cases, that have the label set of another part than their vectors."""
_EXACT_GRAPH: Final = 20_000
"""Cases up to which a graph is made by comparing all with all; beyond, by HNSW, as a Milvus server would."""
_GREEDY: Final = 2_000
"""Cases up to which the greedy method of Clauset et al. is run."""
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class World:
    """A gallery and queries: vectors of unit length `[n, 120]` and `[q, 120]`, label sets, and patients."""

    vectors: Vectors
    labels: Sequence[str]
    patients: Sequence[str]
    queries: Vectors
    asked: Sequence[str]
    whose: Sequence[str]


def mixture(count: int, seed: int = 0) -> World:
    """As `drawn` has them, compared at the default balance."""
    vectors, labels = drawn(count + QUERIES, seed)
    alike, patients = comparable(vectors, DEFAULT_BALANCE), [str(number) for number in range(len(labels))]
    return World(alike[:count], labels[:count], patients[:count], alike[count:], labels[count:], patients[count:])


def drawn(count: int, seed: int = 0) -> tuple[Vectors, list[str]]:
    """Vectors `[count, 120]` and label sets: cases of 60 label sets of one to three findings out of 13: a finding is a direction, a set the sum of its findings and one of its own."""
    fixed = np.random.default_rng(1)
    directions = fixed.normal(size=(len(_LABELS), VECTOR_SIZE))
    sets = [fixed.choice(len(_LABELS), fixed.integers(1, 4), replace=False) for _ in range(_SETS)]
    centres = np.array([directions[list(one)].mean(axis=0) for one in sets]) + 0.5 * fixed.normal(size=(_SETS, VECTOR_SIZE))
    names = [SEPARATOR.join(_LABELS[number] for number in sorted(one)) for one in sets]
    random = np.random.default_rng((seed, count))
    of = random.integers(_SETS, size=count)
    parts = [_noisy(centres[of[start : start + 50_000]], random) for start in range(0, count, 50_000)]  # a million at once would be 1 GB
    told = np.where(random.random(count) < _STRAY, random.integers(_SETS, size=count), of)
    return np.concatenate(parts), [names[one] for one in told]


def _noisy(centres: NDArray[np.float64], random: np.random.Generator) -> Vectors:
    return with_unit_parts(centres + _NOISE * random.normal(size=centres.shape))


def real(folder: Path, manifest: Path) -> World:
    """Films as a run sees them."""
    with manifest.open(encoding="utf-8") as file:
        rows = {row["image_id"]: row for row in csv.DictReader(file)}

    def side(split: str) -> tuple[Vectors, list[str], list[str]]:
        with np.load(folder / f"vectors-{split}.npz") as file:
            held = dict(file)
        told = [rows[str(name)] for name in held["image_ids"]]
        whose = [f"{row['source']} {row['patient_id'] or row['image_id']}" for row in told]
        if "embedding" not in held:
            return held["features"], [row["label"].replace("control", "") for row in told], whose
        vectors = with_unit_parts(np.concatenate([held["embedding"], held["appearance"]], axis=1))
        labels = [SEPARATOR.join((row["label"], row["raw_finding"].strip('"').lower())) for row in told]
        return comparable(vectors, DEFAULT_BALANCE), labels, whose

    return World(*side("train"), *side("val"))


class Asked:
    """A gallery that answers, and counts the vectors that it compares."""

    def __init__(self, world: World) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        self._faiss: Any = faiss
        self.world = world
        self.compared = 0
        index: Any = faiss.IndexHNSWFlat(world.vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 256
        started = time.perf_counter()
        index.add(world.vectors)
        self.index_s = time.perf_counter() - started
        self._index = index
        self.of: NDArray[np.int64] = np.zeros(len(world.vectors), np.int64)
        self.strengths: NDArray[np.float64] = np.zeros(len(world.vectors))
        self.run = ""
        self._members: list[NDArray[np.int64]] = []
        self._parts: list[Vectors] = []

    def put(self, clustering: Clustering, found: Communities, weights: Any) -> None:
        """Cases into clusters, each cluster's vectors in one piece."""
        self.of, self.strengths, self.run = found.of, weights.sum(axis=1), clustering.run
        self._members = [np.flatnonzero(found.of == number) for number in range(len(clustering.clusters))]
        self._parts = [self.world.vectors[some] for some in self._members]
        self.means = np.array([part.mean(axis=0) for part in self._parts])

    def nearest(self, query: Vectors, limit: int) -> list[Neighbour]:
        """By HNSW."""
        self._index.hnsw.efSearch = max(128, 4 * limit)
        stats = self._faiss.cvar.hnsw_stats
        stats.reset()
        similarities, numbers = self._index.search(query[None], limit)
        self.compared += int(stats.ndis)
        return [self._hit(int(one), float(alike)) for one, alike in zip(numbers[0], similarities[0], strict=True) if one >= 0]

    def exact(self, query: Vectors, limit: int) -> list[Neighbour]:
        """By comparing with all."""
        return self._best(np.arange(len(self.world.vectors)), self.world.vectors, query, limit)

    def within(self, number: int, query: Vectors, limit: int) -> list[Neighbour]:
        """By comparing with all of a cluster."""
        return self._best(self._members[number], self._parts[number], query, limit)

    def _best(self, numbers: NDArray[np.int64], vectors: Vectors, query: Vectors, limit: int) -> list[Neighbour]:
        self.compared += len(vectors)
        alike = vectors @ query
        some = np.argpartition(-alike, limit - 1)[:limit] if limit < len(alike) else np.arange(len(alike))
        return [self._hit(int(numbers[one]), float(alike[one])) for one in some[np.argsort(-alike[some])]]

    def _hit(self, number: int, similarity: float) -> Neighbour:
        cluster = f"{self.run}:{self.of[number]}"
        key, label, patient = f"{number:x}", self.world.labels[number], self.world.patients[number]
        case = Case(key, key, label, patient, None, None, None, {}, "", "", None, cluster, float(self.strengths[number]))
        return Neighbour(case, similarity, similarity, similarity)


Method = Callable[[Vectors, str], Sequence[Neighbour]]


def methods(asked: Asked, clustering: Clustering) -> dict[str, Method]:
    """Name → query, its patient → cases of other patients, K of them."""
    random = np.random.default_rng(5)

    def others(hits: Sequence[Neighbour], whose: str) -> list[Neighbour]:
        return [hit for hit in hits if hit.case.patient_id != whose][:K]

    def by_chance(query: Vectors, whose: str) -> list[Neighbour]:
        return others([asked._hit(int(one), 0.0) for one in random.integers(len(asked.world.vectors), size=K + 10)], whose)  # pyright: ignore[reportPrivateUsage]

    def by_region(query: Vectors, whose: str) -> list[Neighbour]:
        def search(limit: int, among: str | None = None) -> Sequence[Neighbour]:
            number = clustering.number(among)
            return asked.nearest(query, limit) if number is None else asked.within(number, query, limit)

        hits = search(hits_wanted(clustering, K))
        return grown(hits, search, clustering, K, lambda case: case.patient_id == whose)[0]

    def by_mean(query: Vectors, whose: str) -> list[Neighbour]:
        asked.compared += len(asked.means)
        order, found = np.argsort(-(asked.means @ query)), list[Neighbour]()
        for number in order:
            found += others(asked.within(int(number), query, K + 10), whose)
            if len(found) >= K:
                break
        return found[:K]

    return {
        "random": by_chance,
        "exact": lambda query, whose: others(asked.exact(query, K + 10), whose),
        "HNSW": lambda query, whose: others(asked.nearest(query, K + 10), whose),
        "clusters (Algorithm 1)": by_region,
        "cluster of the nearest mean, not shipped": by_mean,
    }


def edges_of(asked: Asked) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """The nearest of each case, by comparing all or by HNSW."""
    vectors, k = asked.world.vectors, DEFAULT_NEIGHBOURS
    if len(vectors) <= _EXACT_GRAPH:
        nearest = Nearest.of(vectors, vectors, k, themselves=True)
        return np.repeat(np.arange(len(vectors)), k), nearest.numbers.ravel(), nearest.similarities.ravel().astype(np.float64)
    asked._index.hnsw.efSearch = 128  # pyright: ignore[reportPrivateUsage]
    similarities, numbers = asked._index.search(vectors, k + 1)  # pyright: ignore[reportPrivateUsage]
    cases = np.repeat(np.arange(len(vectors)), k + 1)
    return cases, np.maximum(numbers.ravel(), 0), np.where(numbers.ravel() < 0, 0, similarities.ravel()).astype(np.float64)


def measured(world: World) -> None:
    """Prints how the clusters came about, and a line for each method."""
    asked = Asked(world)
    started = time.perf_counter()
    weights = graph(len(world.vectors), *edges_of(asked))
    graph_s = time.perf_counter() - started
    started = time.perf_counter()
    found = communities(weights, SEEDS)
    louvain_s = (time.perf_counter() - started) / SEEDS
    keys = [f"{number:x}" for number in range(len(world.vectors))]
    clustering = clustered(keys, world.labels, weights, found, model_version="", k=DEFAULT_NEIGHBOURS, about={})
    asked.put(clustering, found, weights)
    modularities = ", ".join(f"{one:.4f}" for one in found.modularities)
    print(
        f"\n{len(world.vectors)} cases: {len(clustering.clusters)} clusters, modularity {modularities}, adjusted Rand index "
        f"{min(found.agreements):.3f} at least; HNSW built in {asked.index_s:.1f} s, graph in {graph_s:.1f} s, Louvain {louvain_s:.1f} s a run"
    )
    if len(world.vectors) <= _GREEDY:
        _greedy(weights)
    flags, names = label_sets([*world.labels, *world.asked])
    wanted, held = label_sets(world.asked, names)[0][:QUERIES], flags[: len(world.labels)]
    print(
        "| method | ACG | ACGp | precision | exact | average gain | vectors compared | ms a query | recall@50 |\n|---|---|---|---|---|---|---|---|---|"
    )
    nearest: list[set[str]] = []
    for name, ask in methods(asked, clustering).items():
        asked.compared = 0
        times: list[float] = []
        answers: list[Sequence[Neighbour]] = []
        for query, whose in zip(world.queries[:QUERIES], world.whose, strict=False):
            begun = time.perf_counter()
            answers.append(ask(query, whose))
            times.append(1000 * (time.perf_counter() - begun))
        keys_found = [{hit.case.key for hit in hits} for hits in answers]
        nearest = keys_found if name == "exact" else nearest
        recall = np.mean([len(one & all_) / K for one, all_ in zip(keys_found, nearest, strict=True)]) if nearest else 0.0
        told = gains(wanted, [held[[int(hit.case.key, 16) for hit in hits]] for hits in answers])
        print(_line(name, told, asked.compared / len(answers), statistics.median(times), float(recall)), flush=True)


def in_gallery(kind: str, size: int) -> None:
    """Prints how long clustering a gallery takes, and a query by the nearest and by clusters, as the store is asked."""
    with (
        tempfile.TemporaryDirectory(prefix="cxr-bench-") as folder,
        milvus_server() if kind == "server" else nullcontext((f"{folder}/gallery.db", 0)) as (uri, _),
        open_pseudonyms(PseudonymSettings(Path(folder) / "pseudonym.key"), create=True) as pseudonyms,
        Store(MilvusSettings(uri), "clusters", pseudonyms, create=True) as store,
    ):
        vectors, _ = drawn(size + QUERIES)
        for start in range(0, size, 5000):
            part = vectors[start : min(start + 5000, size)]
            store.upsert(synthetic_entries(start, len(part), pseudonyms), [""] * len(part), part)
        store.publish()
        patience = Patience(threading.Event(), 0)
        started = time.perf_counter()
        found = find_clusters(store, patience)
        assert found is not None
        found_s, started = time.perf_counter() - started, time.perf_counter()
        keep_clusters(store, found, patience)
        kept_s, clustering = time.perf_counter() - started, found.clustering
        times: dict[str, list[float]] = {"nearest": [], "clusters": []}
        for query in vectors[size : size + QUERIES // 2]:

            def search(limit: int, among: str | None = None, query: Vectors = query) -> Sequence[Neighbour]:
                return store.search(query, limit, within(Clause("", ""), among) if among else "")

            for name, times_of in times.items():
                begun = time.perf_counter()
                hits = search(12 if name == "nearest" else hits_wanted(clustering, 10))
                if name == "clusters":
                    grown(hits, search, clustering, 10, lambda _: False)
                times_of.append(1000 * (time.perf_counter() - begun))
    told = ", ".join(f"{name} {statistics.median(some):.1f} ms, p95 {np.percentile(some, 95):.1f} ms" for name, some in times.items())
    print(
        f"{kind}, {size} cases: {len(clustering.clusters)} clusters found in {found_s:.1f} s, written in {kept_s:.1f} s; {told}; "
        f"modularity {max(clustering.modularities):.3f}, {clustering.stability}"
    )


def _greedy(weights: Any) -> None:
    started = time.perf_counter()
    parts = nx.community.greedy_modularity_communities(nx.from_scipy_sparse_array(weights), weight="weight")
    of = np.empty(weights.shape[0], np.int64)
    for number, cases in enumerate(parts):
        of[list(cases)] = number
    spent = time.perf_counter() - started
    print(f"CNM, as published (networkx): {len(parts)} clusters, modularity {modularity(weights, of):.4f}, in {spent:.1f} s")


def _line(name: str, told: Gains, compared: float, ms: float, recall: float) -> str:
    share = " | ".join(f"{one:.3f}" for one in (told.acg, told.acg_p, told.precision, told.exact, told.gain))
    return f"| {name} | {share} | {compared:.0f} | {ms:.2f} | {recall:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", nargs="*", type=int)
    parser.add_argument("--real", nargs=2, type=Path, metavar=("FOLDER", "MANIFEST"))
    parser.add_argument("--gallery", choices=["lite", "server"])
    given = parser.parse_args()
    if given.gallery:
        for size in given.sizes or [10_000]:
            in_gallery(given.gallery, size)
        return
    with threadpool_limits(1):
        if given.real:
            measured(real(*given.real))
        for size in given.sizes or ([] if given.real else [1_000, 10_000, 100_000]):
            measured(mixture(size))


if __name__ == "__main__":
    main()
