"""Fits what `retrieval/calibration.py` applies, and measures it by cross-fitting: nothing is measured on a patient it was fitted on.

Expected calibration error: over ten bins of equally many answers, the mean of |probability − share right|, as the bins are filled (Naeini
et al. 2015). Of so few answers chance alone makes it greater than nothing; beside it stands the root of the mean square, from which each
bin's own variance is subtracted (Kumar et al. 2019). Intervals: as in `intervals.py`; those of a calibration error lie high for the same
reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.errors import UsageError
from cxr_retrieval.evaluation.intervals import interval, mean_interval, weights_of
from cxr_retrieval.retrieval.calibration import DEFAULT_ERROR_RATE, LEAST_SHARE, PERCENTS, Ballot, Calibration, depth_of, percent

MIN_CASES: Final = 100
"""Of fewer, a bound on one answer in ten is a guess: its standard error is three points."""
MIN_OF_A_LABEL: Final = 10
"""Of fewer, a label cannot be excluded at the usual error rate even by all of them."""
FOLDS: Final = 50
"""Groups of patients, each measured by what the others fit. Many, so that what is measured has nearly all the cases that the user's has."""
BINS: Final = 10

_NEIGHBOURHOOD: Final = 30
"""Cases' worth of weight that a source needs to be told apart, and cases that a neighbourhood needs for thresholds of its own."""
_AT_HOME: Final = 6
"""Cases of one label in a neighbourhood by which that label is judged alone; fewer than nine cannot exclude it at a rate of 0.1."""
_FARTHEST: Final = 0.01
_RIDGE: Final = 0.1
"""Pulls both fitted numbers to 0, so that votes that are always right do not drive them beyond all bounds."""
_STEPS: Final = 50
_DIGITS: Final = 6

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Answered:
    """Votes on cases whose label is known, as many of each.

    Attributes:
        truth: Labels. patients: Keys that are equal where two cases may be of one patient. sources: Of the cases themselves, "" if unknown.
    """

    ballots: Sequence[Ballot]
    truth: Sequence[str]
    patients: Sequence[str]
    sources: Sequence[str]


@dataclass(frozen=True)
class _Votes:
    """The same as arrays: n cases, c labels, s sources of neighbours."""

    labels: tuple[str, ...]
    sources: tuple[str, ...]
    shares: Floats
    weights: Floats
    nearest: Floats
    truth: Integers

    @property
    def logs(self) -> Floats:
        """`[n, c]`: log(share + LEAST_SHARE)."""
        return np.log(self.shares + LEAST_SHARE)

    @property
    def depths(self) -> Floats:
        """`[n]`: D."""
        return np.array([depth_of(similarity) for similarity in self.nearest.tolist()])

    def __getitem__(self, chosen: Flags) -> _Votes:
        cut = (self.shares[chosen], self.weights[chosen], self.nearest[chosen], self.truth[chosen])
        return _Votes(self.labels, self.sources, *cut)


def fit(answered: Answered, model_version: str, top_k: int, gallery: int, about: Mapping[str, Any]) -> Calibration:
    """The calibration of these cases.

    Labels with fewer than MIN_OF_A_LABEL cases are left out, with the cases in whose vote they had a share.

    Raises:
        UsageError: Fewer than MIN_CASES, or fewer than two labels with enough of them.
    """
    votes, _ = _usable(answered, top_k)
    return _fit(votes, model_version, top_k, gallery, {**about, "cases": len(votes.truth), "of_a_label": _counts(votes)})


def measured(answered: Answered, top_k: int, error_rate: float = DEFAULT_ERROR_RATE) -> dict[str, Any]:
    """How well a calibration on such cases does on patients it was not fitted on; keys as published in `calibration.cross_fitted`.

    Raises:
        UsageError: As `fit`.
    """
    votes, used = _usable(answered, top_k)
    patients, sources = np.array(answered.patients)[used], np.array(answered.sources)[used]
    fold = _folds(patients)
    calibrated, inside = np.zeros(len(fold)), np.zeros((len(fold), len(votes.labels)), np.bool_)
    for number in range(int(fold.max()) + 1):
        mine = fold == number
        fitted = _fit(votes[~mine], "", top_k, 0, {})
        calibrated[mine], inside[mine] = _applied(fitted, votes[mine], error_rate)
    return _report(votes, calibrated, inside, patients, sources, error_rate, int(fold.max()) + 1)


