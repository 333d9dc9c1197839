"""The one way of films in bulk: read in worker processes, through Triton in batches, kept by a sink; all of it at once.

One thread conducts; reading, requests and keeping are futures. Each stage takes up what the one before has finished, as far as its limit
allows, so that neither disk, Triton nor Milvus waits for another, and what is held stays bounded. A server that goes away is waited for:
what it had is sent again, nothing fails for it. A batch that Triton refuses is sent film by film, to find the one to blame.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tenacity import (
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_delay,
    stop_any,
    stop_when_event_set,
    wait_random_exponential,
)

from cxr_retrieval.contract import IMAGE_SIZE, TensorSpec
from cxr_retrieval.errors import (
    AccessError,
    CxrError,
    InferenceError,
    InputError,
    OverloadedError,
    ServerDownError,
    StoreDownError,
    StoreError,
    UnusableOutputError,
)
from cxr_retrieval.inference.in_flight import InFlight
from cxr_retrieval.inference.triton import BATCH_SIZE, TritonClient
from cxr_retrieval.radiograph.decoding import Film, FilmReader

KEPT_AT_ONCE: Final = 64
"""Films that one search or one upsert is for."""
MOST_IN_FLIGHT: Final = 32
"""Requests; 256 films keep any one GPU busy."""
_HELD: Final = 512
"""Films between reader and sink: at most 200 MB with attention maps, 70 without."""
_FED: Final = 32
_ATTEMPTS: Final = 3
"""Of a request that failed while its server lived, before its films are sent singly, and of a single film before it has failed."""
_KEEPING_ATTEMPTS: Final = 10
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


W = TypeVar("W", bound=Work)
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class Seen(Generic[W]):
    """A film with what the networks say of it: output name → array without the batch dimension; seconds of its request."""

    work: W
    film: Film
    outputs: Mapping[str, NDArray[np.generic]]
    seconds: float


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


@dataclass(frozen=True)
class _Batch(Generic[W]):
    films: list[tuple[W, Film]]
    attempts: int = 0


def run(
    works: Iterable[W],
    reader: FilmReader,
    triton: TritonClient,
    sink: Sink[W, R],
    *,
    probe_store: Callable[[], None] = lambda: None,
    stop: threading.Event | None = None,
    tell: Callable[[str], None] = lambda _: None,
    patience_s: float = PATIENCE_S,
) -> None:
    """Takes every work through to the sink; returns when all are, or, once `stop` is set, when what Triton has is.

    Args:
        works: Drawn in a thread of its own, as far as there is room.
        probe_store: Raises StoreDownError while Milvus is away.
        tell: Told what is waited for.

    Raises:
        ServiceError: A server was away for longer than `patience_s`, or refuses what no waiting mends. What was kept stays kept.
    """
    with ThreadPoolExecutor(MOST_IN_FLIGHT + 4) as pool:
        conductor = _Conductor(works, reader, triton, sink, probe_store, stop or threading.Event(), tell, patience_s, pool)
        try:
            while conductor.step():
                pass
        finally:
            conductor.abandon()


def patiently(stop: threading.Event, patience_s: float, *others: threading.Event) -> Retrying:
    """Calls again, ever more seldom, what raises ServerDownError or StoreDownError, for `patience_s` or until an event is set."""
    return Retrying(
        retry=retry_if_exception_type((ServerDownError, StoreDownError)),
        wait=wait_random_exponential(multiplier=0.5, max=15),
        stop=stop_any(stop_after_delay(patience_s), *map(stop_when_event_set, (stop, *others))),
        sleep=sleep_using_event(stop),
        reraise=True,
    )


class _Conductor(Generic[W, R]):
    def __init__(
        self,
        works: Iterable[W],
        reader: FilmReader,
        triton: TritonClient,
        sink: Sink[W, R],
        probe_store: Callable[[], None],
        stop: threading.Event,
        tell: Callable[[str], None],
        patience_s: float,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._works = iter(works)
        self._reader, self._triton, self._sink, self._probe_store = reader, triton, sink, probe_store
        self._stop, self._tell, self._patience_s, self._pool = stop, tell, patience_s, pool
        self._in_flight = InFlight(MOST_IN_FLIGHT)
        self._abandoned = threading.Event()
        self._feeding: Future[list[W]] | None = None
        self._fed_all = False
        self._reads: dict[Future[Film], W] = {}
        self._films: deque[tuple[W, Film]] = deque()
        self._again: deque[_Batch[W]] = deque()
        self._requests: dict[Future[tuple[dict[str, NDArray[np.generic]], float]], _Batch[W]] = {}
        self._seen: deque[Seen[W]] = deque()
        self._keeping: tuple[Future[R], list[Seen[W]]] | None = None
        self._keeping_attempts = 0
        self._away: dict[str, Future[None]] = {}
        self._ended: SimpleQueue[Future[Any]] = SimpleQueue()

    def step(self) -> bool:
        """Starts what can be started and takes in what has ended; False when nothing is left."""
        self._feed()
        self._send()
        self._keep()
        if not (self._reads or self._requests or self._away or self._feeding or self._keeping):
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
        return self._stop.is_set()

    def _feed(self) -> None:
        held = len(self._reads) + len(self._films) + len(self._seen) + BATCH_SIZE * (len(self._requests) + len(self._again))
        if self._feeding is None and not self._fed_all and not self._stopping() and held < _HELD - _FED:
            self._feeding = self._begun(self._pool.submit(lambda: list(islice(self._works, _FED))))

    def _send(self) -> None:
        while "triton" not in self._away and len(self._requests) < self._in_flight.limit and not self._stopping():
            if self._again:
                batch = self._again.popleft()
            elif len(self._films) >= BATCH_SIZE or (self._films and not self._requests):  # an idle server gets what there is
                batch = _Batch([self._films.popleft() for _ in range(min(BATCH_SIZE, len(self._films)))])
            elif self._films and self._fed_all and not self._reads:
                batch = _Batch([self._films.popleft() for _ in range(len(self._films))])
            else:
                return
            self._requests[self._begun(self._pool.submit(self._ask, batch))] = batch

    def _ask(self, batch: _Batch[W]) -> tuple[dict[str, NDArray[np.generic]], float]:
        squares = np.stack([film.square for _, film in batch.films]).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
        started = time.monotonic()
        return self._triton.infer(squares, self._sink.outputs, self._in_flight.overloaded), time.monotonic() - started

    def _keep(self) -> None:
        if self._keeping is not None or not self._seen or "milvus" in self._away:
            return
        no_more = not self._requests and (self._stopping() or "triton" in self._away or not (self._films or self._reads or self._again))
        if len(self._seen) >= KEPT_AT_ONCE or no_more:
            some = [self._seen.popleft() for _ in range(min(KEPT_AT_ONCE, len(self._seen)))]
            self._keeping = (self._begun(self._pool.submit(self._sink.keep, some)), some)

    def _take_in(self, ended: set[Future[Any]]) -> None:
        if self._feeding is not None and self._feeding.done():
            fed, self._feeding = self._feeding.result(), None
            self._fed_all = len(fed) < _FED
            for work in fed:
                self._reads[self._begun(self._reader.submit(work.path, work.member))] = work
        for future in ended & self._reads.keys():
            work = self._reads.pop(future)
            try:
                self._films.append((work, future.result()))
            except InputError as error:
                self._sink.failed(work, error)
        for future in ended & self._requests.keys():
            self._take_answer(future, self._requests.pop(future))
        if self._keeping is not None and self._keeping[0] in ended:
            self._take_kept(*self._keeping)
        for service in [name for name, future in self._away.items() if future in ended]:
            future = self._away.pop(service)
            if not self._stopping():
                future.result()

    def _take_answer(self, future: Future[tuple[dict[str, NDArray[np.generic]], float]], batch: _Batch[W]) -> None:
        try:
            outputs, seconds = future.result()
        except (ServerDownError, OverloadedError) as error:
            self._again.append(batch)
            self._wait_for("triton", error, self._triton.probe)
        except AccessError:  # the films are not to blame, and no waiting mends it
            raise
        except InferenceError as error:
            tried = batch.attempts + 1
            if tried < _ATTEMPTS and not isinstance(error, UnusableOutputError):
                self._again.append(_Batch(batch.films, tried))
            elif len(batch.films) > 1:
                self._again.extend(_Batch([film]) for film in batch.films)
            else:
                self._sink.failed(batch.films[0][0], error)
        else:
            if len(batch.films) == BATCH_SIZE:  # the time of fewer would be taken for the fastest
                self._in_flight.answered(seconds)
            for index, (work, film) in enumerate(batch.films):
                self._seen.append(Seen(work, film, {name: values[index] for name, values in outputs.items()}, seconds))

    def _take_kept(self, future: Future[R], some: list[Seen[W]]) -> None:
        self._keeping = None
        try:
            result = future.result()
        except StoreError as error:
            self._keeping_attempts += 1
            if self._keeping_attempts >= _KEEPING_ATTEMPTS:
                raise
            self._seen.extendleft(reversed(some))
            self._wait_for("milvus", error, self._probe_store)
        else:
            self._keeping_attempts = 0
            self._sink.kept(result)

    def _wait_for(self, service: str, error: CxrError, probe: Callable[[], None]) -> None:
        if service not in self._away and not self._stopping():
            self._away[service] = self._begun(self._pool.submit(self._until_back, service, error, probe))

    def _until_back(self, service: str, error: CxrError, probe: Callable[[], None]) -> None:
        """Asks again and again, ever more seldom, until the server answers."""
        started, name = time.monotonic(), service.capitalize()
        self._tell(f"{name} is away: {error.what}. Waiting for it")

        patiently(self._stop, self._patience_s, self._abandoned)(probe)
        self._tell(f"{name} is back after {time.monotonic() - started:.0f} s")
