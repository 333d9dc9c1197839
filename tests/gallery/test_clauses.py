"""Clauses as users write them: what they are read as, what is wrong with them and where, and that nothing else ever happens."""

from __future__ import annotations

import pickle
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clauses import FIELDS, trees
from cxr_retrieval.errors import ClauseError
from cxr_retrieval.gallery.clause import And, Arithmetic, Compare, Field, Node, Not, Or, Value, printed
from cxr_retrieval.gallery.clause_parser import MAX_CONDITIONS, MAX_DEPTH, MAX_LENGTH, MAX_TERMS, parse, parse_text


def read(where: str) -> str:
    """As it is printed again."""
    node = parse(where, FIELDS)
    return "" if node is None else printed(node)


@pytest.mark.parametrize(
    ("where", "read_as"),
    [
        ("", ""),
        (" \n", ""),
        ('age >= 60 and sex == "F" and spo2 < 92 and went_icu', 'age >= 60 and sex == "F" and spo2 < 92 and went_icu == true'),
        ("not went_icu", "not (went_icu == true)"),
        ("!went_icu && age > 1 || (survival)", "(not (went_icu == true) and age > 1) or survival == true"),
        ("went_icu or survival and intubated", "went_icu == true or (survival == true and intubated == true)"),
        ("age > 1 and (age > 2 and age > 3)", "age > 1 and age > 2 and age > 3"),
        ("not age > 60 and went_icu", "not (age > 60) and went_icu == true"),
        ("60 <= age < 80", "60 <= age and age < 80"),
        ("1 < age < spo2 <= 1e2", "1 < age and age < spo2 and spo2 <= 100.0"),
        ("age > 1e3", "age > 1000.0"),
        ("age > 6.5E-1 and wbc <= .5", "age > 0.65 and wbc <= 0.5"),
        ("age in [1, -2, 0x1F, 0b11,]", "age in [1, -2, 31, 3]"),
        ("age not in []", "age not in []"),
        ("age > 9007199254740993", "age > 9007199254740992.0"),
        ("age + 2 * 3 > 60 - 1", "(age + 6) > 59"),
        ("-age < 5 % 3", "(0 - age) < 2"),
        ("NOT (age IS NULL) OR went_icu == TRUE", "not (age is null) or went_icu == true"),
        ('label == "e3 is no number" and sex == "F"', 'label == "e3 is no number" and sex == "F"'),
        ("clinical_notes == 'he said \\'no\\''", "clinical_notes == \"he said 'no'\""),
        (r'clinical_notes == "\u00e4\n\"\\"', 'clinical_notes == "ä\\n\\"\\\\"'),
        (r'label == "\ud83d\ude00"', 'label == "😀"'),
        ('extra["anything at all"] > 2', 'extra["anything at all"] > 2'),
        ('extra["a"][0]["b"] like "x%"', 'extra["a"][0]["b"] like "x%"'),
        ('exists extra["a"] and extra["b"] is not null', '(exists extra["a"]) and extra["b"] is not null'),
        ('ARRAY_CONTAINS(extra["list"], 1)', 'array_contains(extra["list"], 1)'),
        ('json_contains_any(extra["list"], [1, "a", true])', 'json_contains_any(extra["list"], [1, "a", true])'),
        ('array_length(extra["list"]) > 2', 'array_length(extra["list"]) > 2'),
        ('TEXT_MATCH(clinical_notes, "Pleura-Ödem")', 'TEXT_MATCH(clinical_notes, "pleura odem")'),
        ('phrase_match(clinical_notes, "ground glass")', 'PHRASE_MATCH(clinical_notes, "ground glass")'),
        ('patient_id not in ["P", "Q]"]', 'patient_id not in ["P", "Q]"]'),
    ],
)
def test_what_clauses_are_read_as(where: str, read_as: str) -> None:
    assert read(where) == read_as


