"""Retrieval metrics with confidence intervals, over exact neighbours, images of the same patient left out.

recall@k: share of queries with at least one neighbour of their label among the first k (Zhong et al. 2020, Table 3).
precision@k: share of the first k neighbours that have the query's label, mean over queries.
mAP@R: Musgrave et al. 2020, "A Metric Learning Reality Check", with R the number of gallery images of the query's label.

Intervals (`intervals.py`) are over the queries' patients. Balanced accuracy is a mean over classes, so each of its resamples holds every
class: one that lacks a class is drawn again. Leaving the class out of that resample's mean instead would change, with the draw, what is
measured; drawing patients class by class would need a class for patients who have films of two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.labels import of_several, shares_of_findings
from cxr_retrieval.cases.manifest import ManifestRow, patient_key
from cxr_retrieval.errors import InputError, UsageError
from cxr_retrieval.evaluation.confidence import Answered, measured
from cxr_retrieval.evaluation.gains import gains, label_sets
from cxr_retrieval.evaluation.intervals import MIN_PATIENTS, RESAMPLES, draw, interval, mean_interval, weighted_interval, weights_of
from cxr_retrieval.retrieval.calibration import DEFAULT_ERROR_RATE, Ballot, ballot_of
from cxr_retrieval.retrieval.voting import weighted_vote

RECALL_AT: Final = (1, 2, 4, 10)
MIN_PATIENTS_OF_A_CLASS: Final = 2
"""For balanced accuracy: of a class with one patient every resample holds the same films, as if there were nothing to doubt."""
REDRAWS: Final = 50
"""How often the resamples that lack a class are drawn again, before balanced accuracy goes without an interval."""
BINS: Final = 10
SET_ASIDE: Final = 0.1
"""Share of the queries, the least confident, that a reader would look at again."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class LabelledSet:
    """Embeddings `[n, d]` of unit length with what is known of each image.

    Two images with one key in `patients` are of one patient (`comparable_patients`); two with one digest in `pixels` are one picture,
    whatever they are called (`image.pixel_digest`; "" where it is not known, no digests at all where none is).

    Raises:
        ValueError: Not as many of each as there are images.
    """

    image_ids: Sequence[str]
    embeddings: NDArray[np.float32]
    labels: Sequence[str]
    patients: Sequence[str]
    sources: Sequence[str]
    pixels: Sequence[str] = ()

    def __post_init__(self) -> None:
        sizes = {field.name: len(getattr(self, field.name)) for field in fields(self) if field.name != "pixels" or len(self.pixels)}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"a labelled set needs as many of each; got {sizes}")

    def __getitem__(self, chosen: NDArray[np.bool_] | Integers) -> LabelledSet:
        """Some images of it, by mask or by index."""
        index: list[int] = np.arange(len(self.labels))[chosen].tolist()
        return LabelledSet(
            [self.image_ids[i] for i in index],
            self.embeddings[chosen],
            [self.labels[i] for i in index],
            [self.patients[i] for i in index],
            [self.sources[i] for i in index],
            [self.pixels[i] for i in index] if self.pixels else (),
        )

    def beside(self, other: LabelledSet) -> LabelledSet:
        """One set after the other."""
        return LabelledSet(
            [*self.image_ids, *other.image_ids],
            np.concatenate([self.embeddings, other.embeddings]),
            [*self.labels, *other.labels],
            [*self.patients, *other.patients],
            [*self.sources, *other.sources],
            [*self.pixels, *other.pixels],
        )


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


def comparable_patients(gallery: Sequence[ManifestRow], queries: Sequence[ManifestRow]) -> tuple[list[str], list[str], list[str]]:
    """Patients of two sets as keys that are equal where two films may be of one patient; and what the manifests leave open.

    A patient_id that occurs without a source in any row is compared without one in all (so is an image_id, where patient_id is not
    known). That may leave out a stranger of the same number, but never counts a patient's own film.

    Returns:
        Keys of the gallery, keys of the queries, sentences for a reader (`evaluate` takes them as `warnings`).
    """
    without_source = {_number(row) for row in (*gallery, *queries) if row.source is None}

    def keys(rows: Sequence[ManifestRow]) -> list[str]:
        return [_number(row) if _number(row) in without_source else row.patient for row in rows]

    named = {"gallery's": gallery, "queries'": queries}
    sentences = []
    if any(row.patient_id for row in (*gallery, *queries)) and any(row.source for row in (*gallery, *queries)):
        for whose, rows in named.items():
            missing = sum(row.source is None for row in rows)
            sentences += _left_open(whose, "source", missing, len(rows), "patients are compared by patient_id alone, whatever their source")
    for whose, rows in named.items():
        missing = sum(row.patient_id is None for row in rows)
        sentences += _left_open(whose, "patient_id", missing, len(rows), "films of one patient are not recognised")
    return keys(gallery), keys(queries), sentences


