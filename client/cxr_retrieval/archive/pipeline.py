"""The one way of films in bulk: read in worker processes, through Triton in batches, kept by a sink; all of it at once.

One thread conducts; reading, requests and keeping are futures. Each stage takes up what the one before has finished, as far as its limit
allows, so that neither disk, Triton nor Milvus waits for another, and what is held stays bounded. A server that goes away is waited for:
what it had is sent again, nothing fails for it.

A request that fails while Triton lives proves nothing: its films or the server may be to blame. It is doubted until the next answer to
any request. Where several fail and none succeeds, or no other is under way, nothing more is sent (the circuit is open) but a picture of our
own, again and again, ever more seldom, which can be to blame for nothing. An answer settles all doubts: what failed meanwhile is tried
again, then film by film, to find the one to blame.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.archive.watching import (
    Answered,
    Asked,
    Begun,
    Depths,
    Dissolved,
    Kept,
    Read,
    Retried,
    Took,
    Unanswered,
    Watch,
    timed,
    unwatched,
)
from cxr_retrieval.contract import IMAGE_SIZE, TensorSpec
from cxr_retrieval.errors import (
    CxrError,
    InferenceError,
    InputError,
    OverloadedError,
    ServerDownError,
    ServerFaultError,
    StoreError,
    UnusableOutputError,
)
from cxr_retrieval.inference.in_flight import InFlight
from cxr_retrieval.inference.trace import Trace
from cxr_retrieval.inference.triton import BATCH_SIZE
from cxr_retrieval.radiograph.decoding import Film
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom

KEPT_AT_ONCE: Final = 64
"""Films that one search or one upsert is for."""
MOST_IN_FLIGHT: Final = 32
"""Requests; 256 films keep any one GPU busy."""
_HELD: Final = 512
"""Films between reader and sink: at most 200 MB with attention maps, 70 without."""
_FED: Final = 32
_ATTEMPTS: Final = 3
"""Of a request that failed while its server lived, before its films are sent singly, and of a single film before it has failed."""
KEEPING_ATTEMPTS: Final = 6
"""Of films that Milvus refuses without saying that this may pass; it says the same of a collection that is still being loaded."""
_DOUBTS: Final = 4
"""Requests that fail with none answered in between, before nothing more is sent."""
PATIENCE_S: Final = 3600.0
"""How long a server that is away is waited for."""


class Work(Protocol):
    """What a pipeline works on: something with a file."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def member(self) -> str | None:
        """Of a ZIP, else None."""
        ...


class Reader(Protocol):
    """What makes films of files: a FilmReader, or who knows some of them already."""

    def submit(self, path: Path, member: str | None = None) -> Future[Film]:
        """As `FilmReader.submit`."""
        ...


class Inference(Protocol):
    """What says something of films: a TritonClient, or networks in this process. `model_version`: of its weights."""

    model_version: str

    def infer(
        self,
        images: NDArray[np.uint8],
        outputs: Sequence[TensorSpec],
        on_overload: Callable[[], None] = lambda: None,
        trace: Trace | None = None,
    ) -> dict[str, NDArray[np.generic]]:
        """As `TritonClient.infer`."""
        ...

    def probe(self) -> None:
        """As `TritonClient.probe`."""
        ...


W = TypeVar("W", bound=Work)
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class Seen(Generic[W]):
    """A film with what the networks say of it: output name → array without the batch dimension; seconds of its request, and its trace."""

    work: W
    film: Film
    outputs: Mapping[str, NDArray[np.generic]]
    seconds: float
    trace: Trace


class Sink(Protocol[W, R]):
    """Where films go."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """What Triton is asked for."""
        ...

    def keep(self, seen: Sequence[Seen[W]]) -> R:
        """Asks or fills the gallery, in a thread of its own; may be called again with the same films if it raises StoreError."""
        ...

    def kept(self, result: R) -> None:
        """Takes what `keep` returned, in the caller's thread."""
        ...

    def failed(self, work: W, error: CxrError) -> None:
        """This one cannot be used; in the caller's thread."""
        ...


