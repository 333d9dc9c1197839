"""What was pulled: a folder of instances whose names name nobody, and its journal, by which a run that was killed goes on.

A file gets its name once it is whole and on disk; then the journal says that it is there. Killed between the two, the next run finds the
file under its name and asks for nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from cxr_retrieval.archive.journal import refuse_other_options
from cxr_retrieval.cases.tables import Layout, PrivateTable
from cxr_retrieval.errors import SetupError, UsageError

PENDING: Final = "pending"
THERE: Final = "there"
FAILED: Final = "failed"
_PAGE: Final = 500
_NAME: Final = "pull.journal"
_LAYOUT: Final = Layout(
    name="the journal of a pull",
    mend="give another --out",
    exposed="it says what was asked for",
    number=1,
    schema=(
        "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
        "CREATE TABLE instance (id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, series TEXT NOT NULL, study TEXT NOT NULL, "
        "state TEXT NOT NULL DEFAULT 'pending', bytes INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '')",
        "CREATE INDEX state ON instance (state, id)",
    ),
)


@dataclass(frozen=True)
class Found:
    """An instance that an archive holds, by its UIDs."""

    study: str
    series: str
    instance: str

    @property
    def name(self) -> str:
        """Of its file: a digest of its SOP Instance UID."""
        return f"{hashlib.sha256(self.instance.encode()).hexdigest()[:32]}.dcm"


class Pulled:
    """Open for one process at a time; its threads share it. Use as a context manager.

    Args:
        out: The folder, made with rights 0700; files in it have 0600.
        options: What decides which instances are found: a run goes on only with the same.

    Raises:
        SetupError: Not writable, damaged, or in use.
        UsageError: A folder with something else in it, or of other options.
    """

    def __init__(self, out: Path, options: Mapping[str, Any]) -> None:
        self.out = out
        try:
            out.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._held = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _unusable(out, error) from error
        try:
            self._lock()
            if not (out / _NAME).exists() and any(out.iterdir()):
                raise UsageError(
                    f"{out}: has something in it, and no {_NAME}",
                    expected="a new folder, or one that an earlier pull has begun",
                    next_step="give another --out",
                )
            out.chmod(0o700)
            self._journal = PrivateTable(out / _NAME, _LAYOUT)
            self._begin(json.dumps(options, sort_keys=True, ensure_ascii=False))
            for partial in out.glob(".*.partial"):
                partial.unlink()
        except OSError as error:
            os.close(self._held)
            raise _unusable(out, error) from error
        except BaseException:
            os.close(self._held)
            raise

    def __enter__(self) -> Pulled:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._journal.close()
        os.close(self._held)

    def add(self, found: Iterable[Found], most: int | None = None) -> int:
        """Notes instances that are not yet known, at most so many; returns how many are new."""
        new = 0
        with self._journal.writing() as base:
            for one in found:
                if most is not None and new >= most:
                    break
                values = (one.instance, one.series, one.study)
                new += base.execute("INSERT INTO instance (uid, series, study) VALUES (?, ?, ?) ON CONFLICT DO NOTHING", values).rowcount
        return new

    def pending(self, after: int = 0) -> Iterator[tuple[int, Found]]:
        """Instances still to be fetched, with their numbers, from the one behind number `after`; page by page."""
        while True:
            with self._journal.reading() as base:
                rows = base.execute(
                    "SELECT id, study, series, uid FROM instance WHERE state = ? AND id > ? ORDER BY id LIMIT ?", (PENDING, after, _PAGE)
                ).fetchall()
            if not rows:
                return
            for number, study, series, uid in rows:
                yield number, Found(study, series, uid)
            after = rows[-1][0]

    def partial(self, found: Found) -> Path:
        """Where an instance is written until it is whole: empty, with rights 0600, hidden from whoever searches the folder.

        Raises:
            OSError: No room.
        """
        path = self.out / f".{found.name}.partial"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        return path

    def has(self, found: Found) -> bool:
        """Whether its file was whole before, although the journal does not say so; now it does."""
        with suppress(FileNotFoundError):
            self._mark(found, THERE, (self.out / found.name).stat().st_size)
            return True
        return False

    def keep(self, found: Found, partial: Path) -> int:
        """Gives a whole file its name, for good; its bytes.

        Raises:
            OSError: No room.
        """
        with partial.open("rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        partial.replace(self.out / found.name)
        os.fsync(self._held)
        self._mark(found, THERE, size)
        return size

    def fail(self, found: Found, reason: str) -> None:
        """Notes why an instance could not be had."""
        self._mark(found, FAILED, 0, reason)

    def retry_failed(self) -> int:
        """Makes failed instances pending again; returns how many."""
        with self._journal.writing() as base:
            return base.execute("UPDATE instance SET state = ?, reason = '' WHERE state = ?", (PENDING, FAILED)).rowcount

    def counts(self) -> dict[str, int]:
        """State → how many instances; every state occurs."""
        with self._journal.reading() as base:
            found: dict[str, int] = dict(base.execute("SELECT state, count(*) FROM instance GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in (PENDING, THERE, FAILED)}

    def failures(self, most: int) -> list[tuple[str, str]]:
        """The first ones: SOP Instance UID and reason."""
        with self._journal.reading() as base:
            return base.execute("SELECT uid, reason FROM instance WHERE state = ? ORDER BY id LIMIT ?", (FAILED, most)).fetchall()

    def _mark(self, found: Found, state: str, size: int, reason: str = "") -> None:
        with self._journal.writing() as base:
            base.execute("UPDATE instance SET state = ?, bytes = ?, reason = ? WHERE uid = ?", (state, size, reason, found.instance))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SetupError(f"{self.out}: another process pulls into it", next_step="wait for it, or give another --out") from error

    def _begin(self, options: str) -> None:
        with self._journal.writing() as base:
            base.execute("INSERT INTO about VALUES ('options', ?) ON CONFLICT DO NOTHING", (options,))
            (began,) = base.execute("SELECT value FROM about WHERE name = 'options'").fetchone()
        try:
            refuse_other_options(self.out, began, options)
        except UsageError:
            self._journal.close()
            raise


def _unusable(out: Path, error: OSError) -> SetupError:
    return SetupError(
        f"{out}: cannot be written to",
        expected="a folder of one's own, and room on the disk",
        got=error.strerror or type(error).__name__,
        next_step="repair that, then give the same command again: it goes on where it was",
    )