def applied(calibration: Calibration, answered: Answered, error_rate: float = DEFAULT_ERROR_RATE) -> dict[str, Any]:
    """How well a calibration does on cases it was not fitted on, of the labels that it knows; keys as of `measured`.

    Cases that are of another label, or in whose vote another one had a share, are left out.

    Raises:
        UsageError: None is left.
    """
    known = set(calibration.labels)
    used = np.array([truth in known and set(one.shares) <= known for one, truth in zip(answered.ballots, answered.truth, strict=True)])
    if not used.any():
        raise UsageError("no case to measure the calibration on", expected=f"labels {', '.join(calibration.labels)}")
    votes = _votes(answered, used, calibration.labels)
    calibrated, inside = _applied(calibration, votes, error_rate)
    return _report(votes, calibrated, inside, np.array(answered.patients)[used], np.array(answered.sources)[used], error_rate, 0)


def expected_error(probability: Floats, right: Floats, weights: Floats | None = None) -> Floats:
    """Expected calibration error for each row of weights `[resamples, n]`, by default of one row of ones; bins are filled as they are."""
    weights = np.ones((1, len(right))) if weights is None else weights
    gaps = [abs(weights[:, mine] @ (probability - right)[mine]) for mine in _bins(probability)]
    return np.sum(gaps, axis=0) / weights.sum(axis=1)


def _usable(answered: Answered, top_k: int) -> tuple[_Votes, Flags]:
    """The cases that can be fitted, and which they are."""
    whole = np.array([one.count == top_k for one in answered.ballots], np.bool_)
    counts = {label: sum(truth == label for truth in np.array(answered.truth)[whole].tolist()) for label in sorted(set(answered.truth))}
    labels = tuple(label for label, count in counts.items() if count >= MIN_OF_A_LABEL)
    used = whole & np.array(
        [truth in labels and set(one.shares) <= set(labels) for one, truth in zip(answered.ballots, answered.truth, strict=True)], np.bool_
    )
    if used.sum() < MIN_CASES or len(labels) < 2:
        told = ", ".join(f"{label} {count}" for label, count in counts.items()) or "none"
        raise UsageError(
            "too few cases to calibrate on",
            expected=f"{MIN_CASES} with a vote of {top_k} others, of at least two labels that have {MIN_OF_A_LABEL} each: "
            "fewer cannot tell one wrong answer in ten from two",
            got=f"{int(used.sum())} ({told})",
            next_step="ingest more confirmed cases, or choose more of them",
        )
    return _votes(answered, used, labels), used


def _votes(answered: Answered, used: Flags, labels: tuple[str, ...]) -> _Votes:
    ballots = [one for one, mine in zip(answered.ballots, used.tolist(), strict=True) if mine]
    truth = [label for label, mine in zip(answered.truth, used.tolist(), strict=True) if mine]
    sources = tuple(sorted({source for one in ballots for source in one.sources}))
    return _Votes(
        labels,
        sources,
        np.array([[one.shares.get(label, 0.0) for label in labels] for one in ballots]),
        np.array([[one.sources.get(source, 0.0) for source in sources] for one in ballots]),
        np.array([one.nearest for one in ballots]),
        np.array([labels.index(label) for label in truth]),
    )


def _counts(votes: _Votes) -> dict[str, int]:
    return {label: int((votes.truth == number).sum()) for number, label in enumerate(votes.labels)}


