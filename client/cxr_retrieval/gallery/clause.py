"""A clause as a tree, and back in Milvus' syntax: what `clause_parser.py` makes of text and `filters.py` rewrites.

A tree has no parentheses and no synonyms: `a < b < c` is two comparisons, `went_icu` alone is `went_icu == true`, `&&` is `and`.
Where a node stood in the text (`at`) is not part of what it says, and two trees that say the same are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

Span = tuple[int, int]
"""The characters from the first, counted from 0, up to but without the second."""
NOWHERE: Final[Span] = (0, 0)
Constant = int | float | bool | str
Comparator = Literal["==", "!=", "<", "<=", ">", ">="]
Kind = Literal["number", "text", "flag", "id", "own"]
"""What a field holds; `id`: pseudonyms, of which only equality can be asked; `own`: the user's own columns, anything by name."""


@dataclass(frozen=True)
class _Placed:
    at: Span = field(default=NOWHERE, compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Field(_Placed):
    """A stored field."""

    name: str


@dataclass(frozen=True)
class Own(_Placed):
    """A column of the user's own, or what lies in it: `extra["ward"]`, `extra["scores"][0]`."""

    base: str
    path: tuple[str | int, ...]


@dataclass(frozen=True)
class Value(_Placed):
    """A constant."""

    value: Constant


@dataclass(frozen=True)
class Arithmetic(_Placed):
    """`left operator right`, of `+ - * / %`."""

    operator: str
    left: Operand
    right: Operand


@dataclass(frozen=True)
class Length(_Placed):
    """`array_length(item)`."""

    item: Own


Operand = Field | Own | Value | Arithmetic | Length


@dataclass(frozen=True)
class Compare(_Placed):
    """`left operator right`."""

    operator: Comparator
    left: Operand
    right: Operand


@dataclass(frozen=True)
class In(_Placed):
    """`item in [values]`, or `not in`."""

    item: Field | Own
    values: tuple[Constant, ...]
    negated: bool = False


@dataclass(frozen=True)
class Like(_Placed):
    """`item like pattern`: `%` is any characters, `_` any one; a backslash takes the next for itself."""

    item: Field | Own
    pattern: str


@dataclass(frozen=True)
class IsNull(_Placed):
    """`item is null`, or `is not null`."""

    item: Field | Own
    negated: bool = False


@dataclass(frozen=True)
class Exists(_Placed):
    """`exists item`: the same as `is not null`."""

    item: Field | Own


@dataclass(frozen=True)
class Contains(_Placed):
    """A list of the user's own holds a value (`json_contains`), or all or any of several (`json_contains_all`, `array_contains_any`)."""

    function: str
    item: Own
    values: tuple[Constant, ...]


@dataclass(frozen=True)
class Words(_Placed):
    """`TEXT_MATCH(field, "a b")`: one of the words at least; with `phrase`, `PHRASE_MATCH(field, "a b")`: all, one after the other."""

    item: Field
    words: tuple[str, ...]
    phrase: bool = False


@dataclass(frozen=True)
class Not(_Placed):
    """Not so."""

    node: Node


@dataclass(frozen=True)
class And(_Placed):
    """All of them; none of them an And."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Or(_Placed):
    """One of them at least; none of them an Or."""

    nodes: tuple[Node, ...]


Node = Compare | In | Like | IsNull | Exists | Contains | Words | Not | And | Or
"""What is true of a case or not."""


def all_of(nodes: Iterable[Node], at: Span = NOWHERE) -> Node:
    """One node that says what they say together."""
    flat = tuple(part for node in nodes for part in (node.nodes if isinstance(node, And) else (node,)))
    return flat[0] if len(flat) == 1 else And(flat, at=at)


def any_of(nodes: Iterable[Node], at: Span = NOWHERE) -> Node:
    """One node that is true where one of them is."""
    flat = tuple(part for node in nodes for part in (node.nodes if isinstance(node, Or) else (node,)))
    return flat[0] if len(flat) == 1 else Or(flat, at=at)


def items(node: Node | Operand) -> Iterator[Field | Own]:
    """Every field and column that it names, as often as it does."""
    match node:
        case Field() | Own():
            yield node
        case Value():
            pass
        case Arithmetic(_, left, right) | Compare(_, left, right):
            yield from items(left)
            yield from items(right)
        case Not(inner):
            yield from items(inner)
        case And(nodes) | Or(nodes):
            for part in nodes:
                yield from items(part)
        case _:
            yield node.item


def printed(node: Node | Operand) -> str:
    """In Milvus' syntax; what `parse` reads as the same tree."""
    match node:
        case Field(name):
            return name
        case Own(base, path):
            return base + "".join(f"[{constant(part)}]" for part in path)
        case Value(value):
            return constant(value)
        case Arithmetic(operator, left, right):
            return f"({printed(left)} {operator} {printed(right)})"
        case Length(item):
            return f"array_length({printed(item)})"
        case Compare(operator, left, right):
            return f"{printed(left)} {operator} {printed(right)}"
        case In(item, values, negated):
            return f"{printed(item)} {'not in' if negated else 'in'} {_list(values)}"
        case Like(item, pattern):
            return f"{printed(item)} like {constant(pattern)}"
        case IsNull(item, negated):
            return f"{printed(item)} {'is not null' if negated else 'is null'}"
        case Exists(item):
            return f"(exists {printed(item)})"  # without parentheses Milvus 2.3 takes in what follows
        case Contains(function, item, values):
            told = constant(values[0]) if function.endswith("contains") else _list(values)
            return f"{function}({printed(item)}, {told})"
        case Words(item, words, phrase):
            return f"{'PHRASE_MATCH' if phrase else 'TEXT_MATCH'}({printed(item)}, {constant(' '.join(words))})"
        case Not(inner):
            return f"not ({printed(inner)})"
        case And(nodes):
            return " and ".join(f"({printed(part)})" if isinstance(part, Or) else printed(part) for part in nodes)
        case Or(nodes):
            return " or ".join(f"({printed(part)})" if isinstance(part, And) else printed(part) for part in nodes)


_ESCAPED: Final = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def constant(value: Constant) -> str:
    """As every Milvus reads it: flags in lower case, no escapes in text but those that all know, every other character as it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value.translate(_ESCAPED)}"' if isinstance(value, str) else repr(value)


def _list(values: tuple[Constant, ...]) -> str:
    return f"[{', '.join(map(constant, values))}]"
