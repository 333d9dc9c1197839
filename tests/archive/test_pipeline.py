"""The pipeline between fakes of nobody: a real reader and Triton, and a sink that counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cxr_retrieval.archive import pipeline
from cxr_retrieval.archive.pipeline import Seen, run
from cxr_retrieval.errors import StoreDownError, StoreError
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from sinks import Counting, Numbered


def test_each_work_is_kept_or_failed_once_and_bound_to_its_own_film(
    films: list[Path], reader: FilmReader, quick_client: TritonClient, squares: NDArray[np.uint8], tmp_path: Path
) -> None:
    (tmp_path / "page.png").write_text("no picture")
    works = [Numbered(tmp_path / "page.png" if number % 7 == 3 else films[number % 9], number) for number in range(83)]
    sink = Counting()
    run(works, reader, quick_client, sink)
    assert sorted(sink.bad) == [number for number in range(83) if number % 7 == 3]
    assert sorted(sink.numbers) == [number for number in range(83) if number % 7 != 3]
    alone = quick_client.embed(squares)
    assert (alone @ alone.T - np.eye(9)).max() < 0.999, "one is told from another"
    for number, embedding in sink.embeddings.items():
        assert float((np.asarray(embedding) * alone[number % 9]).sum()) > 0.9999


def test_nothing_is_nothing(reader: FilmReader, quick_client: TritonClient) -> None:
    sink = Counting()
    run([], reader, quick_client, sink)
    assert sink.numbers == sink.bad == []


def test_a_store_that_was_away_is_asked_again(films: list[Path], reader: FilmReader, quick_client: TritonClient) -> None:
    sink, told, probes = Counting(StoreDownError("no Milvus answers"), StoreError("not loaded")), list[str](), list[int]()
    away = [StoreDownError("still none"), StoreDownError("still none")]

    def probe() -> None:
        probes.append(1)
        if away:
            raise away.pop()

    run([Numbered(path, number) for number, path in enumerate(films)], reader, quick_client, sink, probe_store=probe, tell=told.append)
    assert sorted(sink.numbers) == list(range(9))
    assert len(probes) == 4
    assert told[0] == "Milvus is away: no Milvus answers. Waiting for it"
    assert "Milvus is back" in told[1]


def test_a_store_that_never_takes_it_ends_the_run(films: list[Path], reader: FilmReader, quick_client: TritonClient) -> None:
    sink = Counting(*(StoreError("no room") for _ in range(99)))
    with pytest.raises(StoreError, match="no room"):
        run([Numbered(films[0], 0)], reader, quick_client, sink)
    assert sink.numbers == sink.bad == []


def test_it_draws_no_more_than_it_can_hold_and_stops_when_told(films: list[Path], reader: FilmReader, quick_client: TritonClient) -> None:
    """An archive without end: what is drawn stays bounded, and after `stop` what Triton has is still kept."""
    drawn: list[int] = []
    stop = threading.Event()

    def endless() -> Iterator[Numbered]:
        while True:
            drawn.append(len(drawn))
            yield Numbered(films[len(drawn) % 9], len(drawn))

    class Stopping(Counting):
        def kept(self, result: Sequence[Seen[Numbered]]) -> None:
            super().kept(result)
            stop.set()

    sink = Stopping()
    run(endless(), reader, quick_client, sink, stop=stop)
    assert len(sink.numbers) == len(set(sink.numbers)) >= pipeline.KEPT_AT_ONCE
    assert len(drawn) <= 700
