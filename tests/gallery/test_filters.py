"""Clauses as users write them: what is refused before Milvus sees it, and what is rewritten."""

from __future__ import annotations

import pytest

from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.filters import check_filter, keep_unknown_patients
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