def _number(row: ManifestRow) -> str:
    """The patient's key as it is where the source is not known."""
    return patient_key(None, row.patient_id, row.image_id)


def _left_open(whose: str, column: str, missing: int, rows: int, consequence: str) -> list[str]:
    if not missing:
        return []
    if missing == rows:
        return [f"the {whose} manifest has no column `{column}`, or nothing in it: {consequence}"]
    return [f"{missing} of {rows} rows of the {whose} manifest have no `{column}`: for those, {consequence}"]


def evaluate(
    gallery: LabelledSet,
    queries: LabelledSet,
    *,
    k: int,
    model_version: str,
    warnings: Sequence[str] = (),
    error_rate: float = DEFAULT_ERROR_RATE,
) -> dict[str, Any]:
    """The published JSON form of an evaluation result.

    Beside the figures over the whole gallery: `within_source` (gallery cut to the query's own source) and `cross_source` (the
    query's source taken out of the gallery), both over those queries whose label that gallery holds along with another one;
    `calibration` of the vote's confidence, and under `cross_fitted` what a calibration on such queries gives on patients it was not
    fitted on (null where they are too few); `nearest_from_own_source`, over the queries whose label another source holds, too, beside
    what it would be by chance; where labels hold several findings (`cases/labels.py`), `findings`: the measures of `gains.py` over the k
    nearest, and of each finding how well its share of the weight tells those that have it.
    Every `_ci` is null where there are too few patients; `balanced_accuracy_redrawn` says how many resamples were drawn again for its
    interval as they lacked a class.

    Args:
        gallery: What is searched.
        queries: What is asked about.
        k: Neighbours that vote.
        model_version: Repeated in the result.
        warnings: What a reader must know of the sets (`comparable_patients`), repeated in the result.
        error_rate: Of the sets of labels.

    Raises:
        InputError: Empty sets, or a query left without any neighbour.
    """
    if not len(gallery.labels) or not len(queries.labels):
        raise InputError(
            "nothing to evaluate", expected="gallery and queries", got=f"{len(gallery.labels)} and {len(queries.labels)} usable images"
        )
    labels = sorted({*gallery.labels, *queries.labels})
    everyone = np.ones(len(queries.labels), np.bool_)
    ranking = Ranking(gallery, queries)
    scores = _score(ranking, k, labels, Gallery.everything, everyone)
    votes = answered(ranking, k)
    findings = _findings(ranking, votes, k)
    return {
        "model_version": model_version,
        "k": k,
        "gallery": {"n": len(gallery.labels), "patients": len(set(gallery.patients))},
        "queries": {"n": len(queries.labels), "patients": len(set(queries.patients))},
        "overall": _summary(scores),
        "per_class": _per_class(scores, labels),
        "per_source": _per_source(scores, np.array(queries.sources), labels),
        "within_source": _restricted(ranking, k, labels, Gallery.own_source),
        "cross_source": _restricted(ranking, k, labels, Gallery.other_sources),
        "nearest_from_own_source": _own_source(scores, gallery, queries),
        "calibration": {**_calibration(scores), "cross_fitted": _cross_fitted(votes, k, error_rate)},
        **({"findings": findings} if findings else {}),
        "warnings": list(warnings),
    }


