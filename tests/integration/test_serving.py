"""The shipped ensemble in the real embedded Triton."""

from __future__ import annotations

import os
import re
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as grpcclient
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from cxr_retrieval.contract import ATTENTION_MAP, EMBEDDING, ENSEMBLE_OUTPUTS, FEATURES, LEAVES, LUNG_MASK, LUNG_SEGMENTATION, TensorSpec
from cxr_retrieval.errors import (
    AccessError,
    InferenceError,
    OverloadedError,
    ServerDownError,
    ServerFaultError,
    SetupError,
    UnusableOutputError,
)
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.serving import server as server_module
from cxr_retrieval.serving.choices import Networks, Precision
from cxr_retrieval.serving.repository import graph_file
from cxr_retrieval.serving.server import Endpoints, ServerOptions, embedded_triton
from cxr_retrieval.settings import TritonSettings
from tests_support import leftovers


def executions(server: Endpoints) -> dict[str, int]:
    """Requests each model has executed, from Triton's own metrics."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {name: int(count) for name, count in re.findall(r'nv_inference_count\{model="(\w+)",version="1"\} (\d+)', text)}


def test_embedding_alone_does_not_run_the_attention_map(server: Endpoints, triton: TritonClient, squares: NDArray[np.uint8]) -> None:
    def grown(outputs: tuple[TensorSpec, ...], count: int, expected: list[int]) -> list[int]:
        """By how much each step's count has grown; Triton counts shortly after it has answered."""
        before, deadline = executions(server), time.monotonic() + 10
        triton.infer(squares[:count], outputs)
        while True:
            after = executions(server)
            found = [after[name] - before[name] for name in ("lung_segmentation", "embedder", "attention_map")]
            if found == expected or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    assert grown((EMBEDDING,), 3, [3, 3, 0]) == [3, 3, 0]
    assert grown((EMBEDDING, ATTENTION_MAP), 2, [2, 2, 2]) == [2, 2, 2], "and none from the request before"


def test_outputs_have_the_published_form(triton: TritonClient, squares: NDArray[np.uint8]) -> None:
    outputs = triton.infer(squares[:5])
    assert {name: (values.dtype.name, values.shape) for name, values in outputs.items()} == {
        "EMBEDDING": ("float32", (5, 64)),
        "APPEARANCE": ("float32", (5, 56)),
        "LUNG_MASK": ("uint8", (5, 1, 256, 256)),
        "ATTENTION_MAP": ("float32", (5, 1, 256, 256)),
        "FEATURES": ("float32", (5, 2048)),
        "LUNG_AGREEMENT": ("float32", (5, 1)),
    }
    assert outputs["LUNG_AGREEMENT"].min() > 0.8, "phantoms have lungs that the networks agree about"
    assert outputs["LUNG_AGREEMENT"].max() <= 1
    for vector in ("EMBEDDING", "APPEARANCE"):
        assert np.linalg.norm(outputs[vector].astype(float), axis=1) == pytest.approx(1, abs=1e-4)
    assert set(np.unique(outputs["LUNG_MASK"])) <= {0, 255}
    attention = outputs["ATTENTION_MAP"].astype(float)
    assert attention.min() >= 0
    assert attention.max() <= 1
    assert (attention[outputs["LUNG_MASK"] == 0] == 0).all()


@pytest.mark.parametrize("wanted", [(LUNG_MASK,), (ATTENTION_MAP,), (FEATURES,), (EMBEDDING, LUNG_MASK), ENSEMBLE_OUTPUTS])
def test_any_subset_of_outputs_can_be_asked_for(triton: TritonClient, squares: NDArray[np.uint8], wanted: tuple) -> None:  # type: ignore[type-arg]
    full, part = triton.infer(squares[:1]), triton.infer(squares[:1], wanted)
    assert set(part) == {spec.name for spec in wanted}
    for name, values in part.items():
        assert np.allclose(values.astype(float), full[name].astype(float), atol=1e-4)


