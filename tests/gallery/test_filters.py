"""What becomes of a clause before Milvus sees it: ids, what is unknown, and what each kind of Milvus can be asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clauses import FIELDS, trees
from cxr_retrieval.gallery.clause import And, Compare, Field, In, IsNull, Like, Node, Not, Or, Own, Value, Words, items, printed
from cxr_retrieval.gallery.clause_parser import parse
from cxr_retrieval.gallery.filters import Dialect, for_milvus, settled, with_pseudonyms
from cxr_retrieval.gallery.matching import matches, with_words
from cxr_retrieval.gallery.words import MAX_WORDS, spaced, words_of


def read(where: str) -> Node:
    node = parse(where, FIELDS)
    assert node is not None
    return node


def pseudonym(text: str) -> str:
    return f"<{text}>"


IDS = {"image_id": pseudonym, "patient_id": pseudonym}
ITSELF = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("where", "stored"),
    [
        ('image_id == "A" and age > 5', 'key in ["<A>"] and age > 5'),
        ("patient_id!='P'", 'patient_id not in ["<P>"]'),
        ('patient_id IN ["P", \'Q]"\']', 'patient_id in ["<P>", "<Q]\\">"]'),
        ('not (patient_id not in["P",])', 'not (patient_id not in ["<P>"])'),
        ("patient_id is not null or image_id in []", "patient_id is not null or key in []"),
        ("exists image_id", "(exists key)"),
        (r'patient_id == "a\"b\\c\u00e4"', r'patient_id in ["<a\"b\\cä>"]'),
        (f'image_id == "{ITSELF}"', f'key in ["<{ITSELF}>", "{ITSELF}"]'),
        (
            'clinical_notes == "patient_id == 1" and extra["image_id"] == "A"',
            'clinical_notes == "patient_id == 1" and extra["image_id"] == "A"',
        ),
    ],
)
def test_ids_become_pseudonyms(where: str, stored: str) -> None:
    assert printed(with_pseudonyms(read(where), IDS)) == stored


PLAIN = dict.fromkeys(IDS, lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:31])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.sampled_from(["in", "not in"]))
def test_no_id_survives_in_a_clause(ids: list[str], how: str) -> None:
    """Whatever an id holds: quotes, backslashes, brackets, what looks like a clause."""
    where = f"image_id {how} {json.dumps(ids)} or patient_id {how} {json.dumps(ids, ensure_ascii=False)}"
    hidden = json.dumps([PLAIN["image_id"](text) for text in ids])
    assert printed(with_pseudonyms(read(where), PLAIN)) == f"key {how} {hidden} or patient_id {how} {hidden}"


@given(trees())
def test_no_field_of_ids_reaches_milvus_as_it_is_asked(node: Node) -> None:
    asked = with_pseudonyms(node, PLAIN)
    assert not any(isinstance(item, Field) and item.name == "image_id" for item in items(asked))
    for part in _conditions(asked):
        if isinstance(part, In) and part.item in (Field("patient_id"), Field("key")):
            assert part.item == Field("key") or all(len(str(value)) in (31, 32) for value in part.values)


def _conditions(node: Node) -> list[Node]:
    match node:
        case Not(inner):
            return _conditions(inner)
        case And(nodes) | Or(nodes):
            return [part for one in nodes for part in _conditions(one)]
        case _:
            return [node]


@pytest.mark.parametrize(
    ("where", "one_meaning"),
    [
        ("not went_icu", "went_icu == false"),
        ("not (age > 60)", "age <= 60"),
        ('sex != "F"', 'sex is not null and sex != "F"'),
        ('not (sex == "F" and age < 5)', '(sex is not null and sex != "F") or age >= 5'),
        ('not (sex in ["F"] or went_icu)', 'sex is not null and sex not in ["F"] and went_icu == false'),
        ('label != "covid19"', 'label != "covid19"'),
        ('not (label like "c%")', 'not (label like "c%")'),
        ('not (view like "A%")', 'view is not null and not (view like "A%")'),
        ('not (extra["n"] == age)', 'extra["n"] is not null and age is not null and extra["n"] != age'),
        ('extra["ok"] != true', 'extra["ok"] is not null and extra["ok"] != true'),
        ("not (age is null)", "age is not null"),
        ('not (exists extra["x"])', 'extra["x"] is null'),
        ("not not went_icu", "went_icu == true"),
        (
            'not text_match(clinical_notes, "tube")',
            'clinical_notes is not null and not (TEXT_MATCH(clinical_notes, "tube"))',
        ),
        ('patient_id not in ["P"]', 'patient_id is null or patient_id not in ["P"]'),
        ('not (patient_id in ["P"] or age > 5)', '(patient_id is null or patient_id not in ["P"]) and age <= 5'),
    ],
)
def test_what_is_unknown_meets_no_condition_nor_its_opposite(where: str, one_meaning: str) -> None:
    assert printed(settled(read(where), unknown_patients=True)) == one_meaning


def test_unknown_patients_can_be_left_out() -> None:
    assert printed(settled(read('patient_id not in ["P"]'), unknown_patients=False)) == 'patient_id is not null and patient_id not in ["P"]'


def _kleene(node: Node, row: dict[str, Any]) -> bool | None:
    """Three truth values, as SQL has them: the oracle of `settled`, which has to do with two."""
    match node:
        case Not(inner):
            truth = _kleene(inner, row)
            return None if truth is None else not truth
        case And(nodes):
            truths = [_kleene(part, row) for part in nodes]
            return False if False in truths else None if None in truths else True
        case Or(nodes):
            truths = [_kleene(part, row) for part in nodes]
            return True if True in truths else None if None in truths else False
        case IsNull():
            return matches(node, row)
        case _:
            known = all(matches(IsNull(item, negated=True), row) for item in items(node))
            return matches(node, row) if known else None


_NUMBER = st.one_of(st.sampled_from(["age", "spo2"]).map(Field), st.integers(0, 2).map(Value))
_SIMPLE: st.SearchStrategy[Node] = st.one_of(
    st.builds(Compare, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), st.just(Field("age")), _NUMBER),
    st.builds(Compare, st.sampled_from(["==", "!="]), st.just(Field("went_icu")), st.booleans().map(Value)),
    st.builds(In, st.just(Field("sex")), st.lists(st.sampled_from("FM")).map(tuple), st.booleans()),
    st.builds(Compare, st.sampled_from(["==", "!="]), st.just(Own("extra", ("x",))), st.integers(0, 2).map(Value)),
    st.builds(Like, st.just(Field("sex")), st.sampled_from(["F%", "_", "%"])),
    st.builds(IsNull, st.sampled_from(["age", "sex"]).map(Field), st.booleans()),
    st.just(Words(Field("clinical_notes"), ("tube",))),
)
_ROW = st.fixed_dictionaries(
    {},
    optional={
        "age": st.integers(0, 2),
        "spo2": st.integers(0, 2),
        "went_icu": st.booleans(),
        "sex": st.sampled_from("FM"),
        "extra": st.fixed_dictionaries({}, optional={"x": st.integers(0, 2)}),
        "clinical_notes": st.sampled_from(["", "a tube", "none"]),
    },
)


@given(trees(_SIMPLE), _ROW)
def test_two_truth_values_are_enough_for_what_is_settled(node: Node, row: dict[str, Any]) -> None:
    held = with_words(row)
    assert matches(settled(node, unknown_patients=False), held) == (_kleene(node, held) is True)


LITE = Dialect(lite=True, nullable=True, words=True)
OLDER = Dialect(lite=True, nullable=True, words=False)
NEW = Dialect(lite=False, nullable=True, words=True)
OLD = Dialect(lite=False, nullable=False, words=False)


def nothing(possible: Node | None, condition: Node) -> Sequence[str]:
    """What is asked of the client is to be seen in the clause."""
    return (f"{printed(possible) if possible else 'all'} | {printed(condition)}",)


@pytest.mark.parametrize(
    ("dialect", "where", "asked"),
    [
        (LITE, "age is null", "age is null"),
        (OLD, "age is null", "not ((exists age))"),
        (LITE, 'extra["x"] is not null', '(exists extra["x"])'),
        (NEW, "age in [1, 2.5]", "age in [1.0, 2.5]"),
        (LITE, 'extra["x"] in [1, "a"]', 'extra["x"] == 1 or extra["x"] == "a"'),
        (LITE, 'extra["x"] in []', "key in []"),
        (LITE, 'label like "%19"', 'label like "%19"'),
        (OLD, 'label like "covid%"', 'label like "covid%"'),
        (OLD, 'age > 5 and label like "%19"', 'key in ["age > 5 | label like \\"%19\\""]'),
        (OLD, 'age > 5 or label like "%19"', 'age > 5 or key in ["all | label like \\"%19\\""]'),
        (LITE, r'label like "a\\%"', r'key in ["all | label like \"a\\\\%\""]'),
        (LITE, "age + 1 > spo2", "(age + 1) > spo2"),
        (NEW, "age + 1 > spo2", 'key in ["all | (age + 1) > spo2"]'),
        (LITE, "age % 2 == 1", 'key in ["all | (age % 2) == 1"]'),
        (LITE, 'extra["ok"] == true', 'key in ["all | extra[\\"ok\\"] == true"]'),
        (NEW, 'text_match(clinical_notes, "a b")', 'TEXT_MATCH(notes_words, "a b")'),
        (LITE, 'text_match(clinical_notes, "a b")', 'notes_words like "% a %" or notes_words like "% b %"'),
        (
            NEW,
            'phrase_match(clinical_notes, "a b")',
            'TEXT_MATCH(notes_words, "a") and TEXT_MATCH(notes_words, "b") and notes_words like "% a b %"',
        ),
        (LITE, 'phrase_match(clinical_notes, "a b")', 'notes_words like "% a b %"'),
        (
            OLDER,
            'text_match(clinical_notes, "a") and not text_match(clinical_notes, "b") and age > 5',
            'key in ["clinical_notes is not null and age > 5 | '
            'TEXT_MATCH(clinical_notes, \\"a\\") and not (TEXT_MATCH(clinical_notes, \\"b\\"))"]',
        ),
    ],
)
def test_what_each_kind_of_milvus_is_asked(dialect: Dialect, where: str, asked: str) -> None:
    """The rest is matched here, among the cases that meet what it can be asked."""
    assert printed(for_milvus(settled(read(where), unknown_patients=True), dialect, nothing)) == asked


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Pleural effusion, right > left.", ["pleural", "effusion", "right", "left"]),
        ("ÖDEM Straße ﬁbrosis Crohn’s", ["odem", "strasse", "fibrosis", "crohn", "s"]),
        ("covid_19 follow-up 12.5", ["covid", "19", "follow", "up", "12", "5"]),
        ("e\u0301tude İstanbul", ["etude", "istanbul"]),
        ("肺炎 ПНЕВМОНИЯ", ["肺炎", "пневмония"]),
        ("!? \n", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_of(text) == tuple(words)


@given(st.text())
def test_words_of_words_are_the_same(text: str) -> None:
    """So that what was stored once is never folded into something else, and no word holds what separates them."""
    words = words_of(text)
    assert words_of(spaced(words)) == words
    assert words_of(text.upper()) == words_of(text.lower()) or not text.isascii()
    assert len(spaced(words).encode()) <= MAX_WORDS


def test_more_words_than_a_field_holds_are_cut_at_a_word() -> None:
    words = words_of("lobe " * 10_000)
    assert set(words) == {"lobe"}
    assert MAX_WORDS - 10 < len(spaced(words).encode()) <= MAX_WORDS


@pytest.mark.parametrize(
    ("where", "row", "met"),
    [
        ("age + 1 == 62", {"age": 61}, True),
        ("age / spo2 > 1", {"age": 61, "spo2": 0}, False),
        ("age / spo2 <= 1", {"age": 61, "spo2": 0}, False),
        ('extra["x"] + 1 > 0', {"extra": {"x": "a"}}, False),
        ('extra["x"] == 1', {"extra": {"x": True}}, False),
        ('extra["x"] != 1', {"extra": {"x": "1"}}, True),
        ('extra["x"] > 1', {"extra": {"x": "2"}}, False),
        ('extra["x"]["y"][1] == 5', {"extra": {"x": {"y": [4, 5]}}}, True),
        ('extra["x"][0] is null', {"extra": {"x": "text"}}, True),
        ('array_length(extra["x"]) == 2', {"extra": {"x": [1, 2]}}, True),
        ('array_contains_all(extra["x"], [1, 2])', {"extra": {"x": [2, 3, 1]}}, True),
        ('array_contains_any(extra["x"], [])', {"extra": {"x": [2]}}, False),
        ('json_contains(extra["x"], 1)', {}, False),
        (r'label like "a\\%_c%"', {"label": "a%bc\nd"}, True),
        (r'label like "a\\%_c%"', {"label": "axbcd"}, False),
        ('phrase_match(clinical_notes, "ground glass")', {"clinical_notes": "Ground-glass!"}, True),
        ('text_match(clinical_notes, "round")', {"clinical_notes": "Ground-glass!"}, False),
    ],
)
def test_what_is_matched_here(where: str, row: dict[str, Any], met: bool) -> None:
    assert matches(settled(read(where), unknown_patients=True), with_words(row)) == met
