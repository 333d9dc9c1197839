"""What each stage costs, read from TOML: a value, its unit, where it comes from, and whether it was measured or assumed.

`costs.toml` ships with the package; a file of the same form replaces its costs one by one, so that a site can put in what it has measured.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cxr_retrieval.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports] (installed on Python 3.10 only)

CHOICE: Final = "choice"
"""The source of what a site chooses for itself: it is neither measured nor to be measured."""
SHIPPED: Final = Path(__file__).with_name("costs.toml")
_PARTED: Final = re.compile(r"[,\s]+")
UNITS: Final = frozenset(
    {
        "bytes",
        "bytes/case",
        "bytes/film",
        "bytes/s",
        "cases",
        "copies",
        "core s/case",
        "core s/film",
        "core s/search",
        "cores",
        "films/s",
        "FLOP/film",
        "FLOP/s",
        "GPUs",
        "s",
        "share",
        "times",
    }
)
"""What a cost may be counted in; `core s` are seconds of one core."""


@dataclass(frozen=True)
class Source:
    """Where figures come from.

    Attributes:
        what: The command that measured them, or the publication, with its address.
        machine: What they were measured on. date: When, or when the publication was looked at (ISO).
    """

    key: str
    what: str
    machine: str
    date: str


@dataclass(frozen=True)
class Cost:
    """One of them.

    Attributes:
        name: Its dotted place in the file, such as `reading.dicom`.
        measured: Whether it was measured on this system; else it was published for something similar, or is assumed.
        how: How it was got from its source, where that does not say the number itself.
    """

    name: str
    value: float
    unit: str
    measured: bool
    source: Source
    how: str = ""

    @property
    def assumed(self) -> bool:
        """Neither measured nor chosen."""
        return not self.measured and self.source.key != CHOICE


@dataclass(frozen=True)
class Costs:
    """All of them, by name."""

    by_name: Mapping[str, Cost]
    profile: tuple[float, ...]
    """Weights of the 24 hours of a day."""

    def cost(self, name: str, unit: str) -> Cost:
        """The one of this name.

        Raises:
            UsageError: There is none, or it is counted in another unit.
        """
        found = self.by_name.get(name)
        if found is None or found.unit != unit:
            raise UsageError(
                f"no cost {name}",
                expected=f"a value in {unit}",
                got="none" if found is None else f"one in {found.unit}",
                next_step="add it to the file given as --costs",
            )
        return found

    def kinds(self, table: str) -> tuple[str, ...]:
        """What there is of a kind, in the file's order: `gpu` → its names."""
        prefix = f"{table}."
        return tuple(dict.fromkeys(name.removeprefix(prefix).partition(".")[0] for name in self.by_name if name.startswith(prefix)))


def read_costs(own: Path | None = None) -> Costs:
    """What ships, and over it what is the user's own.

    Raises:
        UsageError: The file cannot be read, or says something that cannot be meant.
    """
    costs = _read(SHIPPED, None)
    return costs if own is None else _read(own, costs)


def read_profile(path: Path) -> tuple[float, ...]:
    """Weights of the 24 hours from midnight on: TOML with `hours = […]`, or 24 numbers with commas or line ends between them.

    Raises:
        UsageError: It cannot be read, or does not hold 24 numbers of which none is negative and not all are 0.
    """
    try:
        text = path.read_text("utf-8")
        hours = tomllib.loads(text).get("hours") if path.suffix == ".toml" else [float(part) for part in _PARTED.split(text.strip())]
    except (OSError, ValueError) as error:  # TOML's and UTF-8's errors are ValueErrors
        raise _unreadable(path, error) from error
    return _profile(path, hours)


