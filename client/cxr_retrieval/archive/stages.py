"""Films in bulk on a cluster, seen from a worker: the stages that Ray Data runs as actors, each with what it needs held open.

A row of the data set is a bundle of films, sealed (`sealed.py`): first where they lie, then what they show, then what the networks say of
them, then, of a query, its answers. A film that cannot be used is a result like any other, so no film ends a bundle, and what ends one (a
server that stays away, a node without the key) is for whoever gave the command. Nothing is remembered between bundles: one that is done
twice, because a worker or its node was lost, comes out the same.
"""

from __future__ import annotations

import os
import threading
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

from cxr_retrieval.archive import pipeline
from cxr_retrieval.archive.objects import ObjectReader
from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.archive.pipeline import Inference, Seen, Work
from cxr_retrieval.archive.sealed import Sealed
from cxr_retrieval.archive.watching import Begun, Event, Took, timed
from cxr_retrieval.archive.watching import Read as WasRead
from cxr_retrieval.cases.pseudonyms import Pseudonyms, open_pseudonyms
from cxr_retrieval.contract import TensorSpec
from cxr_retrieval.errors import CxrError, InputError, ServiceError, SetupError
from cxr_retrieval.radiograph.decoding import DecodingLimits, Film
from cxr_retrieval.settings import PseudonymSettings

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

PURPOSE: Final = "bulk work"
"""Of the key that seals, as `Pseudonyms.secret` has it."""


class Asker(Protocol[R_co]):
    """What a query is answered by, on a worker: a sink's `keep` without the sink."""

    def keep(self, seen: Sequence[Seen[Any]]) -> R_co:
        """As `Sink.keep`."""
        ...

    def probe(self) -> None:
        """Raises StoreDownError while Milvus is away."""
        ...


@dataclass(frozen=True)
class Plan(Generic[R]):
    """What the stages are made of, on whichever machine; pickled.

    Args:
        inference: Opens a Triton client, or networks in the worker; `model_version`: that they must have.
        outputs: What these are asked for.
        asker: Opens what answers queries there, told everything by the function that it is given; None: who gave the command keeps films
            himself.
        gpu: Each of those networks has one for itself.
        limits: Of decoding one film; one process for each actor.
        patience_s: How long a server that is away is waited for.
    """

    inference: Callable[[], AbstractContextManager[Inference]]
    model_version: str
    outputs: Sequence[TensorSpec]
    asker: Callable[[Pseudonyms, pipeline.Watch], AbstractContextManager[Asker[R]]] | None = None
    gpu: bool = False
    limits: DecodingLimits = field(default_factory=lambda: DecodingLimits(workers=1))
    patience_s: float = pipeline.PATIENCE_S


@dataclass(frozen=True)
class Place:
    """Where a film lies, if a worker need know no more of it."""

    path: Path
    member: str | None


@dataclass(frozen=True)
class Numbered:
    """A work, and its number among those of this window."""

    number: int
    work: Work

    @property
    def path(self) -> Path:
        """The file."""
        return self.work.path

    @property
    def member(self) -> str | None:
        """Of a ZIP, else None."""
        return self.work.member


@dataclass(frozen=True)
class Bundle:
    """Some films on their way: works, then works with films, then `Seen`; each work is `Numbered`.

    Attributes:
        failed: Number → why it cannot be used.
        answered: Numbers of the films that `result` is about, which then are no longer among `films`.
        result: What an `Asker` kept of them.
        traces: Trace id → how many of them its request was about.
        took: What keeping them took.
    """

    films: list[Any]
    failed: dict[int, CxrError] = field(default_factory=dict)
    answered: tuple[int, ...] = ()
    result: Any = None
    traces: Mapping[str, int] = field(default_factory=dict)
    took: Took = field(default_factory=lambda: Took(0))


def traces_of(seen: Sequence[Seen[Any]]) -> dict[str, int]:
    """Trace id → how many of these films it stands for."""
    return Counter(one.trace.trace_id for one in seen)


