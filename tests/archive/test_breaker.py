"""Whom a failure is blamed on: a real Triton behind a proxy that fails what it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.archive.pipeline import run
from cxr_retrieval.archive.watching import Asked, Away, Back, Event, Retried
from cxr_retrieval.errors import InferenceError, ServerFaultError, StoreError, StoreFullError
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.serving.server import Endpoints
from cxr_retrieval.settings import TritonSettings
from faults import Harm, Proxy, Request, before
from sinks import Counting, Numbered


@pytest.fixture
def proxy(quick: Endpoints) -> Iterator[Proxy]:
    with before(quick.grpc) as opened:
        yield opened


def containing(square: NDArray[np.uint8]) -> Harm:
    """Fails requests that hold this picture."""
    wanted = square.tobytes()
    return lambda request: grpc.StatusCode.INTERNAL if wanted in request.raw_input_contents[0] else None


def everything(_: Request) -> grpc.StatusCode:
    return grpc.StatusCode.INTERNAL


def fail_everything(proxy: Proxy) -> None:
    proxy.harm = everything


def be_too_slow(proxy: Proxy) -> None:
    proxy.delay_s = 2.5


def unload(proxy: Proxy) -> None:
    proxy.harm = lambda _: grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("harm", [fail_everything, be_too_slow, unload])
def test_a_triton_that_serves_nobody_is_waited_for_and_nothing_fails(
    harm: Callable[[Proxy], None], films: list[Path], reader: FilmReader, proxy: Proxy
) -> None:
    """A few requests fail; then only our own picture is sent, one at a time, until it is answered."""
    events: list[Event] = []
    away = threading.Event()

    def watch(event: Event) -> None:
        events.append(event)
        if isinstance(event, Away):
            away.set()

    sink, told = Counting(), list[str]()
    with TritonClient(TritonSettings(proxy.address, timeout_s=2)) as triton, ThreadPoolExecutor(1) as pool:
        harm(proxy)
        works = [Numbered(films[number % 9], number) for number in range(16)]
        running = pool.submit(run, works, reader, triton, sink, tell=told.append, watch=watch)
        assert away.wait(60)
        sent = [event for event in events if isinstance(event, Asked)]
        while proxy.count < len(sent) + 2 and not running.done():
            time.sleep(0.05)
        assert [event for event in events if isinstance(event, Asked)] == sent, "no film is sent while it is away"
        assert len(sent) <= 6
        assert {request.inputs[0].shape[0] for request, _ in proxy.asked[len(sent) :]} == {1}
        proxy.harm, proxy.delay_s = lambda _: None, 0.0
        running.result()
    assert sink.bad == []
    assert sorted(sink.numbers) == list(range(16))
    assert "Waiting for it" in told[0]
    assert "Triton is back" in told[-1]
    assert any(isinstance(event, Back) for event in events)


def test_the_one_to_blame_is_found_among_good_ones(films: list[Path], squares: NDArray[np.uint8], reader: FilmReader, proxy: Proxy) -> None:
    proxy.harm = containing(squares[4, 0])
    events: list[Event] = []
    sink = Counting()
    with TritonClient(TritonSettings(proxy.address)) as triton:
        run([Numbered(films[number % 9], number) for number in range(20)], reader, triton, sink, watch=events.append)
    assert sorted(sink.bad) == [number for number in range(20) if number % 9 == 4]
    assert sorted(sink.numbers) == [number for number in range(20) if number % 9 != 4]
    assert not any(isinstance(event, Away) for event in events)
    assert any(isinstance(event, Retried) and event.reason == "ServerFaultError" for event in events)


def test_films_that_are_all_to_blame_fail_and_hold_up_nothing(
    films: list[Path], squares: NDArray[np.uint8], reader: FilmReader, proxy: Proxy
) -> None:
    """No film is ever answered, but our own picture is: nobody waits for a server that serves."""
    proxy.harm = containing(squares[4, 0])
    told: list[str] = []
    sink = Counting()
    with TritonClient(TritonSettings(proxy.address)) as triton:
        run([Numbered(films[4], number) for number in range(3)], reader, triton, sink, tell=told.append)
    assert sorted(sink.bad) == [0, 1, 2]
    assert told == []


def test_patience_with_a_triton_that_fails_everything_ends(films: list[Path], reader: FilmReader, proxy: Proxy) -> None:
    proxy.harm = everything
    sink = Counting()
    with TritonClient(TritonSettings(proxy.address)) as triton, pytest.raises(ServerFaultError, match="the proxy of a test fails this"):
        run([Numbered(path, number) for number, path in enumerate(films)], reader, triton, sink, patience_s=1)
    assert sink.numbers == sink.bad == []


def test_what_no_waiting_mends_ends_the_run_and_is_no_films_fault(films: list[Path], reader: FilmReader, proxy: Proxy) -> None:
    proxy.harm = lambda _: grpc.StatusCode.UNAUTHENTICATED
    sink = Counting()
    with TritonClient(TritonSettings(proxy.address)) as triton, pytest.raises(InferenceError, match="refused access"):
        run([Numbered(path, number) for number, path in enumerate(films)], reader, triton, sink)
    assert sink.numbers == sink.bad == []


def test_each_request_carries_its_trace(films: list[Path], reader: FilmReader, proxy: Proxy) -> None:
    events: list[Event] = []
    with TritonClient(TritonSettings(proxy.address)) as triton:
        run([Numbered(path, number) for number, path in enumerate(films)], reader, triton, Counting(), watch=events.append)
    asked = {event.trace.trace_id: event.trace.traceparent for event in events if isinstance(event, Asked)}
    assert {request.id: metadata["traceparent"] for request, metadata in proxy.asked} == asked
    assert all(parent == f"00-{trace_id}-{parent[36:52]}-01" and len(parent) == 55 for trace_id, parent in asked.items())


def test_a_full_store_is_waited_for_longer_than_one_that_refuses() -> None:
    """The same number of refusals: one that says that it may pass is believed, the other ends it."""

    def refusing(error: StoreError) -> Callable[[], str]:
        troubles = [error] * 3

        def call() -> str:
            if troubles:
                raise troubles.pop()
            return "stored"

        return call

    patience = Patience(threading.Event(), 60)
    assert patience.until("milvus", refusing(StoreFullError("no room on its disk"))) == "stored"
    with pytest.raises(StoreError, match="another schema"):
        patience.until("milvus", refusing(StoreError("another schema")), attempts=2)
