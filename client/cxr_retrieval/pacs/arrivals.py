"""What was received, and what is owed for it: a spool folder with files, and a table in SQLite that says what becomes of each.

Nothing is confirmed to a sender before it is here to stay: its file is on disk under its name (fsync of file and folder), then a
transaction has its row. Whatever is answered is on disk before the row says so: the results' lines (the table knows how long their file
is, and what stands behind that is cut off), the objects that go to other archives, the instance where it is kept. A kill at any moment
leaves files without a row at most, which the next start removes, and rows that wait, which it answers.

The folder holds patients' films for as long as they wait, so it is readable by its owner alone, as the table is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from cxr_retrieval.archive.audit import sync_folder
from cxr_retrieval.cases.tables import Layout, PrivateTable
from cxr_retrieval.errors import SetupError
from cxr_retrieval.radiograph.header import Header

WAITING: Final = "waiting"
ANSWERED: Final = "answered"
REFUSED: Final = "refused"
FAILED: Final = "failed"
SENT: Final = "sent"
GIVEN_UP: Final = "given up"

_MENDING: Final = "move it aside and start again (what it held is then forgotten)"
_LAYOUT: Final = Layout(
    "the table of received films",
    _MENDING,
    "it names patients",
    1,
    (
        "CREATE TABLE arrival (id INTEGER PRIMARY KEY, instance TEXT NOT NULL UNIQUE, file TEXT NOT NULL UNIQUE, "
        "digest TEXT NOT NULL, caller TEXT NOT NULL, "
        "rule TEXT NOT NULL, received REAL NOT NULL, state TEXT NOT NULL, header TEXT, settled REAL, kept TEXT)",
        "CREATE INDEX arrival_state ON arrival (state, id)",
        "CREATE INDEX arrival_settled ON arrival (settled) WHERE settled IS NOT NULL",
        "CREATE TABLE parcel (id INTEGER PRIMARY KEY, destination TEXT NOT NULL, kind TEXT NOT NULL, file TEXT NOT NULL UNIQUE, "
        "tries INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL, made REAL NOT NULL, state TEXT NOT NULL, reason TEXT)",
        "CREATE INDEX parcel_due ON parcel (state, destination, due)",
        "CREATE TABLE tally (name TEXT PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID",
        "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    ),
)
_PAGE: Final = 256
_IDLE_S: Final = 0.2
"""How long an empty queue is watched before it says so."""
_REMEMBERED_S: Final = 30 * 86_400.0
"""How long an instance is known after it was answered: for so long a second one is no news. Afterwards it is answered again."""
_SWEPT_AT_ONCE: Final = 1000


@dataclass(frozen=True)
class Arrival:
    """An instance that waits for its answer.

    Attributes:
        id: Its number here; the order in which instances came.
        path: Its file. member: Always None; a pipeline's work has one.
        caller: AE title of who sent it. rule: The name of the rule that it is treated by.
    """

    id: int
    path: Path
    caller: str
    rule: str
    received: float
    header: Header
    member: str | None = None


@dataclass(frozen=True)
class Parcel:
    """Something that is to be sent.

    Attributes:
        destination: Its name in the rules. kind: "report", "picture", "instance" or "commitment".
        path: A DICOM file; of a commitment, JSON.
        tries: How often it was tried in vain. made: When it was made, seconds since the epoch.
    """

    id: int
    destination: str
    kind: str
    path: Path
    tries: int
    made: float


@dataclass(frozen=True)
class Outgoing:
    """What is to become a parcel; `data`: the file's bytes."""

    destination: str
    kind: str
    data: bytes


@dataclass(frozen=True)
class Outcome:
    """What became of an arrival: its line among the results, what is to be sent for it, and the instance to be kept (`kept`, its bytes;
    or `keep`, as it was received).
    """

    arrival: Arrival
    state: str
    line: Mapping[str, Any]
    outgoing: Sequence[Outgoing] = ()
    kept: bytes | None = None
    keep: bool = False


