"""Fitting and measuring a calibration, on made-up votes whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.errors import UsageError
from cxr_retrieval.evaluation.confidence import Answered, applied, expected_error, fit, measured
from cxr_retrieval.retrieval.calibration import LEAST_SHARE, Ballot, depth_of

LABELS = ("a", "b", "c")


def made_up(n: int, seed: int, offset: float = -0.6, slope: float = 0.7, per_patient: int = 1) -> Answered:
    """Votes mostly unanimous, whose truth is drawn with the probabilities that `offset` and `slope` give; two hospitals."""
    random = np.random.default_rng(seed)
    ballots: list[Ballot] = []
    truth: list[str] = []
    sources: list[str] = []
    for number in range(n):
        raw = random.dirichlet((0.12, 0.1, 0.08))
        shares = {label: float(share) for label, share in zip(LABELS, raw, strict=True)}
        nearest, place = float(random.uniform(0.6, 0.98)), "north" if number % 3 else "south"
        factor = max(0.0, offset + slope * depth_of(nearest))
        powers = np.array([(share + LEAST_SHARE) ** factor for share in shares.values()])
        truth.append(LABELS[int(random.choice(3, p=powers / powers.sum()))])
        weight = float(random.uniform(0.6, 1))
        ballots.append(Ballot(shares, nearest, {place: weight, "south" if place == "north" else "north": 1 - weight}, 10))
        sources.append(place)
    return Answered(ballots, truth, [f"p{number // per_patient}" for number in range(n)], sources)


def part_of(votes: Answered, some: slice) -> Answered:
    return Answered(votes.ballots[some], votes.truth[some], votes.patients[some], votes.sources[some])


@settings(max_examples=5)
@given(st.integers(0, 10_000))
def test_cross_fitted_figures_hold_where_the_truth_is_known(seed: int) -> None:
    """Coverage within four standard errors of what was asked for, in each hospital and for each label; probabilities near the truth."""
    votes = made_up(900, seed)
    for rate in (0.1, 0.2):
        found = measured(votes, 10, rate)
        for part in (found["overall"], *found["per_source"].values(), *found["per_label"].values()):
            assert abs(part["coverage"] - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / part["n"]) + 0.01
        assert found["overall"]["n"] == sum(found["overall"]["sets"].values()) == 900
    assert abs(found["overall"]["calibrated"] - found["overall"]["accuracy"]) < 0.05
    assert found["ece"] < found["ece_of_the_share"]
    assert found["ece"] < 0.07


def test_what_was_drawn_is_found_again() -> None:
    calibration = fit(made_up(6000, 1), "v", 10, 500, {"by": "a test"})
    assert calibration.offset == pytest.approx(-0.6, abs=0.1)
    assert calibration.slope == pytest.approx(0.7, abs=0.07)
    assert (calibration.labels, calibration.neighbourhoods) == (LABELS, ("north", "south"))
    assert calibration.about["by"] == "a test"
    assert calibration.about["cases"] == sum(calibration.about["of_a_label"].values()) == 6000
    others = applied(calibration, made_up(3000, 2))
    assert others["overall"]["coverage"] == pytest.approx(0.9, abs=0.025)
    assert others["ece"] < 0.03


def test_nothing_leaks_from_the_fit_into_what_is_measured() -> None:
    """Every patient has five equal films, and the truth is a coin's: whoever has seen one of them knows the others."""
    once, random = made_up(200, 3), np.random.default_rng(4)
    coin = [LABELS[i] for i in random.integers(0, 3, 200)]
    five = np.repeat(np.arange(200), 5).tolist()
    votes = Answered([once.ballots[i] for i in five], [coin[i] for i in five], [f"p{i}" for i in five], ["north"] * 1000)
    found = measured(votes, 10)
    assert found["overall"]["accuracy"] == pytest.approx(1 / 3, abs=0.1)
    assert found["overall"]["calibrated"] < 0.45, "it says that it does not know"
    assert found["overall"]["coverage"] < 0.95
    assert found["overall"]["set_size"] > 2


