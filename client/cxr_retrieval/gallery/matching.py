"""Conditions met or not by a row in this process: for what its Milvus cannot be asked, and for counts over many rows that are held."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from operator import add, eq, ge, gt, le, lt, mod, mul, ne, sub, truediv
from typing import Any, Final, cast

from cxr_retrieval.gallery.clause import (
    And,
    Arithmetic,
    Comparator,
    Compare,
    Contains,
    Exists,
    Field,
    In,
    IsNull,
    Length,
    Like,
    Node,
    Not,
    Operand,
    Or,
    Own,
    Value,
    Words,
)
from cxr_retrieval.gallery.words import NOTES, WORDS_FIELD, spaced, words_of

_COMPARED: Final[Mapping[Comparator, Callable[[Any, Any], bool]]] = {"==": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge}
_RECKONED: Final[Mapping[str, Callable[[float, float], float]]] = {"+": add, "-": sub, "*": mul, "/": truediv, "%": mod}


def with_words(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the words of its notes, which conditions on words are asked of."""
    notes = row.get(NOTES)
    return {**row, WORDS_FIELD: None if notes is None else spaced(words_of(notes))}


def matches(node: Node, row: Mapping[str, Any]) -> bool:
    """Whether a row meets a settled clause (`filters.settled`).

    Args:
        row: Field → value, of all that it asks; unknown ones None or left out. From `with_words`, if it asks for words.
    """
    match node:
        case And(nodes):
            return all(matches(part, row) for part in nodes)
        case Or(nodes):
            return any(matches(part, row) for part in nodes)
        case Not(inner):
            return not matches(inner, row)
        case Compare(operator, left, right):
            return _compared(operator, _value(left, row), _value(right, row))
        case In(item, values, negated):
            value = _value(item, row)
            return any(_compared("==", value, one) for one in values) != negated
        case Like(item, pattern):
            value = _value(item, row)
            return isinstance(value, str) and _regex(pattern).fullmatch(value) is not None
        case IsNull(item, negated):
            return (_value(item, row) is None) != negated
        case Exists(item):
            return _value(item, row) is not None
        case Contains(function, item, values):
            held = _value(item, row)
            found = [any(_compared("==", one, value) for one in held) for value in values] if isinstance(held, list) else [False]
            return any(found) if function.endswith("_any") else all(found)
        case Words(_, words, phrase):
            held = row.get(WORDS_FIELD) or ""
            return spaced(words) in held if phrase else any(spaced((word,)) in held for word in words)


def _value(operand: Operand, row: Mapping[str, Any]) -> Any:
    """None where it is not known, or makes no sense."""
    match operand:
        case Value(value):
            return value
        case Field(name):
            return row.get(name)
        case Own(base, path):
            found = row.get(base)
            for part in path:
                if isinstance(part, str):
                    found = cast("dict[str, Any]", found).get(part) if isinstance(found, dict) else None
                else:
                    found = cast("list[Any]", found)[part] if isinstance(found, list) and part < len(cast("list[Any]", found)) else None
            return found
        case Length(item):
            held = _value(item, row)
            return len(cast("list[Any]", held)) if isinstance(held, list) else None
        case Arithmetic(operator, left, right):
            sides = (_value(left, row), _value(right, row))
            if not all(isinstance(side, int | float) and not isinstance(side, bool) for side in sides):
                return None
            try:
                return _RECKONED[operator](*sides)
            except (ZeroDivisionError, OverflowError):
                return None


def _compared(operator: Comparator, left: Any, right: Any) -> bool:
    """Unlike things are unequal, and neither is less; a flag is no number. What is not known meets nothing."""
    if left is None or right is None:
        return False
    if _sort(left) is not _sort(right):
        return operator == "!="
    return _COMPARED[operator](left, right)


def _sort(value: object) -> type:
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


@lru_cache(maxsize=64)
def _regex(pattern: str) -> re.Pattern[str]:
    """Of a pattern of `like`."""
    parts = re.findall(r"\\.|.", pattern, re.DOTALL)
    wild = {"%": ".*", "_": "."}
    return re.compile("".join(wild.get(part) or re.escape(part[-1]) for part in parts), re.DOTALL)
