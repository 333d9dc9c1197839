"""A Triton that crashes under `cxr serve` comes back by itself, as long as there is hope."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from cxr_retrieval.errors import SetupError
from cxr_retrieval.gallery.store import list_collections
from cxr_retrieval.serving.restarts import Restarts, keep_running
from cxr_retrieval.serving.server import Endpoints, ServerOptions
from cxr_retrieval.settings import MilvusSettings
from tests_support import ENVIRONMENT, Served, cxr_command, leftovers, run_cxr

FILMS = 600


def triton_of(served: Served) -> psutil.Process:
    return next(child for child in psutil.Process(served.process.pid).children() if child.name().startswith("tritonserver"))


def test_a_batch_completes_though_triton_is_killed_under_it(tiny: Path, phantom_manifest: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "films", tmp_path / "results.jsonl"
    folder.mkdir()
    for number in range(FILMS):
        pixels = np.full((128, 128), 40 + number % 100, np.uint8)
        pixels[: 2 + number // 100, :4] = 0
        Image.fromarray(pixels).save(folder / f"{number}.png", compress_level=1)
    served = Served(tmp_path, "--repository", str(tiny), "--precision", "fp32")
    try:
        assert (
            run_cxr("ingest", "--no-gate", "--manifest", phantom_manifest, "--audit", tmp_path / "audit", *served.servers).returncode == 0
        )
        batch = subprocess.Popen(
            cxr_command("batch", folder, "--no-gate", "--out", out, "--timeout", "60", *served.servers),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while batch.poll() is None and not (out.exists() and out.stat().st_size):
            pass
        assert batch.poll() is None, "it was quicker than the test"
        former = triton_of(served)
        former.send_signal(signal.SIGKILL)
        assert "Triton ended by itself after" in served.until("warning")
        assert "SIGKILL" in served.said[-1]
        assert list_collections(MilvusSettings(served.servers[3], timeout_s=10)), "the gallery is up meanwhile"
        served.until("ready")
        said = "".join(batch.communicate(timeout=240))
        assert batch.returncode == 0, said
        assert f"{FILMS} answered" in said
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert len({line["input"] for line in lines}) == len(lines) == FILMS
        assert triton_of(served).pid != former.pid
    finally:
        code = served.stop()
    assert code == 128 + signal.SIGTERM
    assert leftovers(served.process.pid) == set()


@pytest.fixture
def served_then_broken(tiny: Path, tmp_path: Path) -> Callable[..., Served]:
    """`cxr serve` with tiny models, whose embedder is spoilt once it runs, and whose Triton then crashes."""

    def start(*options: str) -> Served:
        repository = shutil.copytree(tiny, tmp_path / "repository")
        served = Served(tmp_path, "--repository", str(repository), "--precision", "fp32", *options)
        (repository / "embedder" / "1" / "model.onnx").write_bytes(b"no graph")
        triton_of(served).send_signal(signal.SIGSEGV)
        return served

    return start


def test_a_hopeless_triton_is_given_up_with_its_own_reason(served_then_broken: Callable[..., Served]) -> None:
    served = served_then_broken("--restarts", "2")
    assert served.ended() == 2
    said = " ".join("".join(served.said).split())
    assert "Triton ended by itself after" in said
    assert "trying again in" in said
    assert "error: Triton crashed, and could not be kept running in 2 tries; got Triton could not load embedder: " in said
    assert "model.onnx" in said.rpartition("error:")[2], "Triton's own words name the file"
    assert leftovers(served.process.pid) == set()


def test_ctrl_c_while_it_waits_ends_cleanly(served_then_broken: Callable[..., Served]) -> None:
    served = served_then_broken()
    served.until("trying again in")
    assert served.stop(signal.SIGINT) == 0
    assert "stopped" in served.said[-1]
    assert leftovers(served.process.pid) == set()


def test_without_restarts_it_ends_with_triton(served_then_broken: Callable[..., Served]) -> None:
    served = served_then_broken("--restarts", "0")
    assert served.ended() == 2
    assert "Triton ended by itself; got SIG" in served.said[-1]
    assert "Starting it again" not in served.said[-1]
    assert leftovers(served.process.pid) == set()


class Enough(Exception):  # noqa: N818 (no error)
    pass


@pytest.mark.parametrize(("well_s", "starts"), [(0.0, 4), (3600.0, 3)])
def test_whoever_ran_well_has_all_tries_again(tiny: Path, well_s: float, starts: int) -> None:
    """Killed as soon as it is ready, each time: that counts against it only where it should have run for longer."""
    before = leftovers(os.getpid())  # of a server that this process keeps for all tests
    seen: list[tuple[str, str, str]] = []

    def kill(triton: Endpoints) -> None:
        seen.append((triton.grpc, triton.http, triton.metrics))
        if len(seen) == 4:
            raise Enough
        os.kill(triton.process.pid, signal.SIGKILL)

    options = ServerOptions(tiny, grpc_port=0, http_port=0, metrics_port=0)
    restarts = Restarts(tries=2, first_s=0.01, well_s=well_s)
    told: list[str] = []
    with pytest.raises(Enough if starts == 4 else SetupError) as caught:
        keep_running(options, restarts, kill, told.append)
    assert len(seen) == starts
    assert len(set(seen)) == 1, "on the same ports"
    if starts == 3:
        assert "could not be kept running in 2 tries; got Triton ended by itself: SIGKILL" in str(caught.value)
    assert leftovers(os.getpid()) == before
