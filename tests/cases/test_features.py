"""The table of clinical features: units, plausible ranges, names elsewhere, and the page that shows it."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.cases.features import FEATURE, FEATURES, UNITS, columns_of, heading, standard_name
from cxr_retrieval.cases.fields import CLINICAL_FIELDS, parse_clinical
from cxr_retrieval.errors import InputError
from feature_page import PAGE, tables, with_tables


def test_the_page_shows_the_table() -> None:
    page = PAGE.read_text("utf-8")
    assert with_tables(page, tables()) == page, "run tests/golden/regenerate.py"
    assert all(f"| `{feature.name}` |" in page for feature in FEATURES)


def test_the_stored_schema_is_what_galleries_have() -> None:
    assert dict(CLINICAL_FIELDS) == {
        **dict.fromkeys(("age", "temperature", "spo2", "wbc", "neutrophil", "lymphocyte", "offset_days"), "number"),
        **dict.fromkeys(("survival", "intubated", "went_icu", "needed_supplemental_o2"), "flag"),
        **dict.fromkeys(("sex", "view", "raw_finding", "date", "location", "clinical_notes", "license", "doi", "url"), "text"),
    }


@pytest.mark.parametrize(
    ("column", "text", "feature", "value"),
    [
        ("temperature", "101.3 F", "temperature", 38.5),
        ("temperature", "36.9 °C", "temperature", 36.9),
        ("temperature", "310.15 K", "temperature", 37.0),
        ("temperature [degF]", "98.6", "temperature", 37.0),
        ("temperature [[degF]]", "98.6", "temperature", 37.0),
        ("temperature [degF]", "37 Cel", "temperature", 37.0),
        ("spo2", "92 %", "spo2", 92.0),
        ("spo2 [1]", "0.92", "spo2", 92.0),
        ("wbc", "8.5 10*9/L", "wbc", 8.5),
        ("wbc[/uL]", "8500", "wbc", 8.5),
        ("neutrophil", "4.2 K/uL", "neutrophil", 4.2),
        ("lymphocyte", "900/µL", "lymphocyte", 0.9),
        ("lymphocyte", "900 /\u03bcL", "lymphocyte", 0.9),
        ("temperature", "37\u2103", "temperature", 37.0),
        ("age [mo]", "18", "age", 1.5),
        ("offset_days", "2 weeks", "offset_days", 14.0),
        ("age", "61.5", "age", 61.5),
    ],
)
def test_units_are_converted(column: str, text: str, feature: str, value: float) -> None:
    assert parse_clinical({column: text}) == ({feature: value}, {}, ())


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("neutrophil", "70 %"),
        ("temperature", "36,9"),
        ("temperature", "36.9 f"),
        ("temperature [Rankine]", "560"),
        ("spo2", "80 mmHg"),
        ("age", "1" * 5000),
        ("age", "1" * 60_000 + "\n"),
        ("wbc", "9e999 /uL"),
    ],
)
def test_what_does_not_convert_is_refused_with_its_column(column: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_clinical({column: text})
    assert caught.value.what == f"column {column}: not understood"
    assert all(unit.code in caught.value.expected for unit in UNITS[FEATURE[column.split(" ")[0]].unit])


def test_two_columns_of_one_feature_are_refused() -> None:
    with pytest.raises(InputError, match="holds what another column holds"):
        parse_clinical({"temperature": "37", "temperature [degF]": "98.6"})


@pytest.mark.parametrize(
    ("column", "text", "said"),
    [
        ("temperature", "98.6", "98.6 is outside 30 to 43 °C; Fahrenheit"),
        ("spo2", "340", "340 is outside 50 to 100 %"),
        ("spo2", "0.92", "a fraction"),
        ("neutrophil", "70", "a percentage"),
        ("wbc", "7400", "cells per µL"),
        ("age", "1950", "a year of birth"),
        ("temperature [degF]", "37", "2.777777778 is outside 30 to 43 °C"),
        ("sex", "female", "'female' is none of F, M, O"),
    ],
)
def test_what_is_not_plausible_is_kept_and_doubted(column: str, text: str, said: str) -> None:
    known, extra, doubts = parse_clinical({column: text})
    assert len(known) == 1
    assert extra == {}
    assert len(doubts) == 1
    assert doubts[0].startswith(f"column {column}: ")
    assert said in doubts[0]


def test_an_own_column_with_brackets_stays_the_users_own() -> None:
    assert parse_clinical({"crp [mg/L]": "12", "sex [code]": "F", "temperature_f": "98.6"}) == (
        {},
        {"crp [mg/L]": 12, "sex [code]": "F", "temperature_f": 98.6},
        (),
    )


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("pO2_saturation", "spo2"),
        ("needed_supplemental_O2", None),
        ("leukocyte_count", "wbc"),
        ("temperature_f", "temperature [degF]"),
        ("Age", "age"),
        ("SpO2", "spo2"),
        ("temperature [degF]", None),
        ("spo2", None),
        ("crp", None),
    ],
)
def test_a_feature_under_another_name_is_recognised(column: str, name: str | None) -> None:
    if column == "needed_supplemental_O2":
        name = "needed_supplemental_o2"
    assert standard_name(column) == name


def test_every_row_of_the_table_is_sound() -> None:
    codes = [code for feature in FEATURES for code in feature.loinc]
    assert len(codes) == len(set(codes)), "an Observation is of one feature"
    for feature in FEATURES:
        assert (feature.unit in UNITS) == (feature.plausible is not None) == (feature.kind == "number"), feature.name
        assert all(_checked(code) for code in feature.loinc), feature.name
        for unit in UNITS.get(feature.unit, ()):
            assert heading(f"{feature.name} [{unit.code}]") == (feature, unit.code)
        names = [name for unit in UNITS.get(feature.unit, ()) for name in unit.names]
        assert len(names) == len(set(names)), feature.name
    assert columns_of("ieee8023")["pO2_saturation"] == "spo2"


def _checked(code: str) -> bool:
    """LOINC's check digit, modulus 10 with every second digit doubled (LOINC Users' Guide, appendix C)."""
    digits, check = code.split("-")
    doubled = int("".join(digits[::-1][0::2])[::-1]) * 2
    total = sum(map(int, str(doubled) + digits[::-1][1::2]))
    return (10 - total % 10) % 10 == int(check)


@given(st.sampled_from([feature for feature in FEATURES if feature.unit]), st.fractions(min_value=-1000, max_value=1000), st.data())
def test_every_spelling_of_a_unit_converts_alike(feature: object, value: Fraction, data: st.DataObject) -> None:
    assert isinstance(feature, type(FEATURES[0]))
    unit = data.draw(st.sampled_from(UNITS[feature.unit]))
    assert {feature.converted(value, name) for name in unit.names} == {float(value * unit.factor + unit.offset)}
    assert feature.converted(value, feature.unit) == float(value)


@given(st.text(max_size=30), st.sampled_from([feature.name for feature in FEATURES if feature.kind == "number"]))
def test_no_cell_is_taken_for_a_number_by_accident(text: str, column: str) -> None:
    """Whatever stands in a cell: refused, or a finite number."""
    try:
        known, _, _ = parse_clinical({column: text})
    except InputError:
        return
    value = known[column]
    assert isinstance(value, float)
    assert value - value == 0
