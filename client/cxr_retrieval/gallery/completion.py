"""What a gallery holds, for who writes a clause: its fields, their values, and how many cases have each, as they were at one moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice, takewhile
from sys import intern
from typing import Any, Final, get_args

import numpy as np

from cxr_retrieval.cases.fields import Value
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.clause import Comparator, Kind, Own, constant, printed
from cxr_retrieval.gallery.clause_parser import Token, tokens
from cxr_retrieval.gallery.matching import matches, with_words
from cxr_retrieval.gallery.store import FILTER_FIELDS, Store, understood
from cxr_retrieval.gallery.words import NOTES

MAX_ROWS: Final = 200_000
"""Cases that a snapshot holds; of a larger gallery it is a part."""
_OWN: Final = "extra"
_COMPARATORS: Final = frozenset(get_args(Comparator))
_VALUES: Final = 1000
"""Of a field, that are looked through for suggestions."""
_OPENS: Final = frozenset({"(", "and", "or", "not", "!", "&&", "||", "exists"})
"""Words after which a field may stand."""
_JOINTS: Final = (("and", "both"), ("or", "either"))
_KNOWN: Final = (("is not null", "known"), ("is null", "unknown"))
_EQUAL: Final = (("==", "equal"), ("!=", "unequal"), ("in [", "one of"), ("not in [", "none of"))
_OPERATORS: Final[Mapping[Kind, tuple[tuple[str, str], ...]]] = {
    "number": ((">=", "at least"), ("<=", "at most"), (">", "more than"), ("<", "less than"), *_EQUAL, *_KNOWN),
    "text": (*_EQUAL, ("like", "as this pattern"), *_KNOWN),
    "flag": (*_JOINTS, ("== true", "true"), ("== false", "false"), *_KNOWN),
    "id": _EQUAL,
    "own": (*_EQUAL, *_KNOWN),
}
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


@dataclass(frozen=True)
class Suggestion:
    """What may be written: `text` in place of what is being typed; `about` it in a word or two; of how many cases, where that is known."""

    text: str
    about: str
    cases: int | None


@dataclass(frozen=True)
class Completion:
    """Suggestions for the characters of a clause from `start` up to but without `end`."""

    start: int
    end: int
    suggestions: tuple[Suggestion, ...]


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
    def take(cls, store: Store, wanted: Callable[[], bool] = lambda: True) -> Snapshot:
        """Reads a gallery: all that a clause may ask of its cases. Milvus Lite takes 0.2 ms of CPU time for each of
        them, 20 s for 100,000: a page does it once, beside its work.

        Args:
            wanted: Asked before each case; once it is not, the rest is left out.

        Raises:
            StoreError: Milvus cannot serve.
        """
        found = takewhile(lambda _: wanted(), store.rows(_HELD))
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

    def values(self, field: str) -> list[Value | None]:
        """What each case has in a field, in the order of `rows`.

        Args:
            field: As `fields` names it.
        """
        return [self._value(row, field) for row in self.rows]

    def complete(self, where: str, at: int, limit: int = 12) -> Completion:
        """What may stand at a place of a clause that is being typed: fields, operators, or values that these cases have.

        Args:
            where: May be unfinished, or wrong.
            at: The place: so many characters stand before it. What follows is not looked at.
            limit: Suggestions at most.
        """
        before = tokens(where[:at])
        quotes = [place for place, token in enumerate(before) if token.kind == "quote"]
        if quotes:  # all that follows belongs to it
            start = before[quotes[0]].at[0]
            typed, before = where[start + 1 : at], before[: quotes[0]]
        elif before and before[-1].at[1] == at and before[-1].kind in ("name", "number", "text"):
            start, typed = before[-1].at[0], before[-1].text.strip("\"'")
            before = before[:-1]
        else:
            start, typed = at, ""
        return Completion(start, at, tuple(islice(self._suggested(before, typed), limit)))

    def _suggested(self, before: Sequence[Token], typed: str) -> Iterator[Suggestion]:
        compared = _compared(before)
        if compared is not None:
            name = self._named(compared)
            for counted in self.describe(name, typed, _VALUES).values if name is not None else ():
                yield Suggestion(constant(_plain(counted.value)), "", counted.cases)
        elif not before or before[-1].word in _OPENS:
            for one in self.fields(typed):
                yield Suggestion(one.name, one.kind, one.known)
        else:
            name = self._named(before)
            words = _OPERATORS[self._fields[name].kind] if name is not None else _JOINTS
            yield from (Suggestion(word, about, None) for word, about in words if _begins(word, typed))

    def _named(self, before: Sequence[Token]) -> str | None:
        """The field that ends here."""
        for length in (1, 4):  # of one name, or of extra [ "…" ]
            name = "".join(token.text for token in before[-length:])
            if name in self._fields:
                return name
        return None

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


def _compared(before: Sequence[Token]) -> Sequence[Token] | None:
    """What the value that comes next is compared with; None where none comes next."""
    if not before:
        return None
    if before[-1].word in _COMPARATORS:
        return before[:-1]
    opened = next((place for place in range(len(before) - 1, -1, -1) if before[place].word == "["), 0)
    if before[-1].word not in ("[", ",") or opened < 2 or before[opened - 1].word != "in":
        return None
    return before[: opened - 1 - (before[opened - 2].word == "not")]


def _plain(value: Value) -> Value:
    """Whole numbers as such."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
    return repr(_plain(value))


def _kind(value: object) -> Kind:
    return "flag" if isinstance(value, bool) else "number" if isinstance(value, int | float) else "text"