class Stage(ABC):
    """An actor's work on one bundle after another; several at once, from threads.

    Args:
        keys: Where this node has the key of pseudonyms, by which all is sealed.
        plan: Sealed.
        notices: Handle of a `Notices` actor.
    """

    def __init__(self, keys: PseudonymSettings, plan: bytes, notices: Any) -> None:
        self._keys, self._sealed_plan, self._notices = keys, plan, notices
        self._opening = threading.Lock()
        self._sealed: Sealed | None = None
        self._opened = False
        self._held = ExitStack()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`number` of the bundle and `sealed` → the same, a stage further.

        Raises:
            CxrError: What no waiting mends, or was waited for in vain.
        """
        events: list[Event] = []
        with _without_names(type(self).__name__):
            sealed = self._ready()
            done = self.through(sealed.open(row["sealed"]), lambda event: None if isinstance(event, Begun) else events.append(event))
            if events:
                self._notices.put.remote(sealed.seal(events))
            return {"number": row["number"], "sealed": sealed.seal(done)}

    def _ready(self) -> Sealed:
        """Opened at the first bundle, not when the actor is made: then what is wrong here is told to who asks."""
        with self._opening:
            own = os.environ.get("CXR_PSEUDONYM_KEY", "")  # not from who asks: a key does not travel
            if self._sealed is None or not self._opened:
                keys = open_pseudonyms(replace(self._keys, key=own))
                self._sealed = Sealed(keys.secret(PURPOSE))
                self.open(self._sealed.open(self._sealed_plan), self._held.enter_context(keys), self._held)
                self._opened = True
            return self._sealed

    def _patience(self, plan: Plan[Any], watch: pipeline.Watch) -> Patience:
        return Patience(threading.Event(), plan.patience_s, self._tell, watch)

    def _tell(self, words: str) -> None:
        if self._sealed is not None:
            self._notices.put.remote(self._sealed.seal([words]))

    @abstractmethod
    def open(self, plan: Plan[Any], keys: Pseudonyms, held: ExitStack) -> None:
        """Opens what this stage needs."""

    @abstractmethod
    def through(self, bundle: Bundle, watch: pipeline.Watch) -> Bundle:
        """One bundle."""


class Read(Stage):
    """Files → films. One actor fetches and decodes them: a file of up to a GiB would cross the cluster to become 64 kB there."""

    def open(self, plan: Plan[Any], keys: Pseudonyms, held: ExitStack) -> None:  # noqa: D102 (as `Stage` says)
        self._reader = held.enter_context(ObjectReader(plan.limits, self._patience(plan, lambda _: None)))

    def through(self, bundle: Bundle, watch: pipeline.Watch) -> Bundle:  # noqa: D102
        reading = [(work, self._reader.submit(work.path, work.member)) for work in bundle.films]
        films: list[tuple[Numbered, Film]] = []
        failed: dict[int, CxrError] = {}
        for work, future in reading:
            try:
                films.append((work, future.result()))
            except InputError as error:
                watch(WasRead(None, error))
                failed[work.number] = error
        return Bundle(films, failed)


class Identify(Read):
    """Places of files → which files they are. No stage of the data set: an ingest asks before it decides what must be embedded."""

    def through(self, bundle: Bundle, watch: pipeline.Watch) -> Bundle:  # noqa: D102
        (work,) = bundle.films
        try:
            return Bundle([self._reader.identity(work.path, work.member).result()])
        except InputError as error:
            return Bundle([], {work.number: error})


class Embed(Stage):
    """Films → what the networks say of them, by the pipeline that also serves one machine: with its batches, retries and doubts."""

    def open(self, plan: Plan[Any], keys: Pseudonyms, held: ExitStack) -> None:  # noqa: D102
        self._plan = plan
        self._inference = held.enter_context(self._patience(plan, lambda _: None).until("triton", plan.inference))
        if self._inference.model_version != plan.model_version:
            raise SetupError(
                "a worker of the cluster has other weights than who asks it",
                expected=plan.model_version,
                got=self._inference.model_version,
                next_step="install the same version on every node, or ask one Triton (--inference triton)",
            )

    def through(self, bundle: Bundle, watch: pipeline.Watch) -> Bundle:  # noqa: D102
        known = _Known({(work.path, work.member): film for work, film in bundle.films})
        sink = _Collected(self._plan.outputs)
        works = [work for work, _ in bundle.films]
        pipeline.run(works, known, self._inference, sink, tell=self._tell, watch=watch, patience_s=self._plan.patience_s)
        return Bundle(sink.seen, bundle.failed | sink.failures)


class Ask(Stage):
    """What the networks say → answers."""

    def open(self, plan: Plan[Any], keys: Pseudonyms, held: ExitStack) -> None:  # noqa: D102
        if plan.asker is None:
            raise TypeError("a plan without an asker has no such stage")
        self._plan = plan
        self._events = threading.local()
        asker = plan.asker
        self._asker = held.enter_context(self._patience(plan, lambda _: None).until("milvus", lambda: asker(keys, self._watch)))

    def _watch(self, event: Event) -> None:
        """Of the asker, to the bundle that this thread is at."""
        self._events.watch(event)

    def through(self, bundle: Bundle, watch: pipeline.Watch) -> Bundle:  # noqa: D102
        self._events.watch = watch
        if not bundle.films:
            return bundle
        seen = [replace(one, work=one.work.work) for one in bundle.films]
        with timed() as took:
            result = self._patience(self._plan, watch).until(
                "milvus", lambda: self._asker.keep(seen), probe=self._asker.probe, attempts=pipeline.KEEPING_ATTEMPTS
            )
        return Bundle([], bundle.failed, tuple(one.work.number for one in bundle.films), result, traces_of(seen), took)


class Notices:
    """An actor between the workers and who gave the command: what is told of the run, sealed, until it is fetched."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []

    def put(self, sealed: bytes) -> None:
        """Events, or words for people."""
        self._waiting.append(sealed)

    def take(self) -> list[bytes]:
        """All that have come since the last call."""
        waiting, self._waiting = self._waiting, []
        return waiting


class _Known:
    """The reader of films that have been read."""

    def __init__(self, films: Mapping[tuple[Path, str | None], Film]) -> None:
        self._films = films

    def submit(self, path: Path, member: str | None = None) -> Future[Film]:
        done: Future[Film] = Future()
        done.set_result(self._films[path, member])
        return done


class _Collected:
    """A sink that keeps nothing."""

    def __init__(self, outputs: Sequence[TensorSpec]) -> None:
        self.outputs = outputs
        self.seen: list[Seen[Numbered]] = []
        self.failures: dict[int, CxrError] = {}

    def keep(self, seen: Sequence[Seen[Numbered]]) -> Sequence[Seen[Numbered]]:
        return seen

    def kept(self, result: Sequence[Seen[Numbered]]) -> None:
        self.seen += result

    def failed(self, work: Numbered, error: CxrError) -> None:
        self.failures[work.number] = error


@contextmanager
def _without_names(stage: str) -> Generator[None]:
    """What nobody expected is told by its kind and its place alone: Ray logs it, and its words may name a film."""
    try:
        yield
    except CxrError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ServiceError(
            f"a worker of the cluster failed at {stage.lower()}",
            got=f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}",
            next_step="give the same command again; if it fails again, report that",
        ) from None
