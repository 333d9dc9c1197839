"""The filter language: Milvus' boolean expressions over the stored fields, checked before Milvus sees them.

A server with dynamic fields answers a misspelt name with silence, and an unclosed string with a parser's complaint.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
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


def _tokens(where: str) -> Iterator[re.Match[str]]:
    return _TOKEN.finditer(where)
