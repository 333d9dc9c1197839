"""Clauses as users write them: what is refused before Milvus sees it, and what is rewritten."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.filters import check_filter, keep_unknown_patients, with_pseudonyms
from cxr_retrieval.gallery.store import FILTER_FIELDS


@pytest.mark.parametrize(
    "where",
    [
        "",
        "age > 1e3",
        "age > 6.5E-1 and wbc <= .5",
        "age in [1, 2, 0x1F]",
        'label == "e3 is no number" and sex == "F"',
        "clinical_notes == 'he said \\'no\\''",
        'extra["anything at all"] > 2',
        'array_contains(extra["list"], 1)',
        "NOT (age IS NULL) OR went_icu == TRUE",
    ],
)
def test_sound_clauses(where: str) -> None:
    check_filter(where, FILTER_FIELDS)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("agee > 5", "unknown field: agee"),
        ("age > five", "unknown field: five"),
        ('pixels == "ab"', "unknown field: pixels"),
        ('path == "/films/a.dcm"', "unknown field: path"),
        ('sex == "F', 'a string that is not closed; expected a second "; got "F'),
        ("sex == 'F\\'", "a string that is not closed"),
        ('label == "a" and sex == F"', "a string that is not closed"),
    ],
)
def test_clauses_that_cannot_be_meant(where: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_filter(where, FILTER_FIELDS)


@pytest.mark.parametrize(
    ("where", "rewritten"),
    [
        ('patient_id != "P"', '(patient_id is null or patient_id != "P")'),
        ("age > 5 and patient_id != 'P' and sex == \"F\"", "age > 5 and (patient_id is null or patient_id != 'P') and sex == \"F\""),
        ('patient_id not in ["P", "Q]"]', '(patient_id is null or patient_id not in ["P", "Q]"])'),
        ('patient_id == "P"', 'patient_id == "P"'),
        ("clinical_notes == \"patient_id != 'P'\"", "clinical_notes == \"patient_id != 'P'\""),
        ('sex != "F"', 'sex != "F"'),
    ],
)
def test_another_patient_may_be_an_unknown_one(where: str, rewritten: str) -> None:
    assert keep_unknown_patients(where) == rewritten


def pseudonym(text: str) -> str:
    return f"<{text}>"


FIELDS = {"image_id": pseudonym, "patient_id": pseudonym}
ITSELF = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("where", "stored"),
    [
        ("", ""),
        ('image_id == "A" and age > 5', 'key in ["<A>"] and age > 5'),
        ("patient_id!='P'", 'patient_id not in ["<P>"]'),
        ('patient_id IN ["P", \'Q]"\']', 'patient_id in ["<P>", "<Q]\\">"]'),
        ('not (patient_id not in["P",])', 'not (patient_id not in ["<P>"])'),
        ("patient_id is not null or image_id in []", "patient_id is not null or key in []"),
        (r'patient_id == "a\"b\\c\u00e4"', r'patient_id in ["<a\"b\\c\u00e4>"]'),
        (f'image_id == "{ITSELF}"', f'key in ["<{ITSELF}>", "{ITSELF}"]'),
        (
            'clinical_notes == "patient_id == 1" and extra["image_id"] == "A"',
            'clinical_notes == "patient_id == 1" and extra["image_id"] == "A"',
        ),
    ],
)
def test_ids_become_pseudonyms(where: str, stored: str) -> None:
    assert with_pseudonyms(where, FIELDS) == stored


@pytest.mark.parametrize(
    "where",
    [
        'image_id like "A%"',
        'patient_id > "P"',
        '"P" == patient_id',
        "patient_id == 5",
        "patient_id in [5]",
        "patient_id == patient_id",
        'array_contains(patient_id, "P")',
        'json_contains([patient_id], "P")',
        'patient_id("P")',
        'patient_id + "x" == "P"',
    ],
)
def test_what_pseudonyms_cannot_do_is_said_and_never_sent(where: str) -> None:
    with pytest.raises(UsageError, match="Milvus holds a pseudonym of it"):
        with_pseudonyms(where, FIELDS)


@given(st.lists(st.text()), st.sampled_from(["in", "not in"]))
def test_no_id_survives_in_a_clause(ids: list[str], how: str) -> None:
    """Whatever an id holds: quotes, backslashes, brackets, what looks like a clause."""
    stored = with_pseudonyms(f"image_id {how} {json.dumps(ids)} or patient_id {how} {json.dumps(ids, ensure_ascii=False)}", PLAIN)
    hidden = json.dumps([PLAIN["image_id"](text) for text in ids])
    assert stored == f"key {how} {hidden} or patient_id {how} {hidden}"


PLAIN = dict.fromkeys(FIELDS, lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:31])
