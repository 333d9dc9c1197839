"""Load tests with the real perf_analyzer against the real server."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cxr_retrieval.contract import LEAF_MODELS
from cxr_retrieval.errors import InferenceError, SetupError
from cxr_retrieval.evaluation import perf_analyzer
from cxr_retrieval.evaluation.loadtest import Load, Window, run_loads, write_input_data
from cxr_retrieval.evaluation.perf_analyzer import PerfAnalyzer, find_perf_analyzer
from cxr_retrieval.serving.server import Endpoints
from cxr_retrieval.settings import TritonSettings
from tests_support import ENVIRONMENT, cxr_command, run_cxr

QUICK = Window(seconds=0.5, stable_percent=100.0, trials=6)


@pytest.fixture(scope="session")
def program() -> PerfAnalyzer:
    return find_perf_analyzer()


def test_ensemble_and_step_are_measured(student_server: Endpoints, program: PerfAnalyzer, squares: NDArray[np.uint8]) -> None:
    loads = [
        Load("attention_map", "concurrency", 4),
        Load("attention_map", "rate", 20, shared_memory=True),
        Load("cxr_retrieval", "concurrency", 2),
    ]
    seen: list[str] = []
    found = run_loads(
        loads, squares[:2], TritonSettings(student_server.grpc), program, Window(2.0, 100.0, 6), lambda one: seen.append(one.load.model)
    )
    assert seen == [load.model for load in loads]
    alone, _, ensemble = found
    assert alone.stable
    assert alone.images_per_second is not None
    assert alone.images_per_second > 10
    assert alone.p50_ms is not None
    assert alone.p99_ms is not None
    assert 0 < alone.p50_ms <= alone.p99_ms
    assert set(alone.steps) == {"attention_map"}, "nothing else ran"
    assert set(ensemble.steps) == set(LEAF_MODELS)
    segmentation = ensemble.steps["lung_segmentation"]
    assert segmentation.compute_ms > ensemble.steps["attention_map"].compute_ms
    assert segmentation.batch >= 1


def test_unstable_is_never_called_stable(student_server: Endpoints, program: PerfAnalyzer, squares: NDArray[np.uint8]) -> None:
    """Three windows of half a second never agree to a ten-thousandth of a percent."""
    (found,) = run_loads(
        [Load("attention_map", "rate", 7)],
        squares[:1],
        TritonSettings(student_server.grpc),
        program,
        replace(QUICK, stable_percent=1e-4, trials=3),
        print,
    )
    assert not found.stable
    assert (found.images_per_second, found.p95_ms) == (None, None)
    assert "Failed to obtain stable measurement" in found.said


def test_command_writes_table_json_and_plot_and_fails_when_unstable(student_server: Endpoints, tmp_path: Path) -> None:
    common = ("loadtest", "--model", "attention_map", "--concurrency", "2", "--rate", "20", "--shared-memory", "off")
    more = ("--triton", student_server.grpc, "--out", str(tmp_path))
    result = run_cxr(*common, *more, "--seconds", "0.5", "--stable", "100")
    written = json.loads((tmp_path / "loadtest.json").read_text())["loads"]
    assert [(one["kind"], one["level"]) for one in written] == [("concurrency", 2), ("rate", 20)]
    assert result.returncode == (0 if all(one["stable"] for one in written) else 2), result.stderr
    assert "attention_map" in result.stdout
    assert (tmp_path / "loadtest.png").stat().st_size > 5000
    result = run_cxr(*common, *more, "--seconds", "0.5", "--stable", "0.1", "--trials", "3", "--json")
    unstable = [one for one in json.loads(result.stdout)["loads"] if not one["stable"]]
    assert unstable, "of three windows of random arrivals, all alike to a thousandth"
    assert {one["images_per_second"] for one in unstable} == {None}
    assert result.returncode == 2
    assert f"{len(unstable)} of 2 loads were not stable, and have no figures" in " ".join(result.stderr.split())


def test_shared_memory_out_of_tritons_sight_is_an_error_and_no_figure(student_server: Endpoints, tmp_path: Path) -> None:
    """A client with a /dev/shm of its own, as a container has (compose.yaml has its client join Triton's)."""
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
    command = cxr_command(
        "loadtest", "--model", "attention_map", "--concurrency", "1", "--shared-memory", "on", "--triton", student_server.grpc
    )
    result = subprocess.run(
        [*own, *command, "--out", str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2, result.stderr
    assert "shared memory" in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_no_server(program: PerfAnalyzer, squares: NDArray[np.uint8]) -> None:
    with pytest.raises(InferenceError, match=r"127\.0\.0\.1:9 could not be measured"):
        run_loads([Load("embedder", "concurrency", 1)], squares[:1], TritonSettings("127.0.0.1:9"), program, QUICK, print)


def test_perf_analyzers_own_complaint_is_passed_on(student_server: Endpoints, program: PerfAnalyzer, squares: NDArray[np.uint8]) -> None:
    with pytest.raises(InferenceError, match="perf_analyzer failed on embedder"):
        run_loads([Load("embedder", "concurrency", 1, batch=65)], squares[:1], TritonSettings(student_server.grpc), program, QUICK, print)


def test_input_data_holds_the_images(tmp_path: Path, squares: NDArray[np.uint8]) -> None:
    import base64

    write_input_data(tmp_path / "in.json", {"IMAGE": squares[:3]})
    entries = json.loads((tmp_path / "in.json").read_text())["data"]
    back = np.stack([np.frombuffer(base64.b64decode(one["IMAGE"]["b64"]), np.uint8).reshape(one["IMAGE"]["shape"]) for one in entries])
    assert np.array_equal(back, squares[:3])


def test_one_on_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "perf_analyzer"
    own.write_text("#!/bin/sh\nexit 0\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert find_perf_analyzer(tmp_path / "cache").binary == own
    own.write_text("#!/bin/sh\necho wants another glibc >&2\nexit 1\n")
    with pytest.raises(SetupError, match="does not run here; got wants another glibc"):
        find_perf_analyzer(tmp_path / "cache")


def test_failed_fetch_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_analyzer, "WHEELS", ("no-such-distribution-of-cxr-retrieval==0",))
    monkeypatch.setattr(perf_analyzer.shutil, "which", lambda name: None)
    with pytest.raises(SetupError, match="perf_analyzer could not be fetched"):
        find_perf_analyzer(tmp_path)
    assert list(tmp_path.iterdir()) == []