def test_votes_that_are_always_right_are_trusted_and_not_beyond_bounds() -> None:
    votes = made_up(300, 5)
    right = Answered(
        votes.ballots, [max(one.shares, key=lambda label: one.shares[label]) for one in votes.ballots], votes.patients, votes.sources
    )
    calibration = fit(right, "v", 10, 500, {})
    assert math.isfinite(calibration.offset)
    assert math.isfinite(calibration.slope)
    assert measured(right, 10)["overall"]["accuracy"] == 1


def test_where_distance_does_not_tell_it_is_not_looked_at() -> None:
    votes = made_up(2000, 6)
    turned = [Ballot(one.shares, 1.5 - one.nearest, one.sources, 10) for one in votes.ballots]
    calibration = fit(Answered(turned, votes.truth, votes.patients, votes.sources), "v", 10, 500, {})
    assert calibration.slope == 0
    assert calibration.offset > 0


def test_arrays_and_single_votes_say_the_same() -> None:
    """`applied` is a report over what `Calibration` says vote by vote."""
    calibration, votes = fit(made_up(600, 7), "v", 10, 500, {}), made_up(200, 8)
    found = applied(calibration, votes, 0.2)
    allowed = [calibration.allowed(one, 0.2) for one in votes.ballots]
    said = [calibration.probabilities(one)[max(one.shares, key=lambda label: one.shares[label])] for one in votes.ballots]
    assert found["overall"]["coverage"] == pytest.approx(
        np.mean([truth in labels for truth, labels in zip(votes.truth, allowed, strict=True)])
    )
    assert found["overall"]["set_size"] == pytest.approx(np.mean([len(labels) for labels in allowed]))
    assert found["overall"]["calibrated"] == pytest.approx(np.mean(said))


def test_the_order_of_the_cases_is_of_no_account() -> None:
    votes = made_up(300, 9)
    turned = part_of(votes, slice(None, None, -1))
    assert fit(votes, "v", 10, 500, {}).as_text() == fit(turned, "v", 10, 500, {}).as_text()


def test_too_few_are_refused_and_counted() -> None:
    with pytest.raises(UsageError, match=r"expected 100 with a vote of 10 others.*got 99 \(a \d+, b \d+, c \d+\)"):
        fit(part_of(made_up(200, 10), slice(99)), "v", 10, 500, {})
    votes = made_up(300, 11)
    with pytest.raises(UsageError, match="got 0"):
        measured(votes, 9)
    alone = Answered(votes.ballots, ["a"] * 300, votes.patients, votes.sources)
    with pytest.raises(UsageError, match=r"at least two labels.*\(a 300\)"):
        fit(alone, "v", 10, 500, {})
    with pytest.raises(UsageError, match="no case to measure"):
        applied(fit(votes, "v", 10, 500, {}), Answered(votes.ballots, ["d"] * 300, votes.patients, votes.sources))


def test_a_rare_label_is_left_out_with_the_votes_that_name_it() -> None:
    votes = made_up(300, 12)
    ballots, truth = list(votes.ballots), list(votes.truth)
    for number in range(5):
        ballots[number] = Ballot({"rare": 1.0}, 0.9, {"north": 1.0}, 10)
        truth[number] = "rare"
    calibration = fit(Answered(ballots, truth, votes.patients, votes.sources), "v", 10, 500, {})
    assert calibration.labels == LABELS
    assert calibration.about["cases"] == 295
    assert "rare" in (calibration.unmeasured(ballots[0], 500) or "")


def test_expected_error_of_bins_of_equally_many() -> None:
    probability = np.repeat([0.55, 0.95], 50)
    right = np.array([1.0] * 30 + [0.0] * 20 + [1.0] * 40 + [0.0] * 10)
    assert expected_error(probability, right)[0] > 0.1
    sure = np.concatenate([np.tile([1.0, 0.0], 25), np.ones(50)])
    assert expected_error(np.repeat([0.5, 1.0], 50), sure)[0] == 0
    doubled = expected_error(probability, right, np.full((2, 100), 2.0))
    assert doubled == pytest.approx(np.repeat(expected_error(probability, right), 2)), "weights that are all the same change nothing"
