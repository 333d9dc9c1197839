"""What is suggested while a clause is typed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.gallery.clause_parser import conditions, parse
from cxr_retrieval.gallery.completion import Completion, Snapshot
from cxr_retrieval.gallery.store import FILTER_FIELDS

ROWS = [
    {"key": "1", "label": "covid19", "source": "st-mary", "age": 61.0, "sex": "F", "went_icu": True, "extra": {"ward": "B2"}},
    {"key": "2", "label": "covid19", "source": "north", "age": 70.5, "sex": "F", "went_icu": False, "extra": {"ward": "B3"}},
    {"key": "3", "label": "control", "source": "north", "age": 61.0, "sex": "M"},
]


@pytest.fixture(scope="module")
def held(pseudonyms: Pseudonyms) -> Snapshot:
    return Snapshot(ROWS, pseudonyms)


def texts(found: Completion) -> list[str]:
    return [one.text for one in found.suggestions]


@pytest.mark.parametrize(
    ("typed", "start", "suggested"),
    [
        ("s", 0, ["source", "split", "sex", "survival", "spo2"]),
        ("age > 60 and went", 13, ["went_icu"]),
        ("not (WAR", 5, ['extra["ward"]']),
        ("age ", 4, [">=", "<=", ">", "<", "==", "!=", "in [", "not in [", "is not null", "is null"]),
        ("went_icu ", 9, ["and", "or", "== true", "== false", "is not null", "is null"]),
        ("went_icu a", 9, ["and"]),
        ("label == ", 9, ['"covid19"', '"control"']),
        ("label == con", 9, ['"control"']),
        ('label == "con', 9, ['"control"']),
        ("age == 6", 7, ["61"]),
        ("went_icu != ", 12, ["false", "true"]),
        ('label not in ["covid19", ', 25, ['"covid19"', '"control"']),
        ('extra["ward"] == b3', 17, ['"B3"']),
        ('extra["ward"] ', 14, ["==", "!=", "in [", "not in [", "like", "is not null", "is null"]),
        ("age > 60 ", 9, ["and", "or"]),
        ("(age > 60) o", 11, ["or"]),
        ("patient_id == ", 14, []),
        ("nonsense == ", 12, []),
    ],
)
def test_what_may_come_next(held: Snapshot, typed: str, start: int, suggested: list[str]) -> None:
    found = held.complete(typed, len(typed))
    assert (found.start, found.end) == (start, len(typed))
    assert texts(found)[: len(suggested)] == suggested
    assert len(found.suggestions) == len(suggested)


def test_counts_and_what_a_field_holds(held: Snapshot) -> None:
    (age,) = held.complete("age", 3).suggestions
    assert (age.text, age.about, age.cases) == ("age", "number", 3)
    assert [one.cases for one in held.complete("label == ", 9).suggestions] == [2, 1]
    assert [one.cases for one in held.meeting("went_icu").complete("label == ", 9).suggestions] == [1]


def test_what_follows_the_place_is_not_looked_at(held: Snapshot) -> None:
    assert held.complete('sex == "M" and age > 60', 2) == held.complete("se", 2)


def test_an_empty_one_names_every_field(held: Snapshot) -> None:
    assert len(held.complete("", 0, 100).suggestions) == len(held.fields())
    assert len(held.complete("", 0, 5).suggestions) == 5


@given(st.text(alphabet="age lbo\"'[]()=<>!&|,0123456789and", max_size=40), st.integers(0, 40))
def test_anything_may_be_typed(held: Snapshot, typed: str, at: int) -> None:
    found = held.complete(typed, min(at, len(typed)))
    assert 0 <= found.start <= found.end <= len(typed)


@pytest.mark.parametrize(
    ("where", "one_by_one"),
    [
        ("", ()),
        ("went_icu", ("went_icu == true",)),
        (
            'age > 60 and (sex == "F" or survival) and not went_icu',
            ("age > 60", '(sex == "F" or survival == true)', "not (went_icu == true)"),
        ),
        ("60 <= age < 80", ("60 <= age", "age < 80")),
    ],
)
def test_conditions_one_by_one(where: str, one_by_one: tuple[str, ...]) -> None:
    assert conditions(where, FILTER_FIELDS) == one_by_one
    again = " and ".join(one_by_one)
    assert conditions(again, FILTER_FIELDS) == one_by_one
    assert (parse(again, FILTER_FIELDS) is None) == (where == "")
