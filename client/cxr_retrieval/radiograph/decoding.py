"""Files are decoded in worker processes, so that a file that crashes, hangs or bloats a native decoder costs only itself.

Each worker is a Python of its own, started by `subprocess` and spoken to over its own pair of sockets by one thread of this
process. `multiprocessing` and the pools on top of it do not serve here: fork is not safe beside gRPC's threads, spawn and forkserver
run the user's script again, workers that share one pipe and its locks can take it with them when they die, and a worker that
dies idle breaks the pool (Pebble 5.2, `concurrent.futures`). A worker is no sandbox: it keeps the rights of this process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Final, Literal

from cxr_retrieval.cores import cores
from cxr_retrieval.errors import CxrError, ImageError, SetupError
from cxr_retrieval.radiograph.files import Contents, base_name
from cxr_retrieval.radiograph.grey import Grey8
from cxr_retrieval.radiograph.greys import Greys
from cxr_retrieval.radiograph.header import Header
from cxr_retrieval.radiograph.letterbox import Letterbox
from cxr_retrieval.radiograph.retained import Deidentification

_START_S: Final = 120.0
"""Seconds that a worker may take to import its libraries; a fraction of one on an idle machine."""
_WORKER: Final = "cxr_retrieval.radiograph.worker"
"""Module whose `work` is the life of a worker; not imported here, for it loads every decoder."""
_END_S: Final = 2.0
"""Seconds that a process may take to be gone once it is dead."""
NO_MEMORY: Final = ("bad_alloc", "Unable to allocate", "annot allocate memory")
"""What C++, NumPy and C say when memory runs out."""
_ONE_THREAD: Final = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class DecodingLimits:
    """How many workers decode at a time, and what one file may cost.

    Attributes:
        workers: At most so many processes; 0 means one per core that this process may use.
        timeout_s: Seconds for one file, from the moment a worker takes it up.
        memory_bytes: Address space of one worker (RLIMIT_AS), about 150 MiB of which its libraries take. A DICOM of
            `grey.MAX_PIXELS` of 16 bits decodes under the default.
    """

    workers: int = 0
    timeout_s: float = 30.0
    memory_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.workers < 0 or not 0 < self.timeout_s <= 86_400 or self.memory_bytes < 2**28:
            raise SetupError(
                "the limits of decoding are out of range",
                expected="0 workers (one per core) or more, a timeout above 0 s and up to a day, and at least 256 MiB of memory",
                got=f"{self.workers} workers, {self.timeout_s:g} s, {size_of(self.memory_bytes)}",
                next_step="correct the limits",
            )


@dataclass(frozen=True)
class Film:
    """One decoded file; nothing else of the file leaves its worker.

    Attributes:
        square: `[256, 256]` uint8, letterboxed, bone bright.
        box: Where the radiograph lies in the square.
        format: "DICOM", "PNG", "JPEG" or "TIFF".
        warnings: What a careful reader should know; empty for an ordinary file.
        patient_id: DICOM's Patient ID, if the file has one.
        pixels: SHA-256 (hex) of the square's bytes: equal for the same picture under another name or format.
        file: SHA-256 (hex) of the file's bytes.
        seconds: That its worker took.
    """

    square: Grey8
    box: Letterbox
    format: str
    warnings: tuple[str, ...]
    patient_id: str | None
    pixels: str
    file: str
    seconds: float

    @property
    def film_id(self) -> str:
        """What a film is called that comes without a manifest: the same for the same file, whatever name and folder it has."""
        return f"film-{self.file[:16]}"


@dataclass(frozen=True)
class Identity:
    """What tells a file from others, known before it is decoded.

    Attributes:
        file: SHA-256 (hex) of its bytes.
        patient_id: DICOM's Patient ID, if it has one.
        study_date: DICOM's Study Date, as it is written there.
    """

    file: str
    patient_id: str | None
    study_date: str | None


class FilmReader:
    """Decodes files in worker processes; thread-safe. One per process is enough.

    The first worker starts at once and without waiting, the others when more files are asked for than workers run.
    """

    def __init__(self, limits: DecodingLimits = DecodingLimits()) -> None:
        self.limits = limits
        self._most = limits.workers or cores()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._seats: list[tuple[_Seat, threading.Thread]] = []
        self._unfinished = 0
        self._closed = False
        self._add_seat()

    def read(self, path: Path) -> Film:
        """Decodes one file and waits for it.

        Raises:
            ImageError: The file cannot be used as a radiograph, or its decoder crashed, hung or needed too much memory.
            SetupError: Workers cannot be started, or the reader was closed meanwhile.
        """
        return self.submit(path).result()

    def submit(self, path: Path, member: str | None = None, called: str | None = None) -> Future[Film]:
        """Queues one file, or a member of a ZIP; messages name it as it is `called`, by default as its file is.

        The future raises what `read` raises; `cancel` works until a worker takes the file up.
        """
        return self._ask(Question("film", path.absolute(), member, called=called))

    def greys(self, path: Path, member: str | None = None, called: str | None = None) -> Future[Greys]:
        """As `submit`, for the film's own grey values."""
        return self._ask(Question("greys", path.absolute(), member, called=called))

    def identity(self, path: Path, member: str | None = None) -> Future[Identity]:
        """Queues the question which file this is. The future raises what `read` raises where it cannot be read."""
        return self._ask(Question("identity", path.absolute(), member))

    def header(self, path: Path, called: str | None = None) -> Future[Header]:
        """Queues the question what a DICOM file says of itself. The future raises what `read` raises where it says not even that."""
        return self._ask(Question("header", path.absolute(), called=called))

    def deidentified(self, path: Path, rules: Deidentification, called: str | None = None) -> Future[bytes]:
        """Queues the wish for a DICOM file without identities, whole as it is to be written (docs/deidentification.md).

        The future raises ImageError where that cannot be had of this file, and SetupError as `read` does or where the extra is missing.
        """
        return self._ask(Question("deidentified", path.absolute(), called=called, rules=rules))

    def contents(self, path: Path, start: int = 0) -> Contents:
        """A page of what a ZIP or DICOMDIR holds; the next one begins at `rest`. Waits for it.

        Raises:
            ImageError: It is neither, or damaged, or hostile as a whole.
            SetupError: As `read`.
        """
        return self._ask(Question("contents", path.absolute(), start=start)).result()

    def _ask(self, question: Question) -> Future[Any]:
        job = _Job(question, Future())
        with self._lock:
            if self._closed:
                raise RuntimeError("this FilmReader is closed")
            self._unfinished += 1
            self._jobs.put(job)
            if len(self._seats) < min(self._unfinished, self._most):
                self._add_seat()
        return job.future

    def close(self) -> None:
        """Ends the workers. Files still queued are cancelled, a file under way ends with a SetupError."""
        with self._lock:
            self._closed = True
        for seat, _ in self._seats:
            seat.close()
        with contextlib.suppress(Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None and job.future.cancel():
                    job.future.set_running_or_notify_cancel()
        for _ in self._seats:
            self._jobs.put(None)
        for _, thread in self._seats:
            if thread is not threading.current_thread():  # a future's callback may close
                thread.join()

    def __enter__(self) -> FilmReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _add_seat(self) -> None:
        seat = _Seat(self.limits)
        # A daemon: it never holds up the interpreter's exit. It starts its workers itself, because a worker dies with the thread
        # that started it.
        thread = threading.Thread(target=self._serve, args=(seat,), name="cxr-decoding", daemon=True)
        self._seats.append((seat, thread))
        thread.start()

    def _serve(self, seat: _Seat) -> None:
        while True:
            with contextlib.suppress(SetupError):  # the next file meets it again
                seat.fill()  # now, so that the next file need not wait for it
            job = self._jobs.get()
            if job is None:
                seat.empty()
                return
            if not job.future.set_running_or_notify_cancel():
                self._count_finished()
                continue
            try:
                answer = seat.answer(job.question)
            except BaseException as error:  # whatever it is belongs to who asked, and this thread must live
                self._count_finished()
                job.future.set_exception(error)
            else:
                self._count_finished()
                job.future.set_result(answer)

    def _count_finished(self) -> None:
        with self._lock:
            self._unfinished -= 1


# --------------------------------------------------------------------------------------------- in this process


@dataclass(frozen=True)
class Question:
    """What a worker is asked about a file, or a member of a ZIP; `start`: where a page of contents begins; `rules`: to de-identify by."""

    kind: Literal["film", "greys", "identity", "header", "deidentified", "contents"]
    path: Path
    member: str | None = None
    start: int = 0
    called: str | None = None
    rules: Deidentification | None = None

    @property
    def name(self) -> str:
        """What messages call the file."""
        if self.called is not None:
            return self.called
        return self.path.name if self.member is None else base_name(self.member)


@dataclass(frozen=True)
class _Job:
    question: Question
    future: Future[Any]


@dataclass(frozen=True)
class Answer:
    """What a worker says about a file. `spent`: its memory ran out, which earlier files may have caused."""

    outcome: Film | Greys | Identity | Header | bytes | Contents | CxrError
    spent: bool = False


class _WorkerLostError(Exception):
    """The worker is gone, and `verdict` is what to say about the file. `certain`: it need not be asked again."""

    def __init__(self, verdict: ImageError, *, certain: bool) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict
        self.certain = certain


class _Seat:
    """One worker at a time. Used by one thread; `close` may come from any."""

    def __init__(self, limits: DecodingLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._closed = False

    def fill(self) -> _Worker:
        """The worker that sits here; a new one, perhaps still starting, where there is none or the old one is dead."""
        with self._lock:
            if self._closed:
                raise _closed()
            if self._worker is not None and self._worker.died_idle():
                self._worker.end()
                self._worker = None
            if self._worker is None:
                self._worker = _Worker(self._limits)
            return self._worker

    def answer(self, question: Question) -> Film | Greys | Identity | Header | bytes | Contents:
        """Asks the worker. One that breaks after other files is no proof against this file, so a fresh one is asked then."""
        while True:
            worker = self.fill()
            fresh = worker.files == 0
            try:
                worker.wait_until_ready()
                return worker.answer(question)
            except _WorkerLostError as lost:
                self.empty()
                if (fresh or lost.certain) and not self._closed:
                    raise lost.verdict from None
            except SetupError:
                self.empty()
                if self._closed:
                    raise _closed() from None
                raise

    def empty(self) -> None:
        """Ends the worker."""
        with self._lock:
            if self._worker is not None:
                self._worker.end()
                self._worker = None

    def close(self) -> None:
        """Ends what the worker is doing; the thread that uses this seat meets that and leaves it empty."""
        with self._lock:
            self._closed = True
            if self._worker is not None:
                self._worker.process.kill()


class _Worker:
    """One worker process, seen from outside. All but `process.kill` is for the thread that made it."""

    def __init__(self, limits: DecodingLimits) -> None:
        self.files = 0
        self._limits = limits
        self._ready = False
        path = [str(entry) for entry in sys.path]
        try:
            with contextlib.ExitStack() as undo:
                self._log = undo.enter_context(os.fdopen(os.memfd_create("cxr-decoding"), "r+b", buffering=0))
                self._connection, theirs = Pipe()
                undo.enter_context(self._connection)
                with theirs:
                    work = f"work({theirs.fileno()}, {os.getpid()}, {limits.memory_bytes})"
                    self.process = subprocess.Popen(
                        # It is given where to import from, and no main module: no line of the user's program runs again.
                        [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; from {_WORKER} import work; {work}"],
                        stdin=subprocess.DEVNULL,
                        stdout=self._log,
                        stderr=self._log,
                        pass_fds=[theirs.fileno()],
                        env=os.environ | _ONE_THREAD,
                        start_new_session=True,  # Ctrl-C at the terminal is for this process, which then ends its workers
                    )
                undo.pop_all()
        except (OSError, ValueError) as error:
            raise _not_started(str(error)) from error

    def died_idle(self) -> bool:
        """Whether it has ended since its last file."""
        return self._ready and self.process.poll() is not None

    def wait_until_ready(self) -> None:
        """Raises SetupError where its start failed."""
        if self._ready:
            return
        if not self._connection.poll(_START_S):
            raise _not_started(f"no sign of life in {_START_S:g} s")
        try:
            self._connection.recv()
        except (EOFError, OSError) as error:
            raise _not_started(self._last_words() or "it ended at once") from error
        self._ready = True

    def answer(self, question: Question) -> Film | Greys | Identity | Header | bytes | Contents:
        """Sends one question to the worker, which is ready, and waits as long as the limit says.

        Raises:
            CxrError: The worker's own words about the file.
            _WorkerLostError: It is dead, stuck or out of memory.
        """
        self.files += 1
        self._log.seek(0)  # its position is the worker's, too
        self._log.truncate()
        try:
            self._connection.send(question)
            answer: Answer | None = self._connection.recv() if self._connection.poll(self._limits.timeout_s) else None
        except Exception as error:  # it died, or sends whatever its broken memory holds
            raise _WorkerLostError(self._crash(question.name), certain=False) from error
        if answer is None:
            raise _WorkerLostError(_too_slow(question, self._limits.timeout_s), certain=True)
        if not isinstance(answer.outcome, CxrError):
            return answer.outcome
        if answer.spent:
            raise _WorkerLostError(_too_much_memory(question.name, self._limits.memory_bytes), certain=False)
        raise answer.outcome

    def end(self) -> None:
        """Kills it if it still runs, and closes what led to it."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a dead disk holds even a killed process
            self.process.wait(_END_S)
        self._connection.close()
        self._log.close()

    def _crash(self, name: str) -> ImageError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)
        code, words = self.process.poll(), self._last_words()
        if any(sign in words for sign in NO_MEMORY):
            return _too_much_memory(name, self._limits.memory_bytes)
        if code == -signal.SIGKILL and not words:
            words = "SIGKILL, which the kernel sends when the machine has no memory left"
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return ImageError(
            f"{name}: the decoder crashed ({how})",
            expected="pixel data that can be decoded",
            got=words,
            next_step="export the image again, uncompressed if need be",
        )

    def _last_words(self) -> str:
        """The last line on its stderr, without what could steer a terminal."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        lines = ["".join(filter(str.isprintable, line)).strip() for line in lines]
        return next((line for line in reversed(lines) if line), "")[:200]


def size_of(number: int) -> str:
    """Bytes in words."""
    return f"{number / 2**30:.3g} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"


def _not_started(got: str) -> SetupError:
    return SetupError(
        "a process that decodes files did not start",
        expected="this Python, with this package, under the limit of memory",
        got=got,
        next_step="check the installation and the limits (ulimit -a)",
    )


def _closed() -> SetupError:
    return SetupError("the file reader was closed before this file was decoded")


def _too_slow(question: Question, seconds: float) -> ImageError:
    if question.kind in ("identity", "header", "deidentified", "contents"):
        container = question.kind == "contents"
        return ImageError(
            f"{question.name}: reading it took longer than {seconds:g} s",
            expected="a ZIP or DICOMDIR of at most 100,000 files" if container else "a file that can be read",
            next_step="unpack it, or give its folder" if container else "copy it to a faster disk",
        )
    return ImageError(
        f"{question.name}: decoding took longer than {seconds:g} s",
        expected="pixel data that can be decoded",
        got="a decoder that does not end",
        next_step="export the image again, uncompressed if need be",
    )


def _too_much_memory(name: str, limit: int) -> ImageError:
    return ImageError(
        f"{name}: needs more than {size_of(limit)} of memory",
        expected="a radiograph that decodes within that",
        next_step="scale the image down or export it again",
    )
