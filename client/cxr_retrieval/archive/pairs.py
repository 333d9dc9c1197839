"""Training pairs out of the audit log: which cases readers found relevant to which films, and which not."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Final

from cxr_retrieval.errors import SetupError

MARK: Final = "mark"
"""The action under which marks stand in the log; what they said is `RELEVANT`, `NOT_RELEVANT` or `TAKEN_BACK`."""
RELEVANT: Final = "relevant"
NOT_RELEVANT: Final = "not relevant"
TAKEN_BACK: Final = "taken back"
_ANCHOR: Final = re.compile(r"[0-9a-f]{32}|film-[0-9a-f]{16}")
_CASE: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Pair:
    """`anchor`: the film that was asked about, by its key if it is a stored case. `relevant`: 1 or 0. `time`: of the mark, UTC."""

    anchor: str
    case: str
    relevant: int
    model_version: str
    time: str


def pairs(entries: Iterable[Mapping[str, Any]]) -> list[Pair]:
    """Of the log's entries (`audit.entries`), in the order of the marks; a later mark of the same pair replaces the earlier, and one that
    was taken back is none.
    """
    found: dict[tuple[str, str], Pair] = {}
    for entry in entries:
        anchor, cases = entry.get("asked") or entry.get("film"), entry.get("cases")
        if entry.get("action") != MARK or not isinstance(cases, dict) or not isinstance(anchor, str) or not _ANCHOR.fullmatch(anchor):
            continue
        for said, relevant in ((RELEVANT, 1), (NOT_RELEVANT, 0), (TAKEN_BACK, None)):
            keys = cases.get(said)
            for key in keys if isinstance(keys, list) else ():
                if isinstance(key, str) and _CASE.fullmatch(key):
                    found.pop((anchor, key), None)
                    if relevant is not None:
                        told = str(entry.get("model_version", "")), str(entry.get("time", ""))
                        found[anchor, key] = Pair(anchor, key, relevant, *told)
    return list(found.values())


def write_pairs(found: Iterable[Pair], out: Path) -> None:
    """As CSV, whole or not at all, with rights 0600.

    Raises:
        SetupError: It cannot be written.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        with os.fdopen(
            os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w", encoding="utf-8", newline=""
        ) as file:
            written = csv.writer(file)
            written.writerow(field.name for field in fields(Pair))
            written.writerows(astuple(pair) for pair in found)
        partial.replace(out)
    except OSError as error:
        raise SetupError(f"{out}: cannot be written", got=error.strerror or str(error), next_step="give another --out") from error