def test_served_equals_onnx(triton: TritonClient, squares: NDArray[np.uint8], repository: Path) -> None:
    int8 = ServerOptions(repository).chosen_precision is Precision.int8
    options = onnxruntime.SessionOptions()  # fused, its int8 convolutions take no scales by channel, which depthwise ones have
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    known: dict[str, Any] = {"IMAGE": squares[:4]}
    for leaf in LEAVES:
        graph = graph_file(repository, leaf.name, Networks.ensemble, int8=int8 and leaf.name == LUNG_SEGMENTATION)
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        names = [spec.name for spec in leaf.outputs]
        known |= dict(zip(names, session.run(names, {spec.name: known[spec.name] for spec in leaf.inputs}), strict=True))
        known["MASK"] = known.get("LUNG_MASK", squares)
    served = triton.infer(squares[:4])
    cosine = (served["EMBEDDING"].astype(float) * known["EMBEDDING"].astype(float)).sum(axis=1)
    assert cosine.min() > 0.999
    assert (served["LUNG_MASK"] != known["LUNG_MASK"]).mean() < 1e-3
    assert np.abs(served["ATTENTION_MAP"].astype(float) - known["ATTENTION_MAP"].astype(float)).mean() < 0.01


def test_batch_and_single_agree(triton: TritonClient, squares: NDArray[np.uint8]) -> None:
    together = triton.embed(squares)
    alone = np.concatenate([triton.embed(square[None]) for square in squares])
    assert (together * alone).sum(axis=1).min() > 0.9999


def test_wrong_input_is_refused_and_the_server_goes_on(triton: TritonClient, squares: NDArray[np.uint8]) -> None:
    with pytest.raises(UnusableOutputError, match="refused the request"):
        triton.infer(np.zeros((1, 1, 128, 128), np.uint8))
    assert triton.embed(squares[:1]).shape == (1, 64)


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        ("INTERNAL", ServerFaultError, "failed; got CUDA out of memory"),
        ("NOT_FOUND", ServerDownError, "does not serve cxr_retrieval now"),
        ("UNIMPLEMENTED", InferenceError, "is no Triton"),
        ("UNAUTHENTICATED", AccessError, "refused access"),
        ("INVALID_ARGUMENT", UnusableOutputError, "refused the request"),
        ("RESOURCE_EXHAUSTED", OverloadedError, "no room for this request now"),
        ("UNAVAILABLE", OverloadedError, "no room for this request now"),
    ],
)
def test_failures_are_told_apart_by_status(
    server: Endpoints, squares: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch, status: str, kind: type[InferenceError], said: str
) -> None:
    """A server that lives refuses for a while: only what may pass is tried again, and only bad images are blamed on the images."""
    tries: list[int] = []

    def refuse(*arguments: Any, **options: Any) -> None:
        tries.append(1)
        raise InferenceServerException("CUDA out of memory", status=f"StatusCode.{status}")

    with TritonClient(TritonSettings(server.grpc, timeout_s=1.0)) as client:
        monkeypatch.setattr(grpcclient.InferenceServerClient, "infer", refuse)
        with pytest.raises(kind, match=said) as caught:
            client.embed(squares[:1])
    assert type(caught.value) is kind
    assert (len(tries) > 1) == (kind is OverloadedError)


def test_a_full_queue_is_waited_out(server: Endpoints, squares: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch) -> None:
    real, tries = grpcclient.InferenceServerClient.infer, []

    def full_twice(*arguments: Any, **options: Any) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise InferenceServerException("Exceeds maximum queue size", status="StatusCode.UNAVAILABLE")
        return real(*arguments, **options)

    monkeypatch.setattr(grpcclient.InferenceServerClient, "infer", full_twice)
    with TritonClient(TritonSettings(server.grpc)) as client:
        assert client.embed(squares[:1]).shape == (1, 64)
    assert len(tries) == 3


