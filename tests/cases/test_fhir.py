"""FHIR bundles: which fact of which day, what stays unknown, and documents made to harm."""

from __future__ import annotations

import copy
import json
import pickle
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxr_retrieval.cases import fhir
from cxr_retrieval.cases.fhir import Chart, film_day, read_chart
from cxr_retrieval.cases.fields import parse_clinical
from cxr_retrieval.errors import UsageError
from fhir_bundles import (
    PRIVATE,
    SNOMED,
    TERMINOLOGY,
    at,
    bundle,
    coded,
    encounter,
    hospital,
    left,
    observation,
    patient,
    place,
    procedure,
    written,
)

MARCH_20 = date(2020, 3, 20)


@pytest.fixture
def chart_of(tmp_path: Path) -> Any:
    """Bundles → their chart."""
    return lambda *documents: read_chart([written(tmp_path / f"{n}.json", one) for n, one in enumerate(documents)])


def facts(chart: Chart, patient_id: str = "MRN-4711", taken: date | None = MARCH_20) -> dict[str, str]:
    found = chart.facts(patient_id, taken)
    assert found is not None
    return found


def test_a_stay_through_intensive_care(chart_of: Any) -> None:
    chart = chart_of(hospital())
    assert (chart.patients, chart.warnings) == (2, ())
    found = facts(chart)
    assert found == {
        "age": "67",
        "sex": "F",
        "survival": "N",
        "intubated": "Y",
        "went_icu": "Y",
        "needed_supplemental_o2": "Y",
        "temperature": "38.5",
        "spo2": "88.0",
        "wbc": "8.5",
        "neutrophil": "7.1",
    }
    assert facts(chart, "p1") == facts(chart, "NHS-p1") == found, "every identifier leads to the patient, and so does the id"
    known, extra, doubts = parse_clinical(found)
    assert (known["temperature"], known["went_icu"], extra, doubts) == (38.5, True, {}, ())


def test_a_stay_on_a_ward(chart_of: Any) -> None:
    assert facts(chart_of(hospital()), "MRN-4712", date(2020, 3, 23)) == {
        "age": "29",
        "sex": "M",
        "survival": "Y",
        "intubated": "N",
        "went_icu": "N",
        "needed_supplemental_o2": "N",
        "spo2": "97.0",
    }


def test_another_film_of_the_same_patient_gets_that_days_facts(chart_of: Any) -> None:
    """A year before: another stay, another temperature, another age; in between, nothing but who it is."""
    chart = chart_of(hospital())
    assert facts(chart, taken=date(2019, 1, 3)) == {"age": "66", "sex": "F", "survival": "Y", "went_icu": "N", "temperature": "36.6"}
    assert facts(chart, taken=date(2019, 7, 18)) == {"age": "66", "sex": "F"}
    assert facts(chart, taken=date(2019, 7, 19)) == {"age": "67", "sex": "F"}
    undated = facts(chart, taken=None)
    assert "age" not in undated
    assert (undated["temperature"], undated["survival"]) == ("37.5", "N"), "of a film without a day the latest"


def test_an_unknown_patient_has_no_facts(chart_of: Any) -> None:
    chart = chart_of(hospital())
    assert chart.facts("MRN-9", MARCH_20) is None
    assert chart.facts(None, MARCH_20) is None


def test_pages_of_one_server_are_read_together_and_servers_are_kept_apart(chart_of: Any) -> None:
    """`Patient/1` of one server is not `Patient/1` of another; of one server's pages it is."""
    told = [observation("Patient/1", "8310-5", "2020-03-20", value, "Cel") | {"id": f"o{value}"} for value in (38.0, 39.0)]
    chart = chart_of(bundle(patient("1", "A")), bundle(told[0]), bundle(patient("1", "B"), told[1], server="https://other.example/fhir/"))
    assert facts(chart, "A")["temperature"] == "38.0"
    assert facts(chart, "B")["temperature"] == "39.0"
    assert chart.facts("1", MARCH_20) is None
    assert chart.warnings == ("2 names of patients that more than one Patient has: not used",), "the id, and NHS-1"


