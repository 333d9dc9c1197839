"""Metrics of a run in Prometheus' form, over HTTP while it lasts. They count; they name nothing but servers and kinds of errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from cxr_retrieval.archive.watching import (
    Answered,
    Asked,
    Away,
    Back,
    Begun,
    Depths,
    Event,
    Expected,
    Failed,
    Kept,
    Read,
    Retried,
    Settled,
)
from cxr_retrieval.errors import SetupError

_SERVICES: Final = ("triton", "milvus")
_STAGES: Final = ("read", "infer", "keep", "record")
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class _Place:
    """Where films wait, and how many do."""

    name: str
    films: Callable[[Depths], int]


_PLACES: Final = (
    _Place("reading", lambda depths: depths.reading),
    _Place("to_ask", lambda depths: depths.to_ask),
    _Place("doubted", lambda depths: depths.doubted),
    _Place("to_keep", lambda depths: depths.to_keep),
)


class Metrics:
    """A watcher. What it counts is in a registry of its own; `docs/observability.md` has the table."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        here = self.registry
        self._files = Counter("cxr_files", "Files dealt with in this run.", ["state"], registry=here)
        self._expected = Gauge("cxr_files_expected", "Files that this run was to deal with when it began.", registry=here)
        self._errors = Counter("cxr_errors", "Files that cannot be used.", ["error"], registry=here)
        self._retries = Counter("cxr_retries", "Calls made again.", ["service", "reason"], registry=here)
        self._away = Gauge("cxr_breaker_open", "1 while a server is waited for and nothing more is sent to it.", ["service"], registry=here)
        self._waiting = Gauge("cxr_waiting_seconds", "How long a server is being waited for by now.", ["service"], registry=here)
        self._waited = Counter("cxr_waited_seconds", "How long a server was waited for, whenever it came back.", ["service"], registry=here)
        self._sent = Counter("cxr_sent_bytes", "Pixels sent to Triton.", registry=here)
        self._films = Counter("cxr_films_answered", "Films that Triton has answered for.", registry=here)
        self._in_flight = Gauge("cxr_requests_in_flight", "Requests that Triton has.", registry=here)
        self._limit = Gauge("cxr_requests_in_flight_limit", "Requests that Triton may have at once, by its own pace.", registry=here)
        self._held = Gauge("cxr_films_held", "Films between file and result.", ["place"], registry=here)
        self._stages = Histogram(
            "cxr_stage_seconds",
            "Of a file (read), a request (infer), a search or upsert (keep), a commit (record).",
            ["stage"],
            buckets=_SECONDS,
            registry=here,
        )
        Info("cxr_build", "What runs.", registry=here).info({"version": version})
        self._since: dict[str, float] = {}
        self._lock = threading.Lock()
        for service in _SERVICES:
            self._away.labels(service).set(0)
            self._waited.labels(service)
            self._waiting.labels(service).set_function(lambda service=service: self._waiting_s(service))
        for stage in _STAGES:
            self._stages.labels(stage)
        for place in _PLACES:
            self._held.labels(place.name).set(0)

    def __call__(self, event: Event) -> None:
        """Counts."""
        match event:
            case Begun(look):
                self._watch_depths(look)
            case Expected(films):
                self._expected.set(films)
            case Read(seconds):
                if seconds is not None:
                    self._stages.labels("read").observe(seconds)
            case Asked(sent_bytes=sent_bytes):
                self._sent.inc(sent_bytes)
            case Answered(films=films, took=took):
                self._films.inc(films)
                self._stages.labels("infer").observe(took.seconds)
            case Kept(keep=keep, record=record):
                self._stages.labels("keep").observe(keep.seconds)
                self._stages.labels("record").observe(record.seconds)
            case Settled(states):
                for state, count in states.items():
                    self._files.labels(state).inc(count)
            case Failed(error):
                self._errors.labels(type(error).__name__).inc()
            case Retried(service, reason):
                self._retries.labels(service, reason).inc()
            case Away(service):
                self._away.labels(service).set(1)
                with self._lock:
                    self._since[service] = time.monotonic()
            case Back(service, seconds):
                self._away.labels(service).set(0)
                self._waited.labels(service).inc(seconds)
                with self._lock:
                    self._since.pop(service, None)
            case _:
                pass

    def _watch_depths(self, look: Callable[[], Depths]) -> None:
        """Asked when somebody asks us: what goes on pays nothing for it."""
        self._in_flight.set_function(lambda: look().in_flight)
        self._limit.set_function(lambda: look().limit)
        for place in _PLACES:
            self._held.labels(place.name).set_function(lambda place=place: place.films(look()))

    def _waiting_s(self, service: str) -> float:
        with self._lock:
            since = self._since.get(service)
        return 0.0 if since is None else time.monotonic() - since


@contextmanager
def served(metrics: Metrics, host: str, port: int) -> Generator[str]:
    """Answers GET at host:port until left; yields the address, with the port found where 0 was asked for.

    Raises:
        SetupError: The port is taken, or the address not ours.
    """
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise SetupError(
            f"metrics cannot be served at {host}:{port}",
            expected="a free port of this machine",
            got=error.strerror or str(error),
            next_step="stop what uses it, or give another --metrics",
        ) from error
    try:
        yield f"{f'[{host}]' if ':' in host else host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