@pytest.mark.parametrize(
    ("where", "marked", "said"),
    [
        ("agee > 60", "agee", r"an unknown field: agee.*Next: did you mean age\?"),
        ("SPO2 > 60", "SPO2", r"did you mean spo2\?"),
        ('age > five or sex == "F"', "five", "unknown field: five"),
        ('pixels == "ab"', "pixels", "unknown field: pixels"),
        ('path == "/films/a.dcm"', "path", r'unknown field: path; expected age.*reached as extra\["name"\]'),
        ("sex == F", "F", 'text stands in quotes: "F"'),
        ('sex = "F"', "=", r"expected an operator.*did you mean ==\?"),
        ("age => 5", "=>", r"did you mean >=\?"),
        ("age <> 5", "<>", r"did you mean !=\?"),
        ('sex equals "F"', "equals", r"did you mean ==\?"),
        ("age ** 2 > 4", "**", "expected an operator"),
        ('age > 60 adn sex == "F"', "adn", r"expected and, or, or the end; got adn at character 10. Next: did you mean and\?"),
        ("age > 60 & went_icu", "&", r"did you mean and\?"),
        ('age == "60"', '"60"', "compares a number with .*write 60 without quotes"),
        ("sex > 3", "3", 'write it in quotes: "3"'),
        ("spo2 < true", "true", "compares a number with true, which is a flag"),
        ("went_icu == 1", "1", "compare a flag with true or false, or write its name alone"),
        ("went_icu >= true", ">=", "which flag is greater"),
        ('age in [1, "2"]', '"2"', "write 2 without quotes"),
        ("age in [spo2]", "spo2", "a list with more than constants"),
        ("age in (1, 2)", "(", r"expected \[ and a list"),
        ("age not [1]", "[", "expected in, as in not in"),
        ("age", "age", "has age, which is a number alone; expected a comparison, or a flag.*such as age > 60"),
        ('age and sex == "F"', "age", "a number alone"),
        ('sex == "F" and label', "label", 'such as label == "…"'),
        ("true", "true", "a flag alone"),
        ("1 < 2", "1 < 2", "compares two constants"),
        ("(age > 5) == true", "age > 5", "compares a comparison"),
        ("age >", "", "ends too early; expected a field, a value or a parenthesis; got its end"),
        ("(age > 5", "", r"expected \) for the parenthesis at character 1"),
        ("age > 5)", ")", "no parenthesis is open"),
        ("age is 5", "5", "expected null"),
        ('extra["x"] == null', "null", r"did you mean is null\?"),
        ("age like 5", "age", "asks age, which is a number for a pattern"),
        ("sex like F", "F", "a pattern in quotes"),
        ('sex + 1 == "F1"', "sex", "reckons with sex, which is text"),
        ("age / 0 > 1 / 0", "1 / 0", "a number that is none"),
        ("age > 007", "007", "leave out the zeros before it"),
        ("age > 60abc", "60abc", "a number that is none"),
        ("age > 1e999", "1e999", "one up to 1.7e308"),
        ('sex == "F', '"F', 'a string that is not closed; expected a second "; got "F at character 8'),
        ("sex == 'F\\'", "'F\\'", "a string that is not closed"),
        ('label == "a" and sex == F"', '"', "a string that is not closed"),
        (r'sex == "a\qb"', r"\q", "an escape that Milvus does not know"),
        ("extra > 5", "extra", "asks extra as a whole"),
        ("extra[0] > 5", "extra[0]", "asks extra as a whole"),
        ('age["x"] > 5', "[", "expected an operator"),
        ("array_length(age) > 5", "age", "takes age for a list"),
        ('text_match(sex, "F")', "sex", "expected clinical_notes"),
        ('text_match(clinical_notes, "!")', '"!"', "looks for words, and there are none"),
        ("foo(age)", "foo", "an unknown function: foo"),
        ("text_macth(age)", "text_macth", r"did you mean text_match\?"),
        ("$meta > 5", "$", "a word in the wrong place"),
        ("age > 5; drop", ";", "a word in the wrong place"),
    ],
)
def test_what_is_wrong_is_marked_and_mended(where: str, marked: str, said: str) -> None:
    with pytest.raises(ClauseError, match=said) as caught:
        parse(where, FIELDS)
    start, end = caught.value.span
    assert where[start:end] == marked
    assert str(caught.value).splitlines()[-2:] == [f"  {where}", f"  {' ' * start}{'^' * max(1, len(marked))}"]
    assert caught.value.exit_code == 2
    assert pickle.loads(pickle.dumps(caught.value)).span == (start, end)