class Ranking:
    """A gallery in the order of likeness to any of the queries; what is the same for every query is worked out once.

    Strings become numbers that are equal where the strings are, so that a query costs one product, one sort and no string.

    Args:
        gallery: What is searched.
        queries: What is asked about.
    """

    def __init__(self, gallery: LabelledSet, queries: LabelledSet) -> None:
        self.gallery, self.queries = gallery, queries
        self.labels = _codes(gallery.labels, queries.labels)
        self.sources = _codes(gallery.sources, queries.sources)
        self._patients = _codes(gallery.patients, queries.patients)
        self._pixels = _codes(_digests(gallery, "of no query"), _digests(queries, "of no gallery image"))
        self._by_name = np.argsort(np.array(gallery.image_ids), kind="stable")

    def of(self, query: int, compared: Gallery = Gallery.everything) -> tuple[Integers, NDArray[np.float32]]:
        """Gallery indices by falling cosine similarity (ties by image_id), those left out that `admitted` leaves out; and similarities."""
        similarity = self.gallery.embeddings @ self.queries.embeddings[query]
        allowed = self._by_name[self.admitted(query, compared)[self._by_name]]
        order = allowed[np.argsort(-similarity[allowed], kind="stable")]
        return order, similarity[order]

    def admitted(self, query: int, compared: Gallery = Gallery.everything) -> NDArray[np.bool_]:
        """Which gallery images one query is compared with: never its own patient's, never its own picture."""
        admitted = (self._patients[0] != self._patients[1][query]) & (self._pixels[0] != self._pixels[1][query])
        if compared is not Gallery.everything:
            admitted &= (self.sources[0] == self.sources[1][query]) == (compared is Gallery.own_source)
        return admitted


def _digests(images: LabelledSet, unknown: str) -> list[str]:
    """A digest for each image; the word for an unknown one differs between gallery and queries, so that it equals nothing."""
    return [digest or unknown for digest in images.pixels] if images.pixels else [unknown] * len(images.labels)


def _codes(gallery: Sequence[str], queries: Sequence[str]) -> tuple[Integers, Integers]:
    """Numbers of both sets that are equal where the strings are."""
    number = {text: i for i, text in enumerate(dict.fromkeys((*gallery, *queries)))}
    return np.array([number[text] for text in gallery]), np.array([number[text] for text in queries])


def rank(
    gallery: LabelledSet, query: int, queries: LabelledSet, compared: Gallery = Gallery.everything
) -> tuple[Integers, NDArray[np.float32]]:
    """`Ranking.of` for a single query."""
    return Ranking(gallery, queries).of(query, compared)


def _score(ranking: Ranking, k: int, labels: Sequence[str], compared: Gallery, chosen: NDArray[np.bool_]) -> _Scores:
    gallery, queries = ranking.gallery, ranking.queries
    index = {label: i for i, label in enumerate(labels)}
    patients = {patient: i for i, patient in enumerate(sorted(set(queries.patients)))}
    voted, confidence, hits, precision, average, own = [], [], [], [], [], []
    numbers: list[int] = np.flatnonzero(chosen).tolist()
    for number in numbers:
        order, similarity = ranking.of(number, compared)
        if not len(order):
            raise InputError(f"{queries.image_ids[number]}: no gallery image of another patient", next_step="use a larger gallery")
        nearest: list[int] = order[:k].tolist()
        vote = weighted_vote([(gallery.labels[i], float(value)) for i, value in zip(nearest, similarity[:k], strict=True)])
        relevant = ranking.labels[0][order] == ranking.labels[1][number]
        voted.append(index[vote.label])
        confidence.append(vote.confidence)
        hits.append([float(relevant[:at].any()) for at in RECALL_AT])
        precision.append([float(relevant[:at].mean()) for at in RECALL_AT])
        average.append(average_precision_at_r(relevant))
        own.append(float(ranking.sources[0][order[0]] == ranking.sources[1][number]))
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


def answered(ranking: Ranking, k: int) -> Answered:
    """Votes of the k nearest on those queries that have any neighbour."""
    gallery, queries = ranking.gallery, ranking.queries
    ballots: list[Ballot] = []
    numbers: list[int] = []
    for number in range(len(queries.labels)):
        order, similarity = ranking.of(number)
        if len(order):
            nearest: list[int] = order[:k].tolist()
            ballots.append(
                ballot_of([(gallery.labels[i], float(value), gallery.sources[i]) for i, value in zip(nearest, similarity, strict=False)])
            )
            numbers.append(number)
    return Answered(
        ballots,
        [queries.labels[number] for number in numbers],
        [queries.patients[number] for number in numbers],
        [queries.sources[number] for number in numbers],
    )


