"""A run as OpenTelemetry spans: for each group of films that Triton is asked about, read → infer → keep → record, in one trace.

The trace is the one that the request to Triton carries, so that the server's own spans join it. A search or upsert is for several groups:
each has its span, with the same times. Attributes count and name kinds of errors; none names a file, a patient or an image.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context

from cxr_retrieval.archive.watching import Answered, Asked, Dissolved, Event, Kept, Took, Unanswered, Watch
from cxr_retrieval.errors import SetupError
from cxr_retrieval.inference.trace import Trace

_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HTTP: Final = "http/protobuf"


@contextmanager
def exported(version: str) -> Generator[Watch]:
    """Yields a watcher that sends spans to OTEL_EXPORTER_OTLP_ENDPOINT; OpenTelemetry's other variables count, too.

    Raises:
        SetupError: Another protocol than OTLP over HTTP is asked for.
    """
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), _HTTP)
    if protocol != _HTTP:
        raise SetupError(
            "this protocol of OpenTelemetry is not spoken here",
            expected=f"OTEL_EXPORTER_OTLP_PROTOCOL={_HTTP}",
            got=protocol,
            next_step="give the collector's HTTP endpoint, port 4318 as a rule",
        )
    ids = _Ids()
    about = Resource({"service.name": "cxr-retrieval", "service.version": version}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=about, id_generator=ids, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    spans = _Spans(provider, ids)
    try:
        yield spans
    finally:
        spans.end()
        provider.shutdown()


class _Ids(RandomIdGenerator):
    """Gives the next spans the ids that the request to Triton carries; random ones to the others."""

    def __init__(self) -> None:
        self.trace_id: str | None = None
        self.span_id: str | None = None

    def generate_trace_id(self) -> int:
        given, self.trace_id = self.trace_id, None
        return int(given, 16) if given else super().generate_trace_id()

    def generate_span_id(self) -> int:
        given, self.span_id = self.span_id, None
        return int(given, 16) if given else super().generate_span_id()


class _Spans:
    """The watcher: a root span `films` for each group, ended once all of them are kept, and below it one for each stage."""

    def __init__(self, provider: TracerProvider, ids: _Ids) -> None:
        self._tracer = provider.get_tracer("cxr_retrieval")
        self._ids = ids
        self._lock = threading.Lock()
        self._groups: dict[str, tuple[Span, int]] = {}
        self._requests: dict[str, Span] = {}

    def __call__(self, event: Event) -> None:
        with self._lock:
            match event:
                case Asked(trace, films, sent_bytes, read, attempt):
                    if trace.trace_id not in self._groups:
                        self._begin(trace, films, read)
                    about = {"cxr.films": films, "cxr.sent_bytes": sent_bytes, "cxr.attempt": attempt}
                    self._ids.span_id = trace.span_id
                    context = set_span_in_context(self._groups[trace.trace_id][0])
                    self._requests[trace.span_id] = self._tracer.start_span("infer", context, SpanKind.CLIENT, about)
                case Answered(trace):
                    self._requests.pop(trace.span_id).end()
                case Unanswered(trace, error):
                    request = self._requests.pop(trace.span_id)
                    request.set_status(Status(StatusCode.ERROR, type(error).__name__))
                    request.end()
                case Dissolved(trace):
                    self._groups.pop(trace.trace_id)[0].end()
                case Kept(traces, keep, record):
                    for trace_id, films in traces.items():
                        self._stage("keep", trace_id, keep, films)
                        self._stage("record", trace_id, record, films)
                        group, left = self._groups.pop(trace_id)
                        if left > films:
                            self._groups[trace_id] = (group, left - films)
                        else:
                            group.end(_ns(record.ended))
                case _:
                    pass

    def end(self) -> None:
        """What is not over ends here, as it stands."""
        with self._lock:
            for span in [*self._requests.values(), *(group for group, _ in self._groups.values())]:
                span.end()
            self._requests.clear()
            self._groups.clear()

    def _begin(self, trace: Trace, films: int, read: Took) -> None:
        self._ids.trace_id = trace.trace_id
        group = self._tracer.start_span("films", attributes={"cxr.films": films}, start_time=_ns(read.began))
        self._groups[trace.trace_id] = (group, films)
        self._stage("read", trace.trace_id, read, films)

    def _stage(self, name: str, trace_id: str, took: Took, films: int) -> None:
        context = set_span_in_context(self._groups[trace_id][0])
        span = self._tracer.start_span(name, context, attributes={"cxr.films": films}, start_time=_ns(took.began))
        span.end(_ns(took.ended))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
