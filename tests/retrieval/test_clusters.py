"""Algorithm 1 beside a reading of it that goes over every case, and what a gallery keeps of its clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.gallery import communities as found_by
from cxr_retrieval.gallery.communities import communities, gain, modularity
from cxr_retrieval.gallery.store import Case, Neighbour
from cxr_retrieval.retrieval import clusters
from cxr_retrieval.retrieval.clusters import TOUCHING, Clustering, Growing, as_text, closest, clustered, grown, read_clustering, require
from graphs import clumps, nearest_graph, networkx_of

K = 5
LABELS = ("control", "covid19")


class World:
    """A gallery of made-up cases in clusters, asked as a `Store` is."""

    def __init__(self, count: int, parts: int, seed: int = 0, spread: float = 0.8) -> None:
        self.vectors, of = clumps(count, parts, spread=spread, seed=seed)
        self.weights = nearest_graph(self.vectors, K)
        self.found = communities(self.weights, 2)
        self.keys = [f"{number:032x}" for number in range(count)]
        labels = [LABELS[part % 2] for part in of]
        self.clustering = clustered(self.keys, labels, self.weights, self.found, model_version="v", k=K, about={})
        strengths = self.weights.sum(axis=1)
        self.cases = [
            Case(key, key, label, None, None, None, None, {}, "", "", None, self.clustering.label(int(number)), float(strength))
            for key, label, number, strength in zip(self.keys, labels, self.found.of, strengths, strict=True)
        ]
        self.asked = 0

    def hits(self, query: NDArray[np.float64], cases: Sequence[Case]) -> list[Neighbour]:
        alike = {case.key: float(self.vectors[int(case.key, 16)] @ query) for case in cases}
        return sorted((Neighbour(case, alike[case.key], 0, 0) for case in cases), key=lambda hit: (-hit.similarity, hit.case.key))

    def grow(self, query: NDArray[np.float64], top_k: int, aside: frozenset[str] = frozenset(), among: Sequence[Case] | None = None) -> Any:
        cases = self.cases if among is None else among

        def search(limit: int, among: str | None = None) -> list[Neighbour]:
            self.asked += among is not None
            return self.hits(query, [case for case in cases if among in (None, case.cluster)])[:limit]

        first = search(clusters.hits_wanted(self.clustering, top_k))
        return grown(first, search, self.clustering, top_k, lambda case: case.key in aside)


def brute(world: World, query: NDArray[np.float64], top_k: int) -> list[str]:
    """Algorithm 1 line by line, over the graph with the query in it; modularity by its definition, each time of the whole graph."""
    alike, of = world.vectors @ query, world.found.of
    weights = world.weights.toarray()
    edges = np.zeros(len(alike))
    for one in sorted(range(len(alike)), key=lambda case: (-alike[case], case))[:K]:
        edges[one] = max(0.0, alike[one])
    joined = np.block([[weights, edges[:, None]], [edges[None], np.zeros((1, 1))]])
    whole = nx.from_numpy_array(joined)
    total, strength = joined.sum() / 2, float(edges.sum())
    image, region, used = len(alike), list[int](), set[int]()
    while len(region) < top_k and len(used) <= of.max():

        def assigned(cluster: int, used: frozenset[int] = frozenset(used)) -> float:
            parts = [set(np.flatnonzero(of == one).tolist()) for one in range(of.max() + 1)]
            merged = {image}.union(*(parts[one] for one in used), parts[cluster])
            return nx.community.modularity(whole, [merged, *(part for one, part in enumerate(parts) if one not in {*used, cluster})])

        chosen = max((one for one in range(of.max() + 1) if one not in used), key=lambda one: (round(assigned(one), 12), -one))
        members = np.flatnonzero(of == chosen).tolist()
        dq = {one: gain(max(0.0, float(alike[one])), strength, float(weights[one].sum()), total) for one in members}
        for _ in range(min(len(members), top_k - len(region))):
            best = max((one for one in members if one not in region), key=lambda one: (dq[one], alike[one], -one))
            region.append(best)
        used.add(chosen)
    return [world.keys[one] for one in region]


WORLDS = [World(count, parts, seed) for seed, (count, parts) in enumerate([(40, 3), (60, 4), (50, 2)])]


@given(st.sampled_from(WORLDS), st.integers(0, 2**32 - 1), st.integers(1, 45))
def test_a_region_grows_as_the_paper_has_it(world: World, seed: int, top_k: int) -> None:
    query = clumps(1, 4, spread=1.2, seed=seed)[0][0]
    found, own = world.grow(query, top_k)
    assert [hit.case.key for hit in found] == brute(world, query, top_k)
    assert own == []
    assert len(found) == min(top_k, len(world.cases))


@given(st.sampled_from(WORLDS), st.integers(0, 2**32 - 1))
def test_the_closest_cluster_is_the_one_of_most_modularity(world: World, seed: int) -> None:
    random = np.random.default_rng(seed)
    ends = random.choice(len(world.cases), K, replace=False)
    weights = random.uniform(0.1, 1, K)
    whole = networkx_of(world.weights)
    whole.add_weighted_edges_from((len(world.cases), int(end), float(weight)) for end, weight in zip(ends, weights, strict=True))
    edges: dict[int, float] = {}
    for end, weight in zip(ends, weights, strict=True):
        number = int(world.found.of[end])
        edges[number] = edges.get(number, 0.0) + float(weight)

    def with_the_query(number: int) -> float:
        parts = [set(np.flatnonzero(world.found.of == one).tolist()) for one in range(int(world.found.of.max()) + 1)]
        parts[number].add(len(world.cases))
        return nx.community.modularity(whole, parts)

    chosen = closest(edges, world.clustering)
    assert chosen is not None
    assert with_the_query(chosen) == pytest.approx(max(map(with_the_query, range(len(world.clustering.clusters)))), abs=1e-8)


def test_most_queries_ask_for_one_cluster_once() -> None:
    world = World(300, 3, 5)
    for number in range(20):
        found, _ = world.grow(world.vectors[number], 10)
        assert len({hit.case.cluster for hit in found}) == 1
    assert world.asked <= 40, "once, and once more where the first hits do not settle it"


def test_weak_cases_are_found_though_others_are_nearer() -> None:
    """A weak case gains more than a strong one that is a little nearer; it is found although the first hits do not hold it."""
    world = World(60, 1, 2)
    world.cases = [replace(case, strength=1000.0 if number < 50 else 0.1) for number, case in enumerate(world.cases)]
    only = (replace(world.clustering.clusters[0], cases=60, least=0.1),)
    world.clustering = replace(world.clustering, clusters=only)
    world.cases = [replace(case, cluster=world.clustering.label(0)) for case in world.cases]
    found, _ = world.grow(world.vectors[0], 3)
    assert {int(hit.case.key, 16) for hit in found} <= set(range(50, 60))


def test_cases_set_aside_neither_draw_nor_come() -> None:
    world = WORLDS[0]
    query = world.vectors[0]
    near = [hit.case.key for hit in world.hits(query, world.cases)[:9]]
    found, own = world.grow(query, 10, frozenset(near))
    assert not {hit.case.key for hit in found} & set(near)
    assert [hit.case.key for hit in own] == near[: len(own)]
    assert own[0].case.key == world.keys[0]
    left = [case for case in world.cases if case.key not in near]
    assert [hit.case.key for hit in found] == [hit.case.key for hit in world.grow(query, 10, among=left)[0]]


def test_what_no_cluster_holds_is_not_found_and_no_cluster_is_asked_where_all_is_known() -> None:
    world = World(40, 3, 1)
    others = [replace(case, cluster=None if number % 2 else "ffffffff:0") for number, case in enumerate(world.cases)]
    assert world.grow(world.vectors[0], 5, among=others)[0] == []
    few = world.cases[:4]
    found, _ = world.grow(world.vectors[0], 10, among=few)
    assert {hit.case.key for hit in found} == set(world.keys[:4])
    assert world.asked == 0


def test_new_cases_go_where_modularity_gains_most() -> None:
    """And sums are those of the graph that they have joined."""
    vectors, _ = clumps(80, 3, spread=0.8, seed=4)
    world = World(60, 3, 4)
    growing, of, whole = Growing(world.clustering), world.found.of.tolist(), world.weights.toarray()
    for vector in vectors[60:]:
        alike = world.vectors @ vector
        near = np.argsort(-alike, kind="stable")[:K]
        edges = np.zeros(len(whole))
        edges[near] = np.maximum(alike[near], 0)
        whole = np.block([[whole, edges[:, None]], [edges[None], np.zeros((1, 1))]])
        number, strength = growing.take("new", [(of[one], float(alike[one])) for one in near])
        best = max(
            range(len(world.clustering.clusters)), key=lambda one: (round(modularity(_sparse(whole), np.array([*of, one])), 12), -one)
        )
        assert (number, strength) == (best, pytest.approx(float(edges.sum())))
        of.append(number)
    now = growing.now()
    assert now.cases == 80
    assert now.weight == pytest.approx(whole.sum() / 2)
    for number, cluster in enumerate(now.clusters):
        members = np.array(of) == number
        assert cluster.strength == pytest.approx(float(whole[members].sum()))
        assert cluster.labels.get("new", 0) == of[60:].count(number)
        for other, weight in cluster.touching.items():
            assert weight == pytest.approx(float(whole[np.ix_(members, np.array(of) == other)].sum()))
    assert now.run == world.clustering.run


def _sparse(dense: NDArray[np.float64]) -> Any:
    ends = np.argwhere(dense > 0)
    return found_by.graph(len(dense), ends[:, 0], ends[:, 1], dense[ends[:, 0], ends[:, 1]])


def test_clusters_are_kept_as_text_and_come_back() -> None:
    clustering = WORLDS[1].clustering
    assert read_clustering(as_text(clustering)) == clustering
    assert require(as_text(clustering)) == clustering
    assert clustering.cases == 60
    assert [sum(one.labels.values()) for one in clustering.clusters] == [one.cases for one in clustering.clusters]
    assert all(len(one.touching) <= TOUCHING for one in clustering.clusters)
    told = clustering.as_json()
    assert told["modularity"] == max(clustering.modularities)
    assert told["adjusted_rand_index"] == {
        "mean": pytest.approx(WORLDS[1].found.agreements[0]),
        "least": told["adjusted_rand_index"]["mean"],
    }
    alone = replace(clustering, stability=None)
    assert (alone.as_json()["adjusted_rand_index"], read_clustering(as_text(alone))) == (None, alone)


def test_the_same_clusters_have_the_same_run_and_others_another() -> None:
    assert World(40, 3).clustering.run == WORLDS[0].clustering.run
    assert len({world.clustering.run for world in WORLDS}) == len(WORLDS)


@pytest.mark.parametrize("label", [None, "", "ffffffff:0", ":", "{run}:", "{run}:99", "{run}:-1", "{run}:x"])
def test_labels_of_others_are_none(label: str | None) -> None:
    clustering = WORLDS[0].clustering
    assert clustering.number(label and label.format(run=clustering.run)) is None
    assert clustering.number(clustering.label(1)) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"layout": 2}', '{"layout": 1, "clusters": []}', '{"layout": 1, "clusters": [[1]]}'])
def test_damaged_clusters_are_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(SetupError, match=r"the clusters cannot be read.*`cxr cluster` again"):
        read_clustering(text)


def test_what_cannot_be_asked_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"no clusters.*give `cxr cluster`"):
        require("")
    with pytest.raises(UsageError, match=r"another balance; expected --balance 0\.25; got 0\.5"):
        require(as_text(WORLDS[0].clustering), 0.5)


def test_too_many_clusters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "MOST_CLUSTERS", 2)
    with pytest.raises(UsageError, match=r"too many clusters to keep; expected at most 2.*--neighbours"):
        World(60, 4, 1)


def test_a_clustering_without_a_case_in_it_is_none() -> None:
    assert closest({}, Clustering("r", "v", K, 1.0, (), (0.0,), None, {})) is None
