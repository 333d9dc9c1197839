"""Clinical facts out of FHIR R4 bundles in JSON: what was known of a patient around the day of a film (`cxr ingest --fhir`).

Of a bundle only the elements in `_READ` are kept. A Patient is known by the values of its identifiers and by its id. Nothing leaves this
process but facts in the manifest's own form: no name, no identifier, no date. `docs/clinical-features.md` states which fact comes from
where, and of which day.

A bundle comes from elsewhere. It is read by Python's own `json` (no native decoder, nothing that a document could ask it to fetch), one at
a time and up to MAX_BYTES, of which for a moment some 35 times as much memory can become; it nests as deep as `json` goes. Whatever
has another type than R4 gives it counts as not there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from cxr_retrieval.cases.features import FEATURES, Feature
from cxr_retrieval.errors import InputError, UsageError
from cxr_retrieval.radiograph.files import opened, printable

MAX_BYTES: Final = 32 * 2**20
"""Of one bundle."""
NEAR_DAYS: Final = 3
"""An Observation, or a stay, further than this from the day of the film is none of that film."""
_MAX_URL: Final = 2048
_LEVELS: Final = 8
"""From a bed up to its ward, at most."""
_TOLD: Final = 20
"""Kinds of trouble at most: texts of a bundle are part of them."""
OLDEST_TOLD: Final = 90
"""Ages from here on are one class (45 CFR 164.514(b)(2)(i)(C))."""

_READ: Final[Mapping[str, tuple[str, ...]]] = {
    "Patient": ("id", "identifier", "gender", "birthDate", "deceasedDateTime"),
    "Observation": (
        *("status", "subject", "code", "component", "effectiveDateTime", "effectiveInstant", "effectivePeriod"),
        *("valueQuantity", "valueCodeableConcept", "valueBoolean"),
    ),
    "Encounter": ("status", "class", "subject", "period", "partOf", "location", "hospitalization"),
    "Location": ("name", "type", "physicalType", "partOf"),
    "Procedure": ("status", "subject", "code", "encounter", "performedDateTime", "performedPeriod"),
}
"""Kind of resource → its elements that are looked at."""
_LOINC: Final = "http://loinc.org"
_UCUM: Final = "http://unitsofmeasure.org"
_SNOMED: Final = "http://snomed.info/sct"
_TERMINOLOGY: Final = "http://terminology.hl7.org/CodeSystem/"

_SEX: Final = {"female": "F", "male": "M", "other": "O"}
_BY_LOINC: Final[Mapping[str, Feature]] = {code: feature for feature in FEATURES for code in feature.loinc}
_YES_NO: Final = {
    (_SNOMED, "373066001"): "Y",
    (_SNOMED, "373067005"): "N",
    (_LOINC, "LA33-6"): "Y",
    (_LOINC, "LA32-8"): "N",
    (f"{_TERMINOLOGY}v2-0136", "Y"): "Y",
    (f"{_TERMINOLOGY}v2-0136", "N"): "N",
}
_INPATIENT: Final = frozenset({"IMP", "ACUTE", "NONAC"})
"""Of v3-ActCode."""
_SURVIVED: Final[Mapping[str, str]] = {
    "exp": "N",
    **dict.fromkeys(("home", "alt-home", "long", "aadvice", "psy", "rehab", "snf"), "Y"),
}
"""Discharge dispositions that settle it; who went to another hospital or a hospice, has an end that this stay does not tell."""
_INTENSIVE: Final = frozenset({"ICU", "PEDICU", "PEDNICU"})
"""Of v3-RoleCode."""
_INTENSIVE_WORDS: Final = re.compile(r"\b(intensive[ -]care|critical[ -]care|[a-z]{0,3}icu)\b", re.IGNORECASE)
_LESS_INTENSIVE: Final = re.compile(r"step[ -]?down|intermediate", re.IGNORECASE)
_WARD_OR_LESS: Final = frozenset({"wa", "ro", "bd"})
"""Of location-physical-type: where somebody lies."""
_INTUBATION: Final = frozenset(
    {
        (_SNOMED, "112798008"),  # Insertion of endotracheal tube
        (_SNOMED, "16883004"),  # Endotracheal intubation, emergency procedure
        (_SNOMED, "232674004"),  # Orotracheal intubation
        (_SNOMED, "447996002"),  # Intubation of respiratory tract
        ("http://www.cms.gov/Medicare/Coding/ICD10", "0BH17EZ"),
        ("http://hl7.org/fhir/sid/icd-10-pcs", "0BH17EZ"),
    }
)
_INTUBATION_WORDS: Final = re.compile(r"\b(?:endo|oro|naso)?tracheal (?:re)?intubation|endotracheal tube", re.IGNORECASE)
_NO_INTUBATION_WORDS: Final = re.compile(r"\b(?:extubat|remov|care of|suction|exchange)", re.IGNORECASE)
_ANY_INTUBATION: Final = re.compile(r"intubat|endotracheal|ventilat", re.IGNORECASE)
_VOID: Final = frozenset({"entered-in-error", "cancelled", "not-done", "planned", "preparation", "registered"})
_DAY: Final = re.compile(r"(\d{4})-(\d{2})-(\d{2})(?:T.*)?", re.DOTALL)


@dataclass(frozen=True)
class _Measured:
    """A fact with its day, and with the text it was written as, to order those of one day."""

    feature: str
    value: str
    day: date | None
    written: str


@dataclass(frozen=True)
class _Encounter:
    address: str
    part_of: str | None
    inpatient: bool
    finished: bool
    begin: date | None
    end: date | None
    disposition: str | None
    wards: tuple[bool | None, ...]
    """Of each place: whether it is intensive care; None where that is not told."""


@dataclass(frozen=True)
class _Procedure:
    encounter: str | None
    day: date | None
    intubation: bool | None
    """None: something of the kind, but not clearly."""


@dataclass
class _Patient:
    """What a bundle tells of one, while it is read."""

    sex: str | None
    born: date | None
    died: date | None
    measured: list[_Measured] = field(default_factory=list)
    encounters: list[_Encounter] = field(default_factory=list)
    procedures: list[_Procedure] = field(default_factory=list)


class Chart:
    """What the bundles tell of their patients; read-only, so that threads may share it.

    Attributes:
        patients: How many there are.
        warnings: What could not be used, in words without names or identifiers.
    """

    def __init__(self, known_as: Mapping[str, _Patient], patients: int, warnings: Sequence[str]) -> None:
        self._known_as = known_as
        self.patients = patients
        self.warnings = tuple(warnings)

    def facts(self, patient_id: str | None, taken: date | None) -> dict[str, str] | None:
        """Columns as a manifest would have them; None of a patient who is not known.

        Args:
            patient_id: The value of one of the Patient's identifiers, or its id.
            taken: The film's day; None: not known, then the latest facts are taken, and no age.
        """
        patient = None if patient_id is None else self._known_as.get(patient_id)
        if patient is None:
            return None
        stay = _Stay.of(patient, taken)
        found = {
            "age": _age(patient.born, taken),
            "sex": patient.sex,
            **{name: _nearest(patient.measured, name, taken) for name in _MEASURED},
            "needed_supplemental_o2": _oxygen(patient.measured, stay, taken),
        }
        if stay is not None:
            found["survival"] = stay.survival(patient.died)
            found["intubated"] = stay.intubated(patient.procedures)
            found["went_icu"] = stay.went_icu() or found["went_icu"]
        return {name: text for name, text in found.items() if text is not None}


_OXYGEN: Final = "needed_supplemental_o2"
_MEASURED: Final = tuple(dict.fromkeys(feature.name for feature in FEATURES if feature.loinc and feature.name != _OXYGEN))


def film_day(text: str | None) -> date | None:
    """The day that a manifest or a DICOM file gives, `2020-03-25` or `20200325`; None where it gives less, or none."""
    plain = re.fullmatch(r"(\d{4})-?(\d{2})-?(\d{2})(?:T.*)?", text or "")
    return _date(*plain.groups()) if plain else None


def read_chart(bundles: Sequence[Path]) -> Chart:
    """Reads bundles; a patient may be told of in several.

    Raises:
        UsageError: A file that is no FHIR R4 bundle in JSON, or too large.
    """
    reading = _Reading()
    for number, path in enumerate(bundles):
        reading.add(_entries(path), number)
    return reading.chart()


# ------------------------------------------------------------------------------------------------- one film's facts


def _age(born: date | None, taken: date | None) -> str | None:
    if born is None or taken is None or taken < born:
        return None
    years = taken.year - born.year - ((taken.month, taken.day) < (born.month, born.day))
    return str(min(years, OLDEST_TOLD))


def _nearest(measured: Sequence[_Measured], feature: str, taken: date | None) -> str | None:
    """The value nearest in days to the film, of one day the first; of a film without a day the latest value."""
    of_it = [one for one in measured if one.feature == feature]
    if taken is None:
        return max(of_it, key=lambda one: (one.day or date.min, one.written)).value if of_it else None
    near = [(abs((one.day - taken).days), one.day, one.written, one.value) for one in of_it if one.day is not None]
    near = [one for one in near if one[0] <= NEAR_DAYS]
    return min(near)[3] if near else None


def _oxygen(measured: Sequence[_Measured], stay: _Stay | None, taken: date | None) -> str | None:
    """Whether any flow of oxygen was measured during the stay, or, where no stay is known, about the day of the film."""
    flows = [one for one in measured if one.feature == _OXYGEN]
    if stay is not None:
        flows = [one for one in flows if one.day is not None and stay.holds(one.day)]
    elif taken is not None:
        flows = [one for one in flows if one.day is not None and abs((one.day - taken).days) <= NEAR_DAYS]
    return None if not flows else "Y" if any(one.value == "Y" for one in flows) else "N"


@dataclass(frozen=True)
class _Stay:
    """An inpatient Encounter with those that are part of it."""

    whole: _Encounter
    parts: tuple[_Encounter, ...]

    @classmethod
    def of(cls, patient: _Patient, taken: date | None) -> _Stay | None:
        """The stay that holds the film's day, else the nearest; of a film without a day the latest."""
        known = {one.address: one for one in patient.encounters}
        begun = [one for one in patient.encounters if one.inpatient and one.begin is not None and one.part_of not in known]
        dated = [(_days_between(one, taken), one) for one in begun]
        near = [(days, one) for days, one in dated if days <= NEAR_DAYS]
        if not near:
            return None
        _, whole = min(near, key=lambda pair: (pair[0], -(pair[1].begin or date.min).toordinal(), pair[1].address))
        parts_of: dict[str | None, list[_Encounter]] = {}
        for one in patient.encounters:
            parts_of.setdefault(one.part_of, []).append(one)
        parts = [whole]
        for one in parts:  # which grows; no Encounter is part of two, and none that leads round in a circle is part of this one
            parts += parts_of.get(one.address, [])
        return cls(whole, tuple(parts))

    def holds(self, day: date) -> bool:
        """Whether it had begun and not ended."""
        return (self.whole.begin or day) <= day <= (self.whole.end or day)

    def went_icu(self) -> str | None:
        """Y if any place was intensive care; N if the stay is over, and all places are wards, rooms or beds that are not."""
        wards = [ward for part in self.parts for ward in part.wards]
        if any(wards):
            return "Y"
        return "N" if wards and self.whole.finished and None not in wards else None

    def survival(self, died: date | None) -> str | None:
        """As the disposition says, once the stay is over; a death on one of its days says it, too."""
        if died is not None and self.holds(died):
            return "N"
        said = {_SURVIVED[part.disposition] for part in self.parts if part.finished and part.disposition in _SURVIVED}
        if "N" in said:
            return "N"
        return _SURVIVED.get(self.whole.disposition or "") if self.whole.finished else None

    def intubated(self, procedures: Sequence[_Procedure]) -> str | None:
        """Y by a Procedure of this stay; N if the stay is over and has Procedures, none of which has to do with it."""
        addresses = {part.address for part in self.parts}
        during = [
            one.intubation
            for one in procedures
            if (one.encounter in addresses if one.encounter else one.day is not None and self.holds(one.day))
        ]
        if any(during):
            return "Y"
        return "N" if during and self.whole.finished and None not in during else None


