"""The standard clinical features: one table of what each is called, measured in, plausible for, and found under elsewhere.

`docs/clinical-features.md` shows it, and a test holds the two together. LOINC's long names are © Regenstrief Institute (loinc.org/license);
units are UCUM's codes (ucum.org). Where no code was certain, there is none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final, Literal

Kind = Literal["number", "flag", "text"]


@dataclass(frozen=True)
class Unit:
    """A unit that a value may come in: the feature's own unit is `factor` times it, plus `offset`.

    Attributes:
        code: UCUM's.
        spelt: As people write it, too. Capitals count, as in UCUM.
    """

    code: str
    spelt: tuple[str, ...] = ()
    factor: Fraction = Fraction(1)
    offset: Fraction = Fraction(0)

    @property
    def names(self) -> tuple[str, ...]:
        """Every way to write it."""
        return (self.code, *self.spelt)


_PER_1000: Final = Fraction(1, 1000)
UNITS: Final[Mapping[str, tuple[Unit, ...]]] = {
    "Cel": (
        Unit("Cel", ("°C", "C", "degC")),
        Unit("[degF]", ("°F", "F", "degF"), Fraction(5, 9), Fraction(-160, 9)),
        Unit("K", (), Fraction(1), Fraction("-273.15")),
    ),
    "%": (Unit("%"), Unit("1", (), Fraction(100))),
    "10*9/L": (
        Unit("10*9/L", ("10^9/L", "10⁹/L", "x10^9/L", "x10*9/L", "G/L", "/nL")),
        Unit("10*3/uL", ("10^3/uL", "10³/µL", "10^3/µL", "x10^3/uL", "K/uL", "K/µL", "10*3/mm3", "10^3/mm3")),
        Unit("/uL", ("/µL", "cells/uL", "cells/µL", "{cells}/uL", "/mm3", "/mm³"), _PER_1000),
        Unit("10*6/L", ("10^6/L",), _PER_1000),
    ),
    "a": (
        Unit("a", ("y", "yr", "years", "year")),
        Unit("mo", ("months", "month"), Fraction(1, 12)),
        Unit("wk", ("weeks", "week"), Fraction(28, 1461)),
        Unit("d", ("days", "day"), Fraction(4, 1461)),
    ),
    "d": (Unit("d", ("days", "day")), Unit("wk", ("weeks", "week"), Fraction(7)), Unit("h", ("hours", "hour"), Fraction(1, 24))),
}
"""The feature's own unit → what converts to it. A year has 365.25 days. Exact: a float is made of the outcome only."""


def _composed(unit: str) -> str:
    """One spelling of what looks alike: the micro sign and the Greek letter, ℃ and °C."""
    return unicodedata.normalize("NFKC", unit)


_KNOWN_UNITS: Final = {(own, _composed(name)): unit for own, units in UNITS.items() for unit in units for name in unit.names}


@dataclass(frozen=True)
class Feature:
    """One standard feature, a column of the manifest and a field of the gallery.

    Attributes:
        title: What a page calls it.
        meaning: In a sentence.
        unit: UCUM code of what is stored; a number without its own unit is taken to be in it.
        shown: That unit behind a number, for people.
        plausible: Least and greatest value that raises no warning. No reference range: it is chosen so that the usual mistakes fall
            outside, and hardly any patient does.
        mistaken: What a value outside mostly turns out to be.
        values: Of text that a clause compares with: how to write it.
        elsewhere: Data set of `cxr manifest` → its column.
        loinc: Codes by which an Observation is known, with LOINC's names.
        fhir: Where `--fhir` finds it; "": nowhere.
    """

    name: str
    kind: Kind
    title: str
    meaning: str
    unit: str = ""
    shown: str = ""
    plausible: tuple[float, float] | None = None
    mistaken: str = ""
    values: tuple[str, ...] = ()
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    loinc: Mapping[str, str] = field(default_factory=dict)
    fhir: str = ""

    def converted(self, value: Fraction, unit: str) -> float | None:
        """In the feature's own unit; None if `unit` is none that converts to it. An OverflowError if no float is that large."""
        known = _KNOWN_UNITS.get((self.unit, _composed(unit)))
        return None if known is None else float(value * known.factor + known.offset)

    def doubt(self, value: float | bool | str) -> str:
        """Why this value is not plausible, in words; "" if it is."""
        if isinstance(value, str):
            return f"{value[:40]!r} is none of {', '.join(self.values)}" if self.values and value not in self.values else ""
        if self.plausible is None or self.plausible[0] <= value <= self.plausible[1]:
            return ""
        low, high = self.plausible
        return f"{value:.10g} is outside {low:g} to {high:g}{self.shown}" + (f"; {self.mistaken}" if self.mistaken else "")