class Engine(Protocol):
    """What takes works through to a sink: this process (`here`), or a cluster (`cluster.py`)."""

    def __call__(
        self,
        works: Iterable[W | None],
        sink: Sink[W, R],
        *,
        probe_store: Callable[[], None],
        stop: threading.Event,
        tell: Callable[[str], None],
        watch: Watch,
        patience_s: float,
    ) -> None:
        """As `run`."""
        ...


def here(reader: Reader, inference: Inference) -> Engine:
    """The engine that is this process."""

    def through(works: Iterable[W | None], sink: Sink[W, R], **told: Any) -> None:
        run(works, reader, inference, sink, **told)

    return through


@dataclass(frozen=True)
class _Batch(Generic[W]):
    """Films for one request; `read`: when their files were."""

    films: list[tuple[W, Film]]
    read: Took
    attempts: int = 0
    trace: Trace = field(default_factory=Trace)


@dataclass(frozen=True)
class _Answer:
    outputs: dict[str, NDArray[np.generic]]
    took: Took


@dataclass(frozen=True)
class _Ready(Generic[W]):
    """A film to be asked about, and when it was read."""

    work: W
    film: Film
    read: Took


@dataclass(frozen=True)
class _Fed(Generic[W]):
    """Works that were drawn; `last`: there are no more."""

    works: list[W]
    last: bool


def run(
    works: Iterable[W | None],
    reader: Reader,
    triton: Inference,
    sink: Sink[W, R],
    *,
    probe_store: Callable[[], None] = lambda: None,
    stop: threading.Event | None = None,
    tell: Callable[[str], None] = lambda _: None,
    watch: Watch = unwatched,
    patience_s: float = PATIENCE_S,
) -> None:
    """Takes every work through to the sink; returns when all are, or, once `stop` is set, when what Triton has is.

    Args:
        works: Drawn in a thread of its own, as far as there is room; None among them: there is nothing for the moment.
        probe_store: Raises StoreDownError while Milvus is away.
        tell: Told what is waited for, in words.
        watch: Told everything.

    Raises:
        ServiceError: A server was away for longer than `patience_s`, or refuses what no waiting mends. What was kept stays kept.
    """
    patience = Patience(stop or threading.Event(), patience_s, tell, watch)
    with ThreadPoolExecutor(MOST_IN_FLIGHT + 4) as pool:
        conductor = _Conductor(works, reader, triton, sink, probe_store, patience, pool)
        watch(Begun(conductor.look))
        try:
            while conductor.step():
                pass
        finally:
            conductor.abandon()