@pytest.mark.parametrize(
    "where",
    [
        'image_id like "A%"',
        'patient_id > "P"',
        '"P" == patient_id',
        "patient_id == 5",
        "patient_id in [5]",
        "patient_id == patient_id",
        "not patient_id",
        'array_contains(patient_id, "P")',
        'patient_id("P")',
        'patient_id + "x" == "P"',
    ],
)
def test_what_pseudonyms_cannot_do_is_said(where: str) -> None:
    with pytest.raises(ClauseError, match="Milvus holds a pseudonym of it"):
        parse(where, FIELDS)


def test_what_is_shown_of_a_long_clause_fits_a_screen_and_harms_no_terminal() -> None:
    """Carets stand under wide characters, too; what would steer a terminal is a space."""
    with pytest.raises(ClauseError) as caught:
        parse(f'label == "{"x" * 500}" and label == "肺炎\x1b[2J" and agee > 5 and label == "{"y" * 500}"', FIELDS)
    shown, carets = str(caught.value).splitlines()[-2:]
    assert shown.endswith("…")
    assert "\x1b" not in str(caught.value)
    assert "肺炎 [2J" in shown
    assert len(shown) < 140
    assert carets.index("^") == shown.index("agee") + 2, "two of the characters before it are twice as wide"
    assert carets.count("^") == 4


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("(" * 100_000 + "age > 5" + ")" * 100_000, "nested too deeply; expected at most 50 levels"),
        ("not " * 50_000 + "went_icu", "nested too deeply"),
        ("age > " + "-" * 100_000 + "5", "nested too deeply"),
        ("age" + "+age" * 50_000 + " > 5", "too long a sum"),
        (" or ".join(["went_icu"] * (MAX_CONDITIONS + 1)), "too many conditions"),
        ("x" * 10_000_000, "too long; expected at most 262144 characters; got 10000000"),
        ('"' + "\\" * 10_000_000, "too long"),
        ("age in [" + "1," * 100_000, "ends too early"),
        ('"' * 200_001, "not closed"),
        ("age > " + "1" * 200_000, "a number that is none"),
        ('sex == "\ud800"', "half a character"),
    ],
)
def test_hostile_clauses_end_with_an_error(where: str, said: str) -> None:
    with pytest.raises(ClauseError, match=said) as caught:
        parse(where, FIELDS)
    assert len(str(caught.value)) < 1500


