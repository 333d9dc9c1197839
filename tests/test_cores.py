from __future__ import annotations

import os
from pathlib import Path

import pytest

from cxr_retrieval.cores import cores
from cxr_retrieval.radiograph.decoding import FilmReader


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("6400000 100000", 3), ("max 100000", 3), ("", 3), (None, 3)],
    ids=["two", "one and a half", "a tenth", "more than there are", "none", "empty", "no such file"],
)
def test_no_more_than_a_containers_limit_comes_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    if limit is not None:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert cores(tmp_path) == expected


def test_a_reader_has_as_many_workers_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cxr_retrieval.radiograph.decoding.cores", lambda: 3)
    with FilmReader() as reader:
        assert reader._most == 3  # pyright: ignore[reportPrivateUsage]
