"""What becomes of a clause before Milvus sees it: no ids, one meaning of what is unknown, and nothing that this Milvus cannot do.

No two kinds of Milvus answer alike as they are: an unknown value meets `!=` on a server that keeps it as an absent field, and `not in`
in Milvus Lite; patterns, sums and words can be asked of one and not of another. Here a clause gets one meaning, and each kind is asked in
a form that has it there. What a kind cannot do is read and matched here (`matching.py`), and reaches it as a list of keys.

The one meaning: a case whose value is unknown meets no condition on it, nor its opposite, but `is null`. Except that an unknown patient is
another one: `patient_id != "P"` keeps such cases.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

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
    Or,
    Own,
    Value,
    Words,
    all_of,
    any_of,
    items,
)
from cxr_retrieval.gallery.words import WORDS_FIELD, spaced

KEY: Final = Field("key")
"""The primary key: pseudonyms of images."""
_STORED_AS: Final = {"image_id": KEY.name}
_PATIENT: Final = "patient_id"
_NEVER_UNKNOWN: Final = frozenset({KEY.name, "label"})
_PSEUDONYM: Final = re.compile("[0-9a-f]{32}")
_OPPOSITE: Final[Mapping[Comparator, Comparator]] = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_PREFIX: Final = re.compile(r"[^%_\\]*%")
_SPELT_OUT: Final = 100
"""Values of a list that become conditions, one each; more are matched here."""


@dataclass(frozen=True)
class Dialect:
    """What the Milvus behind a gallery understands.

    Attributes:
        lite: It is Milvus Lite, in this process or behind `cxr serve`.
        nullable: Unknown values are null. Otherwise, on servers before 2.5, they are dynamic fields that a row has not.
        words: The gallery has WORDS_FIELD.
    """

    lite: bool
    nullable: bool
    words: bool


def with_pseudonyms(node: Node, pseudonym_of: Mapping[str, Callable[[str], str]]) -> Node:
    """Puts pseudonyms in the place of the ids that a clause compares with, so that no id reaches Milvus.

    `patient_id == "P"` becomes `patient_id in ["5f…"]`, and `image_id` the primary key, `key`. A string of 32 hex digits may be a pseudonym
    itself, as results show them, and is looked for as well.

    Args:
        pseudonym_of: Field, of those that hold pseudonyms → how an id becomes one.
    """
    match node:
        case Not(inner):
            return Not(with_pseudonyms(inner, pseudonym_of))
        case And(nodes) | Or(nodes):
            return type(node)(tuple(with_pseudonyms(part, pseudonym_of) for part in nodes))
        case Compare(operator, Field(name), Value(str(text))) if name in pseudonym_of:
            return In(_stored(name), _pseudonyms([text], pseudonym_of[name]), operator == "!=")
        case In(Field(name), values, negated) if name in pseudonym_of:
            return In(_stored(name), _pseudonyms([value for value in values if isinstance(value, str)], pseudonym_of[name]), negated)
        case IsNull(Field(name), negated) if name in pseudonym_of:
            return IsNull(_stored(name), negated)
        case Exists(Field(name)) if name in pseudonym_of:
            return Exists(_stored(name))
        case _:
            return node


def _stored(name: str) -> Field:
    return Field(_STORED_AS.get(name, name))


def _pseudonyms(ids: Sequence[str], pseudonym: Callable[[str], str]) -> tuple[str, ...]:
    return tuple([pseudonym(text) for text in ids] + [text for text in ids if _PSEUDONYM.fullmatch(text)])


def settled(node: Node, *, unknown_patients: bool, negated: bool = False) -> Node:
    """The same with no negation but of single conditions, and with none that an unknown value could meet.

    Two truth values are enough for it, wherever it is asked: what needs a value says that it must be known.

    Args:
        unknown_patients: `patient_id != "P"` keeps cases whose patient is unknown. False: it leaves them out, like any other field.
        negated: Of its opposite instead.
    """
    match node:
        case Not(inner):
            return settled(inner, unknown_patients=unknown_patients, negated=not negated)
        case And(nodes) | Or(nodes):
            parts = [settled(part, unknown_patients=unknown_patients, negated=negated) for part in nodes]
            return all_of(parts) if isinstance(node, And) != negated else any_of(parts)
        case IsNull(item, is_negated):
            return IsNull(item, is_negated != negated)
        case Exists(item):
            return IsNull(item, not negated)
        case Compare(operator, left, right):
            operator = _OPPOSITE[operator] if negated else operator
            if operator == "!=" and isinstance(left, Field) and isinstance(right, Value) and isinstance(right.value, bool):
                return Compare("==", left, Value(not right.value))
            condition = Compare(operator, left, right)
            return _known(condition) if operator == "!=" else condition
        case In(item, values, is_negated):
            condition = In(item, values, is_negated != negated)
            if condition.negated and item == Field(_PATIENT) and unknown_patients:
                return any_of([IsNull(item), condition])
            return _known(condition) if condition.negated else condition
        case _:
            return _known(Not(node)) if negated else node


def _known(condition: Node) -> Node:
    """Where all that it asks is known."""
    asked = [item for item in dict.fromkeys(items(condition)) if not (isinstance(item, Field) and item.name in _NEVER_UNKNOWN)]
    return all_of([*(IsNull(item, negated=True) for item in asked), condition])


def for_milvus(node: Node, dialect: Dialect, keys_of: Callable[[Node | None, Node], Sequence[str]]) -> Node:
    """What this Milvus can be asked in place of a settled clause.

    Args:
        keys_of: Keys of the cases that meet both a condition that Milvus can be asked (None: all cases), and one that it cannot.
    """
    if (native := _native(node, dialect)) is not None:
        return native
    if not isinstance(node, And | Or):
        return In(KEY, tuple(keys_of(None, node)))
    natives = [_native(part, dialect) for part in node.nodes]
    possible = [native for native in natives if native is not None]
    others = [part for part, native in zip(node.nodes, natives, strict=True) if native is None]
    if isinstance(node, And):
        return In(KEY, tuple(keys_of(all_of(possible) if possible else None, all_of(others))))
    return any_of([*possible, In(KEY, tuple(keys_of(None, any_of(others))))])


def _native(node: Node, dialect: Dialect) -> Node | None:
    """As this Milvus understands it; None: it does not."""
    match node:
        case And(nodes) | Or(nodes):
            parts = [part for part in (_native(one, dialect) for one in nodes) if part is not None]
            return (all_of if isinstance(node, And) else any_of)(parts) if len(parts) == len(nodes) else None
        case Not(inner):
            native = _native(inner, dialect)
            return None if native is None else Not(native)
        case IsNull(item, negated):
            if isinstance(item, Field) and dialect.nullable:
                return node
            return Exists(item) if negated else Not(Exists(item))
        case Compare(_, left, right):
            return node if _comparable(left, right, dialect) else None
        case In(item, values, negated):
            return _listed(item, values, negated)
        case Like(_, pattern):
            able = "\\" not in pattern if dialect.nullable else _PREFIX.fullmatch(pattern) is not None
            return node if able else None
        case Words(_, words, phrase) if dialect.words:
            return _worded(words, phrase, dialect)
        case Contains():
            return node
        case _:
            return None


def _comparable(left: object, right: object, dialect: Dialect) -> bool:
    """Servers compare a field with a constant; Milvus Lite also fields with each other, and sums, but knows no remainder, and takes
    true for 1 in the user's own columns.
    """
    sides = (left, right)
    if dialect.lite:
        is_flag = any(isinstance(side, Value) and isinstance(side.value, bool) for side in sides)
        return not any(_has_remainder(side) or (is_flag and isinstance(side, Own)) for side in sides)
    return any(isinstance(side, Value) for side in sides) and any(isinstance(side, Field | Own) for side in sides)


def _has_remainder(operand: object) -> bool:
    """Or asks how long a list is."""
    match operand:
        case Arithmetic(operator, left, right):
            return operator == "%" or _has_remainder(left) or _has_remainder(right)
        case _:
            return isinstance(operand, Length)


def _listed(item: Field | Own, values: tuple[int | float | bool | str, ...], negated: bool) -> Node | None:
    """A list: of numbers as Milvus has them, floating-point ones; of a column of the user's own one by one, which all kinds can."""
    if isinstance(item, Field):
        plain = tuple(float(value) if isinstance(value, int) and not isinstance(value, bool) else value for value in values)
        return In(item, plain, negated)
    if not values:
        return In(KEY, (), negated)
    if len(values) > _SPELT_OUT:
        return None
    return (all_of if negated else any_of)(Compare("!=" if negated else "==", item, Value(value)) for value in values)


def _worded(words: tuple[str, ...], phrase: bool, dialect: Dialect) -> Node:
    """Milvus Lite's TEXT_MATCH has no index and walks the rows one by one, forty times slower than a pattern over the same field. Servers
    have one, but no Milvus below 2.6 can ask it for phrases.
    """
    field = Field(WORDS_FIELD)
    if dialect.lite:
        return Like(field, f"%{spaced(words)}%") if phrase else any_of(Like(field, f"%{spaced((word,))}%") for word in words)
    if not phrase:
        return Words(field, words)
    return all_of([*(Words(field, (word,)) for word in words), Like(field, f"%{spaced(words)}%")])
