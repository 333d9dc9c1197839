"""Clauses by chance, for tests of what reads, rewrites and answers them."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import strategies as st

from cxr_retrieval.gallery.clause import (
    Arithmetic,
    Comparator,
    Compare,
    Contains,
    Exists,
    Field,
    In,
    IsNull,
    Kind,
    Length,
    Like,
    Node,
    Not,
    Operand,
    Own,
    Value,
    Words,
    all_of,
    any_of,
)
from cxr_retrieval.gallery.store import FILTER_FIELDS

FIELDS: Mapping[str, Kind] = FILTER_FIELDS
NUMBERS = st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
_OF: Mapping[Kind, st.SearchStrategy[Value]] = {
    "number": NUMBERS.map(Value),
    "text": TEXTS.map(Value),
    "flag": st.booleans().map(Value),
}
_KEYS = st.tuples(TEXTS, st.integers(0, 9)).map(lambda pair: pair[:1] if pair[1] > 4 else pair)
_OWN = _KEYS.map(lambda path: Own("extra", path))
_NAMED: Mapping[Kind, st.SearchStrategy[Field]] = {
    kind: st.sampled_from([Field(name) for name, has in FIELDS.items() if has == kind]) for kind in ("number", "text", "flag", "id")
}
_ORDERED: st.SearchStrategy[Comparator] = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
_EQUAL: st.SearchStrategy[Comparator] = st.sampled_from(["==", "!="])


def _operands() -> st.SearchStrategy[Operand]:
    """What can be reckoned with; no constants of constants, which are read as their value."""
    leaves: st.SearchStrategy[Operand] = st.one_of(_NAMED["number"], _OWN, _OWN.map(Length))
    signs = st.sampled_from("+-*/%")
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(Arithmetic, signs, inner, st.one_of(inner, _OF["number"])),
            st.builds(Arithmetic, signs, _OF["number"], inner),
        ),
        max_leaves=4,
    )


def _conditions() -> st.SearchStrategy[Node]:
    def listed(kind: Kind) -> st.SearchStrategy[Node]:
        values = st.lists(_OF["text" if kind == "id" else kind].map(lambda value: value.value), max_size=4).map(tuple)
        return st.builds(In, _NAMED[kind], values, st.booleans())

    anything = st.one_of(*_OF.values())
    words = st.lists(st.from_regex("[a-z0-9]{1,9}", fullmatch=True), min_size=1, max_size=3).map(tuple)
    return st.one_of(
        st.builds(Compare, _ORDERED, _operands(), st.one_of(_OF["number"], _operands())),
        st.builds(Compare, _ORDERED, _NAMED["text"], _OF["text"]),
        st.builds(Compare, _EQUAL, st.one_of(_NAMED["flag"], _OWN), _OF["flag"]),
        st.builds(Compare, _EQUAL, _NAMED["id"], _OF["text"]),
        st.builds(Compare, _EQUAL, _OWN, anything),
        *(listed(kind) for kind in _NAMED),
        st.builds(In, _OWN, st.lists(anything.map(lambda value: value.value), max_size=4).map(tuple), st.booleans()),
        st.builds(Like, st.one_of(_NAMED["text"], _OWN), TEXTS),
        st.builds(IsNull, st.one_of(_OWN, *_NAMED.values()), st.booleans()),
        st.builds(Exists, st.one_of(_OWN, *_NAMED.values())),
        st.builds(Contains, st.just("json_contains"), _OWN, st.tuples(anything.map(lambda value: value.value))),
        st.builds(Contains, st.sampled_from(["array_contains_all", "json_contains_any"]), _OWN, st.lists(NUMBERS, max_size=3).map(tuple)),
        words.map(lambda some: Words(Field("clinical_notes"), some, phrase=False)),
        words.filter(lambda some: len(some) > 1).map(lambda some: Words(Field("clinical_notes"), some, phrase=True)),
    )


def trees(conditions: st.SearchStrategy[Node] | None = None) -> st.SearchStrategy[Node]:
    """Any clause, of any conditions or of these."""
    return st.recursive(
        _conditions() if conditions is None else conditions,
        lambda inner: st.one_of(
            inner.map(Not), st.lists(inner, min_size=2, max_size=3).map(all_of), st.lists(inner, min_size=2, max_size=3).map(any_of)
        ),
        max_leaves=6,
    )