def _fit(votes: _Votes, model_version: str, top_k: int, gallery: int, about: Mapping[str, Any]) -> Calibration:
    offset, slope = _temperature(votes)
    means = votes.weights.mean(axis=0)
    enough = votes.weights.sum(axis=0) >= _NEIGHBOURHOOD
    bare = Calibration(
        model_version,
        top_k,
        gallery,
        votes.labels,
        offset,
        slope,
        {source: round(mean, _DIGITS) for source, mean in zip(votes.sources, means.tolist(), strict=True)},
        tuple(source for source, mine in zip(votes.sources, enough.tolist(), strict=True) if mine),
        {},
        round(float(np.quantile(votes.nearest, _FARTHEST)), _DIGITS),
        about,
    )
    probabilities = _probabilities(bare, votes)
    true = probabilities[np.arange(len(votes.truth)), votes.truth]
    places = _places(bare, votes)
    thresholds = {
        place: {label: _thresholds(true, places == place, votes.truth == number) for number, label in enumerate(votes.labels)}
        for place in ("", *bare.neighbourhoods)
    }
    return replace(bare, thresholds=thresholds)


def _temperature(votes: _Votes) -> tuple[float, float]:
    """Offset and slope of greatest likelihood: the logits (offset + slope × D) log(share + LEAST_SHARE) are linear in both.

    The slope is 0 where a greater distance does not tell of more errors.
    """
    depths, logs = votes.depths, votes.logs
    offset, slope = _newton(np.stack([logs, logs * depths[:, None]], axis=2), votes.truth).tolist()
    if slope <= 0:
        offset, slope = float(_newton(logs[:, :, None], votes.truth)[0]), 0.0
    return round(offset, _DIGITS), round(slope, _DIGITS)


def _newton(features: Floats, truth: Integers) -> Floats:
    """Coefficients of a conditional logit with a ridge; features `[n, c, p]`. The likelihood is concave, so any ascent ends at its top."""
    found, rows = np.zeros(features.shape[2]), np.arange(len(truth))

    def loss(at: Floats) -> float:
        logits = features @ at
        return float((_log_sum(logits) - logits[rows, truth]).sum() + _RIDGE / 2 * at @ at)

    for _ in range(_STEPS):
        logits = features @ found
        shares = np.exp(logits - _log_sum(logits)[:, None])
        mean = np.einsum("nc,ncp->np", shares, features)
        gradient = (mean - features[rows, truth]).sum(axis=0) + _RIDGE * found
        spread = np.einsum("nc,ncp,ncq->pq", shares, features, features) - mean.T @ mean + _RIDGE * np.eye(len(found))
        step = np.linalg.solve(spread, gradient)
        length = 1.0
        while length > 1e-6 and loss(found - length * step) > loss(found):
            length /= 2
        found = found - length * step
        if abs(step).max() < 1e-9:
            break
    return found


def _log_sum(logits: Floats) -> Floats:
    top = logits.max(axis=1)
    return top + np.log(np.exp(logits - top[:, None]).sum(axis=1))


def _probabilities(calibration: Calibration, votes: _Votes) -> Floats:
    """`Calibration.probabilities` of all votes, `[n, c]`."""
    logits = np.maximum(0, calibration.offset + calibration.slope * votes.depths)[:, None] * votes.logs
    return np.exp(logits - _log_sum(logits)[:, None])


def _places(calibration: Calibration, votes: _Votes) -> NDArray[np.str_]:
    """`Calibration.neighbourhood` of all votes."""
    if not calibration.neighbourhoods:
        return np.full(len(votes.truth), "")
    columns = [votes.sources.index(source) if source in votes.sources else None for source in calibration.neighbourhoods]
    none = np.zeros(len(votes.truth))
    lifts = np.stack(
        [
            (none if column is None else votes.weights[:, column]) / calibration.sources[source]
            for source, column in zip(calibration.neighbourhoods, columns, strict=True)
        ],
        axis=1,
    )
    return np.where(lifts.max(axis=1) > 0, np.array(calibration.neighbourhoods)[lifts.argmax(axis=1)], "")


