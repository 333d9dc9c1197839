"""A bulk command as it is seen from outside: its log, its metrics while it waits, its traces; and no name in any of them."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from collector import collecting
from cxr_retrieval.serving.server import Endpoints, embedded_milvus
from faults import before
from tests_support import ENVIRONMENT, cxr_command

NAME = "MUSTERMANN^ERIKA"


@pytest.fixture(scope="module")
def films(squares: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine films and a page of text, in files and a folder that name a patient."""
    folder = tmp_path_factory.mktemp("films") / NAME
    folder.mkdir()
    for number, square in enumerate(squares[:, 0]):
        Image.fromarray(square).save(folder / f"{NAME}-{number}.png")
    (folder / f"{NAME}-page.png").write_text(f"Dear {NAME}")
    return folder


@pytest.fixture(scope="module")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded_milvus(tmp_path_factory.mktemp("milvus") / "gallery.db", "127.0.0.1", 0) as uri:
        yield uri


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(*arguments: str | Path, **environment: str) -> Generator[subprocess.Popen[str]]:
    command = cxr_command(*arguments, "--log-format", "json", "--metrics", "0")
    variables = ENVIRONMENT | environment
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_batch_begun_before_its_server_waits_and_is_seen(student_server: Endpoints, films: Path, tmp_path: Path) -> None:
    out, port = tmp_path / "results.jsonl", free_port()
    arguments = ("batch", films, "--out", out, "--embed-only", "--triton", f"127.0.0.1:{port}")
    with collecting() as collector, started(*arguments, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint) as run:
        assert run.stderr
        log: list[dict[str, Any]] = []
        while not log or log[-1]["event"] != "waiting":
            log.append(json.loads(run.stderr.readline()))
        address = next(line["address"] for line in log if line["event"] == "metrics")
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        assert 'cxr_breaker_open{service="triton"} 1.0' in metrics
        assert (log[-1]["service"], log[-1]["error"]) == ("triton", "ServerDownError")
        with before(student_server.grpc, port) as proxy:
            said, talk = run.communicate(timeout=240)
    assert run.returncode == 1
    assert "10 inputs: 9 answered, 1 failed" in said
    log += [json.loads(line) for line in talk.splitlines()]
    assert NAME not in json.dumps(log)
    assert NAME not in metrics
    failed = next(line for line in log if line["event"] == "failed")
    assert (failed["error"], failed["at"].split(":")[0]) == ("ImageError", "cxr_retrieval.radiograph.raster")
    assert {key: log[-1][key] for key in ("event", "files", "answered", "failed", "error")} == {
        "event": "ended",
        "files": 10,
        "answered": 9,
        "failed": 1,
        "error": "InputError",
    }
    results = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    traces = {line["trace_id"] for line in results if line["status"] == "answered"}
    assert traces == {request.id for request, _ in proxy.asked}
    assert traces == {line["trace_id"] for line in log if line["event"] == "answered"}
    spans = collector.spans()
    assert traces == {span.trace_id.hex() for span in spans}
    parents = {metadata["traceparent"].split("-")[2] for _, metadata in proxy.asked}
    assert parents == {span.span_id.hex() for span in spans if span.name == "infer"}
    assert {span.name for span in spans} == {"films", "read", "infer", "keep", "record"}
    assert NAME.encode() not in b"".join(request.SerializeToString() for request in collector.requests)


def test_an_ingest_is_seen_without_a_name(student_server: Endpoints, films: Path, milvus: str, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    rows = "".join(f"{NAME}-{path.stem},{path},control\n" for path in sorted(films.iterdir()))
    manifest.write_text(f"image_id,path,label\n{rows}")
    with started("ingest", "--manifest", manifest, "--triton", student_server.grpc, "--milvus", milvus, "--json") as run:
        said, talk = run.communicate(timeout=240)
    assert run.returncode == 1
    assert json.loads(said)["stored"] == 9
    assert NAME not in talk
    log = [json.loads(line) for line in talk.splitlines()]
    assert {key: log[-1][key] for key in ("event", "files", "stored", "failed")} == {
        "event": "ended",
        "files": 10,
        "stored": 9,
        "failed": 1,
    }
    assert [line["error"] for line in log if line["event"] == "failed"] == ["ImageError"]