def test_references_by_urn_by_id_and_by_identifier(chart_of: Any) -> None:
    urn = "urn:uuid:0c3151bd-1cbf-4d64-b04d-cd9187a4c6e0"
    one = bundle(patient("p", "A"))
    one["entry"][0]["fullUrl"] = urn
    logical = observation("", "2708-6", "2020-03-20", 91, "%") | {"subject": {"identifier": {"value": "A"}}}
    one["entry"] += [{"resource": observation(urn, "8310-5", "2020-03-20", 38, "Cel")}]
    one["entry"] += [{"resource": observation("Patient/p", "6690-2", "2020-03-20", 8, "10*9/L")}, {"resource": logical}]
    found = facts(chart_of(one), "A")
    assert (found["temperature"], found["wbc"], found["spo2"]) == ("38.0", "8.0", "91.0")


def test_what_cannot_be_used_is_counted_and_names_nobody(chart_of: Any) -> None:
    who = "Patient/p1"
    chart = chart_of(
        bundle(
            patient("p1", "MRN-4711"),
            observation("Patient/gone", "8310-5", "2020-03-20", 38, "Cel"),
            observation(who, "8310-5", "2020-03-20", 38, "furlong\x1b[31m"),
            observation(who, "8310-5", "2020-03-20", 38),
            observation(who, "8310-5", "2020-03-20", valueQuantity={"value": 41, "comparator": ">", "code": "Cel"}),
            observation(who, "8310-5", "2020-03-20", valueQuantity={"value": 39, "unit": "°C"}),
        )
    )
    assert facts(chart)["temperature"] == "39.0", "a unit that is written as people write it will do"
    assert set(chart.warnings) == {
        "1 Observations of no Patient in the bundles",
        "1 Observations of temperature whose unit does not convert to Cel: furlong\\x1b[31m",
        "1 Observations of temperature whose unit does not convert to Cel: none",
        "1 Observations of temperature that give a bound, no value",
    }


@pytest.mark.parametrize(
    ("disposition", "status", "survived"),
    [
        ("home", "finished", "Y"),
        ("exp", "finished", "N"),
        ("home", "in-progress", None),
        ("other-hcf", "finished", None),
        ("hosp", "finished", None),
    ],
)
def test_survival(chart_of: Any, disposition: str, status: str, survived: str | None) -> None:
    stay = encounter("e", "Patient/p1", "2020-03-18", "2020-04-02", hospitalization=left(disposition), status=status)
    assert facts(chart_of(bundle(patient("p1", "MRN-4711"), stay))).get("survival") == survived


@pytest.mark.parametrize(("died", "survived"), [("2020-04-01T03:00:00Z", "N"), ("2020-04-03", "Y"), ("2020", "Y")])
def test_a_death_counts_if_it_was_in_the_stay(chart_of: Any, died: str, survived: str) -> None:
    stay = encounter("e", "Patient/p1", "2020-03-18", "2020-04-02", hospitalization=left("home"))
    assert facts(chart_of(bundle(patient("p1", "MRN-4711", deceasedDateTime=died), stay)))["survival"] == survived


@pytest.mark.parametrize(
    ("places", "status", "icu"),
    [
        ([place("x", "Medical ICU", "wa")], "finished", "Y"),
        ([place("x", "Surgical Critical Care", "ro")], "in-progress", "Y"),
        ([place("x", "Step-down of ICU", "wa")], "finished", "N"),
        ([place("x", "Ward 3", "wa"), place("y", "Ward 4", "wa", role="PEDICU")], "finished", "Y"),
        ([place("x", "Ward 3", "wa")], "finished", "N"),
        ([place("x", "Ward 3", "wa")], "in-progress", None),
        ([place("x", "General Hospital", "bu")], "finished", None),
        ([place("x", "Ward 3", "wa"), place("y", "General Hospital", "bu")], "finished", None),
        ([], "finished", None),
        ([place("x", "Bed 1", "bd", within="Location/y"), place("y", "Room", "ro", within="Location/x")], "finished", "N"),
    ],
)
def test_intensive_care(chart_of: Any, places: list[dict[str, Any]], status: str, icu: str | None) -> None:
    """The last case leads round in a circle."""
    stay = encounter(
        "e", "Patient/p1", "2020-03-18", "2020-04-02", status=status, location=at(*(f"Location/{one['id']}" for one in places))
    )
    assert facts(chart_of(bundle(patient("p1", "MRN-4711"), *places, stay))).get("went_icu") == icu


