"""Films in bulk on a cluster, seen from who gave the command: the engine that Ray is.

Works are drawn in windows; of each window a Ray Data set is made, a row for every bundle of films, which Ray takes through the stages
(`stages.py`): it deals them to actors on all nodes, holds back whoever is ahead when memory fills up, and does again what a lost worker or
node had. What comes out comes here, to the one sink, once for each film: the journal or the gallery is written by one process, so a run
that ends at any moment, with its cluster or without, goes on as one without a cluster does. The next window is drawn meanwhile.

Of logical CPUs the stages claim half of what there is, so that the actors of lost nodes find room on those that are left.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from tenacity import Retrying, stop_after_attempt

from cxr_retrieval.archive import pipeline
from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.archive.pipeline import KEPT_AT_ONCE, Engine, Seen, Sink, Work
from cxr_retrieval.archive.sealed import Sealed
from cxr_retrieval.archive.stages import PURPOSE, Ask, Bundle, Embed, Identify, Notices, Numbered, Place, Plan, Read, Stage, traces_of
from cxr_retrieval.archive.watching import Begun, Depths, Kept, Watch, timed
from cxr_retrieval.cases.pseudonyms import open_pseudonyms
from cxr_retrieval.errors import CxrError, ServiceError, SetupError, StoreError
from cxr_retrieval.radiograph.decoding import Identity
from cxr_retrieval.settings import PseudonymSettings

_FIRST_WINDOW: Final = 1 << 14
_LARGEST_WINDOW: Final = 1 << 20
"""Films; of each its place is in memory here, about 1 kB."""
_GATHERED_S: Final = 10.0
"""A window that is not full by then begins with what there is: workers wait."""
_POLL_S: Final = 0.5
_ANSWER_S: Final = 10.0
_STARTS: Final = 3
"""Ray gives a node up that is not there within half a minute; its first start, when its Python is compiled, may take that."""
_SILENCE_S: Final = 120.0
"""After which it is said that nothing comes."""
_CORES: Final[dict[type[Stage], int]] = {Read: 2, Embed: 1, Ask: 4}
"""For which one actor is made: what an archive costs is mostly its networks."""
_IN_FLIGHT: Final[dict[type[Stage], int]] = {Read: 2, Embed: 4, Ask: 2}
"""Bundles that an actor has at a time; requests to a Triton that is far away need most."""
_IDENTIFIED: Final = 4
"""Files that an actor reads at a time, to tell which they are."""
_CLAIMED: Final = 0.5
"""Of the CPUs that there are."""

W = TypeVar("W", bound=Work)
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class Room:
    """What a cluster has: nodes with CPUs, and of all these together CPUs and GPUs. `own`: it was started by this process."""

    nodes: int
    cpus: float
    gpus: float
    own: bool


@contextmanager
def connected(address: str, keys: PseudonymSettings) -> Generator[Room]:
    """A driver of the cluster at `address`, or, where that is empty, of one started on this machine until the end.

    Raises:
        SetupError: Ray is not installed, or answers at no such address; a cluster without CPUs.
    """
    try:
        import ray
    except ImportError as error:
        raise SetupError("Ray is not installed", expected="the extra ray", next_step="pip install 'cxr-retrieval[ray]'") from error
    if address.startswith("ray://"):
        raise SetupError(
            "a Ray client cannot conduct bulk work",
            expected="HOST:PORT of the cluster's head, given on one of its nodes, or auto",
            got=address,
            next_step="run the command on the head, for example by `ray job submit` or a RayJob (docs/bulk.md)",
        )
    with _key_for_children(keys, mine=not address), _handlers_kept(), _core_quiet():
        try:
            _refuse_silence(address)
            Retrying(stop=stop_after_attempt(1 if address else _STARTS), reraise=True)(_init, address)
        except Exception as error:  # Ray raises that itself where a node does not start in time
            raise SetupError(
                f"no Ray cluster at {address or 'this machine'}",
                got=" ".join(str(error).split())[:200],
                next_step="start one with `ray start --head`, or correct --address",
            ) from error
    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
        cpus, gpus = (sum(float(node["Resources"].get(kind, 0)) for node in nodes) for kind in ("CPU", "GPU"))
        if not cpus:
            raise SetupError(
                "the Ray cluster has no CPUs", expected="at least one worker", next_step="start workers: `ray start --address`"
            )
        yield Room(len(nodes), cpus, gpus, own=not address)
    finally:
        ray.shutdown()


def _init(address: str) -> None:
    import ray

    try:
        ray.init(address or "local", include_dashboard=None if address else False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception:
        ray.shutdown()
        raise


def _refuse_silence(address: str) -> None:
    """Ray would wait for minutes.

    Raises:
        OSError: Nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), _ANSWER_S).close()


