"""What became of a list of cases, counted."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.cases.fields import Value
from cxr_retrieval.gallery.store import Case
from cxr_retrieval.retrieval.summary import MIN_KNOWN, Flag, Number, summarise, wilson


def case(facts: Mapping[str, Value], label: str = "covid19", source: str | None = "north") -> Case:
    return Case("0" * 32, "x", label, None, source, None, None, facts, "", "")


def test_shares_stand_with_their_counts() -> None:
    cases = [
        case({"went_icu": True, "spo2": 88.0}),
        case({"went_icu": True, "spo2": 91.0}),
        case({"went_icu": True, "spo2": 95.0, "sex": "F"}),
    ]
    cases += [case({"went_icu": False, "intubated": True}), *(case({}, "control", None) for _ in range(6))]
    summary = summarise(cases)
    assert summary.lines() == [
        "intensive care: 3 of 4 known (6 unknown)",
        "intubated: 1 of 1 known (9 unknown)",
        "oxygen saturation: median 91 % (quartiles 89.5 to 93) of 3 known (7 unknown)",
        "not known of any: survived",
    ]
    features = json.loads(json.dumps(summary.as_json()))["features"]
    assert summary.as_json()["n"] == 10
    assert features["went_icu"] == {
        "true": 3,
        "known": 4,
        "unknown": 6,
        "share": 0.75,
        "share_ci": pytest.approx([0.3006, 0.9544], abs=1e-4),
    }
    assert features["intubated"] == {"true": 1, "known": 1, "unknown": 9, "share": None, "share_ci": None}, "no share of so few"
    assert features["spo2"] == {
        "known": 3,
        "unknown": 7,
        "implausible": 0,
        "median": 91.0,
        "quartiles": [89.5, 91.0, 93.0],
        "range": [88.0, 95.0],
    }
    assert features["label"] == {"known": 10, "unknown": 0, "counts": {"control": 6, "covid19": 4}}
    assert features["source"]["counts"] == {"north": 4}
    assert features["sex"] == {"known": 1, "unknown": 9, "counts": {"F": 1}}
    assert "survival" not in features


def test_a_flow_noted_as_a_saturation_does_not_move_the_median() -> None:
    found = summarise([case({"spo2": value}) for value in (92.0, 94.0, 96.0, 20.0, 340.0)]).features["spo2"]
    assert isinstance(found, Number)
    assert (found.known, found.unknown, found.implausible, found.median, found.range) == (3, 0, 2, 94.0, (92.0, 96.0))
    assert found.words() == "median 94 % (quartiles 93 to 95) of 3 known (2 not plausible)"


def test_no_cases_have_no_facts() -> None:
    assert summarise([]).as_json() == {"n": 0, "features": {}}


@pytest.mark.parametrize(
    ("true", "known", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
)
def test_wilson_against_published_values(true: int, known: int, low: float, high: float) -> None:
    """Newcombe 1998, table I, method 3."""
    assert wilson(true, known) == pytest.approx((low, high), abs=5e-5)


FACTS = st.fixed_dictionaries(
    {},
    optional={
        "went_icu": st.booleans(),
        "survival": st.booleans(),
        "spo2": st.floats(0, 400),
        "age": st.floats(0, 130),
        "sex": st.sampled_from("FMO"),
    },
)


@given(st.lists(FACTS, max_size=30), st.randoms())
def test_every_case_is_counted_once_in_any_order(facts: list[dict[str, Value]], random: object) -> None:
    cases = [case(one) for one in facts]
    summary = summarise(cases)
    for name, found in summary.features.items():
        counted = found.known + found.unknown + (found.implausible if isinstance(found, Number) else 0)
        assert counted == summary.n == len(cases), name
        if isinstance(found, Flag):
            assert (found.share is None) == (found.known < MIN_KNOWN)
            if found.share is not None and found.interval is not None:
                assert 0 <= found.interval[0] <= found.share <= found.interval[1] <= 1
        if isinstance(found, Number) and found.quartiles is not None and found.range is not None:
            assert found.range[0] <= found.quartiles[0] <= found.quartiles[1] <= found.quartiles[2] <= found.range[1]
    random.shuffle(cases)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    assert summarise(cases).as_json() == summary.as_json()
