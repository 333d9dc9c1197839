"""The smallest graphs with the contract's tensors: a real server with them is ready in a second or two."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cxr_retrieval.contract import ATTENTION_MAP_MODEL, EMBEDDER, LEAVES, LUNG_SEGMENTATION, TensorSpec

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
            *(part for spec in leaf.outputs[:3] for part in (shape(spec), node("Expand", ["flat", f"shape_{spec.name}"], [spec.name]))),
            shape(leaf.outputs[3]),
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


def write_tiny_repository(repository: Path, target: Path) -> Path:
    """A copy of the repository with tiny graphs in the place of its weights."""
    shutil.copytree(repository, target, ignore=shutil.ignore_patterns("*.onnx"))
    for name in (LUNG_SEGMENTATION, EMBEDDER, ATTENTION_MAP_MODEL):
        (target / name / "1").mkdir(exist_ok=True)
        onnx.save(tiny_graph(name), target / name / "1" / "model.onnx")
    return target