def test_a_place_that_is_not_in_the_bundle_is_unknown_unless_its_name_says_it(chart_of: Any) -> None:
    somewhere: dict[str, Any] = {"location": {"reference": "Location/gone"}}
    stay = encounter("e", "Patient/p1", "2020-03-18", "2020-04-02", location=[somewhere])
    assert "went_icu" not in facts(chart_of(bundle(patient("p1", "MRN-4711"), stay)))
    somewhere["location"]["display"] = "Neuro-ICU 2"
    assert facts(chart_of(bundle(patient("p1", "MRN-4711"), stay)))["went_icu"] == "Y"


@pytest.mark.parametrize(
    ("value", "icu"),
    [
        ({"valueCodeableConcept": coded(SNOMED, "373066001")}, "Y"),
        ({"valueCodeableConcept": coded("http://loinc.org", "LA32-8")}, "N"),
        ({"valueCodeableConcept": coded(f"{TERMINOLOGY}v2-0136", "Y")}, "Y"),
        ({"valueBoolean": False}, "N"),
        ({"valueCodeableConcept": coded(SNOMED, "261665006", "Unknown")}, None),
        ({"valueString": "Y"}, None),
    ],
)
def test_intensive_care_as_an_observation(chart_of: Any, value: dict[str, Any], icu: str | None) -> None:
    said = observation("Patient/p1", "95420-6", "2020-03-20", **value)
    assert facts(chart_of(bundle(patient("p1", "MRN-4711"), said))).get("went_icu") == icu


@pytest.mark.parametrize(
    ("done", "further", "intubated"),
    [
        (coded(SNOMED, "232674004"), {}, "Y"),
        (coded("urn:local", "77", "Emergency endotracheal intubation"), {}, "Y"),
        (coded("urn:local", "77", "Removal of endotracheal tube"), {}, None),
        (coded("urn:local", "77", "Mechanical ventilation"), {}, None),
        (coded("urn:local", "77", "Nasogastric intubation"), {}, None),
        (coded("urn:local", "77"), {}, None),
        (coded(SNOMED, "399208008", "Plain X-ray of chest"), {}, "N"),
        (coded(SNOMED, "232674004"), {"status": "not-done"}, None),
        (coded(SNOMED, "232674004"), {"performedDateTime": "2020-05-01"}, None),
    ],
)
def test_intubation(chart_of: Any, done: dict[str, Any], further: dict[str, Any], intubated: str | None) -> None:
    stay = encounter("e", "Patient/p1", "2020-03-18", "2020-04-02")
    found = facts(chart_of(bundle(patient("p1", "MRN-4711"), stay, procedure("Patient/p1", "2020-03-22", done, **further))))
    assert found.get("intubated") == intubated


@pytest.mark.parametrize(
    ("born", "age"),
    [
        ("1920-03-21", "90"),
        ("1960-03-20", "60"),
        ("1960-03-21", "59"),
        ("1960-03", "60"),
        ("1960", "59"),
        ("2020-03-21", None),
        ("soon", None),
    ],
)
def test_age(chart_of: Any, born: str, age: str | None) -> None:
    assert facts(chart_of(bundle(patient("p1", "MRN-4711", born=born)))).get("age") == age


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2020-03-25", date(2020, 3, 25)),
        ("20200325", date(2020, 3, 25)),
        ("2020", None),
        ("3/7/2020", None),
        ("2020-13-01", None),
        (None, None),
    ],
)
def test_the_day_of_a_film(text: str | None, day: date | None) -> None:
    assert film_day(text) == day


