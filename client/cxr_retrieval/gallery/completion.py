"""What a gallery holds, for who writes a clause: its fields, their values, and how many cases have each, as they were at one moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from sys import intern
from typing import Any, Final

import numpy as np

from cxr_retrieval.cases.fields import Value
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.clause import Kind, Own, printed
from cxr_retrieval.gallery.matching import matches, with_words
from cxr_retrieval.gallery.store import FILTER_FIELDS, Store, understood
from cxr_retrieval.gallery.words import NOTES

MAX_ROWS: Final = 200_000
"""Cases that a snapshot holds; of a larger gallery it is a part."""
_OWN: Final = "extra"
_HELD: Final = ("key", "patient_id", *(name for name, kind in FILTER_FIELDS.items() if kind != "id" and name != "key"))


@dataclass(frozen=True)
class Counted:
    """How many cases have a value."""

    value: Value
    cases: int


@dataclass(frozen=True)
class Spread:
    """Of the numbers that are known, with the quartiles interpolated."""

    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float


@dataclass(frozen=True)
class FieldHeld:
    """A field that a clause may use: its name as it is written there, what it holds, and of how many cases it is known."""

    name: str
    kind: Kind
    known: int


@dataclass(frozen=True)
class Described:
    """A field of these cases.

    Attributes:
        unknown: Of how many of them it is not known.
        values: The most frequent first, equally frequent ones in order; as many as were asked for.
        distinct: How many values there are, of those that were asked for.
        spread: Of a field that holds numbers.
    """

    field: FieldHeld
    unknown: int
    values: tuple[Counted, ...]
    distinct: int
    spread: Spread | None


class Snapshot:
    """Cases as a gallery had them at one moment. Asks Milvus nothing more, so that it answers while somebody types.

    Attributes:
        rows: What is known of each case.
        whole: Whether it holds every case of the gallery; otherwise the first `MAX_ROWS` that Milvus gave.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], pseudonyms: Pseudonyms, *, whole: bool = True) -> None:
        """`rows` as `Store.rows` gives them, with the fields that a clause may use."""
        self.rows = rows
        self._pseudonyms = pseudonyms
        self.whole = whole

    @classmethod
    def take(cls, store: Store) -> Snapshot:
        """Reads a gallery: all that a clause may ask of its cases. Milvus Lite takes 0.2 ms of CPU time for each of
        them, 20 s for 100,000: a page does it once, beside its work.

        Raises:
            StoreError: Milvus cannot serve.
        """
        found = store.rows(_HELD)
        rows = [_slim(row) for row in islice(found, MAX_ROWS)]
        return cls(rows, store.pseudonyms, whole=next(found, None) is None)

    def __len__(self) -> int:
        """Cases."""
        return len(self.rows)

    def meeting(self, where: str = "", text: str = "") -> Snapshot:
        """Those of its cases that meet a clause, and whose notes hold words: just those that a search would choose from.

        Raises:
            ClauseError: One of them cannot be meant.
        """
        condition = understood(where, text, self._pseudonyms)
        if condition is None:
            return self
        return Snapshot([row for row in self.rows if matches(condition, row)], self._pseudonyms, whole=self.whole)

    def fields(self, prefix: str = "") -> tuple[FieldHeld, ...]:
        """The fields whose names begin so, in whatever case, in order: first those of the system, then the user's own columns."""
        return tuple(one for one in self._fields.values() if _begins(one.name, prefix) or _begins(_bare(one.name), prefix))

    def describe(self, field: str, prefix: str = "", limit: int = 20) -> Described:
        """What these cases have in a field.

        Args:
            field: As `fields` names it.
            prefix: Count only values that begin so, in whatever case.
            limit: Values at most.

        Raises:
            UsageError: No case has such a field.
        """
        one = self._fields.get(field)
        if one is None:
            raise UsageError(f"no case has a field {field}", expected=", ".join(self._fields), next_step="name another field")
        values = [value for row in self.rows if (value := self._value(row, field)) is not None]
        counted = Counter(value for value in values if _begins(_text(value), prefix))
        most = sorted(counted.items(), key=lambda pair: (-pair[1], _text(pair[0])))[:limit]
        numbers = [value for value in values if isinstance(value, int | float)] if one.kind == "number" else []
        spread = Spread(*(float(value) for value in np.percentile(numbers, [0, 25, 50, 75, 100]))) if numbers else None
        return Described(one, len(self.rows) - len(values), tuple(Counted(*pair) for pair in most), len(counted), spread)

    @cached_property
    def _fields(self) -> dict[str, FieldHeld]:
        known = Counter(name for row in self.rows for name in row)
        named = {name: FieldHeld(name, kind, known[name]) for name, kind in FILTER_FIELDS.items() if kind not in ("id", "own")}
        kinds: dict[str, Counter[Kind]] = {name: Counter() for name in sorted(self._columns)}
        for row in self.rows:
            for column, value in row.get(_OWN, {}).items():
                kinds[_written(column)][_kind(value)] += 1
        own = {name: FieldHeld(name, some.most_common(1)[0][0], some.total()) for name, some in kinds.items()}
        return {name: one for name, one in named.items() if name != "key"} | own

    @cached_property
    def _columns(self) -> dict[str, str]:
        """The user's own columns: as a clause writes them → as they are called."""
        return {_written(column): column for column in {column for row in self.rows for column in row.get(_OWN, {})}}

    def _value(self, row: Mapping[str, Any], field: str) -> Any:
        return row.get(_OWN, {}).get(self._columns[field]) if field in self._columns else row.get(field)


def _slim(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a case; texts that many have are held once."""
    known = {name: intern(value) if isinstance(value, str) else value for name, value in row.items() if name in _HELD and value is not None}
    return with_words(known) if NOTES in known else known


@lru_cache(maxsize=1024)
def _written(column: str) -> str:
    return printed(Own(_OWN, (column,)))


def _bare(name: str) -> str:
    """The column's own name in `extra["name"]`."""
    return name.removeprefix(f'{_OWN}["')


def _begins(text: str, prefix: str) -> bool:
    return text.casefold().startswith(prefix.casefold())


def _text(value: Value) -> str:
    """As it is written in a clause, but without quotes."""
    if isinstance(value, bool | str):
        return str(value).lower() if isinstance(value, bool) else value
    return repr(int(value) if value == int(value) else value)


def _kind(value: object) -> Kind:
    return "flag" if isinstance(value, bool) else "number" if isinstance(value, int | float) else "text"
