"""The clinical fields: which manifest columns are kept in the store, as which Milvus type, and how text becomes a value."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Final, NamedTuple

from cxr_retrieval.cases.features import FEATURES, UNITS, Feature, Kind, heading
from cxr_retrieval.errors import InputError

Value = int | float | bool | str

CLINICAL_FIELDS: Final[Mapping[str, Kind]] = {feature.name: feature.kind for feature in FEATURES}
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

FLAGS: Final[Mapping[str, bool]] = {"y": True, "yes": True, "true": True, "1": True, "n": False, "no": False, "false": False, "0": False}
"""How a flag is written, in small letters."""


class Doubt(NamedTuple):
    """A value that is not plausible, and is kept all the same.

    Attributes:
        image_id: Of its row; of a film that no manifest lists, what the user calls it.
        words: Name the column.
    """

    image_id: str
    words: str


class Clinical(NamedTuple):
    """A row's clinical columns, typed.

    Attributes:
        known: Values of CLINICAL_FIELDS that are present, numbers in the unit of `features.FEATURES`.
        extra: Values of all other kept columns, which identify nobody, for the JSON field `extra`.
        doubts: What is not plausible, in words that name the column; kept all the same.
    """

    known: dict[str, Value]
    extra: dict[str, Value]
    doubts: tuple[str, ...]


def parse_clinical(columns: Mapping[str, str]) -> Clinical:
    """Turns a manifest row's further columns into typed values.

    A column may name its unit (`temperature [degF]`), and so may a cell (`101.3 °F`), whose own word counts.

    Raises:
        InputError: A number or flag that is none, a unit that does not convert, or two columns of one feature.
    """
    known: dict[str, Value] = {}
    extra: dict[str, Value] = {}
    doubts: list[str] = []
    for name, text in columns.items():
        feature, unit = heading(name)
        if feature is None:
            if name not in NOT_KEPT and not identifies(name):
                extra[name] = _guessed(text)
            continue
        if feature.name in known:
            raise InputError(
                f"column {name}: holds what another column holds, too",
                expected=f"one column of {feature.name}",
                next_step="leave one of the two empty",
            )
        known[feature.name] = value = _typed(feature, name, text, unit)
        if doubt := feature.doubt(value):
            doubts.append(f"column {name}: {doubt}")
    return Clinical(known, extra, tuple(doubts))


def _typed(feature: Feature, column: str, text: str, unit: str) -> Value:
    if feature.kind == "text":
        return text.encode()[:MAX_TEXT].decode(errors="ignore")
    value = _number(feature, text, unit) if feature.kind == "number" else FLAGS.get(text.lower())
    if value is None:
        units = ", ".join(unit.code for unit in UNITS.get(feature.unit, ()))
        expected = f"a number, perhaps followed by its unit ({units})" if feature.kind == "number" else "Y or N"
        raise InputError(
            f"column {column}: not understood",
            expected=f"{expected}, or empty for unknown",
            got=repr(text),
            next_step="correct that cell" + (" or the column's heading" if unit else ""),
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


_NUMBER_AND_UNIT: Final = re.compile(r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?)\s*(.*)", re.DOTALL)
"""What float() takes, without 1_0 and nan."""


def _number(feature: Feature, text: str, unit: str) -> float | None:
    parts = _NUMBER_AND_UNIT.fullmatch(text)
    if parts is None:
        return None
    try:
        return feature.converted(Fraction(parts[1]), parts[2] or unit or feature.unit)
    except (OverflowError, ValueError):  # more digits than Python turns into a number
        return None
