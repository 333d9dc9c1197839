"""SQLite files of this user alone: rights 0600, refused where others can read them, safe for threads and beside other processes."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cxr_retrieval.errors import SetupError

_BUSY_S: Final = 60.0
"""How long another process' transaction is waited for."""


@dataclass(frozen=True)
class Layout:
    """What a file holds.

    Attributes:
        name: What messages call it. mend: What else to do about one that cannot be used. exposed: The same of one that others can read.
        number: Above 0; kept in the file, and another one is refused. schema: Statements that make an empty one.
    """

    name: str
    mend: str
    exposed: str
    number: int
    schema: Sequence[str]


class PrivateTable:
    """A file that is made when first written to; while it is not there, an empty one is read."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self._layout = layout
        self._lock = threading.Lock()
        self._base: sqlite3.Connection | None = None

    def close(self) -> None:
        """Closes it; the next use opens it again."""
        with self._lock:
            if self._base is not None:
                self._base.close()
                self._base = None

    @contextmanager
    def reading(self) -> Generator[sqlite3.Connection]:
        """For one thread's turn.

        Raises:
            SetupError: It cannot be used.
        """
        with self._open(create=False) as base:
            yield base

    @contextmanager
    def writing(self, *, create: bool = True) -> Generator[sqlite3.Connection]:
        """For one thread's turn, in a transaction: all of it is on disk when the block ends, or nothing.

        Raises:
            SetupError: It cannot be used.
        """
        with self._open(create=create) as base, _transaction(base):
            yield base

    @contextmanager
    def _open(self, *, create: bool) -> Generator[sqlite3.Connection]:
        with self._lock:
            try:
                if self._base is None and (create or self.path.exists()):
                    self._base = self._opened()
                if self._base is not None:
                    yield self._base
                else:
                    with closing(self._with_schema(sqlite3.connect(":memory:", isolation_level=None))) as empty:
                        yield empty
            except (OSError, sqlite3.Error) as error:
                got = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                raise SetupError(
                    f"{self.path}: {self._layout.name} cannot be used",
                    expected="an undamaged file that may be written, and room on the disk",
                    got=got,
                    next_step=f"repair that, restore it from a backup, or {self._layout.mend}",
                ) from error

    def _opened(self) -> sqlite3.Connection:
        """With SQLite's rollback journal, not WAL: home folders lie on network drives, too, where WAL does not work."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            refuse_open_to_others(self.path, descriptor, self._layout.exposed)
        finally:
            os.close(descriptor)
        return self._with_schema(sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False))

    def _with_schema(self, base: sqlite3.Connection) -> sqlite3.Connection:
        try:
            with _transaction(base):
                (number,) = base.execute("PRAGMA user_version").fetchone()
                for statement in (*self._layout.schema, f"PRAGMA user_version = {self._layout.number}") if number == 0 else ():
                    base.execute(statement)
            if number not in (0, self._layout.number):
                raise sqlite3.DatabaseError(f"it has the layout {number} of another version of this system")
        except BaseException:
            base.close()
            raise
        return base


def refuse_open_to_others(file: Path, descriptor: int, exposed: str) -> None:
    """`exposed`: what to do if somebody may have read it.

    Raises:
        SetupError: Others than its owner can read or write it.
    """
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if mode & 0o077:
        raise SetupError(
            f"{file}: others can read or write it",
            expected="rights 0600",
            got=f"{mode:04o}",
            next_step=f"`chmod 600 {file}`; {exposed}",
        )


@contextmanager
def _transaction(base: sqlite3.Connection) -> Generator[None]:
    base.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        base.execute("ROLLBACK")
        raise
    base.execute("COMMIT")
