"""Does marking help? Simulated readers mark what they are shown, and what comes next is counted.

A reader looks at the k cases shown, marks each that has no mark yet, and asks again: relevant is a case of the query's label, or of its
label and source (which no network was taught to bring together), and some readers err on one case in ten, always on the same ones. Counted
is by what a case is, never by what was said of it, in two ways: of the k cases that are shown, where those marked relevant may stay and
those marked otherwise may not; and of the k nearest without any mark (residual collection; Salton and Buckley 1990), in which nothing
counts that a reader has pointed out himself.

`unmoved`: the question stays, and cases marked as not relevant make room for the next. `rocchio`: fixed α, β, γ as a textbook has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.evaluation.intervals import weighted_interval, weights_of
from cxr_retrieval.evaluation.metrics import Ranking
from cxr_retrieval.retrieval.feedback import PULL, ROOT, Vector, moved

ROUNDS: Final = 2
ERRING: Final = 0.1
_AT_ONCE: Final = 256
"""Queries."""
_RELEVANT, _OTHER = 1, -1

Way = Callable[[Vector, Vector, Vector], Vector]
"""As `moved`."""
Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reader:
    """`by_source`: looks for the query's label and source, else for its label. `errs`: share of the cases that are marked wrongly."""

    by_source: bool = False
    errs: float = 0.0


READERS: Final = (Reader(), Reader(errs=ERRING), Reader(by_source=True), Reader(by_source=True, errs=ERRING))


def _pulled(pull: float, root: float) -> Way:
    return lambda query, relevant, other: moved(query, relevant, other, pull, root)


def _unmoved(query: Vector, relevant: Vector, other: Vector) -> Vector:
    return query


def _rocchio(beta: float, gamma: float) -> Way:
    def way(query: Vector, relevant: Vector, other: Vector) -> Vector:
        sides = [weight * side.mean(axis=0) for weight, side in ((beta, relevant), (-gamma, other)) if len(side)]
        return query + sum(sides, np.zeros_like(query))

    return way


WAYS: Final[dict[str, Way]] = {
    "shipped": _pulled(PULL, ROOT),
    "unmoved": _unmoved,
    "rocchio 1, 0.75, 0.15": _rocchio(0.75, 0.15),
    "rocchio 1, 1, 1": _rocchio(1, 1),
}
GRID: Final[dict[str, Way]] = {
    f"pull {pull:g}, root {root:g}": _pulled(pull, root) for pull in (0.5, 1.0, 1.5, 2.0, 3.0) for root in (0.0, 0.5, 1.0)
}
"""What PULL and ROOT were chosen from: with the train films as gallery and as queries, the greatest `score`."""


def measured(ranking: Ranking, k: int) -> dict[str, Any]:
    """What becomes of the answers in ROUNDS rounds, for READERS and WAYS; `score` of GRID: the mean of both counts over rounds and readers.

    Queries that are compared with fewer than 3 · k cases are left out.
    """
    ways = {**WAYS, **GRID}
    found: dict[tuple[str, Reader], list[Floats]] = {(name, reader): [] for name in ways for reader in READERS}
    used: list[int] = []
    for start in range(0, len(ranking.queries.labels), _AT_ONCE):
        asked = np.arange(start, min(start + _AT_ONCE, len(ranking.queries.labels)))
        admitted = np.stack([ranking.admitted(number) for number in asked.tolist()])
        enough = admitted.sum(axis=1) >= (ROUNDS + 1) * k
        asked, admitted = asked[enough], admitted[enough]
        used += asked.tolist()
        for reader in READERS if len(asked) else ():
            right = ranking.labels[1][asked][:, None] == ranking.labels[0]
            if reader.by_source:
                right &= ranking.sources[1][asked][:, None] == ranking.sources[0]
            said = right ^ _errors(asked, right.shape[1], reader.errs)
            for name, way in ways.items():
                found[name, reader].append(_rounds(ranking, asked, admitted, right, said, way, k))
    patients = np.array(ranking.queries.patients)[used]
    whole = {key: np.concatenate(parts) if parts else np.zeros((0, ROUNDS + 1, 4)) for key, parts in found.items()}
    return {
        "k": k,
        "queries": {"n": len(used), "patients": len(set(patients.tolist())), "left_out": len(ranking.queries.labels) - len(used)},
        "readers": [
            {
                "looks_for": "label and source" if reader.by_source else "label",
                "errs": reader.errs,
                "ways": {name: _told(whole[name, reader], patients) for name in WAYS} if used else {},
            }
            for reader in READERS
        ],
        "grid": {name: float(np.mean([whole[name, reader][:, 1:, :2].mean() for reader in READERS])) for name in GRID} if used else {},
    }


def _errors(asked: NDArray[np.int64], cases: int, share: float) -> Flags:
    """`[n, cases]`: which cases are marked wrongly for each query, whatever the way and the round."""
    return np.stack([np.random.default_rng(number).random(cases) < share for number in asked.tolist()])


def _rounds(ranking: Ranking, asked: NDArray[np.int64], admitted: Flags, right: Flags, said: Flags, way: Way, k: int) -> Floats:
    """`[n, rounds + 1, 4]`: of the cases shown and of the new ones the share that is right, and whether any is."""
    cases, own = ranking.gallery.embeddings, ranking.queries.embeddings[asked]
    marks = np.zeros(right.shape, np.int8)
    vectors, out = own, np.zeros((len(asked), ROUNDS + 1, 4))
    for number in range(ROUNDS + 1):
        similarity = np.where(admitted, vectors @ cases.T, -np.inf)
        shown = _nearest(np.where(marks == _OTHER, -np.inf, similarity), k)
        new = _nearest(np.where(marks != 0, -np.inf, similarity), k)
        good, fresh = np.take_along_axis(right, shown, 1), np.take_along_axis(right, new, 1)
        out[:, number] = np.stack([good.mean(1), fresh.mean(1), good.any(1), fresh.any(1)], axis=1)
        if number < ROUNDS:
            verdict = np.where(np.take_along_axis(said, shown, 1), _RELEVANT, _OTHER).astype(np.int8)
            before = np.take_along_axis(marks, shown, 1)
            np.put_along_axis(marks, shown, np.where(before == 0, verdict, before), 1)
            both = zip(own, marks, strict=True)
            vectors = np.stack([way(query, cases[mine == _RELEVANT], cases[mine == _OTHER]) for query, mine in both])
    return out


def _nearest(similarity: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """`[n, k]`: the nearest cases of each row, nearest first."""
    nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    return np.take_along_axis(nearest, np.argsort(-np.take_along_axis(similarity, nearest, 1), axis=1, kind="stable"), 1)


def _told(counted: Floats, patients: NDArray[np.str_]) -> list[dict[str, Any]]:
    """For each round, from that before any mark on."""
    weights = weights_of(patients)
    names: Sequence[str] = ("shown", "new", "recall_shown", "recall_new")
    return [
        {
            key: value
            for place, name in enumerate(names)
            for key, value in (
                (name, float(counted[:, number, place].mean())),
                (f"{name}_ci", weighted_interval(counted[:, number, place], weights)),
            )
        }
        for number in range(counted.shape[1])
    ]
