"""Rows to choose from: what has been asked since the page's server was started, and the lines of batches' results."""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.errors import UsageError

SORTS: Final = ("order", "label", "confidence", "warnings", "status")
"""What rows can be sorted by; `order` is that of asking, or of the file."""
MOST_ROWS: Final = 200
"""Of a page."""


@dataclass(frozen=True)
class Page:
    """Rows from `offset` on, each with its number. `whole`: nothing more of the list is known to be still unread."""

    rows: list[tuple[int, dict[str, Any]]]
    total: int
    whole: bool


@dataclass
class _Columns:
    """What rows are sorted by, a value each; a label and a status as the place of their name in `names`."""

    labels: array[int] = field(default_factory=lambda: array("h"))
    statuses: array[int] = field(default_factory=lambda: array("h"))
    confidences: array[float] = field(default_factory=lambda: array("f"))
    warnings: array[int] = field(default_factory=lambda: array("h"))
    names: dict[str, int] = field(default_factory=dict[str, int])

    def add(self, line: Mapping[str, Any]) -> None:
        prediction = line.get("prediction") or {}
        self.labels.append(self._place(prediction.get("label") or ""))
        self.statuses.append(self._place(line.get("status") or ""))
        self.confidences.append(prediction.get("confidence") or 0.0)
        self.warnings.append(min(len(line.get("warnings") or ()), 999))

    def order(self, by: str, count: int, *, descending: bool) -> NDArray[np.intp]:
        """Numbers of the first `count` rows; what is equal stays in its order, and rows without a label come last.

        Another thread may add rows meanwhile: of an array no more is asked than its bytes, in one step.
        """
        if by == "order":
            numbers = np.arange(count)
            return numbers[::-1] if descending else numbers
        if by in ("label", "status"):
            places = self.names.copy()
            rank = np.zeros(len(places), np.int64)
            for number, name in enumerate(sorted(places)):
                rank[places[name]] = number if name else (-1 if descending else len(places))
            keys = rank[np.frombuffer((self.labels if by == "label" else self.statuses).tobytes(), np.int16, count)]
        elif by == "confidence":
            keys = np.frombuffer(self.confidences.tobytes(), np.float32, count)
        else:
            keys = np.frombuffer(self.warnings.tobytes(), np.int16, count)
        return np.argsort(-keys if descending else keys, kind="stable")

    def _place(self, name: str) -> int:
        return self.names.setdefault(name, len(self.names))


class Results:
    """The lines of a batch's results, of which only what they are sorted by is kept. A file that a batch still writes is read on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets = array("q", [0])
        self._columns = _Columns()
        self._reading = threading.Lock()
        self._orders: dict[tuple[str, bool], NDArray[np.intp]] = {}

    def read_on(self) -> bool:
        """Looks at lines that are new; False where another thread is at it.

        Raises:
            UsageError: The file cannot be read, or is none of a batch's results.
        """
        if not self._reading.acquire(blocking=False):
            return False
        try:
            with self.path.open("rb") as file:
                file.seek(self._offsets[-1])
                for line in file:
                    if not line.endswith(b"\n"):  # being written
                        break
                    self._columns.add(_parsed(line, self.path))
                    self._offsets.append(self._offsets[-1] + len(line))
        except OSError as error:
            raise UsageError(
                f"{self.path.name}: cannot be read", got=error.strerror or str(error), next_step="give another --results"
            ) from error
        finally:
            self._reading.release()
        return True

    def line(self, number: int) -> dict[str, Any]:
        """One line whole.

        Raises:
            UsageError: There is none of this number.
        """
        if not 0 <= number < len(self._offsets) - 1:
            raise UsageError(f"{self.path.name} has no such line", expected=f"0 to {len(self._offsets) - 2}", got=str(number))
        with self.path.open("rb") as file:
            file.seek(self._offsets[number])
            return _parsed(file.readline(), self.path)

    def page(self, by: str, *, descending: bool, offset: int, limit: int) -> Page:
        """Some lines in this order; of a file that is being read, of those that have been."""
        whole = self.read_on()
        total = len(self._offsets) - 1
        kept = self._orders.get((by, descending))
        if kept is None or len(kept) != total:
            kept = self._columns.order(by, total, descending=descending)
            self._orders[by, descending] = kept
        numbers = [int(number) for number in kept[offset : offset + limit]]
        return Page([(number, self.line(number)) for number in numbers], total, whole)


def sorted_page(lines: Sequence[Mapping[str, Any]], by: str, *, descending: bool, offset: int, limit: int) -> Page:
    """The same of lines in memory."""
    columns = _Columns()
    for line in lines:
        columns.add(line)
    numbers = [int(number) for number in columns.order(by, len(lines), descending=descending)[offset : offset + limit]]
    return Page([(number, dict(lines[number])) for number in numbers], len(lines), whole=True)


def _parsed(line: bytes, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict) or "status" not in parsed:
        raise UsageError(
            f"{path.name}: no results of a batch",
            expected="lines of JSON with a status, as `cxr batch --out` writes them",
            got=repr(line[:60].decode(errors="replace")),
            next_step="correct --results",
        )
    return parsed
