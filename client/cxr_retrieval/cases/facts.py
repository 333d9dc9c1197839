"""What is known of a patient as the numbers that a model reads, the same of a manifest's row and of a film that is asked about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from cxr_retrieval.cases.features import FEATURE
from cxr_retrieval.cases.fields import FLAGS, Value, parse_clinical
from cxr_retrieval.errors import UsageError

_SEXES: Final = {"F": 0.0, "M": 1.0}


def fact_number(name: str, value: Value | None) -> float | None:
    """A fact as a number: numbers in the unit of `features.FEATURES`, a flag 0 or 1, sex 0 (F) or 1 (M).

    None: unknown. What is not plausible (`Feature.doubt`) counts as unknown, as in a summary: a flow of oxygen noted as a saturation would
    tell a model something else. So does text that has no order.
    """
    if value is None or (name in FEATURE and FEATURE[name].doubt(value)):
        return None
    if isinstance(value, str):
        number = _SEXES.get(value) if name == "sex" else FLAGS.get(value.strip().lower())
        return None if number is None else float(number)
    return float(value)


def is_fact(name: str) -> bool:
    """Whether `fact_number` could make a number of it: any column of one's own, and of the standard ones all but text without order."""
    return name not in FEATURE or FEATURE[name].kind != "text" or name == "sex"


def read_facts(given: Sequence[str]) -> dict[str, float]:
    """`NAME=VALUE` each, as a person says them, units as in a manifest (`temperature=101.3 °F`) → name → number.

    Raises:
        UsageError: One has no value, is no number, is not plausible, or comes twice.
    """
    cells: dict[str, str] = {}
    for one in given:
        name, equals, text = (part.strip() for part in one.partition("="))
        if not equals or not name or not text or name in cells:
            raise UsageError(
                f"fact {name} comes twice" if name in cells else f"fact {one!r} says nothing",
                expected="NAME=VALUE, once for each name, such as age=67 or spo2=91",
                next_step="correct --fact",
            )
        cells[name] = text
    clinical = parse_clinical(cells)
    values: Mapping[str, Value] = {**clinical.extra, **clinical.known}
    if clinical.doubts:
        raise UsageError("a fact that is not plausible", got="; ".join(clinical.doubts), next_step="correct --fact, or leave it out")
    numbers = {name: fact_number(name, value) for name, value in values.items()}
    lost = sorted(name for name, number in numbers.items() if number is None)
    if lost or len(values) < len(cells):
        unusable = ", ".join(lost or sorted(cells.keys() - values.keys()))
        raise UsageError(
            f"no number can be made of {unusable}",
            expected="a number, Y or N, and of sex F or M",
            next_step="correct --fact, or leave it out",
        )
    return {name: number for name, number in numbers.items() if number is not None}