def _days_between(encounter: _Encounter, taken: date | None) -> int:
    """Days from the film to an Encounter, 0 if it holds the film; 0 of a film without a day."""
    begin, end = encounter.begin, encounter.end
    if taken is None or begin is None:
        return 0
    if taken < begin:
        return (begin - taken).days
    return max(0, (taken - end).days) if end is not None else 0


# ------------------------------------------------------------------------------------------------- a bundle, read


@dataclass(frozen=True)
class _Resource:
    """The elements of a resource that are looked at, its address, and the number of its bundle."""

    kind: str
    address: str
    bundle: int
    elements: dict[str, Any]


class _Reading:
    """Bundles become patients: first every address, then what refers to one."""

    def __init__(self) -> None:
        self._resources: dict[str, _Resource] = {}
        self._by_id: dict[tuple[int, str], str] = {}
        self._troubles: Counter[str] = Counter()

    def add(self, entries: Iterator[tuple[str, dict[str, Any]]], bundle: int) -> None:
        """Takes the resources of one bundle; its number keeps those without a URL of their own apart from those of others."""
        for url, resource in entries:
            kind, own = _text(resource, "resourceType") or "", _text(resource, "id")
            if kind not in _READ or (kind == "Observation" and not _tells_of(resource)):
                continue
            elements = {name: resource[name] for name in _READ[kind] if name in resource}
            address = _plain(url) if url else f"{bundle}:{kind}/{own}" if own else f"{bundle}:{len(self._resources)}"
            self._resources[address] = _Resource(kind, address, bundle, elements)
            if own:
                self._by_id.setdefault((bundle, f"{kind}/{own}"), address)

    def chart(self) -> Chart:
        """Everything that was read, by patient."""
        patients: dict[str, _Patient] = {}
        names: dict[str, set[str]] = {}
        for one in self._of("Patient"):
            born, died = _born(_text(one.elements, "birthDate")), _day(_text(one.elements, "deceasedDateTime"))
            patients[one.address] = _Patient(_SEX.get(_text(one.elements, "gender") or ""), born, died)
            for name in (_text(one.elements, "id"), *(_text(identifier, "value") for identifier in _objects(one.elements, "identifier"))):
                if name:
                    names.setdefault(name, set()).add(one.address)
        known_as = {name: patients[next(iter(addresses))] for name, addresses in names.items() if len(addresses) == 1}
        if several := len(names) - len(known_as):
            self._troubles["names of patients that more than one Patient has: not used"] = several
        takers = {"Observation": self._take_observation, "Encounter": self._take_encounter, "Procedure": self._take_procedure}
        for kind, take in takers.items():
            for one in self._of(kind):
                if _text(one.elements, "status") in _VOID:
                    continue
                subject = _text(one.elements, "subject", "identifier", "value") or ""
                patient = patients.get(self._resolved(one, one.elements, "subject") or "") or known_as.get(subject)
                if patient is None:
                    self._troubles[f"{kind}s of no Patient in the bundles"] += 1
                else:
                    take(one, patient)
        told = [f"{count} {what}" for what, count in self._troubles.most_common(_TOLD)]
        if len(self._troubles) > _TOLD:
            told.append(f"{len(self._troubles) - _TOLD} more kinds of trouble")
        return Chart(known_as, len(patients), told)

    def _of(self, kind: str) -> list[_Resource]:
        return [one for one in self._resources.values() if one.kind == kind]

    def _resolved(self, home: _Resource, holder: dict[str, Any], name: str) -> str | None:
        """The address that a reference in `home` leads to (R4, Bundle, "Resolving references"): a URL, or relative to that of `home`, or
        an id in its bundle; None of none, or nowhere.
        """
        reference = _plain(_text(holder, name, "reference") or "")
        if not reference:
            return None
        base = re.match(r"(https?://.*/)[A-Za-z]+/[^/]+$", home.address)
        beside = base[1] + reference if base else ""
        by_id = self._by_id.get((home.bundle, "/".join(reference.split("/")[-2:])), "")
        return next((one for one in (reference, beside, by_id) if one in self._resources), None)

    def _take_observation(self, one: _Resource, patient: _Patient) -> None:
        moments = (("effectiveDateTime",), ("effectiveInstant",), ("effectivePeriod", "start"))
        written = next(filter(None, (_text(one.elements, *path) for path in moments)), "")
        for part in (one.elements, *_objects(one.elements, "component")):
            feature = _feature(part)
            if feature is None:
                continue
            value = self._quantity(feature, part) if feature.kind == "number" else _flag(feature, part)
            if value is not None:
                patient.measured.append(_Measured(feature.name, value, _day(written), written))

    def _quantity(self, feature: Feature, part: dict[str, Any]) -> str | None:
        quantity = _object(part, "valueQuantity")
        number = _number(quantity.get("value"))
        if number is None:
            return None
        if "comparator" in quantity:
            self._troubles[f"Observations of {feature.name} that give a bound, no value"] += 1
            return None
        unit = (_text(quantity, "code") if _text(quantity, "system") == _UCUM else None) or _text(quantity, "unit") or ""
        value = feature.converted(Fraction(str(number)), unit)
        if value is None:
            what = f"Observations of {feature.name} whose unit does not convert to {feature.unit}: {printable(unit)[:40] or 'none'}"
            self._troubles[what] += 1
            return None
        return repr(value)

    def _take_encounter(self, one: _Resource, patient: _Patient) -> None:
        told = one.elements
        begin, end = _day(_text(told, "period", "start")), _day(_text(told, "period", "end"))
        finished = _text(told, "status") == "finished"
        dispositions = _codings(_object(told, "hospitalization"), "dischargeDisposition")
        places = [place for place in _objects(told, "location") if _text(place, "status") not in ("planned", "reserved")]
        patient.encounters.append(
            _Encounter(
                one.address,
                self._resolved(one, told, "partOf"),
                _text(told, "class", "code") in _INPATIENT,
                finished,
                begin,
                begin if finished and end is None else end,
                next((code for system, code in dispositions if system == f"{_TERMINOLOGY}discharge-disposition"), None),
                tuple(self._intensive(one, place) for place in places),
            )
        )

    def _intensive(self, encounter: _Resource, entry: dict[str, Any]) -> bool | None:
        """Whether a place, or one that it is part of, is intensive care; False only of a ward, a room or a bed."""
        if _sounds_intensive(_text(entry, "location", "display")):
            return True
        address = self._resolved(encounter, entry, "location")
        physical = _codings(self._resources[address].elements, "physicalType") if address else []
        for _ in range(_LEVELS):
            if address is None:
                break
            location = self._resources[address]
            types = _objects(location.elements, "type")
            codings = [coding for one in types for coding in _codings({"type": one}, "type")]
            words = [_text(location.elements, "name"), *(text for one in types for text in _words(one))]
            if any(system == f"{_TERMINOLOGY}v3-RoleCode" and code in _INTENSIVE for system, code in codings):
                return True
            if any(map(_sounds_intensive, words)):
                return True
            address = self._resolved(location, location.elements, "partOf")
        return False if any(code in _WARD_OR_LESS for _, code in physical) else None

    def _take_procedure(self, one: _Resource, patient: _Patient) -> None:
        codings, words = _codings(one.elements, "code"), " ".join(_words(_object(one.elements, "code")))
        intubation: bool | None = None
        if any(coding in _INTUBATION for coding in codings):
            intubation = True
        elif _ANY_INTUBATION.search(words):
            intubation = True if _INTUBATION_WORDS.search(words) and not _NO_INTUBATION_WORDS.search(words) else None
        elif words:
            intubation = False
        written = _text(one.elements, "performedDateTime") or _text(one.elements, "performedPeriod", "start")
        patient.procedures.append(_Procedure(self._resolved(one, one.elements, "encounter"), _day(written), intubation))


