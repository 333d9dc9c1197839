"""What is said of a vote's reliability: its laws, its words, and when nothing is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.retrieval.calibration import (
    FILE,
    PERCENTS,
    Ballot,
    Calibration,
    Trust,
    ballot_of,
    percent,
    put_calibration,
    read_calibration,
    sentence,
    shipped,
    trust,
)
from cxr_retrieval.retrieval.gate import shipped as shipped_gate
from cxr_retrieval.retrieval.voting import Vote, weighted_vote

LABELS = ("control", "covid19", "flu")
RISING = {label: tuple(0.004 * i * (1 + number) for i in range(len(PERCENTS))) for number, label in enumerate(LABELS)}
MADE = Calibration("v", 10, 1000, LABELS, -1.0, 0.9, {"north": 0.7, "south": 0.25, "": 0.05}, ("north", "south"), {}, 0.6, {"cases": 200})
CALIBRATION = replace(MADE, thresholds={"": RISING, "north": RISING, "south": dict.fromkeys(LABELS, (0.0,) * 50)})
NORTH = [("covid19", 0.95 - i / 100, "north") for i in range(7)] + [("control", 0.9, "north"), ("flu", 0.9, "south"), ("flu", 0.9, "south")]


def asked(
    neighbours: list[tuple[str, float, str]], calibration: Calibration = CALIBRATION, why: str | None = None, gallery: int = 1000
) -> Trust:
    vote = weighted_vote([(label, similarity) for label, similarity, _ in neighbours])
    return trust(vote, ballot_of(neighbours), "v", calibration.as_text(), gallery=gallery, otherwise_asked=why)


def ballot(shares: tuple[float, float, float], nearest: float) -> Ballot:
    return Ballot(dict(zip(LABELS, shares, strict=True)), nearest, {"north": 1.0}, 10)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(-1, 1))
def test_more_of_the_weight_is_never_less_probable(share: float, more: float, other: float, nearest: float) -> None:
    """And probabilities are some: they sum to 1."""
    low, high = sorted((share, more))
    found = [CALIBRATION.probabilities(ballot((one, (1 - one) * other, (1 - one) * (1 - other)), nearest)) for one in (low, high)]
    assert found[0]["control"] <= found[1]["control"] + 1e-12
    for one in found:
        assert sum(one.values()) == pytest.approx(1)
        assert all(0 < probability < 1 for probability in one.values())


@given(st.floats(0.34, 1), st.floats(-1, 1), st.floats(-1, 1))
def test_a_farther_case_makes_the_leading_label_no_surer(share: float, one: float, other: float) -> None:
    far, near = (CALIBRATION.probabilities(ballot((share, (1 - share) / 2, (1 - share) / 2), at)) for at in sorted((one, other)))
    assert far["control"] <= near["control"] + 1e-12
    beyond = CALIBRATION.probabilities(ballot((share, (1 - share) / 2, (1 - share) / 2), -1.0))
    assert list(beyond.values()) == pytest.approx([1 / 3] * 3), "a vote of cases that are like anything says nothing"


@given(st.tuples(*[st.floats(0, 1)] * 3), st.floats(0, 1), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_fewer_errors_need_more_labels(shares: tuple[float, float, float], nearest: float, one: float, other: float) -> None:
    strict, lax = sorted((one, other))
    asked_about = ballot(shares, nearest)
    assert set(CALIBRATION.allowed(asked_about, lax)) <= set(CALIBRATION.allowed(asked_about, strict))


def test_the_neighbourhood_is_the_source_that_is_over_represented() -> None:
    """Not the one with most of the weight: a third of southern cases is more than a quarter, which they have on average."""
    assert CALIBRATION.neighbourhood(Ballot({"flu": 1}, 0.9, {"north": 0.67, "south": 0.33}, 10)) == "south"
    assert CALIBRATION.neighbourhood(Ballot({"flu": 1}, 0.9, {"north": 0.8, "south": 0.2}, 10)) == "north"
    assert CALIBRATION.neighbourhood(Ballot({"flu": 1}, 0.9, {"": 1.0}, 10)) == "", "of sources that are not told apart"


def test_json_leads_back(tmp_path: Path) -> None:
    assert read_calibration(CALIBRATION.as_text()) == CALIBRATION
    path = tmp_path / "c.json"
    for one in (CALIBRATION, replace(CALIBRATION, model_version="w"), replace(CALIBRATION, farthest=0.5)):
        put_calibration(one, path)
    held = [read_calibration(json.dumps(one)) for one in json.loads(path.read_text())]
    assert held == [replace(CALIBRATION, farthest=0.5), replace(CALIBRATION, model_version="w")], "one of each version, the last"
    path.write_text("{}[")
    with pytest.raises(SetupError, match="no file of calibrations"):
        put_calibration(CALIBRATION, path)


@pytest.mark.parametrize(
    "harm",
    [
        lambda held: "no JSON",
        lambda held: "[]",
        lambda held: json.dumps(held | {"layout": 2}),
        lambda held: json.dumps({name: value for name, value in held.items() if name != "offset"}),
        lambda held: json.dumps(held | {"slope": "steep"}),
        lambda held: json.dumps(held | {"labels": [*LABELS, "another"]}),
        lambda held: json.dumps(held | {"neighbourhoods": ["west"]}),
        lambda held: json.dumps(held | {"thresholds": {name: {label: [0.1] for label in LABELS} for name in ("", "north", "south")}}),
    ],
)  # fmt: skip
def test_what_a_gallery_holds_is_not_trusted(harm: object) -> None:
    assert callable(harm)
    with pytest.raises(SetupError, match="cxr calibrate --reset"):
        read_calibration(harm(CALIBRATION.as_json()))


@pytest.mark.parametrize(("rate", "expected"), [(0.01, 1), (0.1, 10), (0.29, 29), (0.105, 10), (0.5, 50)])
def test_error_rates_are_whole_percents_or_less(rate: float, expected: int) -> None:
    assert percent(rate) == expected


@pytest.mark.parametrize("rate", [0.0, 0.009, 0.501, 1.0, -0.1, float("nan"), float("inf")])
def test_error_rates_that_no_set_can_be_given_for(rate: float) -> None:
    with pytest.raises(UsageError, match=r"expected 0\.01 to 0\.5"):
        percent(rate)


@pytest.mark.parametrize(
    ("neighbours", "words"),
    [
        (NORTH[:9], "measured with 10 voting cases, and 9 voted here"),
        ([*NORTH[:9], ("tuberculosis", 0.5, "north")], "labels it was not measured on are among the nearest cases: tuberculosis"),
        ([(label, similarity, "west") for label, similarity, _ in NORTH], "sources it was not measured on: west"),
    ],
)
def test_nothing_is_said_of_what_was_not_measured(neighbours: list[tuple[str, float, str]], words: str) -> None:
    found = asked(neighbours)
    assert (found.calibrated, found.labels, found.abstained) == (None, None, None)
    assert found.as_json() == {"calibrated": None, "set": None, "abstained": None}
    assert found.unmeasured is not None
    assert words in found.unmeasured
    assert "`cxr calibrate`" in found.unmeasured


def test_a_gallery_of_another_size_was_not_measured() -> None:
    assert [asked(NORTH, gallery=size).unmeasured is None for size in (499, 500, 1000, 2000, 2001)] == [False, True, True, True, False]
    assert "a gallery of 1000 cases, and this one holds 499" in (asked(NORTH, gallery=499).unmeasured or "")


def test_other_questions_and_other_versions_are_not_measured_either() -> None:
    clause = asked(NORTH, why="only cases that meet a clause were compared").unmeasured
    assert clause is not None
    assert "clause" in clause
    assert "cxr calibrate" not in clause, "which would not help"
    vote, known = Vote("control", 1.0, {"control": 1.0}), ballot((1, 0, 0), 0.9)
    for own in ("", replace(CALIBRATION, model_version="another").as_text()):
        assert "no calibration of model version v" in (trust(vote, known, "v", own, gallery=1000).unmeasured or "")


def test_a_gallerys_own_calibration_comes_first() -> None:
    version, public = next(iter(shipped().items()))
    vote, known = Vote("control", 1.0, {"control": 1.0}), Ballot({"control": 1.0}, 0.95, {"kermany": 1.0}, 10)
    ours = trust(vote, known, version, "", gallery=public.gallery)
    assert ours.calibrated == pytest.approx(public.probabilities(known)["control"])
    own = replace(public, slope=0.0, offset=0.5).as_text()
    assert trust(vote, known, version, own, gallery=public.gallery).calibrated != pytest.approx(ours.calibrated)


def test_reasons_not_to_rely_on_a_label() -> None:
    def doubt(least: dict[str, float], nearest: float = 0.95) -> str | None:
        rows = {label: (least.get(label, 1.0),) * 50 for label in LABELS}
        calibration = replace(CALIBRATION, thresholds=dict.fromkeys(("", "north", "south"), rows))
        return asked([(label, similarity - 0.95 + nearest, source) for label, similarity, source in NORTH], calibration).abstained

    assert doubt({"covid19": 0.1}) is None
    assert doubt({}) == "no label is sure enough at an error rate of 10 %"
    assert doubt({"covid19": 0.1, "control": 0.0}) == "control cannot be excluded at an error rate of 10 %"
    assert doubt({"covid19": 0.1, "control": 0.0, "flu": 0.0}) == "flu, control cannot be excluded at an error rate of 10 %"
    assert doubt({"control": 0.0}) == "not the vote's label but control is left at an error rate of 10 %"
    assert (
        doubt({"covid19": 0.1}, nearest=0.55)
        == "the nearest case is far away: its similarity is 0.55, 0.60 or more in 99 % of the calibrated cases"
    )


def test_the_sentence() -> None:
    vote = Vote("covid19", 0.74, {"covid19": 0.74, "control": 0.26})
    labels = ["covid19"] * 7 + ["control"] * 3
    said = "7 of 10 nearest cases are COVID-19; weighted share 0.74"
    assert sentence(labels, vote, Trust(0.69, ("covid19",), None)) == f"{said}; in 100 such answers about 69 are right"
    assert sentence(labels, vote, Trust(0.9996, ("covid19",), None)) == f"{said}; in 100 such answers more than 99 are right"
    assert sentence(labels, vote, Trust(None, None, None, "not measured")) == said, "no number that nobody has measured"
    single = Vote("non_covid_pneumonia", 1.0, {"non_covid_pneumonia": 1.0})
    assert sentence(["non_covid_pneumonia"], single, Trust(0.5, (), None)).startswith("1 of 1 nearest cases is non-COVID pneumonia")


def test_what_ships_is_of_the_weights_that_ship() -> None:
    assert shipped_gate().about["model_version"] in shipped()
    assert len(json.loads(FILE.read_text())) == len(shipped())
    for one in shipped().values():
        assert one.labels == ("control", "covid19", "non_covid_pneumonia")
        assert one.slope > 0, "the farther the nearest case, the more often a vote is wrong"
        assert one.about["cases"] == 759
