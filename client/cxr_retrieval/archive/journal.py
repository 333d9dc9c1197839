"""The journal of a batch: what became of each input, in SQLite beside the results, so that a killed run goes on where it was.

The results are a file of JSON lines, and the two agree after a kill at any moment: lines are appended and on disk first, then one
transaction marks their inputs and notes how long the file now is. A file found longer holds lines whose inputs are not marked: it is cut
to that length, and those inputs are asked again. Inputs are known by their place, whatever name leads there, and may be added while others
are answered. Failures wait in the journal and become lines when a run ends, after the others, so that
`--retry-failed` need only cut them off.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from cxr_retrieval.archive.inputs import Input, Unusable
from cxr_retrieval.errors import SetupError, UsageError

_PAGE: Final = 1000
_PAGE_S: Final = 0.5
"""A search that finds less in that time has it added already."""
_LAYOUT: Final = 2
_SCHEMA: Final = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE input (
    id INTEGER PRIMARY KEY,
    place BLOB NOT NULL UNIQUE,
    name TEXT NOT NULL,
    path BLOB,
    member TEXT,
    image_id TEXT,
    patient_id TEXT,
    state TEXT NOT NULL DEFAULT 'pending',
    error TEXT,
    pixels TEXT
);
CREATE INDEX state ON input (state, id);
CREATE INDEX pixels ON input (pixels) WHERE pixels IS NOT NULL;
"""

_COPY: Final = "+"
"""Behind the digest of a picture that another input had before."""
PENDING: Final = "pending"
ANSWERED: Final = "answered"
REFUSED: Final = "refused"
FAILED: Final = "failed"


@dataclass(frozen=True)
class Asked:
    """An input as the journal knows it; `image_id` and `patient_id` as a manifest gives them."""

    id: int
    name: str
    path: Path
    member: str | None
    image_id: str | None
    patient_id: str | None


@dataclass(frozen=True)
class Answer:
    """What became of an input: its result (None if it failed), the digest of its picture, or why it failed; what the audit log calls it."""

    asked: Asked
    state: str
    result: Mapping[str, Any] | None = None
    pixels: str | None = None
    error: str | None = None
    film: str | None = None


