"""Retrieval metrics with confidence intervals, over exact neighbours, images of the same patient left out.

recall@k: share of queries with at least one neighbour of their label among the first k (Zhong et al. 2020, Table 3).
precision@k: share of the first k neighbours that have the query's label, mean over queries.
mAP@R: Musgrave et al. 2020, "A Metric Learning Reality Check", eq. 5, with R the number of gallery images of the query's
label. Intervals: percentile bootstrap (95 %, 1000 resamples with a fixed seed) over the queries' patients, not images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.errors import InputError
from cxr_retrieval.voting import weighted_vote

RECALL_AT: Final = (1, 2, 4, 10)
RESAMPLES: Final = 1000
BINS: Final = 10
SET_ASIDE: Final = 0.1
"""Share of the queries, the least confident, that a reader would look at again."""

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
    """Per query: true and voted label (as indices), the vote's confidence, hits and precision at each k, average precision
    at R, whether the nearest neighbour is of the query's own source, patient.
    """

    truth: Integers
    voted: Integers
    confidence: Floats
    hits: Floats
    precision: Floats
    average_precision: Floats
    own_source: Floats
    patients: Integers

    def __getitem__(self, chosen: NDArray[np.bool_]) -> _Scores:
        return _Scores(*(getattr(self, field.name)[chosen] for field in fields(self)))


class Gallery(str, Enum):
    """Which gallery images a query is compared with, its own patient's left out in any case."""

    everything = "everything"
    own_source = "own_source"
    other_sources = "other_sources"


def evaluate(gallery: LabelledSet, queries: LabelledSet, *, k: int, model_version: str) -> dict[str, Any]:
    """The published JSON form of an evaluation result.

    Beside the figures over the whole gallery: `within_source` (gallery cut to the query's own source) and `cross_source` (the
    query's source taken out of the gallery), both over those queries whose label that gallery holds along with another one;
    `calibration` of the vote's confidence; `nearest_from_own_source`, over the queries whose label another source holds, too.

    Raises:
        InputError: Empty sets, or a query left without any neighbour.
    """
    if not len(gallery.labels) or not len(queries.labels):
        raise InputError(
            "nothing to evaluate", expected="gallery and queries", got=f"{len(gallery.labels)} and {len(queries.labels)} usable images"
        )
    labels = sorted({*gallery.labels, *queries.labels})
    everyone = np.ones(len(queries.labels), np.bool_)
    scores = _score(gallery, queries, k, labels, Gallery.everything, everyone)
    return {
        "model_version": model_version,
        "k": k,
        "gallery": {"n": len(gallery.labels), "patients": len(set(gallery.patients))},
        "queries": {"n": len(queries.labels), "patients": len(set(queries.patients))},
        "overall": _summary(scores, labels),
        "per_class": _per_class(scores, labels),
        "per_source": _per_source(scores, np.array(queries.sources), labels),
        "within_source": _restricted(gallery, queries, k, labels, Gallery.own_source),
        "cross_source": _restricted(gallery, queries, k, labels, Gallery.other_sources),
        "nearest_from_own_source": _own_source(scores, _label_elsewhere(gallery, queries)),
        "calibration": _calibration(scores),
    }


def rank(
    gallery: LabelledSet, query: int, queries: LabelledSet, compared: Gallery = Gallery.everything
) -> tuple[Integers, NDArray[np.float32]]:
    """Gallery indices by falling cosine similarity (ties by image_id), without the query's own patient; and similarities."""
    similarity = gallery.embeddings @ queries.embeddings[query]
    allowed = np.flatnonzero(_admitted(gallery, query, queries, compared))
    order = np.lexsort((np.array(gallery.image_ids)[allowed], -similarity[allowed]))
    return allowed[order], similarity[allowed[order]]


def _admitted(gallery: LabelledSet, query: int, queries: LabelledSet, compared: Gallery) -> NDArray[np.bool_]:
    """Which gallery images one query is compared with."""
    admitted = np.array(gallery.patients) != queries.patients[query]
    if compared is not Gallery.everything:
        admitted &= (np.array(gallery.sources) == queries.sources[query]) == (compared is Gallery.own_source)
    return admitted


def _score(
    gallery: LabelledSet, queries: LabelledSet, k: int, labels: Sequence[str], compared: Gallery, chosen: NDArray[np.bool_]
) -> _Scores:
    index = {label: i for i, label in enumerate(labels)}
    patients = {patient: i for i, patient in enumerate(sorted(set(queries.patients)))}
    gallery_labels, gallery_sources = np.array(gallery.labels), np.array(gallery.sources)
    voted, confidence, hits, precision, average, own = [], [], [], [], [], []
    numbers: list[int] = np.flatnonzero(chosen).tolist()
    for number in numbers:
        order, similarity = rank(gallery, number, queries, compared)
        if not len(order):
            raise InputError(f"{queries.image_ids[number]}: no gallery image of another patient", next_step="use a larger gallery")
        found = gallery_labels[order]
        vote = weighted_vote([(str(name), float(value)) for name, value in zip(found[:k], similarity[:k], strict=True)])
        relevant = found == queries.labels[number]
        voted.append(index[vote.label])
        confidence.append(vote.confidence)
        hits.append([float(relevant[:at].any()) for at in RECALL_AT])
        precision.append([float(relevant[:at].mean()) for at in RECALL_AT])
        average.append(average_precision_at_r(relevant))
        own.append(float(gallery_sources[order[0]] == queries.sources[number]))
    return _Scores(
        np.array([index[queries.labels[number]] for number in numbers]),
        np.array(voted),
        np.array(confidence),
        np.array(hits),
        np.array(precision),
        np.array(average),
        np.array(own),
        np.array([patients[queries.patients[number]] for number in numbers]),
    )


