"""Spans as a collector receives them: a real OTLP exporter, and a server that reads the protocol's own messages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from collector import Collector, collecting
from cxr_retrieval.archive.watching import Answered, Asked, Dissolved, Event, Kept, Took, Unanswered
from cxr_retrieval.errors import ServerFaultError, SetupError
from cxr_retrieval.inference.trace import Trace
from cxr_retrieval.telemetry.spans import exported


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as opened:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", opened.endpoint)
        yield opened


def test_a_group_is_one_trace_from_file_to_result(collector: Collector) -> None:
    trace, read = Trace(), Took(1000.0, 0.5)
    with exported("1.2.3") as watch:
        watch(Asked(trace, 8, 100, read, 0))
        watch(Unanswered(trace, ServerFaultError("MÜLLER")))
        again = trace.again()
        watch(Asked(again, 8, 100, read, 1))
        watch(Answered(again, 8, Took(1001.0, 0.25)))
        watch(Kept({trace.trace_id: 5}, Took(1002.0, 0.125), Took(1003.0, 0.0625)))
        watch(Kept({trace.trace_id: 3}, Took(1004.0, 0.125), Took(1005.0, 0.0625)))
    spans = collector.spans()
    assert {span.trace_id.hex() for span in spans} == {trace.trace_id}
    root = next(span for span in spans if not span.parent_span_id)
    assert root.name == "films"
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (1_000_000_000_000, 1_005_062_500_000)
    assert all(span.parent_span_id == root.span_id for span in spans if span is not root)
    assert sorted(span.name for span in spans) == ["films", "infer", "infer", "keep", "keep", "read", "record", "record"]
    infer = {span.span_id.hex(): span.status.message for span in spans if span.name == "infer"}
    assert infer == {trace.span_id: "ServerFaultError", again.span_id: ""}, "what Triton takes for its parents"
    about = collector.requests[0].resource_spans[0].resource.attributes
    assert {one.key: one.value.string_value for one in about}["service.name"] == "cxr-retrieval"
    assert b"M\xc3\x9cLLER" not in b"".join(request.SerializeToString() for request in collector.requests)


def test_what_is_not_over_is_sent_as_it_stands(collector: Collector, events: tuple[Event, ...]) -> None:
    with exported("1") as watch:
        for event in events:
            watch(event)
        for trace in (Trace(), Trace()):
            watch(Asked(trace, 1, 1, Took(1.0), 0))
        watch(Unanswered(trace, ServerFaultError("twice")))
        watch(Dissolved(trace))
    assert [span.name for span in collector.spans()].count("films") == 3


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(SetupError, match="expected OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf; got grpc"), exported("1"):
        pytest.fail("must not begin")