_CELLS: Final = "cells per µL (then name the unit, '/uL'), or a percentage, which is no count?"

FEATURES: Final = (
    Feature(
        "age",
        "number",
        "age",
        "Age at the film's date.",
        unit="a",
        shown=" years",
        plausible=(0, 120),
        mistaken="months or days (then name the unit, 'mo' or 'd'), or a year of birth?",
        elsewhere={"ieee8023": "age", "chexpert": "Age"},
        fhir="Patient.birthDate at the film's date, in whole years; over 89 it is 90",
    ),
    Feature(
        "sex",
        "text",
        "sex",
        "Sex as registered.",
        values=("F", "M", "O"),
        elsewhere={"ieee8023": "sex", "chexpert": "Sex"},
        fhir="Patient.gender: female F, male M, other O",
    ),
    Feature(
        "view",
        "text",
        "view",
        "Projection: PA, AP, AP Supine, AP Erect.",
        elsewhere={"ieee8023": "view", "chexpert": "AP/PA", "mimic-cxr-jpg": "ViewPosition"},
    ),
    Feature("raw_finding", "text", "finding", "The publisher's own label, before it became one of ours."),
    Feature(
        "survival",
        "flag",
        "survived",
        "Left the hospital alive.",
        elsewhere={"ieee8023": "survival"},
        fhir="Encounter.hospitalization.dischargeDisposition, Patient.deceasedDateTime",
    ),
    Feature(
        "intubated",
        "flag",
        "intubated",
        "Was intubated during the stay.",
        elsewhere={"ieee8023": "intubated"},
        fhir="Procedure.code",
    ),
    Feature(
        "went_icu",
        "flag",
        "ICU",
        "Was in an intensive care unit during the stay.",
        elsewhere={"ieee8023": "went_icu"},
        loinc={"95420-6": "Whether the patient was admitted to intensive care unit (ICU) for condition of interest"},
        fhir="Encounter.location → Location; else Observation.valueCodeableConcept or valueBoolean",
    ),
    Feature(
        "needed_supplemental_o2",
        "flag",
        "supplemental O2",
        "Was given oxygen during the stay.",
        elsewhere={"ieee8023": "needed_supplemental_O2"},
        loinc={"3151-8": "Inhaled oxygen flow rate"},
        fhir="Observation.valueQuantity above 0, also of a component",
    ),
    Feature(
        "temperature",
        "number",
        "temp.",
        "Body temperature.",
        unit="Cel",
        shown=" °C",
        plausible=(30, 43),
        mistaken="Fahrenheit (then name the unit, '[degF]')?",
        elsewhere={"ieee8023": "temperature"},
        loinc={"8310-5": "Body temperature"},
        fhir="Observation.valueQuantity",
    ),
    Feature(
        "spo2",
        "number",
        "SpO2",
        "Oxygen saturation of arterial blood.",
        unit="%",
        shown=" %",
        plausible=(50, 100),
        mistaken="a fraction (then name the unit, '1'), or a partial pressure or a flow of oxygen?",
        elsewhere={"ieee8023": "pO2_saturation"},
        loinc={
            "59408-5": "Oxygen saturation in Arterial blood by Pulse oximetry",
            "2708-6": "Oxygen saturation in Arterial blood",
        },
        fhir="Observation.valueQuantity, also of a component",
    ),
    Feature(
        "wbc",
        "number",
        "white blood cells",
        "Leukocytes in blood.",
        unit="10*9/L",
        shown=" ×10⁹/L",
        plausible=(0.1, 200),
        mistaken=_CELLS,
        elsewhere={"ieee8023": "leukocyte_count"},
        loinc={
            "6690-2": "Leukocytes [#/volume] in Blood by Automated count",
            "26464-8": "Leukocytes [#/volume] in Blood",
        },
        fhir="Observation.valueQuantity, also of a component",
    ),
    Feature(
        "neutrophil",
        "number",
        "neutrophils",
        "Neutrophils in blood.",
        unit="10*9/L",
        shown=" ×10⁹/L",
        plausible=(0, 40),
        mistaken=_CELLS,
        elsewhere={"ieee8023": "neutrophil_count"},
        loinc={
            "751-8": "Neutrophils [#/volume] in Blood by Automated count",
            "26499-4": "Neutrophils [#/volume] in Blood",
        },
        fhir="Observation.valueQuantity, also of a component",
    ),
    Feature(
        "lymphocyte",
        "number",
        "lymphocytes",
        "Lymphocytes in blood.",
        unit="10*9/L",
        shown=" ×10⁹/L",
        plausible=(0, 15),
        mistaken=_CELLS,
        elsewhere={"ieee8023": "lymphocyte_count"},
        loinc={
            "731-0": "Lymphocytes [#/volume] in Blood by Automated count",
            "26474-7": "Lymphocytes [#/volume] in Blood",
        },
        fhir="Observation.valueQuantity, also of a component",
    ),
    Feature(
        "offset_days",
        "number",
        "days since onset",
        "Days from the first symptoms, or admission, to the film.",
        unit="d",
        plausible=(-30, 365),
        mistaken="hours (then name the unit, 'h')?",
        elsewhere={"ieee8023": "offset"},
    ),
    Feature("date", "text", "date", "When the film was taken, as far as it is told.", elsewhere={"ieee8023": "date"}),
    Feature("location", "text", "location", "Hospital, town or country.", elsewhere={"ieee8023": "location"}),
    Feature("clinical_notes", "text", "notes", "Free text."),
    Feature("license", "text", "license", "Under which the film may be used.", elsewhere={"ieee8023": "license"}),
    Feature("doi", "text", "doi", "Of the publication."),
    Feature("url", "text", "url", "Where the film was published."),
)
FEATURE: Final[Mapping[str, Feature]] = {feature.name: feature for feature in FEATURES}