def _thresholds(true: Floats, here: Flags, labelled: Flags) -> tuple[float, ...]:
    """The least probability in the set, for each of PERCENTS: from the cases of the label here, else from all here, else from all."""
    if (here & labelled).sum() >= _AT_HOME:
        scores = true[here & labelled]
    elif here.sum() >= _NEIGHBOURHOOD:
        scores = true[here]
    else:
        scores = true
    falling = np.sort(scores)[::-1]
    found: list[float] = []
    for rate in PERCENTS:
        rank = math.ceil((len(falling) + 1) * (100 - rate) / 100 - 1e-9)  # so many must be in: split conformal's quantile
        kept = 0.0 if rank > len(falling) else float(falling[rank - 1])
        found.append(math.floor(kept * 10**_DIGITS) / 10**_DIGITS)
    return tuple(found)


def _applied(calibration: Calibration, votes: _Votes, error_rate: float) -> tuple[Floats, Flags]:
    """Of each vote the probability of its label, and which labels are in its set `[n, c]`."""
    column = percent(error_rate) - PERCENTS.start
    table = {place: np.array([rows[label][column] for label in votes.labels]) for place, rows in calibration.thresholds.items()}
    least = np.stack([table[str(place)] for place in _places(calibration, votes)])
    probabilities = _probabilities(calibration, votes)
    voted = votes.shares.argmax(axis=1)
    return probabilities[np.arange(len(voted)), voted], probabilities >= least


def _folds(patients: NDArray[np.str_]) -> Integers:
    """A fold for each case, the same for all of one patient; drawn with a fixed seed."""
    unique, position = np.unique(patients, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(unique))
    return (order % min(FOLDS, len(unique)))[position]


def _bins(probability: Floats) -> list[Integers]:
    return [mine for mine in np.array_split(np.argsort(probability, kind="stable"), BINS) if len(mine)]


def _report(
    votes: _Votes, calibrated: Floats, inside: Flags, patients: NDArray[np.str_], sources: NDArray[np.str_], error_rate: float, folds: int
) -> dict[str, Any]:
    voted = votes.shares.argmax(axis=1)
    right = (voted == votes.truth).astype(np.float64)
    rows = np.arange(len(voted))
    covered, size = inside[rows, votes.truth].astype(np.float64), inside.sum(axis=1)
    single = inside[rows, voted] & (size == 1)

    def part(mine: Flags) -> dict[str, Any]:
        told = single & mine
        return {
            "n": int(mine.sum()),
            "accuracy": float(right[mine].mean()),
            "calibrated": float(calibrated[mine].mean()),
            "coverage": float(covered[mine].mean()),
            "coverage_ci": mean_interval(covered[mine], patients[mine]),
            "set_size": float(size[mine].mean()),
            "sets": {str(count): int((size[mine] == count).sum()) for count in range(len(votes.labels) + 1)},
            "single": {"n": int(told.sum()), "accuracy": float(right[told].mean()) if told.any() else None},
        }

    weights = weights_of(patients)
    bins = [
        {
            "n": len(mine),
            "from": float(calibrated[mine].min()),
            "to": float(calibrated[mine].max()),
            "calibrated": float(calibrated[mine].mean()),
            "accuracy": float(right[mine].mean()),
        }
        for mine in _bins(calibrated)
    ]
    square = sum(
        one["n"] * ((one["calibrated"] - one["accuracy"]) ** 2 - one["accuracy"] * (1 - one["accuracy"]) / max(1, one["n"] - 1))
        for one in bins
    )
    return {
        "folds": folds,
        "ece": float(expected_error(calibrated, right)[0]),
        "ece_ci": None if weights is None else interval(expected_error(calibrated, right, weights)),
        "ece_of_the_share": float(expected_error(votes.shares.max(axis=1), right)[0]),
        "debiased_rms": float(math.sqrt(max(0.0, square / len(right)))),
        "bins": bins,
        "error_rate": percent(error_rate) / 100,
        "overall": part(np.ones(len(right), np.bool_)),
        "per_source": {str(source): part(sources == source) for source in sorted(set(sources.tolist()))},
        "per_label": {label: part(votes.truth == number) for number, label in enumerate(votes.labels) if (votes.truth == number).any()},
    }