def test_what_is_just_allowed() -> None:
    deep = "(" * (MAX_DEPTH - 2) + "age > 5" + ")" * (MAX_DEPTH - 2)
    assert read(deep) == "age > 5"
    assert read("not (" * ((MAX_DEPTH - 1) // 2) + "went_icu" + ")" * ((MAX_DEPTH - 1) // 2)).count("not") == (MAX_DEPTH - 1) // 2
    assert read(" or ".join(["went_icu"] * MAX_CONDITIONS)).count("went_icu") == MAX_CONDITIONS
    ids = ", ".join(f'"{n:030x}"' for n in range(7_000))
    assert len(ids) < MAX_LENGTH
    assert read(f"patient_id in [{ids}]") == f"patient_id in [{ids}]"


@given(trees())
def test_what_is_printed_is_read_as_the_same(node: Node) -> None:
    text = printed(node)
    again = parse(text, FIELDS)
    assert again == node
    assert again is not None
    assert printed(again) == text


SIGNS = r"""and or not in like is null exists true false ( ) [ ] , + - * / % == != < <= > >= = && || ! " ' \ 5 0x1 1e5 "a" extra["x"]"""
SOUP = st.lists(st.sampled_from([*FIELDS, *SIGNS.split()]), max_size=12)


@given(st.one_of(st.text(), SOUP.map(" ".join), SOUP.map("".join)))
def test_nothing_but_a_clause_error_is_raised(where: str) -> None:
    """Whatever is read can be printed and read again; whatever is not points into the clause."""
    try:
        node = parse(where, FIELDS)
    except ClauseError as error:
        start, end = error.span
        within = 0 <= start <= end <= max(len(where), 1)
    else:
        within = node is None or parse(printed(node), FIELDS) == node
    assert within


@given(trees(), st.randoms(use_true_random=False))
def test_a_harmed_clause_is_read_or_refused(node: Node, chance: random.Random) -> None:
    text = printed(node)
    place = chance.randrange(len(text))
    harmed = text[:place] + chance.choice(["", text[place] * 2, "(", '"', " not ", "5"]) + text[place + 1 :]
    try:
        again = parse(harmed, FIELDS)
    except ClauseError:
        return
    assert again is None or parse(printed(again), FIELDS) == again


def test_trees_know_no_synonyms() -> None:
    tree = And(
        (
            Not(Compare("==", Field("went_icu"), Value(True))),
            Or((Compare("<", Field("age"), Value(5)), Compare(">", Arithmetic("+", Field("age"), Value(1)), Value(9)))),
        )
    )
    assert parse("not went_icu && (age<5 or (age+1)>9)", FIELDS) == tree


@pytest.mark.parametrize(
    ("text", "asks"),
    [
        ("", ""),
        ("  ", ""),
        ("Effusion", 'TEXT_MATCH(clinical_notes, "effusion")'),
        ("ödem  RECHTS", 'TEXT_MATCH(clinical_notes, "odem") and TEXT_MATCH(clinical_notes, "rechts")'),
        ('"ground  glass" -tube', 'PHRASE_MATCH(clinical_notes, "ground glass") and not (TEXT_MATCH(clinical_notes, "tube"))'),
        ("“ground glass”", 'PHRASE_MATCH(clinical_notes, "ground glass")'),
        ('-"no tube"', 'not (PHRASE_MATCH(clinical_notes, "no tube"))'),
        ("follow-up", 'PHRASE_MATCH(clinical_notes, "follow up")'),
        ("x - , y", 'TEXT_MATCH(clinical_notes, "x") and TEXT_MATCH(clinical_notes, "y")'),
        ('" or age > 5 --"', 'PHRASE_MATCH(clinical_notes, "or age 5")'),
    ],
)
def test_what_words_ask(text: str, asks: str) -> None:
    node = parse_text(text)
    assert ("" if node is None else printed(node)) == asks


@pytest.mark.parametrize(
    ("text", "marked", "said"),
    [
        ('pneumonia "ground glass', '"', 'a phrase that is not closed; expected a second "'),
        ("!! -- ,", "!! -- ,", "holds no word"),
        ("word " * (MAX_TERMS + 1), "word", "too many words"),
        ("x" * 5_000, "x" * 904, "too long"),
    ],
)
def test_words_that_cannot_be_meant(text: str, marked: str, said: str) -> None:
    with pytest.raises(ClauseError, match=said) as caught:
        parse_text(text)
    assert text[slice(*caught.value.span)] == marked


@given(st.text())
def test_words_are_read_or_refused(text: str) -> None:
    try:
        node = parse_text(text)
    except ClauseError:
        return
    assert node is None or parse(printed(node), FIELDS) == node
