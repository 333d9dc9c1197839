"""Graphs of lower precision compute what the shipped ones compute, and say so in their types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cxr_retrieval.errors import SetupError
from cxr_retrieval_build.lower_precision import convolutional_core, signed, to_fp16, to_int8, with_plain_weights


def run(model: onnx.ModelProto, image: NDArray[np.generic], output: str = "EMBEDDING") -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    result = session.run([output], {name: image})
    return np.asarray(result[0])


@pytest.fixture(scope="module")
def small() -> onnx.ModelProto:
    """uint8 image → mean of all pixels taken away (fp32) → two convolutions → sum of squares (fp32)."""
    random = np.random.default_rng(3)
    weights = [
        numpy_helper.from_array(random.normal(size=(5, 1, 3, 3)).astype(np.float32) / 3, "w1"),
        numpy_helper.from_array(random.normal(size=(7, 5, 3, 3)).astype(np.float32) / 7, "w2"),
        numpy_helper.from_array(np.array([2, 3], np.int64), "axes"),
        numpy_helper.from_array(np.array([0.0], np.float32), "zero"),
        numpy_helper.from_array(np.array([1, 2, 3], np.int64), "all"),
    ]
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["f", "axes"], ["mean"], name="mean"),
        helper.make_node("Sub", ["f", "mean"], ["centred"], name="sub"),
        helper.make_node("Conv", ["centred", "w1"], ["a"], name="conv1"),
        helper.make_node("Max", ["a", "zero"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="conv2"),
        helper.make_node("ReduceSumSquare", ["c", "all"], ["y"], name="energy"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["batch", 1, 11, 13])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1, 1, 1])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_core_is_what_lies_between_convolutions(small: onnx.ModelProto) -> None:
    assert convolutional_core(small.graph) == {"conv1", "relu", "conv2"}


def test_fp16_types_and_values(small: onnx.ModelProto) -> None:
    lowered = to_fp16(small)
    onnx.checker.check_model(lowered, full_check=True)
    typed = onnx.shape_inference.infer_shapes(lowered, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.output)}
    assert {types[name] for name in ("a", "b", "c")} == {TensorProto.FLOAT16}
    assert {types[name] for name in ("f", "mean", "centred", "y")} == {TensorProto.FLOAT}
    image = np.random.default_rng(0).integers(0, 256, (3, 1, 11, 13), np.uint8)
    exact, halved = run(small, image, "y"), run(lowered, image, "y")
    assert halved == pytest.approx(exact, rel=5e-3)
    assert not np.array_equal(halved, exact), "nothing was lowered"


@pytest.mark.parametrize("leaf", ["lung_segmentation", "embedder", "attention_map"])
def test_shipped_graphs_in_fp16(repository: Path, leaf: str) -> None:
    """Convolutions in fp16, weights too; inputs and outputs as the contract has them."""
    model = onnx.load(repository / leaf / "1" / "model.onnx")
    lowered = to_fp16(model)
    onnx.checker.check_model(lowered, full_check=True)
    assert [(v.name, v.type) for v in lowered.graph.input] == [(v.name, v.type) for v in model.graph.input]
    assert [(v.name, v.type) for v in lowered.graph.output] == [(v.name, v.type) for v in model.graph.output]
    halved = {tensor.name for tensor in lowered.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    convolutions = [node for node in lowered.graph.node if node.op_type in ("Conv", "ConvTranspose")]
    assert all(set(node.input[1:]) <= halved for node in convolutions)
    assert bool(convolutions) == (leaf != "attention_map")


def test_plain_weights_undo_the_casts(repository: Path) -> None:
    model = onnx.load(repository / "embedder" / "1" / "model.onnx")
    plain = with_plain_weights(model)
    assert not any(tensor.data_type == TensorProto.FLOAT16 for tensor in plain.graph.initializer)
    lungs = np.random.default_rng(0).integers(0, 256, (1, 2, 256, 256), np.uint8)
    assert run(plain, lungs) == pytest.approx(run(model, lungs), abs=1e-5)


def test_int8_of_a_small_graph_and_its_signed_form(small: onnx.ModelProto) -> None:
    images = np.random.default_rng(1).integers(0, 256, (40, 1, 11, 13), np.uint8)
    quantised = to_int8(small, {"x": images})
    stored = {tensor.data_type for tensor in quantised.graph.initializer if len(tensor.dims) == 4}
    assert stored == {TensorProto.INT8}, "convolution weights are stored as int8"
    exact = run(small, images, "y")
    both = [run(model, images, "y") for model in (quantised, signed(quantised))]
    for found in both:
        assert found == pytest.approx(exact, rel=0.1)
        assert not np.array_equal(found, exact)
    zero_points = [
        tensor
        for node in signed(quantised).graph.node
        if node.op_type == "QuantizeLinear"
        for tensor in signed(quantised).graph.initializer
        if tensor.name == node.input[2]
    ]
    assert zero_points
    assert {tensor.data_type for tensor in zero_points} == {TensorProto.INT8}


def test_asymmetric_activations_have_no_signed_form() -> None:
    values = [numpy_helper.from_array(np.array(0.1, np.float32), "scale"), numpy_helper.from_array(np.array(3, np.uint8), "zero")]
    graph = helper.make_graph([helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], name="q")], "g", [], [], values)
    with pytest.raises(SetupError, match="q: zero point is not 0"):
        signed(helper.make_model(graph))
