"""A model that answers NaN for bright pictures (tiny graphs in the real server), and a server whose model is not ready."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import cxr_retrieval.serving.server as server_module
from cxr_retrieval.archive.embedding import ingest
from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.contract import ATTENTION_MAP_MODEL, EMBEDDER, LEAVES, LUNG_SEGMENTATION, TensorSpec
from cxr_retrieval.errors import InferenceError, UnusableOutputError
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.retrieval.query import query
from cxr_retrieval.serving.server import ServerOptions, embedded_triton
from cxr_retrieval.settings import MilvusSettings, TritonSettings

TYPES = {"UINT8": TensorProto.UINT8, "FP32": TensorProto.FLOAT}


def tiny_graph(name: str) -> onnx.ModelProto:
    """The smallest graph with the contract's tensors; the embedder takes the logarithm of 200 − mean, NaN where that is negative."""
    leaf = next(leaf for leaf in LEAVES if leaf.name == name)
    node = helper.make_node

    def shape(spec: TensorSpec) -> onnx.NodeProto:
        return node("Constant", [], [f"shape_{spec.name}"], value=numpy_helper.from_array(np.array([1, *spec.shape], np.int64)))

    if name == LUNG_SEGMENTATION:
        nodes = [
            node("Concat", ["IMAGE", "IMAGE"], ["LUNGS"], axis=1),
            node("Max", ["IMAGE", "white"], ["LUNG_MASK"]),
            node("Cast", ["LUNG_MASK"], ["mask"], to=TensorProto.FLOAT),
            node("ReduceMean", ["mask", "axes"], ["mean"], keepdims=0),
            node("Div", ["mean", "limit"], ["LUNG_AGREEMENT"]),
        ]
        constants = [
            numpy_helper.from_array(np.array(255, np.uint8), "white"),
            numpy_helper.from_array(np.array([2, 3], np.int64), "axes"),
            numpy_helper.from_array(np.array(255, np.float32), "limit"),
        ]
    elif name == EMBEDDER:
        nodes = [
            node("Cast", ["LUNGS"], ["pixels"], to=TensorProto.FLOAT),
            node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=1),
            node("Sub", ["limit", "mean"], ["left"]),
            node("Log", ["left"], ["log"]),
            node("Flatten", ["log"], ["flat"]),
            *(part for spec in leaf.outputs[:2] for part in (shape(spec), node("Expand", ["flat", f"shape_{spec.name}"], [spec.name]))),
            shape(leaf.outputs[2]),
            node("Sigmoid", ["log"], ["gate"]),
            node("Expand", ["gate", "shape_ATTENTION"], ["ATTENTION"]),
        ]
        constants = [
            numpy_helper.from_array(np.array([1, 2, 3], np.int64), "axes"),
            numpy_helper.from_array(np.array(200, np.float32), "limit"),
        ]
    else:
        nodes = [
            node("Cast", ["MASK"], ["mask"], to=TensorProto.FLOAT),
            node("Div", ["mask", "limit"], ["share"]),
            node("ReduceMean", ["ATTENTION", "axes"], ["mean"], keepdims=1),
            node("Mul", ["share", "mean"], ["ATTENTION_MAP"]),
            node("Identity", ["MASK"], ["LUNG_MASK"]),
        ]
        constants = [
            numpy_helper.from_array(np.array([1, 2, 3], np.int64), "axes"),
            numpy_helper.from_array(np.array(255, np.float32), "limit"),
        ]
    inputs, outputs = (
        [helper.make_tensor_value_info(spec.name, TYPES[spec.dtype], ["batch", *spec.shape]) for spec in side]
        for side in (leaf.inputs, leaf.outputs)
    )
    graph = helper.make_graph(nodes, name, inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture(scope="module")
def tiny(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tiny") / "repository"
    shutil.copytree(repository, target, ignore=shutil.ignore_patterns("*.onnx"))
    for name in (LUNG_SEGMENTATION, EMBEDDER, ATTENTION_MAP_MODEL):
        (target / name / "1").mkdir(exist_ok=True)
        onnx.save(tiny_graph(name), target / name / "1" / "model.onnx")
    return target


def test_one_nan_picture_does_not_spoil_its_batch(tiny: Path, reader: FilmReader, tmp_path: Path) -> None:
    levels = {"dark": 40, "bright": 240, "grey": 120}
    for name, level in levels.items():
        pixels = np.full((128, 128), level, np.uint8)
        pixels[:4, :4] = 0
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "m.csv").write_text("image_id,path,label\n" + "".join(f"{name},{name}.png,control\n" for name in levels))
    with (
        embedded_triton(ServerOptions(tiny, grpc_port=0, http_port=0, metrics_port=0)) as server,
        TritonClient(TritonSettings(server.grpc)) as client,
        Store(MilvusSettings(str(tmp_path / "g.db")), client.model_version, create=True) as store,
    ):
        report = ingest(read_manifest(tmp_path / "m.csv").rows, reader, client, store, lambda count: None)
        assert report.stored == store.count() == 2
        (problem,) = report.problems
        assert problem.image_id == "bright"
        assert "is not finite" in str(problem.error)
        with pytest.raises(UnusableOutputError, match="is not finite"):
            query(tmp_path / "bright.png", reader, client, store)
        assert query(tmp_path / "dark.png", reader, client, store).prediction.label == "control"


def test_model_not_ready(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that listens while one of its models has failed: the client says which, and why."""
    broken = tmp_path / "repository"
    shutil.copytree(tiny, broken)
    (broken / EMBEDDER / "1" / "model.onnx").write_bytes(b"no graph")

    def until_it_gave_up(process: object, url: str, log: Path, timeout_s: float) -> None:
        with pytest.raises(server_module.SetupError, match="could not load embedder"):
            real(process, url, log, timeout_s)  # type: ignore[arg-type]

    real = server_module._wait_until_ready  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(server_module, "_wait_until_ready", until_it_gave_up)
    said = r"cxr_retrieval at .* is not ready; expected all four models loaded; got .*embedder"
    options = ServerOptions(broken, grpc_port=0, http_port=0, metrics_port=0)
    with embedded_triton(options) as server, pytest.raises(InferenceError, match=said):
        TritonClient(TritonSettings(server.grpc))