def _cross_fitted(votes: Answered, k: int, error_rate: float) -> dict[str, Any] | None:
    try:
        return measured(votes, k, error_rate)
    except UsageError:
        return None


def _restricted(ranking: Ranking, k: int, labels: Sequence[str], compared: Gallery) -> dict[str, Any]:
    """Overall and per source, over queries for which the answer is both possible and not a foregone conclusion."""
    gallery, queries = ranking.gallery, ranking.queries
    held = set(zip(gallery.labels, gallery.sources, strict=True))
    there = {
        source: {label for label, other in held if (other == source) == (compared is Gallery.own_source)} for source in set(queries.sources)
    }
    chosen = np.array(
        [
            label in there[source] and len(there[source]) > 1 and bool(ranking.admitted(number, compared).any())
            for number, (label, source) in enumerate(zip(queries.labels, queries.sources, strict=True))
        ]
    )
    out: dict[str, Any] = {"n": int(chosen.sum()), "left_out": int((~chosen).sum())}
    if chosen.any():
        scores = _score(ranking, k, labels, compared, chosen)
        out |= {"overall": _summary(scores), "per_source": _per_source(scores, np.array(queries.sources)[chosen], labels)}
    return out


def _per_source(scores: _Scores, sources: NDArray[np.str_], labels: Sequence[str]) -> dict[str, Any]:
    return {
        str(source): {**_summary(part), "per_class": _per_class(part, labels)}
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


def _own_source(scores: _Scores, gallery: LabelledSet, queries: LabelledSet) -> dict[str, Any]:
    """How often the nearest neighbour comes from the query's own source, and would if any case of its label were as near as any other; over
    queries whose label another source holds, too, and `of` those of each source and label; null where there are none.
    """
    chosen = _label_elsewhere(gallery, queries)
    if not chosen.any():
        return {"n": 0, "share": None, "share_ci": None, "by_chance": None, "of": []}
    kinds = list(zip(queries.sources, queries.labels, strict=True))
    held = Counter(zip(gallery.sources, gallery.labels, strict=True))
    of_label = Counter(gallery.labels)
    chance = np.array([held[source, label] / max(1, of_label[label]) for source, label in kinds])
    of: list[dict[str, Any]] = []
    for source, label in sorted({kind for kind, mine in zip(kinds, chosen, strict=True) if mine}):
        mine = np.array([kind == (source, label) for kind in kinds])
        told = {"n": int(mine.sum()), "share": float(scores.own_source[mine].mean()), "by_chance": float(chance[mine].mean())}
        of.append({"source": source, "label": label, **told})
    own = scores.own_source[chosen]
    interval_ = mean_interval(own, scores.patients[chosen])
    return {"n": len(own), "share": float(own.mean()), "share_ci": interval_, "by_chance": float(chance[chosen].mean()), "of": of}


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
    return {
        "ece": float(ece),
        "bins": bins,
        "selective": {
            "set_aside": SET_ASIDE,
            "n": len(kept),
            "accuracy": float(correct[kept].mean()),
            "accuracy_ci": mean_interval(correct[kept], scores.patients[kept]),
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


def _summary(scores: _Scores) -> dict[str, Any]:
    correct = (scores.truth == scores.voted).astype(np.float64)
    weights = weights_of(scores.patients)
    balanced_ci, redrawn = balanced_interval(correct, scores.truth, scores.patients)
    out: dict[str, Any] = {
        "n": len(scores.truth),
        "accuracy": _mean(correct),
        "accuracy_ci": weighted_interval(correct, weights),
        "balanced_accuracy": float(_balanced(correct, scores.truth, np.ones((1, len(correct))))[0]),
        "balanced_accuracy_ci": balanced_ci,
        "balanced_accuracy_redrawn": redrawn,
        "map_at_r": _mean(scores.average_precision),
        "map_at_r_ci": weighted_interval(scores.average_precision, weights),
    }
    for name, values in (("recall_at", scores.hits), ("precision_at", scores.precision)):
        out[name] = {str(at): _mean(values[:, i]) for i, at in enumerate(RECALL_AT)}
        out[f"{name}_ci"] = {str(at): weighted_interval(values[:, i], weights) for i, at in enumerate(RECALL_AT)}
    return out


def _mean(values: Floats) -> float:
    return float((np.ones((1, len(values))) @ values)[0] / len(values))


def area(scores: Floats, came: NDArray[Any], weights: Floats) -> Floats:
    """Area under the ROC curve for each row of weights `[resamples, n]`: in how many pairs the case to which it came has the
    greater score `[n]`, ties half. NaN where there is one kind of case alone.

    Args:
        came: `[n]`, true or 1 of the cases to be told apart.
    """
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.append(True, np.diff(scores[order]) != 0))  # of those that are equal
    drawn, positive = weights[:, order], np.asarray(came, np.bool_)[order]
    yes, no = (np.add.reduceat(drawn * kind, first, axis=1) for kind in (positive, ~positive))
    pairs = yes.sum(axis=1) * no.sum(axis=1)
    below = np.cumsum(no, axis=1) - no
    return np.divide((yes * (below + no / 2)).sum(axis=1), pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def _findings(ranking: Ranking, votes: Answered, k: int) -> dict[str, Any] | None:
    """How the k nearest fare by finding; None where every label is a single one."""
    gallery, queries = ranking.gallery, ranking.queries
    if not of_several((*gallery.labels, *queries.labels)):
        return None
    held, names = label_sets([*gallery.labels, *queries.labels])
    of_gallery, of_queries = held[: len(gallery.labels)], held[len(gallery.labels) :]
    nearest = [ranking.of(number)[0][:k] for number in range(len(queries.labels))]
    asked = np.array([len(one) > 0 for one in nearest])
    found = gains(of_queries[asked], [of_gallery[one] for one in nearest if len(one)])
    shares = [shares_of_findings(ballot.shares) for ballot in votes.ballots]
    weights = weights_of(np.array(votes.patients))
    once = np.ones((1, len(shares)))
    per: dict[str, Any] = {}
    for column, name in enumerate(names):
        said, truth = np.array([one.get(name, 0.0) for one in shares]), of_queries[asked][:, column]
        known = bool(0 < truth.sum() < len(truth))
        drawn = None if weights is None or not known else area(said, truth, weights)
        per[name] = {
            "n": int(truth.sum()),
            "auroc": float(area(said, truth, once)[0]) if known else None,
            "auroc_ci": None if drawn is None else interval(drawn[np.isfinite(drawn)]),
        }
    return {**asdict(found), "per_finding": per}


def balanced_interval(correct: Floats, truth: NDArray[np.generic], patients: NDArray[np.generic]) -> tuple[list[float] | None, int | None]:
    """The interval of balanced accuracy, every class in every resample, and how many resamples were drawn again for that.

    Both None of fewer than `MIN_PATIENTS` patients, or fewer than `MIN_PATIENTS_OF_A_CLASS` in any class, and where `REDRAWS` do not do.

    Args:
        correct: Per image, 1 where the vote is right.
        truth: Its class.
        patients: Its patient.
    """
    unique, position = np.unique(patients, return_inverse=True)
    classes, number = np.unique(truth, return_inverse=True)
    has = np.zeros((len(unique), len(classes)), np.int64)
    has[position, number] = 1
    if len(unique) < MIN_PATIENTS or has.sum(axis=0).min() < MIN_PATIENTS_OF_A_CLASS:
        return None, None
    random, redrawn = np.random.default_rng(0), 0
    drawn = draw(random, len(unique), RESAMPLES)
    for _ in range(REDRAWS):
        lacking = (drawn @ has == 0).any(axis=1)
        if not lacking.any():
            return interval(_balanced(correct, truth, drawn[:, position].astype(np.float64))), redrawn
        redrawn += int(lacking.sum())
        drawn[lacking] = draw(random, len(unique), int(lacking.sum()))
    return None, None


def balanced_accuracy(correct: NDArray[Any], truth: NDArray[Any]) -> float:
    """Mean over classes of the share of right votes; `correct` `[n]` is 1 where the vote is right."""
    return float(np.mean([correct[truth == label].mean() for label in np.unique(truth)]))


def _balanced(correct: Floats, truth: NDArray[np.generic], weights: Floats) -> Floats:
    """Mean over classes of the share of right votes, for each row of weights `[resamples, n]`, of which each holds every class."""
    mine = [weights * (truth == label) for label in np.unique(truth)]
    return np.mean([part @ correct / part.sum(axis=1) for part in mine], axis=0)


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
