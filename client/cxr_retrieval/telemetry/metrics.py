"""Metrics of a run in Prometheus' form, and its health, over HTTP while it lasts. They name nothing but servers and kinds of errors."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cxr_retrieval.archive.watching import (
    Answered,
    Arrived,
    Asked,
    Away,
    Back,
    Begun,
    Delivered,
    Depths,
    Event,
    Expected,
    Failed,
    Kept,
    Listening,
    Queue,
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
        self._arrived = Counter("cxr_dicom_instances", "Instances sent to the node, and what it did with them.", ["outcome"], registry=here)
        self._delivered = Counter("cxr_dicom_parcels", "Tries to send an answer.", ["destination", "outcome"], registry=here)
        self._queue: Callable[[], Queue] | None = None
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
            case Listening(look):
                self._watch_queue(look)
            case Arrived(what):
                self._arrived.labels(what).inc()
            case Delivered(destination, outcome):
                self._delivered.labels(destination, outcome).inc()
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

    def _watch_queue(self, look: Callable[[], Queue]) -> None:
        self._queue = look
        self.registry.register(_QueueNow(look))

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether all goes on as it should, and what is waited for; with the queue, where there is one."""
        waiting = {service: round(self._waiting_s(service), 1) for service in _SERVICES if self._waiting_s(service)}
        queue = {} if self._queue is None else asdict(self._queue())
        return not waiting, {"status": "waiting" if waiting else "ok", "waiting_for": waiting, **queue}

    def _waiting_s(self, service: str) -> float:
        with self._lock:
            since = self._since.get(service)
        return 0.0 if since is None else time.monotonic() - since


class _QueueNow(Collector):
    """A node's queue, looked at once each time that somebody asks."""

    def __init__(self, look: Callable[[], Queue]) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        queue = self._look()
        for name, about, value in (
            ("cxr_dicom_associations", "Associations that are open.", queue.associations),
            ("cxr_dicom_waiting", "Instances without an answer.", queue.waiting),
            ("cxr_dicom_oldest_seconds", "How long the oldest of them has waited.", queue.oldest_s),
            ("cxr_dicom_to_send", "Answers that other archives have not got yet.", queue.to_send),
            ("cxr_dicom_oldest_parcel_seconds", "How long the oldest of them has waited.", queue.oldest_parcel_s),
        ):
            yield GaugeMetricFamily(name, about, value)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    timeout = 10.0

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (its name there)
        pass


@contextmanager
def served(metrics: Metrics, host: str, port: int) -> Generator[str]:
    """Answers GET /metrics, and /health (200, or 503 while a server is waited for), at host:port until left; yields the address, with the
    port found where 0 was asked for.

    Raises:
        SetupError: The port is taken, or the address not ours.
    """
    counted: Any = make_wsgi_app(metrics.registry)

    def answered(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != "/health":
            return counted(environ, start)
        well, said = metrics.health()
        body = json.dumps(said).encode()
        start("200 OK" if well else "503 Service Unavailable", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    try:
        server = make_server(host, port, answered, _Server6 if ":" in host else _Server, _Silent)
    except OSError as error:
        raise SetupError(
            f"metrics cannot be served at {host}:{port}",
            expected="a free port of this machine",
            got=error.strerror or str(error),
            next_step="stop what uses it, or give another --metrics",
        ) from error
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="cxr-metrics", daemon=True)
    thread.start()
    try:
        yield f"{f'[{host}]' if ':' in host else host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
