"""Graphs that OpenVINO has compiled are kept for the next start, and never served if they are not what was kept."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.serving.server import ServerOptions, embedded_triton
from cxr_retrieval.settings import TritonSettings

PICTURE = np.arange(128, dtype=np.uint8).repeat(2)[:, None].repeat(256, 1)[None, None]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cxr-retrieval" / "openvino"


def embedding(repository: Path) -> tuple[NDArray[np.generic], str]:
    """Of one start, and its log."""
    options = ServerOptions(repository, grpc_port=0, http_port=0, metrics_port=0)
    with embedded_triton(options) as server, TritonClient(TritonSettings(server.grpc)) as client:
        return client.infer(PICTURE)["EMBEDDING"], server.log.read_text()


def test_a_graph_is_compiled_once_and_again_when_its_file_is_damaged(tiny: Path, cache: Path) -> None:
    first, _ = embedding(tiny)
    kept = {path: path.read_bytes() for path in cache.iterdir()}
    assert len(kept) == 3, "one of each leaf, though the lungs have two instances"
    assert cache.stat().st_mode & 0o77 == 0
    damaged, cut, untouched = kept
    damaged.write_bytes(kept[damaged][:-1] + bytes([kept[damaged][-1] ^ 1]))
    cut.write_bytes(kept[cut][: len(kept[cut]) // 2])
    os.utime(untouched, (0, 0))
    again, _ = embedding(tiny)
    assert np.array_equal(first, again)
    assert {path: path.read_bytes() for path in cache.iterdir()} == kept
    assert untouched.stat().st_mtime > 0, "it was used"


def test_those_not_used_for_longest_go(tiny: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    for age in range(20):
        (cache / f"{age}").touch()
        os.utime(cache / f"{age}", (1e9 - age, 1e9 - age))
    embedding(tiny)
    left = {path.name for path in cache.iterdir() if path.suffix != ".compiled"}
    assert left == {f"{age}" for age in range(13)}


def test_a_folder_that_cannot_be_written_costs_time_alone(tiny: Path, cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    vectors, log = embedding(tiny)
    assert np.isfinite(vectors).all()
    assert "compiled graphs are not kept, so the next start takes as long: Not a directory" in log
