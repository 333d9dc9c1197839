from __future__ import annotations

import pytest

from cxr_retrieval.cases.fields import CLINICAL_FIELDS, MAX_TEXT, NOT_KEPT, identifies, parse_clinical
from cxr_retrieval.errors import CxrError, InputError, SetupError
from cxr_retrieval.settings import MilvusSettings, TritonSettings


def test_known_columns_get_their_type_and_own_columns_a_guess() -> None:
    known, extra, _ = parse_clinical(
        {"age": "61.5", "went_icu": "Y", "survival": "n", "sex": "F", "crp": "12", "ward": "B2", "sha256": "ff"}
    )
    assert known == {"age": 61.5, "went_icu": True, "survival": False, "sex": "F"}
    assert extra == {"crp": 12, "ward": "B2"}, "file facts such as sha256 are not kept"


@pytest.mark.parametrize(
    "column",
    [
        *("name", "PatientName", "patient's name", "PATIENT_NAME", "last name", "Vorname", "Prénom", "ReferringPhysicianName"),
        *(
            "birth_date",
            "PatientBirthDate",
            "dob",
            "Geburtsdatum",
            "AccessionNumber",
            "accession no.",
            "StudyInstanceUID",
            "uid",
            "SOPInstanceUIDs",
        ),
        *(
            "MRN",
            "OtherPatientIDs",
            "patientID",
            "study_id",
            "StudyID",
            "visit number",
            "PatientAddress",
            "telephone",
            "e-mail address",
            "email",
        ),
        *("orig_path", "dicom_path", "FileName", "InstitutionName", "OperatorsName", "insurance", "zip", "IssuerOfPatientID"),
    ],
)
def test_own_columns_that_identify_are_never_stored(column: str) -> None:
    assert identifies(column)
    assert parse_clinical({column: "x"}) == ({}, {}, ())


@pytest.mark.parametrize(
    "column", ["crp", "ward", "d_dimer", "NT-proBNP", "pathology", "case", "study", "smoker", "Mobile", "scanner", "profile"]
)
def test_other_own_columns_stay(column: str) -> None:
    assert not identifies(column)
    assert parse_clinical({column: "x"}) == ({}, {column: "x"}, ())


def test_fields_of_our_own_are_not_taken_for_a_persons() -> None:
    assert not [name for name in (*CLINICAL_FIELDS, *NOT_KEPT) if identifies(name)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-3", -3),
        ("0", 0),
        ("38.1", 38.1),
        ("12.50", 12.5),
        ("00012345", "00012345"),
        ("123_456", "123_456"),
        ("1e3", "1e3"),
        ("+5", "+5"),
        (".5", ".5"),
        ("nan", "nan"),
        ("1234567890123456789", "1234567890123456789"),
        ("0.1234567890123456789", "0.1234567890123456789"),
        ("٣", "٣"),
    ],
)
def test_only_what_round_trips_is_a_number(text: str, value: object) -> None:
    """Identifiers stay what they are: text that would come back otherwise is no number."""
    _, extra, _ = parse_clinical({"own": text})
    assert extra["own"] == value
    assert type(extra["own"]) is type(value)


@pytest.mark.parametrize(
    ("column", "text"), [("age", "fifty"), ("age", "nan"), ("age", "6_0"), ("spo2", "inf"), ("spo2", "1e999"), ("went_icu", "maybe")]
)
def test_values_that_are_none_are_refused(column: str, text: str) -> None:
    with pytest.raises(InputError, match=f"column {column}: not understood"):
        parse_clinical({column: text})


def test_long_text_is_cut_at_a_character() -> None:
    known, _, _ = parse_clinical({"clinical_notes": "é" * MAX_TEXT})
    assert len(str(known["clinical_notes"]).encode()) <= MAX_TEXT


def test_every_kind_is_known() -> None:
    assert set(CLINICAL_FIELDS.values()) == {"number", "flag", "text"}


@pytest.mark.parametrize("url", ["", "localhost", "http://localhost:8001", "host:port", "a b:1"])
def test_malformed_triton_address(url: str) -> None:
    with pytest.raises(SetupError, match="Triton address is malformed"):
        TritonSettings(url)


def test_good_addresses() -> None:
    assert TritonSettings("[::1]:8001").url == "[::1]:8001"
    assert MilvusSettings("gallery.db").is_lite
    assert not MilvusSettings("https://milvus.example:443").is_lite


def test_malformed_milvus_uri_and_limits() -> None:
    with pytest.raises(SetupError, match="Milvus URI is malformed"):
        MilvusSettings("milvus.example")
    with pytest.raises(SetupError, match="timeout"):
        MilvusSettings(timeout_s=0)
    with pytest.raises(SetupError, match="Triton timeout"):
        TritonSettings(timeout_s=0)


def test_secrets_stay_out_of_repr() -> None:
    shown = repr(MilvusSettings(password="hush", token="hush"))
    assert "hush" not in shown


def test_a_message_says_what_expected_got_and_next() -> None:
    error = CxrError("it broke", expected="a", got="b", next_step="do c")
    assert str(error) == "it broke; expected a; got b. Next: do c."