@dataclass(frozen=True)
class Standing:
    """How things stand, at one moment.

    Attributes:
        waiting: Instances without an answer; `oldest_s`: how long the oldest of them has been here.
        to_send: Destination → parcels that wait; `given_up`: destination → parcels that were given up, and lie in the spool.
        oldest_parcel_s: How long the oldest of those that wait has been here.
        tally: What has been counted since the spool was made: state → how many, "rejected <reason>", "sent <destination>".
    """

    waiting: int
    oldest_s: float
    to_send: Mapping[str, int]
    given_up: Mapping[str, int]
    oldest_parcel_s: float
    tally: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """What `cxr listen --status --json` prints."""
        return {
            "waiting": self.waiting,
            "oldest_s": round(self.oldest_s, 1),
            "to_send": dict(self.to_send),
            "oldest_parcel_s": round(self.oldest_parcel_s, 1),
            "given_up": dict(self.given_up),
            "counted": dict(self.tally),
        }


class FullError(Exception):
    """Nothing more is taken now: the queue is long enough, or the disk full enough."""


class _Results:
    """A file of JSON lines: appended to, and cut to what the table knows of. One that was moved away, as logrotate does, is begun anew.

    Attributes:
        known: Bytes of it that count.
    """

    def __init__(self, path: Path, end: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open(end)

    def _open(self, end: int) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.known = min(end, os.fstat(self._file).st_size)
        os.ftruncate(self._file, self.known)

    def append(self, lines: bytes) -> int:
        """Puts them on disk; how long the file is then."""
        if self._is_there():
            os.ftruncate(self._file, self.known)  # what a full disk has left of an earlier try
        else:
            self.close()
            self._open(0)
        at = self.known
        while lines:
            count = os.pwrite(self._file, lines, at)
            lines, at = lines[count:], at + count
        os.fsync(self._file)
        return at

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        os.close(self._file)


class Arrivals:
    """Open for one process at a time, and any number of its threads. Use as a context manager.

    Args:
        folder: The spool.
        out: The results, a line of JSON for each instance.
        most_waiting: Instances that may wait for an answer. free_bytes: Of the disk, which are left alone.

    Raises:
        SetupError: Not writable, damaged, or in use.
    """

    def __init__(self, folder: Path, out: Path, *, most_waiting: int = 10_000, free_bytes: int = 2**30) -> None:
        self.folder, self.out = folder, out
        self._most_waiting, self._free_bytes = most_waiting, free_bytes
        self._incoming, self._outgoing, self._kept = folder / "incoming", folder / "outgoing", folder / "kept"
        self._changed = threading.Condition()
        self._admitting = threading.Lock()
        self._rejected: Counter[str] = Counter()
        self._partial = 0
        with _on_disk(folder):
            for made in (folder, self._incoming, self._outgoing, self._kept):
                made.mkdir(mode=0o700, parents=True, exist_ok=True)
                made.chmod(0o700)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._take_lock()
            self._table = PrivateTable(folder / "arrivals.db", _LAYOUT)
            with _on_disk(out), self._table.writing() as base:
                about = dict(base.execute("SELECT name, value FROM about").fetchall())
                ours = about.get("out") == str(out.absolute())
                self._results = _Results(out, int(about["end"]) if ours else out.stat().st_size if out.exists() else 0)
                _note(base, "out", str(out.absolute()))
                _note(base, "end", str(self._results.known))
                self._waiting = int(base.execute("SELECT count(*) FROM arrival WHERE state = ?", (WAITING,)).fetchone()[0])
            self._sweep_files()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the table and the results."""
        self._table.close()
        self._results.close()
        os.close(self._lock)

    # ------------------------------------------------------------------------------------------ receiving

    def refuse_if_full(self, size: int) -> None:
        """Raises FullError where an instance of so many bytes would be one too many."""
        if self._waiting >= self._most_waiting:
            raise FullError("queue")
        if shutil.disk_usage(self.folder).free < self._free_bytes + 2 * size:
            raise FullError("disk")

    @contextmanager
    def partial(self, data: bytes) -> Generator[Path]:
        """A file that holds these bytes, on disk; gone at the end, unless it was admitted.

        Raises:
            FullError: The disk is.
            SetupError: It cannot be written.
        """
        with self._changed:
            self._partial += 1
            path = self._incoming / f".partial-{self._partial}"
        try:
            _write(path, data)
            yield path
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FullError("disk") from error
            raise SetupError(f"{self.folder}: cannot be written", got=error.strerror or str(error), next_step="repair that") from error
        finally:
            path.unlink(missing_ok=True)

    def known(self, instance: str) -> str | None:
        """The digest of the data set that came under this SOP Instance UID; None if none did."""
        with self._table.reading() as base:
            row = base.execute("SELECT digest FROM arrival WHERE instance = ?", (instance,)).fetchone()
        return None if row is None else str(row[0])

    def admit(self, partial: Path, digest: str, caller: str, rule: str, header: Header) -> bool:
        """Takes this file up; on disk when it returns. False: an instance of this UID is here already, and this one is not needed."""
        path = self._incoming / f"{hashlib.sha256(header.instance.encode()).hexdigest()[:32]}.dcm"  # a UID leads to the patient's study
        said = json.dumps(dict(header.elements), ensure_ascii=False)
        with self._admitting:
            if self.known(header.instance) is not None:
                return False
            partial.rename(path)
            sync_folder(self._incoming)
            with self._table.writing() as base:
                base.execute(
                    "INSERT INTO arrival (instance, file, digest, caller, rule, received, state, header) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (header.instance, path.name, digest, caller, rule, time.time(), WAITING, said),
                )
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
        return True

    def rejected(self, reason: str) -> None:
        """Counts; a sender that is refused costs no write to the disk."""
        with self._changed:
            self._rejected[reason] += 1

    def held(self, instances: Sequence[str]) -> set[str]:
        """Those of these SOP Instance UIDs whose instances are kept as they were received."""
        found: set[str] = set()
        with self._table.reading() as base:
            for start in range(0, len(instances), _PAGE):
                some = instances[start : start + _PAGE]
                marks = ", ".join("?" * len(some))
                rows = base.execute(f"SELECT instance FROM arrival WHERE kept = 'received' AND instance IN ({marks})", some)  # noqa: S608
                found.update(row[0] for row in rows)
        return found

    # ------------------------------------------------------------------------------------------ answering

    def feed(self, stop: threading.Event) -> Iterator[Arrival | None]:
        """What waits, in the order in which it came, and then what comes, until `stop` is set; None whenever there is nothing for now."""
        last = 0
        while not stop.is_set():
            page = self._page(last)
            if page:
                yield from page
                last = page[-1].id
                continue
            yield None
            with self._changed:
                self._changed.wait(_IDLE_S)

    def _page(self, after: int) -> list[Arrival]:
        with self._table.reading() as base:
            rows = base.execute(
                "SELECT id, file, caller, rule, received, header FROM arrival WHERE state = ? AND id > ? ORDER BY id LIMIT ?",
                (WAITING, after, _PAGE),
            ).fetchall()
        return [
            Arrival(number, self._incoming / file, caller, rule, received, Header(json.loads(header)))
            for number, file, caller, rule, received, header in rows
        ]

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """Results, parcels and kept instances to disk, then the states; either all of it counts or nothing. Files that are done with go.

        Raises:
            SetupError: The disk is full or broken; everything waits on.
        """
        now = time.time()
        written: list[Path] = []
        parcels: list[tuple[str, str, str, float, float, str]] = []
        with _on_disk(self.folder), _undone(written):
            for outcome in outcomes:
                for number, outgoing in enumerate(outcome.outgoing):
                    name = f"{outcome.arrival.id}-{number}-{outgoing.kind}.dcm"
                    written.append(self._outgoing / name)
                    _write(written[-1], outgoing.data)
                    parcels.append((outgoing.destination, outgoing.kind, name, now, now, WAITING))
                copy = self._kept / outcome.arrival.path.name
                if outcome.kept is not None:
                    written.append(copy)
                    _write(copy, outcome.kept)
                elif outcome.keep:
                    copy.unlink(missing_ok=True)
                    copy.hardlink_to(outcome.arrival.path)
            for changed in (self._outgoing, self._kept):
                sync_folder(changed)
            end = self._results.append(b"".join(json.dumps(one.line, ensure_ascii=False).encode() + b"\n" for one in outcomes))
            with self._table.writing() as base:
                base.executemany(
                    "UPDATE arrival SET state = ?, header = NULL, settled = ?, kept = ? WHERE id = ?",
                    [(one.state, now, _how_kept(one), one.arrival.id) for one in outcomes],
                )
                base.executemany("INSERT INTO parcel (destination, kind, file, due, made, state) VALUES (?, ?, ?, ?, ?, ?)", parcels)
                _count(base, Counter(one.state for one in outcomes))
                _note(base, "end", str(end))
            self._results.known = end
        with _on_disk(self.folder):
            for outcome in outcomes:
                outcome.arrival.path.unlink(missing_ok=True)
        with self._changed:
            self._waiting -= len(outcomes)
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------ sending

    def post(self, outgoing: Outgoing) -> None:
        """A parcel that belongs to no arrival; on disk when it returns."""
        name = f"{uuid.uuid4().hex}-{outgoing.kind}"
        now = time.time()
        with _on_disk(self.folder):
            _write(self._outgoing / name, outgoing.data)
            sync_folder(self._outgoing)
        with self._table.writing() as base:
            base.execute(
                "INSERT INTO parcel (destination, kind, file, due, made, state) VALUES (?, ?, ?, ?, ?, ?)",
                (outgoing.destination, outgoing.kind, name, now, now, WAITING),
            )
        with self._changed:
            self._changed.notify_all()

    def due(self, destination: str, most: int) -> list[Parcel]:
        """Parcels for a destination that may be tried now, the oldest first."""
        with self._table.reading() as base:
            rows = base.execute(
                "SELECT id, destination, kind, file, tries, made FROM parcel WHERE state = ? AND destination = ? AND due <= ? "
                "ORDER BY id LIMIT ?",
                (WAITING, destination, time.time(), most),
            ).fetchall()
        return [Parcel(number, to, kind, self._outgoing / file, tries, made) for number, to, kind, file, tries, made in rows]

    def wait(self, seconds: float) -> None:
        """Until something changes here, but no longer than that."""
        with self._changed:
            self._changed.wait(seconds)

    def sent(self, parcel: Parcel) -> None:
        """It has arrived."""
        with self._table.writing() as base:
            base.execute("DELETE FROM parcel WHERE id = ?", (parcel.id,))
            _count(base, {f"{SENT} {parcel.destination}": 1})
        with _on_disk(self.folder):
            parcel.path.unlink(missing_ok=True)

    def postpone(self, parcel: Parcel, until: float, reason: str) -> None:
        """It is tried again at this time, seconds since the epoch."""
        with self._table.writing() as base:
            base.execute("UPDATE parcel SET tries = tries + 1, due = ?, reason = ? WHERE id = ?", (until, reason, parcel.id))

    def give_up(self, parcel: Parcel, reason: str) -> None:
        """It stays in the spool, for somebody to look at; `retry` takes it up again."""
        with self._table.writing() as base:
            base.execute("UPDATE parcel SET state = ?, reason = ? WHERE id = ?", (GIVEN_UP, reason, parcel.id))
            _count(base, {f"{GIVEN_UP} {parcel.destination}": 1})

    def retry(self) -> int:
        """Everything given up is to be sent again; how many."""
        with self._table.writing() as base:
            again = (WAITING, time.time(), GIVEN_UP)
            return base.execute("UPDATE parcel SET state = ?, tries = 0, due = ?, made = due WHERE state = ?", again).rowcount

    # ------------------------------------------------------------------------------------------ upkeep

    def standing(self) -> Standing:
        """As it is now."""
        with self._changed:
            rejected = {f"rejected {reason}": count for reason, count in self._rejected.items()}
        with self._table.reading() as base:
            found = _standing(base)
        return replace(found, tally=dict(Counter(found.tally) + Counter(rejected)))

    def sweep(self) -> None:
        """Writes down what was rejected, and forgets instances that were answered long ago. To be called now and then."""
        with self._changed:
            rejected, self._rejected = self._rejected, Counter()
        with self._table.writing() as base:
            _count(base, {f"rejected {reason}": count for reason, count in rejected.items()})
            base.execute(
                "DELETE FROM arrival WHERE id IN (SELECT id FROM arrival WHERE settled < ? AND kept IS NULL LIMIT ?)",
                (time.time() - _REMEMBERED_S, _SWEPT_AT_ONCE),
            )

    def _sweep_files(self) -> None:
        """Removes what a kill has left: files of no row."""
        with _on_disk(self.folder), self._table.reading() as base:
            for path in self._incoming.iterdir():
                if base.execute("SELECT 1 FROM arrival WHERE file = ? AND state = ?", (path.name, WAITING)).fetchone() is None:
                    path.unlink()
            for path in self._outgoing.iterdir():
                if base.execute("SELECT 1 FROM parcel WHERE file = ?", (path.name,)).fetchone() is None:
                    path.unlink()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SetupError(
                f"{self.folder}: another node has this spool",
                expected="a spool of one's own",
                next_step="stop the other one, or give another --spool",
            ) from error


def standing_of(folder: Path) -> Standing:
    """How things stand in a spool that another process may have open; what it has rejected lately is not yet counted.

    Raises:
        SetupError: There is none.
    """
    path = folder / "arrivals.db"
    if not path.exists():
        raise SetupError(
            f"{folder}: no spool of a node",
            expected="the folder that `cxr listen` was given",
            got="nothing there",
            next_step="give --spool",
        )
    table = PrivateTable(path, _LAYOUT)
    try:
        with table.reading() as base:
            return _standing(base)
    finally:
        table.close()


def _standing(base: sqlite3.Connection) -> Standing:
    now = time.time()
    waiting, oldest = base.execute("SELECT count(*), min(received) FROM arrival WHERE state = ?", (WAITING,)).fetchone()
    parcels: dict[str, dict[str, int]] = {WAITING: {}, GIVEN_UP: {}}
    for state, destination, count in base.execute("SELECT state, destination, count(*) FROM parcel GROUP BY state, destination"):
        parcels[state][destination] = count
    (made,) = base.execute("SELECT min(made) FROM parcel WHERE state = ?", (WAITING,)).fetchone()
    tally = dict(base.execute("SELECT name, number FROM tally ORDER BY name").fetchall())
    ages = [0.0 if since is None else max(0.0, now - since) for since in (oldest, made)]
    return Standing(waiting, ages[0], parcels[WAITING], parcels[GIVEN_UP], ages[1], tally)


def _how_kept(outcome: Outcome) -> str | None:
    return "deidentified" if outcome.kept is not None else "received" if outcome.keep else None


def _count(base: sqlite3.Connection, counts: Mapping[str, int]) -> None:
    base.executemany(
        "INSERT INTO tally VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET number = number + excluded.number", list(counts.items())
    )


def _note(base: sqlite3.Connection, name: str, value: str) -> None:
    base.execute("INSERT INTO about VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value))


def _write(path: Path, data: bytes) -> None:
    """All of it on disk, readable by its owner alone; its folder is for the caller to sync."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _undone(written: Sequence[Path]) -> Generator[None]:
    """Takes these files away again where the block fails: on a full disk they would be in the way of the next try."""
    try:
        yield
    except BaseException:
        for path in written:
            with suppress(OSError):
                path.unlink()
        raise


@contextmanager
def _on_disk(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise SetupError(
            f"{path}: cannot be written or read",
            expected="room on the disk, and rights to it",
            got=error.strerror or str(error),
            next_step="repair that: nothing that was confirmed is lost",
        ) from error