def _read(path: Path, under: Costs | None) -> Costs:
    try:
        said = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    known = {} if under is None else {cost.source.key: cost.source for cost in under.by_name.values()}
    if strange := sorted(said.keys() - {"sources", "costs", "profile"}):
        raise _meaningless(path, "the whole", "tables sources, costs, profile", ", ".join(strange))
    sources = known | {key: _source(path, key, one) for key, one in _table(path, "sources", said.get("sources", {})).items()}
    costs = {} if under is None else dict(under.by_name)
    costs |= {cost.name: cost for cost in _costs(path, _table(path, "costs", said.get("costs", {})), "", sources)}
    if "profile" in said:
        profile = _profile(path, _table(path, "profile", said["profile"]).get("hours"))
    elif under is not None:
        profile = under.profile
    else:
        raise _meaningless(path, "profile", "hours = [24 numbers]", "none")
    return Costs(costs, profile)


def _source(path: Path, key: str, said: Any) -> Source:
    table = _table(path, f"sources.{key}", said)
    parts = {name: table.get(name, "") for name in ("what", "machine", "date")}
    if table.keys() - parts.keys() or not all(isinstance(part, str) for part in parts.values()) or not parts["what"]:
        raise _meaningless(path, f"sources.{key}", "texts what, machine, date", ", ".join(table) or "nothing")
    return Source(key, **parts)


def _costs(path: Path, table: Mapping[str, Any], within: str, sources: Mapping[str, Source]) -> list[Cost]:
    found: list[Cost] = []
    for key, said in table.items():
        name = f"{within}.{key}" if within else key
        inner = _table(path, f"costs.{name}", said)
        found += [_cost(path, name, inner, sources)] if "value" in inner else _costs(path, inner, name, sources)
    return found


def _cost(path: Path, name: str, said: Mapping[str, Any], sources: Mapping[str, Source]) -> Cost:
    value, unit, measured = said.get("value"), said.get("unit"), said.get("measured")
    source, how = sources.get(str(said.get("source"))), said.get("how", "")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _meaningless(path, f"costs.{name}.value", "a number", str(value))
    if unit not in UNITS:
        raise _meaningless(path, f"costs.{name}.unit", f"one of {', '.join(sorted(UNITS))}", str(unit))
    if value < 0 or (value == 0 and not str(unit).startswith("core s/")):
        raise _meaningless(path, f"costs.{name}.value", "a number above 0; 0 core s for what costs none", str(value))
    if not isinstance(measured, bool):
        raise _meaningless(path, f"costs.{name}.measured", "true or false", str(measured))
    if source is None:
        raise _meaningless(path, f"costs.{name}.source", f"one of {', '.join(sources)}", str(said.get("source")))
    if measured and not (source.machine and source.date):
        raise _meaningless(path, f"costs.{name}", "a source with machine and date, as it was measured", f"sources.{source.key} without")
    if not isinstance(how, str) or said.keys() - {"value", "unit", "measured", "source", "how"}:
        raise _meaningless(path, f"costs.{name}", "value, unit, measured, source, how", ", ".join(sorted(map(str, said))))
    if not measured and not how:
        raise _meaningless(path, f"costs.{name}.how", "how it was got, as it was not measured", "nothing")
    return Cost(name, float(value), str(unit), measured, source, how)


def _profile(path: Path, hours: Any) -> tuple[float, ...]:
    numbers = hours if isinstance(hours, list) else []
    weights = [float(one) for one in numbers if isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one < math.inf]
    if len(weights) != 24 or len(numbers) != 24 or not sum(weights):
        raise _meaningless(path, "hours", "24 numbers of at least 0, not all 0", f"{len(numbers)} of which {len(weights)} are such")
    return tuple(weights)


def _table(path: Path, place: str, said: Any) -> Mapping[str, Any]:
    if not isinstance(said, dict):
        raise _meaningless(path, place, "a table", str(said))
    return said


def _unreadable(path: Path, error: Exception) -> UsageError:
    got = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UsageError(f"{path}: cannot be read", expected="a file as docs/scale.md shows", got=got, next_step="correct it")


def _meaningless(path: Path, place: str, expected: str, got: str) -> UsageError:
    return UsageError(f"{path}: {place} cannot be meant", expected=expected, got=got, next_step="correct it, as docs/scale.md shows")