@contextmanager
def _key_for_children(keys: PseudonymSettings, *, mine: bool) -> Generator[None]:
    """Workers of a cluster on this machine inherit a key that came from the environment, as those of another have it from theirs."""
    if not mine or not keys.key:
        yield
        return
    os.environ["CXR_PSEUDONYM_KEY"] = keys.key
    try:
        yield
    finally:
        del os.environ["CXR_PSEUDONYM_KEY"]


@contextmanager
def _handlers_kept() -> Generator[None]:
    """Ray would have SIGTERM for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _core_quiet() -> Generator[None]:
    """Ray's core would write between our words, errors that are none among them, and says so where it is told not to."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 (a device)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def engine_on(room: Room, plan: Plan[Any], keys: PseudonymSettings) -> Engine:
    """The engine that is a cluster, to which this process is `connected`.

    Args:
        keys: Of pseudonyms; what travels is sealed by a key that follows from theirs. Workers look for theirs at the same place.

    Raises:
        SetupError: No key here, or no GPU where one is wanted.
    """
    if plan.gpu and room.gpus < 1:
        raise SetupError(
            "the Ray cluster has no GPUs",
            expected="one for each worker's networks, as --inference tensorrt wants them",
            next_step="start workers with --num-gpus, or take --inference openvino or triton",
        )
    sealed, keyless = _sealed(room, keys)

    def through(
        works: Iterable[W | None],
        sink: Sink[W, R],
        *,
        probe_store: Callable[[], None],
        stop: threading.Event,
        tell: Callable[[str], None],
        watch: Watch,
        patience_s: float,
    ) -> None:
        patience = Patience(stop, patience_s, tell, watch)
        conductor = _Conductor(room, plan, keyless, sealed, sink, probe_store, patience)
        watch(Begun(conductor.look))
        with ThreadPoolExecutor(1, "cxr-drawing") as drawing:
            drawn = windows(works, stop)
            window: list[W] = next(drawn, [])
            while window and not stop.is_set():
                following: Future[list[W]] = drawing.submit(lambda: next(drawn, []))
                conductor.take(window)
                window = following.result()

    return through


def identities_on(room: Room, plan: Plan[Any], keys: PseudonymSettings) -> Callable[[Path, str | None], Identity]:
    """Which file lies at a place, as the nodes of a cluster tell; from any thread. Its actors are made when it is first asked.

    Raises:
        SetupError: As `engine_on`.
    """
    import ray
    from ray.exceptions import RayError

    sealed, keyless = _sealed(room, keys)
    lock = threading.Lock()
    actors: list[Any] = []
    turn = itertools.count()

    def identity(path: Path, member: str | None) -> Identity:
        with lock:
            if not actors:
                made: Any = ray.remote(Identify)
                forever = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": "SPREAD"}
                arguments = (keyless, sealed.seal(plan), _notices())
                ways = made.options(num_cpus=0, max_concurrency=_IDENTIFIED, **forever)
                actors.extend(ways.remote(*arguments) for _ in range(max(1, int(room.cpus))))
            actor = actors[next(turn) % len(actors)]
        row = {"number": 0, "sealed": sealed.seal(Bundle([Numbered(0, Place(path, member))]))}
        try:
            told: Any = ray.get(actor.__call__.remote(row))
        except RayError as error:
            raise _ours(error) from error
        answer: Bundle = sealed.open(told["sealed"])
        if answer.failed:
            raise answer.failed[0]
        return answer.films[0]

    return identity