def test_weights_without_a_version_are_refused(repository: Path, server: Endpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gallery could hold any other weights' embeddings."""

    def unnamed(*arguments: Any, **options: Any) -> Any:
        config: Any = real(*arguments, **options)
        config.config.parameters["model_version"].string_value = ""
        return config

    real = grpcclient.InferenceServerClient.get_model_config
    monkeypatch.setattr(grpcclient.InferenceServerClient, "get_model_config", unnamed)
    with pytest.raises(InferenceError, match="does not say which weights it has"):
        TritonClient(TritonSettings(server.grpc))


def test_deadline(server: Endpoints, squares: NDArray[np.uint8]) -> None:
    with TritonClient(TritonSettings(server.grpc)) as patient:
        hasty = TritonSettings(server.grpc, timeout_s=0.01)
        patient._settings = hasty  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(InferenceError, match=r"took too long; expected an answer within 0\.01 s"):
            patient.infer(np.repeat(squares, 4, axis=0))


def test_no_server() -> None:
    with pytest.raises(InferenceError, match=r"no Triton server answers at 127\.0\.0\.1:1.*cxr serve"):
        TritonClient(TritonSettings("127.0.0.1:1", timeout_s=2))


# ----------------------------------------------------------------------------------------------- starting, stopping


def test_a_model_that_cannot_load_is_named_with_the_servers_reason(tiny: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "repository")
    (broken / "embedder" / "1" / "model.onnx").write_bytes(b"no graph")
    before = leftovers(os.getpid())
    with pytest.raises(SetupError) as caught, embedded_triton(ServerOptions(broken, grpc_port=0, http_port=0, metrics_port=0)):
        pytest.fail("must not become ready")
    message = str(caught.value)
    assert "could not load embedder" in message
    assert "model.onnx" in message, "Triton's own words name the file"
    assert leftovers(os.getpid()) == before


@pytest.mark.parametrize("aborts", [1, 2])
def test_a_start_that_aborts_has_a_second_try(aborts: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aborting = tmp_path / "tritonserver"
    aborting.write_text("#!/bin/sh\necho no shared memory; kill -ABRT $$\n")
    aborting.chmod(0o700)
    first, install = iter([aborting] * aborts), server_module._install_backend  # pyright: ignore[reportPrivateUsage]

    def installed(work: Path) -> tuple[Path, dict[str, str]]:
        binary, environment = install(work)
        return next(first, binary), environment

    monkeypatch.setattr(server_module, "_install_backend", installed)
    before = leftovers(os.getpid())
    options = ServerOptions(tiny, grpc_port=0, http_port=0, metrics_port=0)
    if aborts == 1:
        with embedded_triton(options) as endpoints, TritonClient(TritonSettings(endpoints.grpc)) as client:
            assert client.model_version
    else:
        with pytest.raises(SetupError, match="exit code -6 while starting; got no shared memory"), embedded_triton(options):
            pytest.fail("must not become ready")
    assert leftovers(os.getpid()) == before


def test_a_port_in_use_is_named(server: Endpoints, repository: Path) -> None:
    port = int(server.grpc.rsplit(":", 1)[1])
    with (
        pytest.raises(SetupError, match=f"grpc port 127.0.0.1:{port} cannot be used"),
        embedded_triton(ServerOptions(repository, grpc_port=port, http_port=0, metrics_port=0)),
    ):
        pytest.fail("must not start")


def test_free_ports_are_three(repository: Path) -> None:
    """One that is let go of before the next is chosen is chosen again, once in some thousand times."""
    options = ServerOptions(repository, grpc_port=0, http_port=0, metrics_port=0)
    for _ in range(20_000):
        ports = options.on_free_ports()
        assert len({ports.grpc_port, ports.http_port, ports.metrics_port}) == 3


def test_nothing_is_left_behind(repository: Path) -> None:
    before = leftovers(os.getpid())
    with embedded_triton(
        ServerOptions(repository, Precision.bf16, Networks.student, grpc_port=0, http_port=0, metrics_port=0)
    ) as endpoints:
        assert leftovers(os.getpid()) != before
        group = endpoints.process.pid
        with TritonClient(TritonSettings(endpoints.grpc)) as client:
            assert client.embed(np.zeros((1, 1, 256, 256), np.uint8)).shape == (1, 64)
    assert leftovers(os.getpid()) == before
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)
