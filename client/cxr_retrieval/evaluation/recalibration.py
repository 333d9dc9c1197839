"""A gallery's own calibration, from its own cases: each asked about as if it were new, its patient's films left out.

Cases that the networks have learnt from do not count: their nearest cases are nearer than a new film's, and their votes more often right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.evaluation import confidence
from cxr_retrieval.evaluation.metrics import LabelledSet, Ranking, answered
from cxr_retrieval.gallery.aliases import PREFIX
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, comparable
from cxr_retrieval.gallery.store import Case, Store
from cxr_retrieval.retrieval.calibration import DEFAULT_ERROR_RATE, Calibration, read_calibration, shipped
from cxr_retrieval.retrieval.voting import DEFAULT_K

MOST_CASES: Final = 5000
"""That are asked about; more would change no threshold by a point."""
LEARNT_FROM: Final = "train"
"""Split of the cases that do not count unless asked for."""


@dataclass(frozen=True)
class Recalibration:
    """What a recalibration would change, or has changed.

    Attributes:
        calibration: The new one, or the gallery's own if that is of the very same cases.
        is_new: Whether it differs from the gallery's own.
        before: How the calibration that answers now does on these cases (`confidence.applied`; its own cases may be among them); None
            without one, or if it knows none of their labels.
        after: How the new one does on patients that it was not fitted on (`confidence.measured`).
        learnt_from: Cases that did not count as the networks may know them.
        missing: Of the cases named, those that the gallery lacks.
    """

    calibration: Calibration
    is_new: bool
    before: dict[str, Any] | None
    after: dict[str, Any]
    learnt_from: int
    missing: int

    def as_json(self) -> dict[str, Any]:
        """What `cxr calibrate --json` tells of it."""
        about = dict(self.calibration.about)
        return {
            "model_version": self.calibration.model_version,
            "changed": self.is_new,
            "gallery": self.calibration.gallery,
            "about": about,
            "learnt_from": self.learnt_from,
            "missing": self.missing,
            "before": self.before,
            "after": self.after,
        }


def recalibrate(
    store: Store,
    *,
    where: str = "",
    keys: Collection[str] | None = None,
    include_train: bool = False,
    top_k: int = DEFAULT_K,
    error_rate: float = DEFAULT_ERROR_RATE,
) -> Recalibration:
    """Fits and measures; keeps nothing (`Store.keep`).

    Args:
        where: Only cases that meet this clause are asked about; all are compared with.
        keys: Only these cases are.
        include_train: Also cases of split LEARNT_FROM.
        top_k: Neighbours that vote.
        error_rate: Of the sets that are reported; the calibration itself is for all.

    Raises:
        UsageError: Too few cases, or a malformed clause.
        StoreError: Milvus cannot serve.
    """
    cases, vectors = store.vectors()
    embeddings = comparable(vectors, DEFAULT_BALANCE)
    met = {str(row["key"]) for row in store.rows(["key"], where)} if where else {case.key for case in cases}
    wanted = [number for number, case in enumerate(cases) if case.key in met and (keys is None or case.key in keys)]
    fresh = [number for number in wanted if include_train or cases[number].split != LEARNT_FROM]
    asked = fresh[:MOST_CASES]  # they lie in the order of their keys, which is as good as chance
    gallery = _labelled(cases, embeddings, range(len(cases)))
    votes = answered(Ranking(gallery, _labelled(cases, embeddings, asked)), top_k)
    version = store.collection.removeprefix(PREFIX)
    about = {
        "made_by": "cxr calibrate",
        "made": datetime.now(timezone.utc).date().isoformat(),
        "balance": DEFAULT_BALANCE,
        "gallery_sha256": _digest(cases, range(len(cases))),
        "cases_sha256": _digest(cases, asked),
        "patients": len(set(votes.patients)),
    }
    after = confidence.measured(votes, top_k, error_rate)
    found = confidence.fit(votes, version, top_k, len(cases), about)
    own = read_calibration(store.calibration) if store.calibration else None
    is_new = own is None or _undated(own) != _undated(found)
    return Recalibration(
        found if is_new or own is None else own,
        is_new,
        _before(own or shipped().get(version), votes, len(cases), error_rate),
        after,
        len(wanted) - len(fresh),
        0 if keys is None else len(set(keys) - {case.key for case in cases}),
    )


def _before(present: Calibration | None, votes: confidence.Answered, gallery: int, error_rate: float) -> dict[str, Any] | None:
    if present is None or not set(votes.truth) & set(present.labels):
        return None
    without = sum(present.unmeasured(ballot, gallery) is not None for ballot in votes.ballots)
    return {**confidence.applied(present, votes, error_rate), "without": without}


def _labelled(cases: Sequence[Case], embeddings: NDArray[np.float32], numbers: Sequence[int]) -> LabelledSet:
    """As `query` tells whose films are whose: one patient whatever the source, or one picture."""
    some = [cases[number] for number in numbers]
    return LabelledSet(
        [case.key for case in some],
        embeddings[list(numbers)],
        [case.label for case in some],
        [case.patient_id or case.key for case in some],
        [case.source or "" for case in some],
        [case.pixels for case in some],
    )


def _digest(cases: Sequence[Case], numbers: Sequence[int]) -> str:
    """Of which cases, with which labels and pictures; the gallery gives them in the order of their keys."""
    told = hashlib.sha256()
    for number in numbers:
        case = cases[number]
        told.update(repr((case.key, case.label, case.patient_id, case.source, case.pixels)).encode())
    return told.hexdigest()


def _undated(calibration: Calibration) -> dict[str, Any]:
    told = calibration.as_json()
    return {**told, "about": {name: value for name, value in told["about"].items() if name != "made"}}
