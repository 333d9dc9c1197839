"""A model repository whose networks answer at once: the contract's tensors from a few sums. For runs that measure the client alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cxr_retrieval.contract import (
    APPEARANCE_SIZE,
    ATTENTION_MAP_MODEL,
    ATTENTION_SIZE,
    EMBEDDER,
    EMBEDDING_SIZE,
    FEATURE_SIZE,
    IMAGE_SIZE,
    LEAVES,
    LUNG_SEGMENTATION,
    MODEL_VERSION_PARAMETER,
    LeafSpec,
)
from cxr_retrieval.locations import default_repository

VERSION: Final = "0instant0000"
_TYPES: Final = {"UINT8": TensorProto.UINT8, "FP32": TensorProto.FLOAT}


def instant_repository(folder: Path) -> Path:
    """Writes it, with the configurations that ship."""
    for config in default_repository().glob("*/config.pbtxt"):
        model = folder / config.parent.name
        (model / "1").mkdir(parents=True)
        words = re.sub(rf'("{MODEL_VERSION_PARAMETER}".*?string_value: ")\w+', rf"\g<1>{VERSION}", config.read_text())
        (model / "config.pbtxt").write_text(words)
    for leaf in LEAVES:
        onnx.save(_graph(leaf, _NODES[leaf.name]()), str(folder / leaf.name / "1" / "model.onnx"))
    shutil.copyfile(folder / LUNG_SEGMENTATION / "1" / "model.onnx", folder / LUNG_SEGMENTATION / "1" / "student.onnx")
    return folder


def _graph(leaf: LeafSpec, parts: tuple[Sequence[Any], dict[str, Any]]) -> Any:
    nodes, constants = parts
    tensors = [
        [helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], ["n", *spec.shape]) for spec in side]
        for side in (leaf.inputs, leaf.outputs)
    ]
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), leaf.name, tensors[0], tensors[1], values)
    make: Any = helper.make_model  # its stub knows no keywords
    return make(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _lungs() -> tuple[Sequence[Any], dict[str, Any]]:
    """The middle of every picture is lung."""
    mask = np.zeros((1, 1, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    mask[..., IMAGE_SIZE // 4 : -IMAGE_SIZE // 4, IMAGE_SIZE // 4 : -IMAGE_SIZE // 4] = 255
    return [
        helper.make_node("Cast", ["IMAGE"], ["film"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["film", "zero"], ["blank"]),
        helper.make_node("Add", ["blank", "lung"], ["outline"]),
        helper.make_node("Cast", ["outline"], ["LUNG_MASK"], to=TensorProto.UINT8),
        helper.make_node("Concat", ["IMAGE", "LUNG_MASK"], ["LUNGS"], axis=1),
        helper.make_node("ReduceMean", ["blank"], ["nothing"], axes=[2, 3], keepdims=0),
        helper.make_node("Add", ["nothing", "agreed"], ["LUNG_AGREEMENT"]),
    ], {"zero": np.float32(0), "lung": mask, "agreed": np.float32(0.97)}


def _embedding() -> tuple[Sequence[Any], dict[str, Any]]:
    """8 × 8 mean greys of the film, less their mean, of unit length; the lower seven rows of them are what the lungs look like."""
    side = round(EMBEDDING_SIZE**0.5)
    return [
        helper.make_node("Cast", ["LUNGS"], ["both"], to=TensorProto.FLOAT),
        helper.make_node("Split", ["both", "ones"], ["film", "share"], axis=1),
        helper.make_node("AveragePool", ["film"], ["coarse"], kernel_shape=[IMAGE_SIZE // side] * 2, strides=[IMAGE_SIZE // side] * 2),
        helper.make_node("Reshape", ["coarse", "flat"], ["greys"]),
        helper.make_node("ReduceMean", ["greys"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Sub", ["greys", "mean"], ["centred"]),
        helper.make_node("ReduceL2", ["centred"], ["length"], axes=[1], keepdims=1),
        helper.make_node("Div", ["centred", "length"], ["EMBEDDING"]),
        helper.make_node("Slice", ["centred", "upper", "end", "across"], ["lower"]),
        helper.make_node("ReduceL2", ["lower"], ["lower_length"], axes=[1], keepdims=1),
        helper.make_node("Div", ["lower", "lower_length"], ["APPEARANCE"]),
        helper.make_node("Concat", ["greys"] * (FEATURE_SIZE // EMBEDDING_SIZE), ["FEATURES"], axis=1),
        helper.make_node(
            "AveragePool", ["film"], ["places"], kernel_shape=[IMAGE_SIZE // ATTENTION_SIZE] * 2, strides=[IMAGE_SIZE // ATTENTION_SIZE] * 2
        ),
        helper.make_node("Div", ["places", "white"], ["ATTENTION"]),
    ], {
        "ones": np.array([1, 1], np.int64),
        "flat": np.array([-1, EMBEDDING_SIZE], np.int64),
        "upper": np.array([EMBEDDING_SIZE - APPEARANCE_SIZE], np.int64),
        "end": np.array([EMBEDDING_SIZE], np.int64),
        "across": np.array([1], np.int64),
        "white": np.float32(255),
    }


def _attention() -> tuple[Sequence[Any], dict[str, Any]]:
    scale = float(IMAGE_SIZE // ATTENTION_SIZE)
    return [
        helper.make_node("Resize", ["ATTENTION", "", "scales"], ["large"], mode="nearest"),
        helper.make_node("Cast", ["MASK"], ["outline"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["outline", "white"], ["inside"]),
        helper.make_node("Mul", ["large", "inside"], ["ATTENTION_MAP"]),
        helper.make_node("Identity", ["MASK"], ["LUNG_MASK"]),
    ], {"scales": np.array([1, 1, scale, scale], np.float32), "white": np.float32(255)}


_NODES: Final[dict[str, Callable[[], tuple[Sequence[Any], dict[str, Any]]]]] = {
    LUNG_SEGMENTATION: _lungs,
    EMBEDDER: _embedding,
    ATTENTION_MAP_MODEL: _attention,
}