def test_nothing_that_identifies_stays_in_the_chart(chart_of: Any) -> None:
    """But for the names by which a film finds its patient, and dates, which never leave the chart: its facts hold none."""
    chart = chart_of(hospital())
    kept = pickle.dumps(chart)
    assert all(word.encode() not in kept for word in ("Petronella", "Quisenberry", "Elm Street"))
    told = json.dumps([chart.facts(name, MARCH_20) for name in ("p1", "p2")]) + " ".join(chart.warnings)
    assert not [word for word in (*PRIVATE, "p1", "2020", "1990") if word in told]


# ------------------------------------------------------------------------------------------------- made to harm


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "one JSON document"),
        (b"{", "one JSON document"),
        (b"\xff\xfe\xff", "one JSON document"),
        (b"[" * 200_000, "nests"),
        (b'{"resourceType": "Bundle", "entry": ' + b'{"a":' * 100_000, "nests"),
        (b'{"resourceType": "Bundle", "n": ' + b"9" * 10_000 + b"}", "one JSON document"),
        (b'{"resourceType": "Bundle", "n": NaN}', "one JSON document"),
        (b"[]", "resourceType Bundle"),
        (b'{"resourceType": "Patient"}', "got Patient"),
        (b'{"resourceType": "Bundle", "type": "history"}', "got history"),
        (b'{"resourceType": ["\\ud800\\u202e"]}', "resourceType Bundle"),
    ],
)
def test_what_is_no_bundle_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(UsageError) as caught:
        read_chart([tmp_path / "x.json"])
    assert said in str(caught.value)
    str(caught.value).encode()


def test_a_file_that_is_none_or_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_chart([tmp_path / "gone.json"])
    with pytest.raises(UsageError, match="cannot be read"):
        read_chart([tmp_path])
    monkeypatch.setattr(fhir, "MAX_BYTES", 100)
    with pytest.raises(UsageError, match="at most 0 MiB"):
        read_chart([written(tmp_path / "large.json", hospital())])


def test_long_chains_of_parts_cost_no_more_than_their_length(chart_of: Any) -> None:
    """Stays within stays and places within places, 5,000 deep; a search through all of them for each would not end."""
    count, who = 5_000, "Patient/p1"
    places = [place(f"l{n}", "Ward", "wa", within=f"Location/l{n + 1}") for n in range(count)]
    whole = encounter("e0", who, "2020-03-18", "2020-04-02")
    parts = [
        encounter(f"e{n}", who, "2020-03-18", "2020-04-02", partOf={"reference": f"Encounter/e{n - 1}"}, location=at(f"Location/l{n}"))
        for n in range(1, count)
    ]
    assert facts(chart_of(bundle(patient("p1", "MRN-4711"), *places, whole, *parts)))["went_icu"] == "N"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["coding", "code", "value", "reference", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_any_element_may_hold_anything(tmp_path: Path, data: st.DataObject) -> None:
    """Elements of a good bundle replaced by whatever: a chart, whose facts an ingest understands."""
    document = copy.deepcopy(hospital())
    for _ in range(data.draw(st.integers(1, 8))):
        holder: Any = data.draw(st.sampled_from(document["entry"]))
        if not isinstance(holder, dict):
            continue
        while True:
            name = data.draw(st.sampled_from(sorted(holder))) if isinstance(holder, dict) else data.draw(st.integers(0, len(holder) - 1))
            below = holder[name]
            if not isinstance(below, dict | list) or not below or data.draw(st.booleans()):
                holder[name] = data.draw(JUNK)
                break
            holder = below
    chart = read_chart([written(tmp_path / "bundle.json", document)])
    for name in ("MRN-4711", "MRN-4712", "p1", "p2"):
        for taken in (MARCH_20, None):
            parse_clinical(chart.facts(name, taken) or {})
    " ".join(chart.warnings).encode()