def _feature(part: dict[str, Any]) -> Feature | None:
    """What an Observation, or a component of one, is about."""
    return next((_BY_LOINC[code] for system, code in _codings(part, "code") if system == _LOINC and code in _BY_LOINC), None)


def _tells_of(observation: dict[str, Any]) -> bool:
    return any(_feature(part) is not None for part in (observation, *_objects(observation, "component")))


def _flag(feature: Feature, part: dict[str, Any]) -> str | None:
    if feature.name == _OXYGEN:
        flow = _number(_object(part, "valueQuantity").get("value"))
        return None if flow is None else "Y" if flow > 0 else "N"
    said = part.get("valueBoolean")
    if isinstance(said, bool):
        return "Y" if said else "N"
    return next((_YES_NO[coding] for coding in _codings(part, "valueCodeableConcept") if coding in _YES_NO), None)


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fullUrl, or "", and the resource of each entry."""
    bundle = _parsed(path)
    if not isinstance(bundle, dict) or bundle.get("resourceType") != "Bundle" or bundle.get("type") == "history":
        got = "another document"
        if isinstance(bundle, dict):
            got = printable(str(bundle.get("type" if bundle.get("resourceType") == "Bundle" else "resourceType")))[:40]
        raise _unusable(path, "resourceType Bundle, and no history of resources", got)
    for entry in _objects(bundle, "entry"):
        resource = _object(entry, "resource")
        if resource:
            url = _text(entry, "fullUrl") or ""
            yield url if len(url) <= _MAX_URL else "", resource


def _parsed(path: Path) -> Any:
    try:
        with opened(path) as file:
            data = file.read(MAX_BYTES + 1)
    except (InputError, OSError) as error:
        got = error.got if isinstance(error, InputError) else error.strerror or str(error)
        raise UsageError(f"{path}: cannot be read", expected="a FHIR bundle", got=got, next_step="correct --fhir") from error
    if len(data) > MAX_BYTES:
        raise _unusable(path, f"at most {MAX_BYTES // 2**20} MiB", "more", "export fewer patients at a time, and repeat --fhir")
    try:
        return json.loads(data, parse_constant=_no_number)
    except RecursionError as error:
        raise _unusable(path, "JSON that nests no deeper than a few hundred levels", "deeper") from error
    except ValueError as error:  # not JSON, not Unicode, or a number of more digits than Python reads
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "something else"
        raise _unusable(path, "one JSON document", where) from error


def _no_number(name: str) -> float:
    raise ValueError(name)


def _unusable(path: Path, expected: str, got: str, next_step: str = "export it as a FHIR R4 bundle in JSON") -> UsageError:
    return UsageError(f"{path}: no FHIR bundle that can be used", expected=expected, got=got, next_step=next_step)


# ------------------------------------------------------------------------------------------------- elements of a resource


def _object(value: Any, name: str) -> dict[str, Any]:
    """An element that is an object; an empty one if it is none."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    """The objects in an element that repeats."""
    found = value.get(name) if isinstance(value, dict) else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _text(value: Any, *path: str) -> str | None:
    """An element that is text, and not empty."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> int | float | None:
    """A number of a size that anything could have."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12 else None


def _codings(value: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """System and code of each Coding of a CodeableConcept."""
    codings = _objects(_object(value, name), "coding")
    return [(_text(one, "system") or "", _text(one, "code") or "") for one in codings]


def _words(concept: dict[str, Any]) -> list[str]:
    """What a CodeableConcept is called."""
    named = [_text(concept, "text"), *(_text(one, "display") for one in _objects(concept, "coding"))]
    return [words for words in named if words]


def _sounds_intensive(name: str | None) -> bool:
    return name is not None and bool(_INTENSIVE_WORDS.search(name)) and not _LESS_INTENSIVE.search(name)


def _plain(url: str) -> str:
    """A URL or reference without the version it is of."""
    return url.split("/_history/")[0]


def _day(text: str | None) -> date | None:
    """The day of a FHIR date or dateTime, where it was written; None of one that gives a month or a year only."""
    found = _DAY.fullmatch(text or "")
    return _date(*found.groups()) if found else None


def _born(text: str | None) -> date | None:
    """A birth date; of a month only its middle, of a year only the middle of that."""
    if text and re.fullmatch(r"\d{4}(-\d{2})?", text):
        text += "-15" if len(text) == 7 else "-07-01"
    return _day(text)


def _date(year: str, month: str, day: str) -> date | None:
    try:
        return date(int(year), int(month), int(day))
    except ValueError:
        return None