def _sealed(room: Room, keys: PseudonymSettings) -> tuple[Sealed, PseudonymSettings]:
    """What seals by the key of pseudonyms, and where workers look for theirs."""
    with open_pseudonyms(keys, create=room.own) as opened:
        return Sealed(opened.secret(PURPOSE)), PseudonymSettings(keys.key_file, None, "")


def _notices() -> Any:
    """Beside who gave the command: it is lost with him alone."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here: Any = ray.get_runtime_context()
    made: Any = ray.remote(Notices)
    return made.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(here.get_node_id(), soft=False)).remote()


def windows(works: Iterable[T | None], stop: threading.Event) -> Iterator[list[T]]:
    """Twice as many each time, for actors are made anew for each."""
    size, window, began = _FIRST_WINDOW, list[T](), time.monotonic()
    for work in works:
        if stop.is_set():
            return
        if work is not None:
            window.append(work)
        if len(window) == size or (window and time.monotonic() > began + _GATHERED_S):
            yield window
            size, window, began = min(2 * size, _LARGEST_WINDOW), [], time.monotonic()
    if window:
        yield window


class _Conductor:
    """Takes windows through, one after the other."""

    def __init__(
        self,
        room: Room,
        plan: Plan[Any],
        keys: PseudonymSettings,
        sealed: Sealed,
        sink: Sink[Any, Any],
        probe_store: Callable[[], None],
        patience: Patience,
    ) -> None:
        self._room, self._plan, self._keys, self._sealed = room, plan, keys, sealed
        self._sink, self._probe_store, self._patience = sink, probe_store, patience
        self._under_way = 0
        self._notices = _notices()

    def look(self) -> Depths:
        """How many films the cluster has; where in it, Ray's dashboard shows."""
        return Depths(self._under_way, 0, 0, 0, 0, 0)

    def take(self, window: Sequence[Any]) -> None:
        """Every work of a window; returns when all have come back, or `stop` is set."""
        works = dict(enumerate(window))
        self._under_way = len(works)
        last = time.monotonic()
        for bundle in self._bundles(window):
            self._fetch_notices()
            if bundle is not None:
                try:
                    self._settle(bundle, works)
                except StoreError:
                    if not self._patience.stop.is_set():
                        raise
                self._under_way = len(works)
                last = time.monotonic()
            elif time.monotonic() > last + _SILENCE_S:
                last = time.monotonic()
                self._patience.tell(f"nothing came from the cluster for {_SILENCE_S:.0f} s; {self._state()}")
            if self._patience.stop.is_set():
                return
        self._fetch_notices()
        if works:
            raise ServiceError(
                "the cluster ended without an answer for every film",
                expected=f"{len(window)} films",
                got=f"{len(window) - len(works)}",
                next_step="give the same command again: it goes on from here",
            )

    def _settle(self, bundle: Bundle, works: dict[int, Any]) -> None:
        for number, error in bundle.failed.items():
            self._sink.failed(works.pop(number), error)
        kept, took, traces = bundle.result, bundle.took, bundle.traces
        if bundle.films:
            seen = [Seen(works[one.work.number], one.film, one.outputs, one.seconds, one.trace) for one in bundle.films]
            with timed() as took:
                kept = self._patience.until(
                    "milvus", lambda: self._sink.keep(seen), probe=self._probe_store, attempts=pipeline.KEEPING_ATTEMPTS
                )
            traces = traces_of(seen)
        if traces:
            with timed() as record:
                self._sink.kept(kept)
            self._patience.watch(Kept(traces, took, record))
        for number in (*bundle.answered, *(one.work.number for one in bundle.films)):
            del works[number]

    def _bundles(self, window: Sequence[Any]) -> Iterator[Bundle | None]:
        """Bundles as they come; None: none has for a while."""
        came: queue.Queue[Bundle | BaseException | None] = queue.Queue(4)
        left = threading.Event()

        def put(one: Bundle | BaseException | None) -> bool:
            while not left.is_set():
                with suppress(queue.Full):
                    came.put(one, timeout=_POLL_S)
                    return True
            return False

        def iterate() -> None:
            try:
                rows: Any = self._data_set(window).iter_rows()
                numbers = set[int]()
                for row in rows:
                    if row["number"] in numbers:  # a film has one result, whatever was done twice
                        continue
                    numbers.add(row["number"])
                    if not put(self._sealed.open(row["sealed"])):
                        return
                put(None)
            except BaseException as error:  # told by who waits
                put(error)

        threading.Thread(target=iterate, name="cxr-cluster", daemon=True).start()
        try:
            while True:
                try:
                    one = came.get(timeout=_POLL_S)
                except queue.Empty:
                    yield None
                    continue
                if one is None:
                    return
                if isinstance(one, BaseException):
                    raise _ours(one) from one
                yield one
        finally:
            left.set()

    def _data_set(self, window: Sequence[Any]) -> Any:
        import pyarrow as pa
        import ray

        context: Any = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.raise_original_map_exception = True
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends a run is told once, by us
        remote = self._plan.asker is None
        numbered = [Numbered(number, Place(one.path, one.member) if remote else one) for number, one in enumerate(window)]
        bundles = [
            pa.table(
                {
                    "number": [start],
                    "sealed": pa.array([self._sealed.seal(Bundle(numbered[start : start + KEPT_AT_ONCE]))], pa.large_binary()),
                }
            )
            for start in range(0, len(numbered), KEPT_AT_ONCE)
        ]
        data: Any = ray.data.from_arrow(bundles)
        stages = [Read, Embed] if self._plan.asker is None else [Read, Embed, Ask]
        cpus = int(max(1, self._room.cpus))
        arguments = (self._keys, self._sealed.seal(self._plan), self._notices)
        for stage in stages:
            gpu = self._plan.gpu and stage is Embed
            size = max(1, min(int(self._room.gpus) if gpu else -(-cpus // _CORES[stage]), len(bundles)))
            data = data.map(
                stage,
                fn_constructor_args=arguments,
                compute=ray.data.ActorPoolStrategy(
                    size=size,
                    max_tasks_in_flight_per_actor=2 * _IN_FLIGHT[stage],
                    max_concurrent_calls_per_actor=_IN_FLIGHT[stage],
                    enable_true_multi_threading=True,
                ),
                num_cpus=_CLAIMED * self._room.cpus / len(stages) / size,
                num_gpus=1 if gpu else None,
            )
        return data

    def _fetch_notices(self) -> None:
        import ray

        for sealed in ray.get(self._notices.take.remote()):
            for one in self._sealed.open(sealed):
                if isinstance(one, str):
                    self._patience.tell(one)
                else:
                    self._patience.watch(one)

    def _state(self) -> str:
        """For people."""
        import ray

        alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
        return f"{len(alive)} of {self._room.nodes} nodes are there"


def _ours(error: BaseException) -> BaseException:
    """What Ray wraps, where it is ours; else that it failed, in Ray's words."""
    at: BaseException | None = error
    while at is not None:
        cause: BaseException | None = getattr(at, "cause", None)
        for one in (at, cause):
            if isinstance(one, CxrError):
                return one
        at = cause if isinstance(cause, BaseException) else at.__cause__
    said = " ".join(str(error).split())
    return ServiceError(
        "Ray could not go on", got=f"{type(error).__name__}: {said[:300]}", next_step="see to the cluster, then give the same command again"
    )