class _Conductor(Generic[W, R]):
    def __init__(
        self,
        works: Iterable[W | None],
        reader: Reader,
        triton: Inference,
        sink: Sink[W, R],
        probe_store: Callable[[], None],
        patience: Patience,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._works = iter(works)
        self._reader, self._triton, self._sink, self._probe_store = reader, triton, sink, probe_store
        self._patience, self._watch, self._pool = patience, patience.watch, pool
        self._in_flight = InFlight(MOST_IN_FLIGHT)
        self._abandoned = threading.Event()
        self._feeding: Future[_Fed[W]] | None = None
        self._fed_all = False
        self._reads: dict[Future[Film], W] = {}
        self._films: deque[_Ready[W]] = deque()
        self._again: deque[_Batch[W]] = deque()
        self._requests: dict[Future[_Answer], _Batch[W]] = {}
        self._doubted: list[tuple[_Batch[W], InferenceError]] = []
        self._proving: Future[None] | None = None
        self._seen: deque[Seen[W]] = deque()
        self._keeping: tuple[Future[tuple[R, Took]], list[Seen[W]]] | None = None
        self._ended: SimpleQueue[Future[Any]] = SimpleQueue()

    def look(self) -> Depths:
        """How many there are of everything; from any thread."""
        waiting = len(self._films) + sum(len(batch.films) for batch in list(self._again))
        doubted = sum(len(batch.films) for batch, _ in list(self._doubted))
        return Depths(len(self._reads), waiting, doubted, len(self._seen), len(self._requests), self._in_flight.limit)

    def step(self) -> bool:
        """Starts what can be started and takes in what has ended; False when nothing is left."""
        self._feed()
        self._send()
        if self._doubted and not self._requests:  # nothing is under way that could settle it
            self._prove()
        self._keep()
        if not (self._reads or self._requests or self._proving or self._feeding or self._keeping):
            return False
        self._take_in(self._next_ended())
        return True

    def _begun(self, future: Future[T]) -> Future[T]:
        """Has its end told to `_next_ended`; `concurrent.futures.wait` would look at every open future again for each that ends."""
        future.add_done_callback(self._ended.put)
        return future

    def _next_ended(self) -> set[Future[Any]]:
        """What has ended since the last call; waits for one, but not for long."""
        ended: set[Future[Any]] = set()
        with suppress(Empty):
            ended.add(self._ended.get(timeout=0.5))
            while True:
                ended.add(self._ended.get_nowait())
        return ended

    def abandon(self) -> None:
        """Lets go of what has not begun."""
        self._abandoned.set()
        for future in [*self._reads, *self._requests]:
            future.cancel()

    def _stopping(self) -> bool:
        return self._patience.stop.is_set()

    def _feed(self) -> None:
        batches = len(self._requests) + len(self._again) + len(self._doubted)
        held = len(self._reads) + len(self._films) + len(self._seen) + BATCH_SIZE * batches
        if self._feeding is None and not self._fed_all and not self._stopping() and held < _HELD - _FED:
            self._feeding = self._begun(self._pool.submit(self._draw))

    def _draw(self) -> _Fed[W]:
        drawn: list[W] = []
        for work in islice(self._works, _FED):
            if work is None:  # what there is need not wait for what may come
                return _Fed(drawn, last=False)
            drawn.append(work)
        return _Fed(drawn, last=len(drawn) < _FED)

    def _send(self) -> None:
        while self._proving is None and len(self._requests) < self._in_flight.limit and not self._stopping():
            if self._again:
                batch = self._again.popleft()
            elif len(self._films) >= BATCH_SIZE or (self._films and not self._requests):  # an idle server gets what there is
                batch = self._batch(min(BATCH_SIZE, len(self._films)))
            elif self._films and self._fed_all and not self._reads:
                batch = self._batch(len(self._films))
            else:
                return
            self._requests[self._begun(self._pool.submit(self._ask, batch))] = batch

    def _batch(self, count: int) -> _Batch[W]:
        ready = [self._films.popleft() for _ in range(count)]
        began = min(one.read.began for one in ready)
        read = Took(began, max(one.read.ended for one in ready) - began)
        return _Batch([(one.work, one.film) for one in ready], read)

    def _ask(self, batch: _Batch[W]) -> _Answer:
        squares = np.stack([film.square for _, film in batch.films]).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
        self._watch(Asked(batch.trace, len(batch.films), squares.nbytes, batch.read, batch.attempts))

        def overloaded() -> None:
            self._in_flight.overloaded()
            self._watch(Retried("triton", OverloadedError.__name__, batch.trace))

        with timed() as took:
            outputs = self._triton.infer(squares, self._sink.outputs, overloaded, batch.trace)
        return _Answer(outputs, took)

    def _keep(self) -> None:
        if self._keeping is not None or not self._seen:
            return
        no_more = not self._requests and (self._stopping() or self._proving or not (self._films or self._reads or self._again))
        if len(self._seen) >= KEPT_AT_ONCE or no_more:
            some = [self._seen.popleft() for _ in range(min(KEPT_AT_ONCE, len(self._seen)))]
            self._keeping = (self._begun(self._pool.submit(self._kept_at_last, some)), some)

    def _kept_at_last(self, some: list[Seen[W]]) -> tuple[R, Took]:
        def keep() -> tuple[R, Took]:
            with timed() as took:
                return self._sink.keep(some), took

        return self._patience.until("milvus", keep, self._abandoned, probe=self._probe_store, attempts=KEEPING_ATTEMPTS)

    def _take_in(self, ended: set[Future[Any]]) -> None:
        if self._feeding is not None and self._feeding.done():
            fed, self._feeding = self._feeding.result(), None
            self._fed_all = fed.last
            for work in fed.works:
                self._reads[self._begun(self._reader.submit(work.path, work.member))] = work
        for future in ended & self._reads.keys():
            self._take_film(future, self._reads.pop(future))
        for future in ended & self._requests.keys():
            self._take_answer(future, self._requests.pop(future))
        if self._keeping is not None and self._keeping[0] in ended:
            self._take_kept(*self._keeping)
        if self._proving is not None and self._proving in ended:
            proof, self._proving = self._proving, None
            if not self._stopping():
                proof.result()
                self._settle()

    def _take_film(self, future: Future[Film], work: W) -> None:
        try:
            film = future.result()
        except InputError as error:
            self._watch(Read(None, error))
            self._sink.failed(work, error)
        else:
            self._watch(Read(film.seconds))
            self._films.append(_Ready(work, film, Took(time.time() - film.seconds, film.seconds)))

    def _take_answer(self, future: Future[_Answer], batch: _Batch[W]) -> None:
        try:
            answer = future.result()
        except (ServerDownError, OverloadedError) as error:
            self._watch(Unanswered(batch.trace, error))
            self._ask_again(batch, error)
            self._prove(error)
        except (ServerFaultError, UnusableOutputError) as error:
            self._watch(Unanswered(batch.trace, error))
            self._doubted.append((batch, error))
            if len(self._doubted) >= _DOUBTS:
                self._prove()
        else:
            self._watch(Answered(batch.trace, len(batch.films), answer.took))
            if len(batch.films) == BATCH_SIZE:  # the time of fewer would be taken for the fastest
                self._in_flight.answered(answer.took.seconds)
            for index, (work, film) in enumerate(batch.films):
                outputs = {name: values[index] for name, values in answer.outputs.items()}
                self._seen.append(Seen(work, film, outputs, answer.took.seconds, batch.trace))
            self._settle()

    def _ask_again(self, batch: _Batch[W], error: InferenceError) -> None:
        self._watch(Retried("triton", type(error).__name__, batch.trace))
        self._again.append(replace(batch, trace=batch.trace.again()))

    def _settle(self) -> None:
        """Triton answers: what it failed on before is tried again, or film by film, or has failed."""
        doubted, self._doubted = self._doubted, []
        for batch, error in doubted:
            tried = batch.attempts + 1
            if tried < _ATTEMPTS and not isinstance(error, UnusableOutputError):
                self._ask_again(replace(batch, attempts=tried), error)
                continue
            self._watch(Dissolved(batch.trace))
            if len(batch.films) > 1:
                self._again.extend(_Batch([film], batch.read) for film in batch.films)
            else:
                self._sink.failed(batch.films[0][0], error)

    def _prove(self, because: InferenceError | None = None) -> None:
        """Sends no more until Triton answers for a picture of our own; it has been away or failing already if there is a `because`."""
        if self._proving is None and not self._stopping():
            proof = self._pool.submit(self._patience.until, "triton", self._proof, self._abandoned, because=because)
            self._proving = self._begun(proof)

    def _proof(self) -> None:
        self._triton.probe()
        square, _ = letterbox(make_phantom(0, PHANTOM_LABELS[0]).pixels)
        try:
            self._triton.infer(square[None, None], self._sink.outputs)
        except UnusableOutputError as error:
            raise InferenceError(
                "Triton cannot answer even for a picture of our own",
                expected="finite outputs",
                got=error.what,
                next_step="check the model's weights and precision, then give the same command again",
            ) from error

    def _take_kept(self, future: Future[tuple[R, Took]], some: list[Seen[W]]) -> None:
        self._keeping = None
        try:
            result, keep = future.result()
        except StoreError:
            if not self._stopping():
                raise
            self._seen.clear()  # they stay pending
        else:
            with timed() as record:
                self._sink.kept(result)
            self._watch(Kept(Counter(seen.trace.trace_id for seen in some), keep, record))