_HEADED: Final = re.compile(r"(?P<name>\w+)\s*\[(?P<unit>.+)\]")


def heading(column: str) -> tuple[Feature | None, str]:
    """Which feature a manifest's column holds, and the unit that it names, or "": `temperature`, `temperature [degF]`."""
    if column in FEATURE:
        return FEATURE[column], ""
    headed = _HEADED.fullmatch(column)
    if headed and headed["name"] in FEATURE and FEATURE[headed["name"]].unit:
        return FEATURE[headed["name"]], headed["unit"].strip()
    return None, ""


def columns_of(data_set: str) -> dict[str, str]:
    """A public data set's columns → the features they hold."""
    return {feature.elsewhere[data_set]: feature.name for feature in FEATURES if data_set in feature.elsewhere}


def standard_name(column: str) -> str | None:
    """What a column that is kept as one of the user's own should be called to be the feature that it looks like: `pO2_saturation` → `spo2`,
    `temperature_f` → `temperature [degF]`. None if it is like none.
    """
    if heading(column)[0]:
        return None
    plain = re.sub(r"[^0-9a-z]+", "_", column.casefold()).strip("_")
    for feature in FEATURES:
        if plain == feature.name or plain in {re.sub(r"\W+", "_", name.casefold()) for name in feature.elsewhere.values()}:
            return feature.name
        for unit in UNITS.get(feature.unit, ()):
            if plain in {f"{feature.name}_{name.casefold()}" for name in unit.names}:
                return f"{feature.name} [{unit.code.strip('[]')}]"
    return None
