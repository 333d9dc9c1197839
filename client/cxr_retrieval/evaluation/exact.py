"""What a gallery's index finds of what comparing with every case finds: recall@k over its own cases, with a filter and without.

An index may miss a case that is nearer than those it finds; nothing in an answer shows it. The cases that are asked about are the first in
the order of their pseudonyms, which is as good as chance; each is left out of its own answer. They lie in the index themselves, where new
films do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.errors import UsageError
from cxr_retrieval.evaluation.intervals import wilson
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE
from cxr_retrieval.gallery.clause import constant
from cxr_retrieval.gallery.store import EVERY_CASE, Clause, Store

Vectors = NDArray[np.float32]
_PAGE: Final = 5000
_ASKED_AT_ONCE: Final = 100
_EQUAL: Final = 1e-5
"""Similarities that differ by less are one: either case may stand in an answer."""


@dataclass(frozen=True)
class Audited:
    """What was found under one filter.

    Attributes:
        where: The filter; "": none.
        cases: That meet it.
        queries: How many were asked about.
        recall: Share of the `k` nearest that the index found, mean over queries.
        interval: Wilson's, 95 %, over queries.
        worst: The same of the query that fares worst.
    """

    where: str
    cases: int
    queries: int
    k: int
    recall: float
    interval: tuple[float, float]
    worst: float

    def as_json(self) -> dict[str, Any]:
        """As it is printed."""
        told = {"where": self.where, "cases": self.cases, "queries": self.queries, f"recall_at_{self.k}": self.recall}
        return {**told, f"recall_at_{self.k}_ci": list(self.interval), "worst_query": self.worst}


def audit_index(
    store: Store,
    wheres: Sequence[str] = (),
    *,
    queries: int = 200,
    k: int = 10,
    begun: Callable[[str, int | None], None] = lambda what, cases: None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Audited]:
    """Without a filter, and with each of some. Reads every vector of the gallery page by page; memory stays flat.

    Args:
        wheres: Clauses; without any, that of its rarest label that has enough cases.
        queries: Cases to ask about.
        begun: Told what is compared next, and with how many cases (None: nobody knows).
        advance: Told of each case compared with.

    Raises:
        UsageError: Too few cases.
        ClauseError: A clause cannot be meant.
        StoreError: Milvus cannot serve.
    """
    clauses = [store.clause(where) for where in wheres]
    asked = [(str(row["key"]), row["embedding"]) for row in islice(store.rows(["key", "embedding"]), queries)]
    if len(asked) <= k:
        raise UsageError(
            "too few cases to audit", expected=f"more than {k}", got=str(len(asked)), next_step="ingest more, or give a smaller --top-k"
        )
    keys = [key for key, _ in asked]
    vectors = np.array([vector for _, vector in asked], np.float32)
    labels: Counter[str] = Counter()
    begun("comparing with every case", store.count())
    found = [_audited(store, EVERY_CASE, keys, vectors, k, advance, labels)]
    if not clauses:
        rare = next((label for label, count in reversed(labels.most_common()) if k < count < found[0].cases), None)
        clauses = [] if rare is None else [store.clause(f"label == {constant(rare)}")]
    for clause in clauses:
        begun(f"comparing with those where {clause.given}", None)
        found.append(_audited(store, clause, keys, vectors, k, advance, Counter()))
    return found


def _audited(
    store: Store, clause: Clause, keys: Sequence[str], vectors: Vectors, k: int, advance: Callable[[int], None], labels: Counter[str]
) -> Audited:
    exact = _Nearest(store.space.comparable(store.space.as_question(vectors), DEFAULT_BALANCE), keys, k)
    for page in _pages(store.rows(["key", "label", "embedding"], clause)):
        labels.update(str(row["label"]) for row in page)
        exact.see(
            [str(row["key"]) for row in page],
            store.space.comparable(np.array([row["embedding"] for row in page], np.float32), DEFAULT_BALANCE),
        )
        advance(len(page))
    shares: list[float] = []
    for start in range(0, len(keys), _ASKED_AT_ONCE):
        part = slice(start, start + _ASKED_AT_ONCE)
        for number, hits in enumerate(store.nearest(vectors[part], k + 1, clause), start):
            others = [(hit.key, hit.similarity) for hit in hits if hit.key != keys[number]][:k]
            shares.append(exact.share(number, others))
    recall = float(np.mean(shares))
    low, high = wilson(recall, len(shares))
    return Audited(clause.given, exact.seen, len(shares), k, recall, (low, high), min(shares))


class _Nearest:
    """The `k` nearest of each query among all that were seen, but for itself."""

    def __init__(self, queries: Vectors, themselves: Sequence[str], k: int) -> None:
        self._queries, self._themselves, self._k = queries, {key: number for number, key in enumerate(themselves)}, k
        self._similarities = np.full((len(queries), 0), 0, np.float32)
        self._keys = np.full((len(queries), 0), "", "U32")
        self.seen = 0

    def see(self, keys: Sequence[str], vectors: Vectors) -> None:
        """Some more cases."""
        self.seen += len(keys)
        alike = self._queries @ vectors.T
        for position, key in enumerate(keys):
            if key in self._themselves:
                alike[self._themselves[key], position] = -np.inf
        some = (
            np.argpartition(-alike, self._k - 1, axis=1)[:, : self._k]
            if self._k < len(keys)
            else np.arange(len(keys))[None].repeat(len(alike), 0)
        )
        similarities = np.concatenate([self._similarities, np.take_along_axis(alike, some, axis=1)], axis=1)
        names = np.concatenate([self._keys, np.array(keys, "U32")[some]], axis=1)
        best = np.argsort(-similarities, axis=1, kind="stable")[:, : self._k]
        self._similarities, self._keys = np.take_along_axis(similarities, best, axis=1), np.take_along_axis(names, best, axis=1)

    def share(self, query: int, found: Sequence[tuple[str, float]]) -> float:
        """Of the nearest of one query, how many are among `found`; 1 where there are none."""
        there = np.isfinite(self._similarities[query])
        if not there.any():
            return 1.0
        similarities = self._similarities[query][there]
        nearest, least = set(self._keys[query][there].tolist()), float(similarities[-1]) - _EQUAL
        return min(1.0, sum(key in nearest or similarity >= least for key, similarity in found) / len(similarities))


def _pages(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while page := list(islice(rows, _PAGE)):
        yield page