class Journal:
    """Open for one process at a time; in it, one thread may add inputs while another takes and answers them. Use as a context manager.

    Args:
        out: The results; the journal lies beside it as `<out>.journal`, both with rights 0600.
        options: What decides an answer (model version, gallery, clause, …): a run goes on only with the same.

    Raises:
        SetupError: Not writable, damaged, or in use.
        UsageError: Results without a journal, or a journal of other options.
    """

    def __init__(self, out: Path, options: Mapping[str, Any]) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".journal")
        self._changing = threading.Lock()
        with _on_disk(self.path):
            out.parent.mkdir(parents=True, exist_ok=True)
            if out.exists() and out.stat().st_size and not self.path.exists():
                raise UsageError(
                    f"{out}: exists, and no journal beside it",
                    expected=f"a new file, or the journal {self.path.name} of the run that wrote it",
                    next_step="give another --out, or remove it",
                )
            self._file = os.fdopen(os.open(out, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
            try:
                self._lock()
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                self._base = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
                self._base.execute("PRAGMA journal_mode = WAL")
                self._base.execute("PRAGMA synchronous = FULL")
                self._open(json.dumps(options, sort_keys=True, ensure_ascii=False))
                self._file.truncate(self._end())
                self._file.seek(0, os.SEEK_END)
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes both files."""
        self._base.close()
        self._file.close()

    def add(self, inputs: Iterable[Input | Unusable]) -> Iterator[int]:
        """Notes inputs that are not yet there, those that cannot be used as failed; yields how many were looked at, page by page.

        Where something unusable lay, and now lies a film, it is to be asked.
        """
        page: list[tuple[Any, ...]] = []
        added = time.monotonic()
        for found in inputs:
            if isinstance(found, Unusable):
                page.append((found.place, found.name, None, None, None, None, FAILED, str(found.error)))
            else:
                row = found.row
                known = (row.image_id, row.patient_id) if row else (None, None)
                page.append((found.place, found.name, os.fsencode(found.path.absolute()), found.member, *known, PENDING, None))
            if len(page) == _PAGE or time.monotonic() > added + _PAGE_S:
                yield self._add(page)
                page, added = [], time.monotonic()
        yield self._add(page)

    def pending(self, after: int = 0) -> Iterator[Asked]:
        """Inputs still to be asked, in the order in which they were found, from the one behind that with id `after`. Read page by page:
        memory stays flat.
        """
        last = after
        while True:
            with _on_disk(self.path), self._changing:
                rows = self._base.execute(
                    "SELECT id, name, path, member, image_id, patient_id FROM input WHERE state = ? AND id > ? ORDER BY id LIMIT ?",
                    (PENDING, last, _PAGE),
                ).fetchall()
            if not rows:
                return
            for number, name, path, member, image_id, patient_id in rows:
                yield Asked(number, name, Path(os.fsdecode(path)), member, image_id, patient_id)
            last = rows[-1][0]

    def record(self, answers: Sequence[Answer]) -> None:
        """Results to disk, then their inputs' states; either all of these are kept or none.

        An input with the picture of an earlier one carries its name in `same_as`.
        """
        with _on_disk(self.out):
            first = self._first_with_pixels(answers)
            lines = b"".join(_line(_as_line(answer, first)) for answer in answers if answer.result is not None)
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
            with self._transaction():
                self._base.executemany(
                    "UPDATE input SET state = ?, error = ?, pixels = ? WHERE id = ?",
                    [(answer.state, answer.error, _marked(answer, first), answer.asked.id) for answer in answers],
                )
                self._note("end", str(self._end() + len(lines)))

    def finish(self) -> None:
        """Appends a line for every failure, and writes the same to `dead_letters`; without a failure there is no such file."""
        with _on_disk(self.out):
            self._file.truncate(self._end())
            self._file.seek(0, os.SEEK_END)
            dead = self.dead_letters.with_name(self.dead_letters.name + ".partial")
            with os.fdopen(os.open(dead, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as letters:
                for name, error in self._base.execute("SELECT name, error FROM input WHERE state = ? ORDER BY id", (FAILED,)):
                    line = _line({"input": name, "status": FAILED, "error": error})
                    letters.write(line)
                    self._file.write(line)
                letters.flush()
                os.fsync(letters.fileno())
            if self.counts()[FAILED]:
                dead.replace(self.dead_letters)
            else:
                dead.unlink()
                self.dead_letters.unlink(missing_ok=True)
            self._file.flush()
            os.fsync(self._file.fileno())

    def retry_failed(self) -> int:
        """Makes the failed films pending again, and forgets what was no film, which the next search will find or not; returns how many."""
        with _on_disk(self.path), self._transaction():
            forgotten = self._base.execute("DELETE FROM input WHERE state = ? AND path IS NULL", (FAILED,)).rowcount
            return forgotten + self._base.execute("UPDATE input SET state = ?, error = NULL WHERE state = ?", (PENDING, FAILED)).rowcount

    def counts(self) -> dict[str, int]:
        """State → how many inputs; every state occurs."""
        with _on_disk(self.path):
            found: dict[str, int] = dict(self._base.execute("SELECT state, count(*) FROM input GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in (PENDING, ANSWERED, REFUSED, FAILED)}

    def copies(self) -> int:
        """How many inputs show the picture of another one."""
        with _on_disk(self.path):
            return int(self._base.execute("SELECT count(*) FROM input WHERE substr(pixels, -1) = ?", (_COPY,)).fetchone()[0])

    @property
    def id(self) -> str:
        """What the audit log calls this journal; a path could name a patient."""
        with _on_disk(self.path):
            return str(self._base.execute("SELECT value FROM about WHERE name = 'id'").fetchone()[0])

    @property
    def dead_letters(self) -> Path:
        """Where failures are written, with reasons."""
        return self.out.with_name(self.out.name + ".failed.jsonl")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SetupError(f"{self.out}: another process writes these results", next_step="wait for it, or give another --out") from error

    def _open(self, options: str) -> None:
        if not self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            with self._transaction():
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._base.execute(statement)
                for name, value in (("layout", str(_LAYOUT)), ("options", options), ("end", "0")):
                    self._note(name, value)
        self._base.execute("INSERT INTO about VALUES ('id', ?) ON CONFLICT (name) DO NOTHING", (uuid.uuid4().hex[:16],))
        about = dict(self._base.execute("SELECT name, value FROM about").fetchall())
        if about.get("layout") != str(_LAYOUT):
            raise UsageError(f"{self.path}: a journal of another version of this system", next_step="give another --out")
        refuse_other_options(self.out, about["options"], options)

    def _add(self, page: Sequence[tuple[Any, ...]]) -> int:
        with _on_disk(self.path), self._transaction():
            films = [(place,) for place, _, path, *_ in page if path is not None]
            self._base.executemany("DELETE FROM input WHERE place = ? AND path IS NULL", films)  # not changed: `pending` may be past it
            self._base.executemany(
                "INSERT INTO input (place, name, path, member, image_id, patient_id, state, error) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (place) DO NOTHING",
                page,
            )
        return len(page)

    def _first_with_pixels(self, answers: Sequence[Answer]) -> dict[str, str]:
        """Digest → the name of the input that was the first to be answered with this picture."""
        first: dict[str, str] = {}
        for answer in answers:
            if answer.pixels is not None and answer.pixels not in first:
                known = self._base.execute("SELECT name FROM input WHERE pixels = ? ORDER BY id LIMIT 1", (answer.pixels,)).fetchone()
                first[answer.pixels] = known[0] if known else answer.asked.name
        return first

    def _end(self) -> int:
        return int(self._base.execute("SELECT value FROM about WHERE name = 'end'").fetchone()[0])

    def _note(self, name: str, value: str) -> None:
        self._base.execute("INSERT INTO about VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value))

    @contextmanager
    def _transaction(self) -> Generator[None]:
        with self._changing:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")


def refuse_other_options(out: Path, began: str, options: str) -> None:
    """Both in JSON, with sorted names.

    Raises:
        UsageError: They differ, so that what is in `out` would not go on as it began.
    """
    if began == options:
        return
    before, now = json.loads(began), json.loads(options)
    differ = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    raise UsageError(
        f"{out}: was begun with other options",
        expected=", ".join(f"{name} {before.get(name)!r}" for name in differ),
        got=", ".join(f"{name} {now.get(name)!r}" for name in differ),
        next_step="go on with the same ones, or give another --out",
    )


def _marked(answer: Answer, first: Mapping[str, str]) -> str | None:
    """The digest by which an input is found; of a copy one by which it is not, for it may have been found before its original was."""
    pixels = answer.pixels
    return pixels if pixels is None or first[pixels] == answer.asked.name else pixels + _COPY


def _as_line(answer: Answer, first: Mapping[str, str]) -> dict[str, Any]:
    line = {"input": answer.asked.name, "status": answer.state, **(answer.result or {})}
    original = first.get(answer.pixels or "", answer.asked.name)
    return line if original == answer.asked.name else {**line, "same_as": original}


def _line(result: Mapping[str, Any]) -> bytes:
    return json.dumps(result, ensure_ascii=False).encode() + b"\n"


@contextmanager
def _on_disk(path: Path) -> Generator[None]:
    """A full or broken disk ends the run with a clear error; what is recorded stays so."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        got = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SetupError(
            f"{path}: cannot be written or read",
            expected="room on the disk and an undamaged file",
            got=got,
            next_step="repair that, then give the same command again: it goes on where it was",
        ) from error
