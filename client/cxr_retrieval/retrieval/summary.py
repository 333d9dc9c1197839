"""What became of a list of cases, in numbers that say how many of them they rest on: neighbours of a query, or cases brushed on a map.

Facts are known of few cases, and not of a random few: who fell very ill is written about. So no share stands without its counts, there is
none of fewer than MIN_KNOWN, and each has its interval (Wilson 1927), which is that of a random sample, and nearest neighbours are none.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cxr_retrieval.cases.features import FEATURE, FEATURES
from cxr_retrieval.gallery.store import Case

MIN_KNOWN: Final = 3
"""Known values below which there is no share, no median and no range: counts only."""
_Z_95: Final = statistics.NormalDist().inv_cdf(0.975)
_TEXTS: Final = ("label", "source", "sex", "view")
_NAMES: Final = {
    "went_icu": "intensive care",
    "spo2": "oxygen saturation",
    "temperature": "temperature",
    "needed_supplemental_o2": "supplemental oxygen",
}
_IN_BRIEF: Final = ("went_icu", "intubated", "survival", "spo2")
"""What a terminal and a page say in words; the others that are known are in `as_json`."""


@dataclass(frozen=True)
class Flag:
    """Of how many cases something is true; `share` and its 95 % interval only of MIN_KNOWN known ones or more."""

    true: int
    known: int
    unknown: int

    @property
    def share(self) -> float | None:
        """Of the known ones."""
        return self.true / self.known if self.known >= MIN_KNOWN else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Wilson's, 95 %."""
        return wilson(self.true, self.known) if self.known >= MIN_KNOWN else None

    def as_json(self) -> dict[str, Any]:
        """Under these names."""
        return {
            "true": self.true,
            "known": self.known,
            "unknown": self.unknown,
            "share": self.share,
            "share_ci": None if self.interval is None else list(self.interval),
        }

    def words(self) -> str:
        """`3 of 4 known (6 unknown)`."""
        return f"{self.true} of {self.known} known{_unknown(self.unknown)}"


@dataclass(frozen=True)
class Number:
    """Values of a number, in the unit of its feature; `quartiles` (25, 50 and 75 %, interpolated) and `range` only of MIN_KNOWN or more.

    Those that are not plausible (`Feature.plausible`) are no known ones: a flow of oxygen noted as a saturation would move the median.
    """

    known: int
    unknown: int
    implausible: int
    quartiles: tuple[float, float, float] | None
    range: tuple[float, float] | None
    shown: str

    @property
    def median(self) -> float | None:
        """The middle one of the quartiles."""
        return self.quartiles[1] if self.quartiles else None

    def as_json(self) -> dict[str, Any]:
        """Under these names."""
        return {
            "known": self.known,
            "unknown": self.unknown,
            "implausible": self.implausible,
            "median": self.median,
            "quartiles": list(self.quartiles) if self.quartiles else None,
            "range": list(self.range) if self.range else None,
        }

    def words(self) -> str:
        """`median 91 % (quartiles 88 to 95) of 6 known (4 unknown)`."""
        known = f"{self.known} known{_unknown(self.unknown, self.implausible)}"
        if self.quartiles is None:
            return known
        low, median, high = (f"{value:.3g}" for value in self.quartiles)
        return f"median {median}{self.shown} (quartiles {low} to {high}) of {known}"


@dataclass(frozen=True)
class Text:
    """How many cases have each text, the most frequent first."""

    counts: Mapping[str, int]
    known: int
    unknown: int

    def as_json(self) -> dict[str, Any]:
        """Under these names."""
        return {"known": self.known, "unknown": self.unknown, "counts": dict(self.counts)}

    def words(self) -> str:
        """`F 6, M 3 (1 unknown)`."""
        return ", ".join(f"{value} {count}" for value, count in self.counts.items()) + _unknown(self.unknown)


@dataclass(frozen=True)
class Summary:
    """`n` cases; of each feature that is known of at least one of them, what is known. A feature that is not there is known of none."""

    n: int
    features: Mapping[str, Flag | Number | Text]

    def as_json(self) -> dict[str, Any]:
        """The published JSON form."""
        return {"n": self.n, "features": {name: one.as_json() for name, one in self.features.items()}}

    def lines(self) -> list[str]:
        """The most telling features in words, a line each; those that are known of none together in the last."""
        known = [f"{called(name)}: {self.features[name].words()}" for name in _IN_BRIEF if name in self.features]
        none = [called(name) for name in _IN_BRIEF if name not in self.features]
        return [*known, *([f"not known of any: {', '.join(none)}"] if none else [])]


def summarise(cases: Iterable[Case]) -> Summary:
    """Counts what is known of these cases, each of which counts once, films of one patient as often as there are films."""
    n = 0
    columns: dict[str, list[Any]] = {}
    for case in cases:
        n += 1
        for name, value in (("label", case.label), ("source", case.source), *((name, case.metadata.get(name)) for name in _SUMMARISED)):
            if value is not None:
                columns.setdefault(name, []).append(value)
    order = [*_TEXTS, *(name for name in _SUMMARISED if name not in _TEXTS)]
    return Summary(n, {name: _of(name, columns[name], n) for name in order if name in columns})


def called(name: str) -> str:
    """A column in words; one of the user's own as it is."""
    return _NAMES.get(name) or (FEATURE[name].title if name in FEATURE else name)


def wilson(true: int, known: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), for `known` of one or more."""
    share, square = true / known, _Z_95**2
    middle = share + square / (2 * known)
    reach = _Z_95 * math.sqrt(share * (1 - share) / known + square / (4 * known**2))
    whole = 1 + square / known
    return max(0.0, (middle - reach) / whole), min(1.0, (middle + reach) / whole)


_SUMMARISED: Final = tuple(feature.name for feature in FEATURES if feature.kind != "text" or feature.name in _TEXTS)


def _of(name: str, values: list[Any], n: int) -> Flag | Number | Text:
    known, unknown = len(values), n - len(values)
    kind = FEATURE[name].kind if name in FEATURE else "text"
    if kind == "flag":
        return Flag(sum(map(bool, values)), known, unknown)
    if kind == "number":
        plausible = [value for value in values if not FEATURE[name].doubt(value)]
        known, implausible, values = len(plausible), len(values) - len(plausible), plausible
        enough = known >= MIN_KNOWN
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if enough else (0.0, 0.0, 0.0)
        quartiles, span = ((low, median, high), (float(min(values)), float(max(values)))) if enough else (None, None)
        return Number(known, unknown, implausible, quartiles, span, FEATURE[name].shown)
    return Text(dict(Counter(map(str, values)).most_common()), known, unknown)


def _unknown(unknown: int, implausible: int = 0) -> str:
    counts = [f"{count} {what}" for count, what in ((unknown, "unknown"), (implausible, "not plausible")) if count]
    return f" ({', '.join(counts)})" if counts else ""
