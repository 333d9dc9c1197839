"""Retrieval metrics with confidence intervals, over exact neighbours, images of the same patient left out.

recall@k: share of queries with at least one neighbour of their label among the first k (Zhong et al. 2020, Table 3).
mAP@R: Musgrave et al. 2020, "A Metric Learning Reality Check", eq. 5, with R the number of gallery images of the query's
label. Intervals: percentile bootstrap (95 %, 1000 resamples with a fixed seed) over the queries' patients, not images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.errors import InputError
from cxr_retrieval.voting import weighted_vote

RECALL_AT: Final = (1, 2, 4, 10)
RESAMPLES: Final = 1000

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class LabelledSet:
    """Embeddings `[n, d]` of unit length with what is known of each image."""

    image_ids: Sequence[str]
    embeddings: NDArray[np.float32]
    labels: Sequence[str]
    patients: Sequence[str]
    sources: Sequence[str]


@dataclass(frozen=True)
class _Scores:
    """Per query: true and voted label (as indices), hits at each k, average precision at R, patient."""

    truth: Integers
    voted: Integers
    hits: Floats
    average_precision: Floats
    patients: Integers

    def __getitem__(self, chosen: NDArray[np.bool_]) -> _Scores:
        return _Scores(self.truth[chosen], self.voted[chosen], self.hits[chosen], self.average_precision[chosen], self.patients[chosen])


def evaluate(gallery: LabelledSet, queries: LabelledSet, *, k: int, model_version: str) -> dict[str, Any]:
    """The published JSON form of an evaluation result.

    Raises:
        InputError: Empty sets, or a query left without any neighbour.
    """
    if not len(gallery.labels) or not len(queries.labels):
        raise InputError(
            "nothing to evaluate", expected="gallery and queries", got=f"{len(gallery.labels)} and {len(queries.labels)} usable images"
        )
    labels = sorted({*gallery.labels, *queries.labels})
    scores = _score(gallery, queries, k, labels)
    sources = np.array(queries.sources)
    return {
        "model_version": model_version,
        "k": k,
        "gallery": {"n": len(gallery.labels), "patients": len(set(gallery.patients))},
        "queries": {"n": len(queries.labels), "patients": len(set(queries.patients))},
        "overall": _summary(scores, labels),
        "per_class": _per_class(scores, labels),
        "per_source": {
            source: {**_summary(part, labels), "per_class": _per_class(part, labels)}
            for source in sorted(set(queries.sources))
            for part in [scores[sources == source]]
        },
    }


def rank(gallery: LabelledSet, query: int, queries: LabelledSet) -> tuple[Integers, NDArray[np.float32]]:
    """Gallery indices by falling cosine similarity (ties by image_id), without the query's own patient; and similarities."""
    similarity = gallery.embeddings @ queries.embeddings[query]
    allowed = np.flatnonzero(np.array(gallery.patients) != queries.patients[query])
    order = np.lexsort((np.array(gallery.image_ids)[allowed], -similarity[allowed]))
    return allowed[order], similarity[allowed[order]]


def _score(gallery: LabelledSet, queries: LabelledSet, k: int, labels: Sequence[str]) -> _Scores:
    index = {label: i for i, label in enumerate(labels)}
    patients = {patient: i for i, patient in enumerate(sorted(set(queries.patients)))}
    gallery_labels = np.array(gallery.labels)
    voted, hits, precisions = [], [], []
    for number, label in enumerate(queries.labels):
        order, similarity = rank(gallery, number, queries)
        if not len(order):
            raise InputError(f"{queries.image_ids[number]}: no gallery image of another patient", next_step="use a larger gallery")
        found = gallery_labels[order]
        vote = weighted_vote([(str(name), float(value)) for name, value in zip(found[:k], similarity[:k], strict=True)])
        voted.append(index[vote.label])
        relevant = found == label
        hits.append([float(relevant[:at].any()) for at in RECALL_AT])
        precisions.append(average_precision_at_r(relevant))
    return _Scores(
        np.array([index[label] for label in queries.labels]),
        np.array(voted),
        np.array(hits),
        np.array(precisions),
        np.array([patients[patient] for patient in queries.patients]),
    )


def average_precision_at_r(relevant: NDArray[np.bool_]) -> float:
    """(1/R) Σ_{i≤R} P(i)·rel(i) over a ranking's relevance flags, R their sum; 0 where nothing is relevant."""
    r = int(relevant.sum())
    if r == 0:
        return 0.0
    first = relevant[:r]
    precision = np.cumsum(first) / np.arange(1, r + 1)
    return float((precision * first).sum() / r)


def _summary(scores: _Scores, labels: Sequence[str]) -> dict[str, Any]:
    point = _metrics(scores, labels, np.ones((1, len(scores.truth))))
    resampled = _metrics(scores, labels, patient_weights(scores.patients))
    out: dict[str, Any] = {"n": len(scores.truth)}
    for name in ("accuracy", "balanced_accuracy", "map_at_r"):
        out[name] = float(point[name][0])
        out[f"{name}_ci"] = interval(resampled[name])
    out["recall_at"] = {str(at): float(point[f"recall_{at}"][0]) for at in RECALL_AT}
    out["recall_at_ci"] = {str(at): interval(resampled[f"recall_{at}"]) for at in RECALL_AT}
    return out


def _metrics(scores: _Scores, labels: Sequence[str], weights: Floats) -> dict[str, Floats]:
    """Every metric for each row of query weights `[resamples, n]`; a class without weight leaves the balanced mean."""
    total = weights.sum(axis=1)
    correct = (scores.truth == scores.voted).astype(np.float64)
    per_class = []
    for c in range(len(labels)):
        mine = weights * (scores.truth == c)
        size = mine.sum(axis=1)
        per_class.append(np.divide(mine @ correct, size, out=np.full(len(size), np.nan), where=size > 0))
    out = {
        "accuracy": weights @ correct / total,
        "balanced_accuracy": np.nanmean(np.array(per_class), axis=0),
        "map_at_r": weights @ scores.average_precision / total,
    }
    return out | {f"recall_{at}": weights @ scores.hits[:, i] / total for i, at in enumerate(RECALL_AT)}


def patient_weights(patients: NDArray[np.generic]) -> Floats:
    """How often each image is drawn in each bootstrap resample of whole patients, `[resamples, n]`; the seed is fixed."""
    unique, position = np.unique(patients, return_inverse=True)
    drawn = np.random.default_rng(0).multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=RESAMPLES)
    return drawn[:, position].astype(np.float64)


def interval(values: Floats) -> list[float]:
    """The 95 % percentile interval of a metric's resampled values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def _per_class(scores: _Scores, labels: Sequence[str]) -> dict[str, Any]:
    """Only classes that occur among these queries; ppv and f1 are null where nothing was voted so."""
    out: dict[str, Any] = {}
    for c, label in enumerate(labels):
        true, voted = scores.truth == c, scores.voted == c
        if not true.any():
            continue
        both = float((true & voted).sum())
        sensitivity = both / float(true.sum())
        ppv = both / float(voted.sum()) if voted.any() else None
        out[label] = {
            "n": int(true.sum()),
            "sensitivity": sensitivity,
            "ppv": ppv,
            "f1": 2 * both / float(true.sum() + voted.sum()) if voted.any() else None,
            "recall_at": {str(at): float(scores.hits[true, i].mean()) for i, at in enumerate(RECALL_AT)},
        }
    return out
