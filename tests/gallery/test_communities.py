"""Communities and their weighted modularity beside what networkx and scikit-learn say of them."""

from __future__ import annotations

import sys
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from cxr_retrieval.errors import SetupError
from cxr_retrieval.gallery.communities import adjusted_rand, between, communities, gain, graph, modularity
from graphs import drawn, networkx_of


@st.composite
def parted(draw: st.DrawFn) -> tuple[Any, NDArray[np.int64]]:
    """A weighted graph of 3 to 12 cases with an edge at least, in up to four parts."""
    count, seed = draw(st.integers(3, 12)), draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    edges = draw(st.integers(1, 30))
    ends = random.integers(count, size=(edges, 2))
    ends[0] = (0, 1)
    return graph(count, ends[:, 0], ends[:, 1], random.uniform(0.01, 1, edges)), random.integers(draw(st.integers(1, 4)), size=count)


def sets_of(of: NDArray[np.int64]) -> list[set[int]]:
    return [set(np.flatnonzero(of == number).tolist()) for number in np.unique(of)]


@given(parted())
def test_modularity_is_that_of_networkx(given_: tuple[Any, NDArray[np.int64]]) -> None:
    weights, of = given_
    assert modularity(weights, of) == pytest.approx(nx.community.modularity(networkx_of(weights), sets_of(of)), abs=1e-9)


@given(parted())
def test_the_gain_is_the_difference_that_joining_makes(given_: tuple[Any, NDArray[np.int64]]) -> None:
    weights, of = given_
    first, second = 0, int(of.max())
    joined = np.where(of == second, first, of)
    dense = weights.toarray()
    one, other = of == first, of == second
    strengths = dense.sum(axis=1)
    found = gain(float(dense[np.ix_(one, other)].sum()), float(strengths[one].sum()), float(strengths[other].sum()), float(dense.sum() / 2))
    if first != second and one.any():
        whole = networkx_of(weights)
        difference = nx.community.modularity(whole, sets_of(joined)) - nx.community.modularity(whole, sets_of(of))
        assert found == pytest.approx(difference, abs=1e-9)


def test_a_graph_has_each_edge_once_whichever_end_named_it() -> None:
    weights = graph(4, np.array([0, 1, 1, 2, 3]), np.array([1, 0, 2, 2, 0]), np.array([0.5, 0.5, -0.2, 1.0, 0.25]))
    assert weights.toarray().tolist() == [[0, 0.5, 0, 0.25], [0.5, 0, 0, 0], [0, 0, 0, 0], [0.25, 0, 0, 0]]


def test_communities_are_found_whatever_the_seed() -> None:
    weights, truth = drawn(300, 3, spread=0.5)
    found = communities(weights, seeds=4)
    assert adjusted_rand(found.of, truth) > 0.99
    assert (len(found.modularities), len(found.agreements)) == (4, 6)
    assert min(found.agreements) > 0.99
    assert max(found.modularities) == pytest.approx(modularity(weights, found.of))
    assert max(found.modularities) >= modularity(weights, truth) - 1e-9
    assert np.all(np.diff(np.bincount(found.of)) <= 0), "the largest first"
    again = communities(weights, seeds=4)
    assert np.array_equal(again.of, found.of)
    assert again.modularities == found.modularities
    assert communities(weights, seeds=1).agreements == ()


def test_of_several_runs_the_best_is_kept() -> None:
    """Where there is nothing to find, runs differ, and that is told."""
    weights, _ = drawn(300, 1, spread=1.0)
    found = communities(weights, seeds=5)
    assert modularity(weights, found.of) == max(found.modularities)
    assert max(found.agreements) < 0.95


def test_it_finds_about_as_much_modularity_as_the_method_of_the_paper() -> None:
    weights, _ = drawn(200, 4, spread=1.0)
    greedy = nx.community.greedy_modularity_communities(networkx_of(weights), weight="weight")
    of = np.empty(200, np.int64)
    for number, cases in enumerate(greedy):
        of[list(cases)] = number
    assert max(communities(weights).modularities) >= modularity(weights, of) - 0.005


def test_cases_without_an_edge_are_communities_of_their_own() -> None:
    nothing = graph(3, np.array([0]), np.array([1]), np.array([-1.0]))
    assert communities(nothing, 2).of.tolist() == [0, 1, 2]
    assert modularity(nothing, np.arange(3)) == 0.0


def test_weights_between_communities() -> None:
    weights, truth = drawn(60, 3, spread=1.0)
    dense = weights.toarray()
    expected = [[float(dense[np.ix_(truth == a, truth == b)].sum()) for b in range(3)] for a in range(3)]
    assert between(weights, truth).toarray() == pytest.approx(np.array(expected))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_the_rand_index_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    one, other = np.array(pairs, np.int64).T
    assert adjusted_rand(one, other) == pytest.approx(adjusted_rand_score(one, other))


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sknetwork.clustering", None)
    with pytest.raises(SetupError, match=r"pip install 'cxr-retrieval\[cluster\]'"):
        graph(2, np.array([0]), np.array([1]), np.array([1.0]))