def _restricted(gallery: LabelledSet, queries: LabelledSet, k: int, labels: Sequence[str], compared: Gallery) -> dict[str, Any]:
    """Overall and per source, over queries for which the answer is both possible and not a foregone conclusion."""
    sources, held = np.array(gallery.sources), np.array(gallery.labels)
    chosen = np.zeros(len(queries.labels), np.bool_)
    for source in set(queries.sources):
        there = set(held[(sources == source) == (compared is Gallery.own_source)])
        mine = [s == source and label in there and len(there) > 1 for s, label in zip(queries.sources, queries.labels, strict=True)]
        chosen |= np.array(mine)
    chosen &= np.array([_admitted(gallery, number, queries, compared).any() for number in range(len(chosen))])
    out: dict[str, Any] = {"n": int(chosen.sum()), "left_out": int((~chosen).sum())}
    if chosen.any():
        scores = _score(gallery, queries, k, labels, compared, chosen)
        out |= {"overall": _summary(scores, labels), "per_source": _per_source(scores, np.array(queries.sources)[chosen], labels)}
    return out


def _per_source(scores: _Scores, sources: NDArray[np.str_], labels: Sequence[str]) -> dict[str, Any]:
    return {
        str(source): {**_summary(part, labels), "per_class": _per_class(part, labels)}
        for source in sorted(set(sources.tolist()))
        for part in [scores[sources == source]]
    }


def _label_elsewhere(gallery: LabelledSet, queries: LabelledSet) -> NDArray[np.bool_]:
    """Queries whose label the gallery holds from their own source and from another one: only there is there a choice."""
    held = set(zip(gallery.labels, gallery.sources, strict=True))
    return np.array(
        [
            (label, source) in held and any(one == label and other != source for one, other in held)
            for label, source in zip(queries.labels, queries.sources, strict=True)
        ]
    )


def _own_source(scores: _Scores, chosen: NDArray[np.bool_]) -> dict[str, Any]:
    """How often the nearest neighbour comes from the query's own source; null where no label occurs in two sources."""
    if not chosen.any():
        return {"n": 0, "share": None, "share_ci": None}
    own, weights = scores.own_source[chosen], patient_weights(scores.patients[chosen])
    return {"n": int(chosen.sum()), "share": float(own.mean()), "share_ci": interval(weights @ own / weights.sum(axis=1))}


def _calibration(scores: _Scores) -> dict[str, Any]:
    """Expected calibration error over ten equal bins (Guo et al. 2017, eq. 3), and accuracy without the least confident tenth."""
    correct = (scores.truth == scores.voted).astype(np.float64)
    position = np.minimum((scores.confidence * BINS).astype(np.int64), BINS - 1)
    bins: list[dict[str, Any]] = []
    for number in range(BINS):
        mine = position == number
        bins.append(
            {
                "from": number / BINS,
                "to": (number + 1) / BINS,
                "n": int(mine.sum()),
                "confidence": float(scores.confidence[mine].mean()) if mine.any() else None,
                "accuracy": float(correct[mine].mean()) if mine.any() else None,
            }
        )
    ece = sum(entry["n"] * abs(entry["confidence"] - entry["accuracy"]) for entry in bins if entry["n"]) / len(correct)
    kept = np.argsort(-scores.confidence, kind="stable")[: len(correct) - int(SET_ASIDE * len(correct))]
    weights = patient_weights(scores.patients[kept])
    return {
        "ece": float(ece),
        "bins": bins,
        "selective": {
            "set_aside": SET_ASIDE,
            "n": len(kept),
            "accuracy": float(correct[kept].mean()),
            "accuracy_ci": interval(weights @ correct[kept] / weights.sum(axis=1)),
        },
    }


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
    for name in ("recall", "precision"):
        out[f"{name}_at"] = {str(at): float(point[f"{name}_{at}"][0]) for at in RECALL_AT}
        out[f"{name}_at_ci"] = {str(at): interval(resampled[f"{name}_{at}"]) for at in RECALL_AT}
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
    for i, at in enumerate(RECALL_AT):
        out |= {f"recall_{at}": weights @ scores.hits[:, i] / total, f"precision_{at}": weights @ scores.precision[:, i] / total}
    return out


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
