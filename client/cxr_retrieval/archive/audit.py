"""The audit log: who did what, when, to which cases, with which weights, and how it ended. Lines of JSON, appended and never rewritten.

A line begins with its number and the digest of the line before it, and ends with its own, the SHA-256 of all that stands before:

    {"seq": 8, "prev": "<digest of line 7>", "time": …, "user": …, "op": …, "action": "query", …, "digest": "<SHA-256>"}

So a line that is edited, taken out, put in, repeated or moved does not fit its neighbours. There is no secret in it: the chain does not
show that lines were cut off the end, nor that somebody wrote the whole file anew. Both come out by a head (the last digest) that was
written down elsewhere, where who writes the log cannot reach it.

What a kill or a full disk leaves half-written stays where it is, since nothing is ever taken from the file (`chattr +a` suits it). The
next line to be appended owns up to it (`torn`: how many bytes, and their SHA-256), and goes on from the last whole line.

Cases stand in it by their keys, films by pseudonyms, accounts by name; no patient, no image_id, no path of a film.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pwd
import re
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from cxr_retrieval.errors import SetupError, UsageError

GENESIS: Final = "0" * 64
"""What the first line has for the digest of the line before it."""
_END: Final = re.compile(rb', "digest": "([0-9a-f]{64})"\}$')
_BEGIN: Final = re.compile(rb'\{"seq": (\d{1,15}), "prev": "([0-9a-f]{64})", ')
_HALF: Final = re.compile(rb'(?:(?!, "digest": ).)*(?:, "digest": (?:"[0-9a-f]{0,64}"?)?)?')
"""A line as far as it had been written."""
_TAIL: Final = 1 << 16
"""Bytes in which the last whole line is looked for first; a line of 64 cases has about 3,000."""

Noted = Callable[[Mapping[str, str]], None]
"""Takes pseudonym → what becomes of it; on disk when it returns."""


@dataclass(frozen=True)
class _Link:
    """What chains a line: its number, the digest of the line before, its own."""

    seq: int
    prev: str
    digest: str


_START: Final = _Link(0, "", GENESIS)


class AuditLog:
    """Open for appending; several processes may have it so. Use as a context manager.

    Raises:
        SetupError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._on_disk():
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if is_new:
                sync_folder(path.parent)

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)

    def append(self, *events: Mapping[str, Any]) -> None:
        """A line for each event, on disk when this returns. The time it takes does not depend on how long the file is.

        Raises:
            SetupError: It cannot be written; nothing that it would say may then be done.
        """
        about = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "user": _user()}
        with self._on_disk():
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                link, torn, begun = self._last()
                healed = [{"action": "log healed", "torn": _torn(torn)}] if torn else []
                text = b"\n" if begun else b""
                for event in (*healed, *events):
                    line, link = _forge(link, {**about, **event})
                    text += line + b"\n"
                while text:
                    text = text[os.write(self._file, text) :]
                os.fsync(self._file)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _last(self) -> tuple[_Link, list[bytes], bool]:
        """The last whole line, what was half-written after it, and whether the file ends within a line."""
        size, window = os.fstat(self._file).st_size, _TAIL
        while True:
            start = max(0, size - window)
            data = os.pread(self._file, size - start, start)
            pieces = data.split(b"\n")
            first = 1 if start else 0  # a piece that begins before the window is not whole
            for index in range(len(pieces) - 1, first - 1, -1):
                if link := _link(pieces[index]):
                    return link, _lines(pieces[index + 1 :]), not data.endswith(b"\n")
            if not start:
                return _START, _lines(pieces), bool(data) and not data.endswith(b"\n")
            window *= 4

    @contextmanager
    def _on_disk(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise SetupError(
                f"{self.path}: the audit log cannot be written",
                expected="a file to append to, and room on its disk",
                got=error.strerror or str(error),
                next_step="repair that, or give --audit; nothing is done without the log",
            ) from error


@dataclass(frozen=True)
class Operation:
    """One command, of which the log has said that it begins. `outcome` is filled in by it, for the line that says how it ended."""

    log: AuditLog
    about: Mapping[str, Any]
    outcome: dict[str, Any] = field(default_factory=dict)

    def note(self, cases: Mapping[str, str]) -> None:
        """Pseudonym → what becomes of it: one line for all of these, on disk when it returns."""
        grouped: dict[str, list[str]] = {}
        for pseudonym, what in cases.items():
            grouped.setdefault(what, []).append(pseudonym)
        if grouped:
            self.log.append({**self.about, "cases": grouped})


@contextmanager
def audited(log: Path, action: str, about: Mapping[str, Any]) -> Generator[Operation]:
    """Writes one line before the body runs and one after it.

    The second line is missing if the process was killed in between, and says "failed", and by which kind of error, if the body raised.

    Args:
        log: Made with rights 0600 if it is not there.
        action: The command, such as "gallery remove".
        about: What all its lines repeat: the model version above all.

    Raises:
        SetupError: The log cannot be written; the body has then not run.
    """
    with AuditLog(log) as opened:
        operation = Operation(opened, {"op": uuid.uuid4().hex[:16], "action": action, **about})
        opened.append({**operation.about, "state": "begun"})
        try:
            yield operation
        except BaseException as error:
            with suppress(SetupError):  # what went wrong first is what the user must hear of
                opened.append({**operation.about, "state": "failed", "error": type(error).__name__, **operation.outcome})
            raise
        opened.append({**operation.about, "state": "done", **operation.outcome})


def film_pseudonym(film: Path) -> str | None:
    """What a film will be called (`Film.film_id`), before it is decoded: the log must have it first. None if it cannot be read."""
    with suppress(OSError):
        if film.is_file():
            with film.open("rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
            return f"film-{digest.hexdigest()[:16]}"
    return None


@dataclass(frozen=True)
class Verified:
    """What a check of the log found.

    Attributes:
        lines: Whole ones that follow each other from the beginning.
        head: Digest of the last of them.
        torn: Half-written lines that a later line owns up to.
        unfinished: It ends with a half-written line; the next one to be appended will own up to it.
        flaw: The first line that does not fit, and why; None where all do.
    """

    lines: int
    head: str
    torn: int
    unfinished: bool
    flaw: str | None


def verify(log: Path, head: str | None = None) -> Verified:
    """Checks every line against its neighbours.

    Args:
        head: A digest that was kept elsewhere; the log must still hold it, or lines were cut off or written anew.

    Raises:
        UsageError: The file cannot be read.
    """
    try:
        with log.open("rb") as file:
            return _verify(file, head)
    except OSError as error:
        raise UsageError(f"{log}: cannot be read", got=error.strerror or str(error), next_step="check the path") from error


def entries(log: Path) -> Iterator[dict[str, Any]]:
    """Every whole line, parsed, whether or not it fits its neighbours.

    Raises:
        UsageError: The file cannot be read.
    """
    try:
        with log.open("rb") as file:
            for line in file:
                if _link(line.rstrip(b"\n")):
                    with suppress(ValueError):
                        yield json.loads(line)
    except OSError as error:
        raise UsageError(f"{log}: cannot be read", got=error.strerror or str(error), next_step="check the path") from error


def _verify(file: Iterator[bytes], head: str | None) -> Verified:
    last, torn, pending = _START, 0, list[bytes]()
    found, ended, number = head in (None, GENESIS), True, 0

    def result(flaw: str | None, *, unfinished: bool = False) -> Verified:
        return Verified(last.seq, last.digest, torn, unfinished, flaw)

    for number, raw in enumerate(file, start=1):
        line, ended = raw.removesuffix(b"\n"), raw.endswith(b"\n")
        link = _link(line)
        if link is None:
            pending.append(line)
            continue
        if flaw := _flaw(line, link, last, pending):
            return result(f"line {number - len(pending) if flaw is _NOT_OWNED else number}: {flaw}")
        torn, pending, last = torn + len(pending), [], link
        found = found or link.digest == head
    if pending and (ended or len(pending) > 1 or not _is_half(pending[0], last)):
        return result(f"line {number - len(pending) + 1}: {_NOT_OWNED}")
    if not found:
        return result(f"line {number}: ends without the head {head}: lines were cut off, or the log was written anew")
    return result(None, unfinished=bool(pending))


_NOT_OWNED: Final = "is no line of this log: edited, put in, or half-written without the next line saying so"


def _flaw(line: bytes, link: _Link, last: _Link, pending: Sequence[bytes]) -> str | None:
    if hashlib.sha256(line[: -len(_ending(link.digest))]).hexdigest() != link.digest:
        return "was edited: its digest is not that of its content"
    if link.prev != last.digest:
        if link.seq <= last.seq:
            return f"says to be the {link.seq}th, which stands above: repeated, or moved here"
        if link.seq > last.seq + 1:
            return f"says to be the {link.seq}th and follows the {last.seq}th: what stood between was taken out or moved"
        return "does not follow the line above: one of the two was put in, or replaced"
    if link.seq != last.seq + 1:
        return f"says to be the {link.seq}th and follows the {last.seq}th: numbered anew"
    owned = json.loads(line).get("torn")
    if owned != (_torn(pending) if pending else None):
        return _NOT_OWNED if pending else "owns up to a half-written line that is gone"
    return None


def _forge(last: _Link, event: Mapping[str, Any]) -> tuple[bytes, _Link]:
    seq = last.seq + 1
    body = json.dumps({"seq": seq, "prev": last.digest, **event}).encode()[:-1]
    digest = hashlib.sha256(body).hexdigest()
    return body + _ending(digest), _Link(seq, last.digest, digest)


def _ending(digest: str) -> bytes:
    return f', "digest": "{digest}"}}'.encode()


def _link(line: bytes) -> _Link | None:
    """By its form alone; None of what is no whole line."""
    begin, end = _BEGIN.match(line), _END.search(line)
    return _Link(int(begin[1]), begin[2].decode(), end[1].decode()) if begin and end else None


def _is_half(piece: bytes, last: _Link) -> bool:
    """Whether a kill can have left it: the beginning of the line that would have come next."""
    begin = f'{{"seq": {last.seq + 1}, "prev": "{last.digest}", '.encode()
    return (piece.startswith(begin) or begin.startswith(piece)) and _HALF.fullmatch(piece) is not None


def _lines(pieces: Sequence[bytes]) -> list[bytes]:
    """Of a text split at its line ends: the lines, without the emptiness after the last end."""
    return list(pieces[:-1] if pieces and not pieces[-1] else pieces)


def _torn(lines: Sequence[bytes]) -> dict[str, Any]:
    text = b"\n".join(lines)
    return {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}


def _user() -> str:
    """The account this process runs as, by the kernel; and who logged in, where that is somebody else."""
    login = -1
    with suppress(OSError, ValueError):
        login = int(Path("/proc/self/loginuid").read_text())
    named = [_account(uid) for uid in dict.fromkeys((os.getuid(), login)) if 0 <= uid < 2**32 - 1]
    return " for ".join(named)


def _account(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def sync_folder(folder: Path) -> None:
    """A new file is there after a power cut only once its folder is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
