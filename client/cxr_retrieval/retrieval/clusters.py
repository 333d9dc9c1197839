"""Retrieval confined to the closest clusters of a gallery: Algorithm 1 of Haq et al. 2020, a region that grows from the query.

The query I joins the graph of the gallery's cases (`gallery/communities.py`) with edges to its nearest ones. It goes to the cluster that
gains most weighted modularity by it; the cases of that cluster are added to its region by Δq(I, I_j), the gain of joining I with the case
alone; where they are used up, the region goes to the next cluster that gains most. With w the weight of the edges between, s strengths, and
m the weight of all edges, those of the query included,

    ΔQ(R, c) = w_Rc/m − s_R·S_c / 2m²          Δq(I, I_j) = w_Ij/m − s_I·s_j / 2m²

Where we read the paper so, or deviate:

- Its edges E(I, I_f) lead to the `k` nearest cases, as those of the gallery's cases do; what a case of the chosen cluster is compared with,
  w_Ij, is its similarity, whether there is an edge or not. So the nearest cases are asked for first, of the whole gallery.
- The loop adds as many cases as are still missing; as printed, it adds up to K of each cluster and can end with more than K.
- A cluster that is used up counts in s_R and w_Rc as a whole, with cases that may not be retrieved (the query's own, or those that do not
  meet a clause). Of the weights between clusters, the TOUCHING greatest of each are kept.
- s_j, S_c and m are of the time when the gallery was clustered, S_c with what `cxr cluster --new` has added since.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE
from cxr_retrieval.gallery.communities import Communities, between, gain
from cxr_retrieval.gallery.kept_text import compact, read_back
from cxr_retrieval.gallery.store import MAX_HITS, Case, Neighbour
from cxr_retrieval.retrieval.own import OWN_EXPECTED, nearest_others

CONFINED: Final = "the cases were sought in the closest clusters alone"
"""Why nothing that was measured on the nearest of all cases holds."""
TOUCHING: Final = 8
"""Clusters whose weight of edges to a cluster is kept with it."""
MOST_CLUSTERS: Final = 2000
"""That a gallery can keep; each takes some 200 bytes of a property."""
_LAYOUT: Final = 1
_AGAIN: Final = "`cxr cluster` again"


class Search(Protocol):
    """Asks a gallery about a query."""

    def __call__(self, limit: int, among: str | None = None) -> Sequence[Neighbour]:
        """The `limit` nearest cases, nearest first; `among` those of one cluster, by its label (`Clustering.label`)."""
        ...


@dataclass(frozen=True)
class Cluster:
    """What is kept of a cluster.

    Attributes:
        cases: How many it has.
        strength: S_c, the sum of their strengths.
        least: The least of these.
        labels: Label → cases.
        touching: Another cluster's number → weight of the edges between both.
    """

    cases: int
    strength: float
    least: float
    labels: Mapping[str, int]
    touching: Mapping[int, float]

    def as_json(self, number: int) -> dict[str, Any]:
        """What stands beside a case of it."""
        return {"number": number, "cases": self.cases, "labels": dict(self.labels)}


@dataclass(frozen=True)
class Clustering:
    """What is kept of the clusters of a gallery; its cases have their cluster as a field (`Store.assign`).

    Attributes:
        run: Digest of which case is in which cluster; the labels of another run are none.
        k: Nearest cases that each has edges to.
        weight: m.
        modularities: Q of the runs with several seeds, in order of seed; the greatest is its own, when it was made.
        stability: Mean and least adjusted Rand index of two of these runs; None of a single one.
        about: When it was made, and by which version of this system.
        balance: At which cases were compared.
    """

    run: str
    model_version: str
    k: int
    weight: float
    clusters: tuple[Cluster, ...]
    modularities: tuple[float, ...]
    stability: Mapping[str, float] | None
    about: Mapping[str, Any]
    balance: float = DEFAULT_BALANCE

    @property
    def cases(self) -> int:
        """How many are in a cluster."""
        return sum(cluster.cases for cluster in self.clusters)

    def label(self, number: int) -> str:
        """What a case of the cluster has in the field."""
        return f"{self.run}:{number}"

    def number(self, label: str | None) -> int | None:
        """The cluster that a case's field says; None: none of this run's."""
        run, _, number = (label or "").partition(":")
        return int(number) if run == self.run and number.isdecimal() and int(number) < len(self.clusters) else None

    def as_json(self) -> dict[str, Any]:
        """What `cxr cluster --json` tells."""
        return {
            "run": self.run,
            "model_version": self.model_version,
            "balance": self.balance,
            "k": self.k,
            "cases": self.cases,
            "modularity": max(self.modularities),
            "modularity_of_each_seed": list(self.modularities),
            "adjusted_rand_index": self.stability and dict(self.stability),
            "clusters": [cluster.as_json(number) for number, cluster in enumerate(self.clusters)],
        }


def clustered(
    keys: Sequence[str],
    labels: Sequence[str],
    weights: Any,
    found: Communities,
    *,
    model_version: str,
    k: int,
    about: Mapping[str, Any],
) -> Clustering:
    """What is kept of communities that have been found.

    Args:
        keys, labels: Of each case. weights: The graph of the cases, in the same order.

    Raises:
        UsageError: There are more than MOST_CLUSTERS.
    """
    strengths = weights.sum(axis=1)
    count = int(found.of.max(initial=-1)) + 1
    if count > MOST_CLUSTERS:
        raise UsageError(
            "too many clusters to keep", expected=f"at most {MOST_CLUSTERS}", got=str(count), next_step="give more --neighbours"
        )
    linked = between(weights, found.of)
    members: list[list[int]] = [[] for _ in range(count)]
    for case, number in enumerate(found.of.tolist()):
        members[number].append(case)
    clusters = tuple(
        Cluster(
            len(cases),
            _rounded(float(strengths[cases].sum())),
            _rounded_down(float(strengths[cases].min())),
            _counted(labels[case] for case in cases),
            _strongest(linked[[number]], number),
        )
        for number, cases in enumerate(members)
    )
    weight = _rounded(float(weights.sum()) / 2)
    told = hashlib.sha256(repr((model_version, k, weight)).encode())
    for key, number in sorted(zip(keys, found.of.tolist(), strict=True)):
        told.update(f"{key}:{number}\n".encode())
    agreements = found.agreements
    stability = {"mean": _rounded(float(np.mean(agreements))), "least": _rounded(min(agreements))} if agreements else None
    return Clustering(told.hexdigest()[:8], model_version, k, weight, clusters, tuple(map(_rounded, found.modularities)), stability, about)


def closest(weights: Mapping[int, float], clustering: Clustering, used: Iterable[int] = ()) -> int | None:
    """The cluster that gains most weighted modularity by the region of a case and of the clusters that it has used up.

    Args:
        weights: Cluster → weight of the case's edges into it.

    Returns:
        Its number, the least where several gain as much; None if all are used up.
    """
    region, clusters = set(used), clustering.clusters
    own = sum(weights.values())
    total = clustering.weight + own
    strengths = [cluster.strength + weights.get(number, 0.0) for number, cluster in enumerate(clusters)]
    strength = own + sum(strengths[number] for number in region)
    edges = defaultdict(float, weights)
    for one in region:
        for number, weight in clusters[one].touching.items():
            edges[number] += weight

    def gained(number: int) -> float:
        return gain(edges[number], strength, strengths[number], total)

    return max((number for number in range(len(clusters)) if number not in region), key=lambda one: (gained(one), -one), default=None)


def grown(
    hits: Sequence[Neighbour], search: Search, clustering: Clustering, top_k: int, set_aside: Callable[[Case], bool]
) -> tuple[list[Neighbour], list[Neighbour]]:
    """The region of a query: `top_k` cases in the order in which they are added, and those set aside that are as near as the last of them.

    Args:
        hits: The cases nearest to the query, nearest first, `hits_wanted` of them if there are.
        search: Asked for more of them, and for cases of a cluster.
        set_aside: Cases that neither draw the query to a cluster nor are retrieved.
    """
    wanted = hits_wanted(clustering, top_k)

    def apart(case: Case) -> bool:
        return set_aside(case) or clustering.number(case.cluster) is None

    drawn, _ = nearest_others(hits, search, clustering.k, apart)
    edges: dict[int, float] = {}
    for hit in drawn:
        number = _number(clustering, hit)
        edges[number] = edges.get(number, 0.0) + max(0.0, hit.similarity)
    everything = drawn if len(drawn) < clustering.k else [hit for hit in hits if not apart(hit.case)] if len(hits) < wanted else None
    strength = sum(edges.values())
    region: list[Neighbour] = []
    used: list[int] = []
    if everything is not None:
        top_k = min(top_k, len(everything))
    while len(region) < top_k and (number := closest(edges, clustering, used)) is not None:
        missing, total = top_k - len(region), clustering.weight + strength
        if everything is None:
            inside = partial(search, among=clustering.label(number))
            region += _most_gaining(inside, set_aside, missing, strength, clustering.clusters[number].least, total)
        else:
            region += _by_gain([hit for hit in everything if _number(clustering, hit) == number], strength, total)[:missing]
        used.append(number)
    least = min((hit.similarity for hit in region), default=1.0)
    return region, [hit for hit in hits if set_aside(hit.case) and hit.similarity >= least]


def hits_wanted(clustering: Clustering, top_k: int) -> int:
    """How many of the nearest cases `grown` begins with."""
    return min(max(top_k, clustering.k) + OWN_EXPECTED, MAX_HITS)


def _number(clustering: Clustering, hit: Neighbour) -> int:
    number = clustering.number(hit.case.cluster)
    assert number is not None, "others are set aside"
    return number


def _most_gaining(
    inside: Callable[[int], Sequence[Neighbour]],
    set_aside: Callable[[Case], bool],
    wanted: int,
    strength: float,
    least: float,
    total: float,
) -> list[Neighbour]:
    """The `wanted` cases of a cluster with the greatest Δq. Asked for by similarity, until none that has not come can gain more: it would
    be no more similar than the last that has, and no weaker than the weakest.
    """
    limit = min(wanted + OWN_EXPECTED, MAX_HITS)
    while True:
        hits = inside(limit)
        first = _by_gain([hit for hit in hits if not set_aside(hit.case)], strength, total)[:wanted]
        if len(hits) < limit or limit == MAX_HITS:
            return first
        others = gain(max(0.0, hits[-1].similarity), strength, least, total)
        if len(first) == wanted and _gain(first[-1], strength, total) >= others:
            return first
        limit = min(2 * limit, MAX_HITS)


def _by_gain(hits: Sequence[Neighbour], strength: float, total: float) -> list[Neighbour]:
    return sorted(hits, key=lambda hit: (-_gain(hit, strength, total), -hit.similarity, hit.case.key))


def _gain(hit: Neighbour, strength: float, total: float) -> float:
    """Δq(I, I_j)."""
    return gain(max(0.0, hit.similarity), strength, hit.case.strength, total)


class Growing:
    """A clustering that takes in new cases one by one: each goes to the cluster that gains most weighted modularity. The strengths of its
    neighbours grow with it in their clusters' sums; in the field of each they stay as they were.
    """

    def __init__(self, clustering: Clustering) -> None:
        self._begun = clustering
        self._clusters = list(clustering.clusters)
        self._weight = clustering.weight

    def take(self, label: str, nearest: Sequence[tuple[int, float]]) -> tuple[int, float]:
        """Puts a case into a cluster, by the clusters of its nearest cases and its similarity to these.

        Args:
            label: Of the case.

        Returns:
            The cluster's number, and the strength of the case.
        """
        edges: dict[int, float] = {}
        for number, similarity in nearest:
            edges[number] = edges.get(number, 0.0) + max(0.0, similarity)
        number = closest(edges, self.now())
        assert number is not None, "a clustering has a cluster"
        strength = sum(edges.values())
        for one, weight in edges.items():
            touched = self._clusters[one]
            self._clusters[one] = replace(touched, strength=touched.strength + weight)
        chosen = self._clusters[number]
        touching = dict(chosen.touching)
        for one, weight in edges.items():
            if one != number:
                touching[one] = touching.get(one, 0.0) + weight
                other = self._clusters[one]
                self._clusters[one] = replace(other, touching=_first({**other.touching, number: other.touching.get(number, 0.0) + weight}))
        self._clusters[number] = replace(
            chosen,
            cases=chosen.cases + 1,
            strength=chosen.strength + strength,
            least=_rounded_down(min(chosen.least, strength)),
            labels=_sorted({**chosen.labels, label: chosen.labels.get(label, 0) + 1}),
            touching=_first(touching),
        )
        self._weight += strength
        return number, strength

    def now(self) -> Clustering:
        """The clustering with all that has been taken in."""
        return replace(self._begun, clusters=tuple(self._clusters), weight=self._weight)


def require(text: str, balance: float = DEFAULT_BALANCE) -> Clustering:
    """The clustering that a gallery keeps.

    Raises:
        UsageError: It keeps none, or one for another balance.
        SetupError: It cannot be read.
    """
    if not text:
        raise UsageError(
            "this gallery has no clusters",
            expected="one whose cases `cxr cluster` has put into clusters, to the end",
            next_step="give `cxr cluster`, or ask for the nearest cases (--method nearest)",
        )
    found = read_clustering(text)
    if balance != found.balance:
        raise UsageError(
            "the clusters were made at another balance",
            expected=f"--balance {found.balance:g}",
            got=f"{balance:g}",
            next_step="leave --balance out, or ask for the nearest cases (--method nearest)",
        )
    return found


@lru_cache(maxsize=4)
def read_clustering(text: str) -> Clustering:
    """From the text that a gallery keeps.

    Raises:
        SetupError: It is none, or of another layout.
    """
    with read_back(text, "the clusters", _LAYOUT, _AGAIN) as held:
        clusters = tuple(
            Cluster(
                int(cases),
                float(strength),
                float(least),
                _sorted({str(label): int(count) for label, count in labels.items()}),
                {int(number): float(weight) for number, weight in touching},
            )
            for cases, strength, least, labels, touching in held["clusters"]
        )
        if not clusters:
            raise ValueError("none")
        return Clustering(
            str(held["run"]),
            str(held["model_version"]),
            int(held["k"]),
            float(held["weight"]),
            clusters,
            tuple(map(float, held["modularities"])),
            held["stability"] and {name: float(held["stability"][name]) for name in ("mean", "least")},
            dict(held["about"]),
            float(held["balance"]),
        )


def as_text(clustering: Clustering) -> str:
    """What a gallery keeps: compact JSON."""
    held = {
        "layout": _LAYOUT,
        "run": clustering.run,
        "model_version": clustering.model_version,
        "k": clustering.k,
        "weight": _rounded(clustering.weight),
        "clusters": [
            [one.cases, _rounded(one.strength), one.least, dict(one.labels), [[n, _rounded(w)] for n, w in one.touching.items()]]
            for one in clustering.clusters
        ],
        "modularities": list(clustering.modularities),
        "stability": clustering.stability and dict(clustering.stability),
        "about": dict(clustering.about),
        "balance": clustering.balance,
    }
    return compact(held)


def _strongest(row: Any, number: int) -> dict[int, float]:
    others: NDArray[np.int64] = row.indices
    return _first({int(other): float(weight) for other, weight in zip(others, row.data, strict=True) if other != number})


def _first(touching: Mapping[int, float]) -> dict[int, float]:
    """The TOUCHING greatest."""
    return {number: _rounded(weight) for number, weight in sorted(touching.items(), key=lambda one: (-one[1], one[0]))[:TOUCHING]}


def _counted(labels: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
    return _sorted(counts)


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first."""
    return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")


def _rounded_down(value: float) -> float:
    """That nothing is below."""
    return value - abs(value) * 1e-6
