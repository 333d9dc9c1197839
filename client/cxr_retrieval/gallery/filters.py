"""The filter language: Milvus' boolean expressions over the stored fields, checked before Milvus sees them.

A server with dynamic fields answers a misspelt name with silence, and an unclosed string with a parser's complaint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Final

from cxr_retrieval.errors import UsageError

_WORDS: Final = frozenset({"and", "or", "not", "in", "like", "true", "false", "null", "is", "exists"})
_EXAMPLE: Final = "for example --where 'age > 60 and sex == \"F\"'"
_TOKEN: Final = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<quote>["'])
      | (?P<number>(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?))
      | (?P<call>[A-Za-z_]\w*\s*(?=\())
      | (?P<name>[A-Za-z_]\w*)
    """,
    re.VERBOSE,
)
_STRING: Final = r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
_ANOTHER_PATIENT: Final = re.compile(rf"\bpatient_id\s*(?:!=\s*{_STRING}|not\s+in\s*\[(?:[^\]\"']|{_STRING})*\])", re.IGNORECASE)
_COMPARISON: Final = re.compile(
    rf"\s*(?:(?P<sign>==|!=)\s*(?P<one>{_STRING})|(?P<out>not\s+)?in\s*\[(?P<several>(?:\s*{_STRING}\s*,?)*)\s*\]|is\s+(?:not\s+)?null\b)",
    re.IGNORECASE,
)
"""What may follow the name of a field that holds pseudonyms."""
_STORED_AS: Final = {"image_id": "key"}
_PSEUDONYM: Final = re.compile("[0-9a-f]{32}")
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


def check_filter(where: str, fields: Collection[str]) -> None:
    """Refuses what cannot be meant.

    Args:
        fields: Names that a clause may use.

    Raises:
        UsageError: A string is not closed, or a name is none of `fields`.
    """
    for token in _tokens(where):
        if token.lastgroup == "quote":
            raise UsageError(
                "the filter holds a string that is not closed",
                expected=f"a second {token[0]}",
                got=where[token.start() :],
                next_step=_EXAMPLE,
            )
    names = {token[0].strip() for token in _tokens(where) if token.lastgroup == "name"}
    unknown = sorted(name for name in names if name.lower() not in _WORDS and name not in fields)
    if unknown:
        raise UsageError(
            f"the filter names an unknown field: {', '.join(unknown)}",
            expected=", ".join(sorted(fields)),
            got=where,
            next_step='columns of your own are reached as extra["name"]',
        )


def keep_unknown_patients(where: str) -> str:
    """Makes `patient_id != "P"` and `patient_id not in [...]` true of cases whose patient is unknown: null is unequal to nothing."""
    parts: list[str] = []
    end = 0
    for clause in _ANOTHER_PATIENT.finditer(where):
        if any(token.lastgroup == "string" and token.start() < clause.start() < token.end() for token in _tokens(where)):
            continue  # it stands inside a string
        parts += [where[end : clause.start()], f"(patient_id is null or {clause[0]})"]
        end = clause.end()
    return "".join([*parts, where[end:]])


def with_pseudonyms(where: str, pseudonym_of: Mapping[str, Callable[[str], str]]) -> str:
    """Puts pseudonyms in the place of the ids that a clause compares with, so that no id reaches Milvus.

    `patient_id == "P"` becomes `patient_id in ["5f…"]`, and `image_id` the primary key, `key`. A string of 32 hex digits may be a pseudonym
    itself, as results show them, and is looked for as well.

    Args:
        pseudonym_of: Field, of those that hold pseudonyms → how an id becomes one.

    Raises:
        UsageError: A comparison that pseudonyms do not have, such as `like` or `>`.
    """
    parts: list[str] = []
    end = 0
    for token in _tokens(where):
        if token.lastgroup not in ("name", "call") or token[0].strip() not in pseudonym_of:
            continue
        field = token[0].strip()
        compared = _COMPARISON.match(where, token.end())
        if compared is None:
            raise UsageError(
                f"the filter does with {field} what cannot be done",
                expected=f'{field} == "…", != "…", in ["…"], not in ["…"] or is null: Milvus holds a pseudonym of it',
                got=where[token.start() :],
                next_step="name the field first, and compare it with whole ids",
            )
        stored, rest = _STORED_AS.get(field, field), compared[0]
        if compared["one"] or compared["several"] is not None:
            ids = [_unquoted(text[0]) for text in re.finditer(_STRING, compared["one"] or compared["several"])]
            keys = [pseudonym_of[field](text) for text in ids] + [text for text in ids if _PSEUDONYM.fullmatch(text)]
            unequal = compared["sign"] == "!=" or compared["out"]
            rest = f" {'not in' if unequal else 'in'} {json.dumps(keys)}"
        parts += [where[end : token.start()], stored, rest]
        end = compared.end()
    return "".join([*parts, where[end:]])


def _unquoted(literal: str) -> str:
    def unescaped(escape: re.Match[str]) -> str:
        return chr(int(escape[2], 16)) if escape[2] else _ESCAPES.get(escape[1], escape[1])

    text = re.sub(r"\\(u([0-9a-fA-F]{4})|.)", unescaped, literal[1:-1], flags=re.DOTALL)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # \ud800\udc00 is one character


def _tokens(where: str) -> Iterator[re.Match[str]]:
    return _TOKEN.finditer(where)
