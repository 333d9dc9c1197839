"""FHIR R4 bundles of made-up patients, as a hospital's server writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SERVER = "https://fhir.hospital.example/r4/"
UCUM = "http://unitsofmeasure.org"
SNOMED = "http://snomed.info/sct"
TERMINOLOGY = "http://terminology.hl7.org/CodeSystem/"
PRIVATE = ("Petronella", "Quisenberry", "1952-07-19", "1 Elm Street", "MRN-4711", "NHS-943")
"""What must not be found anywhere after an ingest."""


def coded(system: str, code: str, display: str = "") -> dict[str, Any]:
    """A CodeableConcept."""
    return {"coding": [{"system": system, "code": code, **({"display": display} if display else {})}]}


def observation(subject: str, code: str, day: str, value: float | None = None, unit: str = "", **further: Any) -> dict[str, Any]:
    """One with a LOINC code and a UCUM quantity."""
    quantity = {} if value is None else {"valueQuantity": {"value": value, "unit": unit, "system": UCUM, "code": unit}}
    return {
        "resourceType": "Observation",
        "status": "final",
        "code": coded("http://loinc.org", code),
        "subject": {"reference": subject},
        "effectiveDateTime": day,
        **quantity,
        **further,
    }


def patient(number: str, mrn: str, gender: str = "female", born: str = "1952-07-19", **further: Any) -> dict[str, Any]:
    """With a name, an address and two identifiers."""
    return {
        "resourceType": "Patient",
        "id": number,
        "text": {"status": "generated", "div": "<div>Petronella Quisenberry</div>"},
        "identifier": [{"system": "urn:mrn", "value": mrn}, {"system": "urn:nhs", "value": f"NHS-{number}"}],
        "name": [{"family": "Quisenberry", "given": ["Petronella"]}],
        "address": [{"line": ["1 Elm Street"]}],
        "gender": gender,
        "birthDate": born,
        **further,
    }


def encounter(number: str, subject: str, begin: str, end: str, **further: Any) -> dict[str, Any]:
    """An inpatient stay that is over."""
    return {
        "resourceType": "Encounter",
        "id": number,
        "status": "finished",
        "class": {"system": f"{TERMINOLOGY}v3-ActCode", "code": "IMP"},
        "subject": {"reference": subject},
        "period": {"start": begin, "end": end},
        **further,
    }


def place(number: str, name: str, physical: str, *, role: str = "", within: str = "") -> dict[str, Any]:
    """A Location."""
    return {
        "resourceType": "Location",
        "id": number,
        "name": name,
        "physicalType": coded(f"{TERMINOLOGY}location-physical-type", physical),
        **({"type": [coded(f"{TERMINOLOGY}v3-RoleCode", role)]} if role else {}),
        **({"partOf": {"reference": within}} if within else {}),
    }


def left(disposition: str) -> dict[str, Any]:
    """How a stay ended."""
    return {"dischargeDisposition": coded(f"{TERMINOLOGY}discharge-disposition", disposition)}


def at(*places: str) -> list[dict[str, Any]]:
    """Where somebody lay."""
    return [{"location": {"reference": one}} for one in places]


def procedure(subject: str, day: str, code: dict[str, Any], **further: Any) -> dict[str, Any]:
    """One that was done."""
    return {
        "resourceType": "Procedure",
        "status": "completed",
        "subject": {"reference": subject},
        "performedDateTime": day,
        "code": code,
        **further,
    }


def bundle(*resources: dict[str, Any], server: str = SERVER) -> dict[str, Any]:
    """A page of search results; without a `server` nothing has a URL."""
    return {
        "resourceType": "Bundle",
        "type": "searchset",
        "entry": [
            {"resource": one, **({"fullUrl": f"{server}{one['resourceType']}/{one['id']}"} if server and "id" in one else {})}
            for one in resources
        ],
    }


def written(path: Path, document: object) -> Path:
    """The document as a file."""
    path.write_text(json.dumps(document), "utf-8")
    return path


def hospital() -> dict[str, Any]:
    """Two stays in March 2020: one through intensive care that ended in death, one on a ward that ended at home; and an earlier visit."""
    severe, mild = "Patient/p1", "Patient/p2"
    intubation = coded(SNOMED, "112798008", "Insertion of endotracheal tube")
    return bundle(
        patient("p1", "MRN-4711"),
        patient("p2", "MRN-4712", "male", "1990"),
        place("icu", "Ward 4B", "wa", role="ICU"),
        place("bed", "Bed 7", "bd", within="Location/icu"),
        place("ward", "Respiratory ward", "wa"),
        encounter("old", severe, "2019-01-02", "2019-01-09", hospitalization=left("home"), location=at("Location/ward")),
        encounter("e1", severe, "2020-03-18T22:10:00+01:00", "2020-04-02", hospitalization=left("exp"), location=at("Location/ward")),
        encounter("e1-icu", severe, "2020-03-21", "2020-04-02", partOf={"reference": "Encounter/e1"}, location=at("Location/bed")),
        encounter("e2", mild, "2020-03-24", "2020-03-29", hospitalization=left("home"), location=at("Location/ward")),
        observation(severe, "8310-5", "2019-01-03", 36.6, "Cel"),
        observation(severe, "8310-5", "2020-03-20T08:00:00+01:00", 101.3, "[degF]"),
        observation(severe, "8310-5", "2020-03-20T20:00:00+01:00", 99.5, "[degF]"),
        observation(severe, "8310-5", "2020-03-19", 41.0, "Cel", status="entered-in-error"),
        observation(
            severe,
            "59408-5",
            "2020-03-19",
            88,
            "%",
            component=[{"code": coded("http://loinc.org", "3151-8"), "valueQuantity": {"value": 6, "unit": "L/min"}}],
        ),
        observation(severe, "6690-2", "2020-03-20", 8.5, "10*3/uL"),
        observation(severe, "26499-4", "2020-03-20", 7100, "/uL"),
        observation(mild, "2708-6", "2020-03-25", 0.97, "1"),
        observation(mild, "3151-8", "2020-03-25", 0, "L/min"),
        procedure(severe, "2020-03-22", intubation, encounter={"reference": "Encounter/e1-icu"}),
        procedure(mild, "2020-03-25", coded(SNOMED, "399208008", "Plain X-ray of chest")),
    )
