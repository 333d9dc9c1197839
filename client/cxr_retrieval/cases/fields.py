"""The clinical fields: which manifest columns are kept in the store, as which Milvus type, and how text becomes a value."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Final, Literal

from cxr_retrieval.errors import InputError

Kind = Literal["number", "flag", "text"]
Value = int | float | bool | str

CLINICAL_FIELDS: Final[Mapping[str, Kind]] = {
    "age": "number",
    "sex": "text",
    "view": "text",
    "raw_finding": "text",
    "survival": "flag",
    "intubated": "flag",
    "went_icu": "flag",
    "needed_supplemental_o2": "flag",
    "temperature": "number",
    "spo2": "number",
    "wbc": "number",
    "neutrophil": "number",
    "lymphocyte": "number",
    "offset_days": "number",
    "date": "text",
    "location": "text",
    "clinical_notes": "text",
    "license": "text",
    "doi": "text",
    "url": "text",
}
"""Columns with a typed, nullable Milvus field each: DOUBLE, BOOL or VARCHAR, filterable as `age > 60 and went_icu == true`."""

NOT_KEPT: Final = frozenset(
    {
        "lung_mask_path",
        "mask_source",
        "lesion_mask_path",
        "sha256",
        "orig_filename",
        "width",
        "height",
        "orig_width",
        "orig_height",
        "geometry",
    }
)
"""Columns about the file rather than the patient."""

_IDENTIFYING: Final = re.compile(
    r"""\w*(name|names|birth|birthdate|accession|uid|uids|phone|address)
      | namen|vorname|nachname|nom|prenom|nombre|apellidos?|cognome
      | birthday|birthplace|birthtime|dob|geburts(datum|tag|ort)|naissance|nacimiento|nascita
      | accession(no|number)|mrn|medicalrecordnumber|mpi|pid|ssn|nhs|nir|nric|guid|uuid|(patient|study|subject|case)ids?
      | telephone|telefon|tel|phonenumber|fax|email|adresse|addresses|street|postcode|zip|zipcode|postal|plz
      | physicians?|doctor|surgeon|radiologist|operators?|nurse|technician|referrer|requester|insurance|policy
      | paths?|files?|filepath""",
    re.VERBOSE,
)
_NUMBER: Final = re.compile("ids?|identifiers?|identification|no|nr|num|numbers?|code|key")
_NUMBERED: Final = re.compile(
    "patient|person|subject|participant|study|series|visit|encounter|admission|stay|case|medical|record|hospital|national|passport|"
    "exam|examination|order|request|sop|instance|dicom|issuer|other"
)
"""What a number, in the same column's name, tells apart people or their visits by."""


def identifies(column: str) -> bool:
    """Whether a column of the user's own, by its name, says who somebody is or where a file lies: such a column is never stored.

    Known by words, in English and a few other languages, and by DICOM's keywords: `PatientName`, `birth_date`, `Accession No`,
    `StudyInstanceUID`, `mrn`. Rather one too many than one too few: a column that harms nobody can be stored under another name.
    """
    if column in CLINICAL_FIELDS or column in NOT_KEPT:
        return False
    plain = "".join(c for c in unicodedata.normalize("NFKD", column) if c.isascii())
    words = [word.lower() for word in re.findall(r"[A-Z]{2,}s?(?![a-z])|[A-Z]?[a-z]+", plain)]
    numbered = any(map(_NUMBER.fullmatch, words)) and any(map(_NUMBERED.fullmatch, words))
    return numbered or any(map(_IDENTIFYING.fullmatch, words))


MAX_TEXT: Final = 8192
"""Bytes of UTF-8 in a text field."""

_FLAGS: Final = {"y": True, "yes": True, "true": True, "1": True, "n": False, "no": False, "false": False, "0": False}


def parse_clinical(columns: Mapping[str, str]) -> tuple[dict[str, Value], dict[str, Value]]:
    """Turns a manifest row's further columns into typed values.

    Returns:
        (values of CLINICAL_FIELDS that are present, values of all other kept columns, which identify nobody, for the JSON field `extra`).

    Raises:
        InputError: A number or flag that is none.
    """
    known: dict[str, Value] = {}
    extra: dict[str, Value] = {}
    for name, text in columns.items():
        if name in CLINICAL_FIELDS:
            known[name] = _typed(name, CLINICAL_FIELDS[name], text)
        elif name not in NOT_KEPT and not identifies(name):
            extra[name] = _guessed(text)
    return known, extra


def _typed(name: str, kind: Kind, text: str) -> Value:
    if kind == "text":
        return text.encode()[:MAX_TEXT].decode(errors="ignore")
    value = _number(text) if kind == "number" else _FLAGS.get(text.lower())
    if value is None:
        expected = "a number" if kind == "number" else "Y or N"
        raise InputError(
            f"column {name}: not understood", expected=f"{expected}, or empty for unknown", got=repr(text), next_step="correct that cell"
        )
    return value


def _guessed(text: str) -> Value:
    """A column of the user's own: a number only if it can be written so again (but for zeros at its end), an integer up to 15 digits.
    `00012345`, `123_456` and `1e3` are names of something.
    """
    if re.fullmatch(r"0|-?[1-9][0-9]{0,14}", text):
        return int(text)
    if re.fullmatch(r"-?(0|[1-9][0-9]*)\.[0-9]+", text) and Decimal(repr(float(text))) == Decimal(text):
        return float(text)
    return text.encode()[:MAX_TEXT].decode(errors="ignore")


def _number(text: str) -> float | None:
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):  # float() would also take 1_0 and nan
        return None
    value = float(text)
    return value if value - value == 0 else None
