"""Each learner asked about patients that it was not fitted on: five folds, whole patients, areas under the curve as in Fig. 6 of the paper.

An area is the mean of those of the folds, as published. Its interval is by bootstrap over patients (`evaluation/intervals.py`), and so is
that of a difference of two: the same patients are drawn for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from cxr_retrieval.contract import OUTCOME_PARTS
from cxr_retrieval.errors import UsageError
from cxr_retrieval.evaluation.confidence import expected_error
from cxr_retrieval.evaluation.intervals import interval, weights_of
from cxr_retrieval.evaluation.metrics import area
from cxr_retrieval_training.config import OutcomeConfig
from cxr_retrieval_training.outcome.cases import Cases
from cxr_retrieval_training.outcome.learners import Given, Learner, learners

GRID: Final = np.linspace(0, 1, 101)
"""False positive rates at which curves are averaged."""
_PENALTY: Final = 10.0
"""Inverse of the L2 penalty of a calibration's slope: scores that part a few cases without a mistake are not believed without limit."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Held:
    """One outcome, every case of which was asked about by learners that were fitted without its patient.

    Attributes:
        came: `[n]` 0 or 1. patients: `[n]`. fold: `[n]`.
        scores: For each learner `[n]` log odds.
    """

    outcome: str
    came: Floats
    patients: NDArray[np.generic]
    fold: Integers
    scores: dict[Learner, Floats]

    @property
    def folds(self) -> int:
        """How many there are."""
        return int(self.fold.max()) + 1

    def served(self, part: str) -> Learner:
        """The learner of this part that is served."""
        return next(one for one in self.scores if one.part == part)

    def calibration(self, learner: Learner, used: NDArray[np.bool_] | None = None) -> tuple[float, float]:
        """Slope and offset (Platt 1999) that turn log odds into those of a probability, from these cases; a slope of 0 where high scores do
        not go with the outcome, so that the probability is how often it came.
        """
        mine = np.ones(len(self.came), np.bool_) if used is None else used
        fitted = LogisticRegression(C=_PENALTY).fit(self.scores[learner][mine, None], self.came[mine])
        if fitted.coef_[0, 0] > 0:
            return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
        share = self.came[mine].mean()
        return 0.0, float(np.log(share / (1 - share)))

    def probabilities(self, learner: Learner) -> Floats:
        """Calibrated by the other folds."""
        found = np.zeros(len(self.came))
        for mine in self._parted():
            slope, offset = self.calibration(learner, ~mine)
            found[mine] = 1 / (1 + np.exp(-(slope * self.scores[learner][mine] + offset)))
        return found

    def curves(self, learner: Learner) -> Floats:
        """`[folds, 101]` true positive rates at GRID."""
        return np.stack([_curve(self.scores[learner][mine], self.came[mine]) for mine in self._parted()])

    def areas(self, learner: Learner, weights: Floats | None = None) -> Floats:
        """`[folds, resamples]` areas under the curve, each case weighed; NaN where a resample has one kind of case alone."""
        drawn = np.ones((1, len(self.came))) if weights is None else weights
        return np.stack([area(self.scores[learner][mine], self.came[mine], drawn[:, mine]) for mine in self._parted()])

    def _parted(self) -> list[NDArray[np.bool_]]:
        return [self.fold == number for number in range(self.folds)]


def cross_validate(
    cases: Cases, outcome: str, config: OutcomeConfig, advance: Callable[[], None] = lambda: None
) -> tuple[Held, NDArray[np.bool_]]:
    """Asks about every case of which the outcome is known; also says which of `cases` those are.

    Args:
        advance: Told after each learner of each fold; `steps` times in all.

    Raises:
        UsageError: A fold would have none with the outcome or none without.
    """
    known = np.isfinite(cases.outcomes[outcome])
    came, patients = cases.outcomes[outcome][known], cases.patients[known]
    fold = folds_of(outcome, came, patients, config)
    given = Given.of(cases)[known]
    scores = {learner: np.zeros(len(came)) for learner in learners(config)}
    for number in range(config.folds):
        mine = fold == number
        for learner, found in scores.items():
            found[mine] = learner.scores(given[~mine], came[~mine], given[mine])
            advance()
    return Held(outcome, came, patients, fold, scores), known


def steps(config: OutcomeConfig) -> int:
    """How often `cross_validate` tells that it advances."""
    return config.folds * len(learners(config))


def folds_of(outcome: str, came: Floats, patients: NDArray[np.generic], config: OutcomeConfig) -> Integers:
    """`[n]` folds, whole patients each, the outcome about as frequent in all.

    Raises:
        UsageError: As `cross_validate`.
    """
    with_it, without = len(set(patients[came > 0].tolist())), len(set(patients[came == 0].tolist()))
    if min(with_it, without) >= config.folds:
        fold = np.zeros(len(came), np.int64)
        splitter = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.seed)
        for number, (_, held) in enumerate(splitter.split(came, came, patients)):
            fold[held] = number
        if all(0 < came[fold == number].sum() < (fold == number).sum() for number in range(config.folds)):
            return fold
    raise UsageError(
        f"{outcome}: not every fold has films with and without it",
        expected=f"{config.folds} patients with it and as many without, spread over {config.folds} folds",
        got=f"{with_it} patients with it, {without} without, {len(came)} films",
        next_step="add cases, or take fewer folds in the config",
    )


def figures(held: Held) -> dict[str, Any]:
    """What the report says of one outcome; keys as in `outcome.json`."""
    weights = weights_of(held.patients)
    drawn = {learner: None if weights is None else np.nanmean(held.areas(learner, weights), axis=0) for learner in held.scores}
    both, facts = held.served("both"), held.served("facts")
    gained = drawn[both], drawn[facts]
    return {
        "n": len(held.came),
        "with": int(held.came.sum()),
        "patients": len(set(held.patients.tolist())),
        "patients_with": len(set(held.patients[held.came > 0].tolist())),
        "folds": held.folds,
        "learners": [_of(held, learner, drawn[learner]) for learner in held.scores],
        "served": {part: held.served(part).name for part in OUTCOME_PARTS},
        "features_add": {
            "auc": float(held.areas(both).mean() - held.areas(facts).mean()),
            "auc_ci": None if gained[0] is None or gained[1] is None else interval(gained[0] - gained[1]),
        },
        "brier_of_the_share": float(np.mean((held.came - held.came.mean()) ** 2)),
    }


def served_rows(one: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of `figures` the learners that are served."""
    return [row for row in one["learners"] if one["served"].get(row["part"]) == row["learner"]]


def _of(held: Held, learner: Learner, drawn: Floats | None) -> dict[str, Any]:
    folds, probability = held.areas(learner)[:, 0], held.probabilities(learner)
    slope, offset = held.calibration(learner)
    return {
        "part": learner.part,
        "learner": learner.name,
        "auc": float(folds.mean()),
        "auc_ci": None if drawn is None else interval(drawn),
        "auc_sd": float(folds.std(ddof=1)),
        "auc_of_folds": folds.tolist(),
        "brier": float(np.mean((held.came - probability) ** 2)),
        "ece": float(expected_error(probability, held.came)[0]),
        "calibration": {"slope": slope, "offset": offset},
    }


def _curve(scores: Floats, came: Floats) -> Floats:
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of equal scores, all or none are called positive
    yes, no = np.cumsum(came[order])[last], np.cumsum(1 - came[order])[last]
    rates = np.interp(GRID, np.append(0.0, no / no[-1]), np.append(0.0, yes / yes[-1]))
    rates[0] = 0.0  # where the curve climbs at first, interpolation begins on top of that
    return rates
