"""The tables of `docs/clinical-features.md`, made from the code; `tests/golden/regenerate.py` writes them, a test compares them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cxr_retrieval.cases.features import FEATURES, UNITS, Feature

PAGE = Path(__file__).parents[1] / "docs" / "clinical-features.md"
TYPES = {"number": "number", "flag": "Y or N", "text": "text"}


def tables() -> dict[str, str]:
    """Name of a table → its Markdown."""
    return {
        "features": _table(("name", "type", "unit", "plausible", "meaning"), [_feature(one) for one in FEATURES]),
        "elsewhere": _table(("name", "public data sets", "LOINC", "FHIR R4"), [_elsewhere(one) for one in FEATURES if _is_elsewhere(one)]),
        "units": _table(
            ("stored in", "converted from"),
            [
                (f"`{stored}`", ", ".join(" = ".join(f"`{name}`" for name in unit.names) for unit in units))
                for stored, units in UNITS.items()
            ],
        ),
    }


def with_tables(page: str, made: Mapping[str, str]) -> str:
    """The page with each table in its place."""
    for name, table in made.items():
        start, end = f"<!-- {name}: made by tests/golden/regenerate.py -->\n", f"<!-- end of {name} -->"
        page = re.sub(re.escape(start) + ".*?" + re.escape(end), lambda _, made=start + table + end: made, page, flags=re.DOTALL)
    return page


def _feature(one: Feature) -> tuple[str, ...]:
    plausible = f"{one.plausible[0]:g} to {one.plausible[1]:g}" if one.plausible else ", ".join(one.values)
    return (f"`{one.name}`", TYPES[one.kind], f"`{one.unit}`" if one.unit else "", plausible, one.meaning)


def _is_elsewhere(one: Feature) -> bool:
    return bool(one.elsewhere or one.loinc or one.fhir)


def _elsewhere(one: Feature) -> tuple[str, ...]:
    sets = ", ".join(f"{name}: `{column}`" for name, column in one.elsewhere.items())
    return (f"`{one.name}`", sets, "; ".join(f"`{code}` {name}" for code, name in one.loinc.items()), one.fhir)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
