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
from cxr_retrieval_build.lower_precision import convolutional_core, signed, to_fp16, to_int8, with_plain_weights, with_split_convolutions
from cxr_retrieval_training.cpu_engine import CpuEngine
from cxr_retrieval_training.segmentation.metrics import dice_coefficient


def run(model: onnx.ModelProto, image: NDArray[np.generic], output: str = "EMBEDDING") -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    result = session.run([output], {name: image})
    return np.asarray(result[0])


def model_of(
    name: str, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], x: tuple[int, ...], y: tuple[int, ...]
) -> onnx.ModelProto:
    """A model from uint8 images to floats; shapes without the batch."""
    image = helper.make_tensor_value_info("x", TensorProto.UINT8, ["batch", *x])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *y])
    graph = helper.make_graph(nodes, name, [image], [result], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


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
    return model_of("small", nodes, weights, x=(1, 11, 13), y=(1, 1, 1))


@pytest.fixture(scope="module")
def decoder() -> onnx.ModelProto:
    """uint8 image → three convolutions → bottleneck (linear, ±60) → a convolution and ReLU (0…1) → a convolution of both, joined → y."""
    random = np.random.default_rng(5)

    def weight(name: str, to: int, of: int, scale: float) -> onnx.TensorProto:
        return numpy_helper.from_array((random.normal(size=(to, of, 3, 3)) * scale).astype(np.float32), name)

    halves = [numpy_helper.to_array(weight("", 5, of, scale)) for of, scale in ((6, 1.0), (8, 0.02))]  # both count alike in y
    weights = [
        weight("w1", 4, 1, 0.01),
        weight("w2", 4, 4, 0.2),
        weight("w3", 8, 4, 10.0),
        weight("w4", 6, 8, 0.001),
        numpy_helper.from_array(np.concatenate(halves, axis=1), "w5"),
        numpy_helper.from_array(random.normal(size=5).astype(np.float32), "b5"),
    ]
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["f", "w1"], ["c1"], name="conv1"),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="conv2"),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("Conv", ["r2", "w3"], ["bottleneck"], name="conv3"),
        helper.make_node("Conv", ["bottleneck", "w4"], ["c4"], name="conv4", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c4"], ["made"], name="relu4"),
        helper.make_node("Concat", ["made", "bottleneck"], ["both"], name="join", axis=1),
        helper.make_node("Conv", ["both", "w5", "b5"], ["y"], name="conv5"),
    ]
    return model_of("decoder", nodes, weights, x=(1, 16, 16), y=(5, 8, 8))


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


def test_a_convolution_of_signed_and_unsigned_features_becomes_the_sum_of_two(decoder: onnx.ModelProto) -> None:
    split = with_split_convolutions(decoder)
    onnx.checker.check_model(split, full_check=True)
    read_by = {node.name: {node.input[0]} for node in split.graph.node if node.op_type == "Conv"}
    assert set(read_by) == {"conv1", "conv2", "conv3", "conv4", "y_signed", "y_unsigned"}
    joins = {node.name: list(node.input) for node in split.graph.node if node.op_type == "Concat"}
    assert joins == {"y_signed_in": ["bottleneck"], "y_unsigned_in": ["made"]}
    images = np.random.default_rng(2).integers(0, 256, (3, 1, 16, 16), np.uint8)
    assert run(split, images, "y") == pytest.approx(run(decoder, images, "y"), rel=1e-4, abs=1e-4)


def test_joined_features_of_one_kind_are_left_together(small: onnx.ModelProto, decoder: onnx.ModelProto) -> None:
    assert [node.name for node in with_split_convolutions(small).graph.node] == [node.name for node in small.graph.node]
    alike = onnx.ModelProto()
    alike.CopyFrom(decoder)
    join = next(node for node in alike.graph.node if node.name == "join")
    join.input[:] = ["c4", "bottleneck"]
    assert "join" in {node.name for node in with_split_convolutions(alike).graph.node}


def test_int8_gives_each_half_its_own_scale_and_leaves_the_stem_alone(decoder: onnx.ModelProto) -> None:
    images = np.random.default_rng(1).integers(0, 256, (40, 1, 16, 16), np.uint8)
    quantised = to_int8(decoder, {"x": images})
    values = {tensor.name: tensor for tensor in quantised.graph.initializer}
    made_by = {name: node for node in quantised.graph.node for name in node.output}

    def activation(convolution: str) -> tuple[int, float]:
        """Type and scale of what a convolution reads."""
        node = next(node for node in quantised.graph.node if node.name == convolution)
        while node.op_type != "DequantizeLinear":
            node = made_by[node.input[0]]
        return values[node.input[2]].data_type, float(numpy_helper.to_array(values[node.input[1]]))

    signed_type, signed_scale = activation("y_signed")
    unsigned_type, unsigned_scale = activation("y_unsigned")
    assert (signed_type, unsigned_type) == (TensorProto.INT8, TensorProto.UINT8)
    assert unsigned_scale < signed_scale / 20, "what the decoder makes is 0…1, the bottleneck ±60"
    whole = {node.name for node in quantised.graph.node if node.op_type == "Conv" and node.input[1] in values}
    assert whole == {"conv1", "conv2", "conv3"}, "the stem keeps its weights"
    stored = {values[name].data_type for name in values if len(values[name].dims) == 4 and name not in ("w1", "w2", "w3")}
    assert stored == {TensorProto.INT8}, "all others are stored as int8"

    exact = run(decoder, images, "y")
    for found in (run(model, images, "y") for model in (quantised, signed(quantised))):
        error = float(np.sqrt(((found - exact) ** 2).mean()) / exact.std())
        assert 0 < error < 0.05


def test_signed_activations_are_int8_throughout(decoder: onnx.ModelProto) -> None:
    images = np.random.default_rng(1).integers(0, 256, (20, 1, 16, 16), np.uint8)
    model = signed(to_int8(decoder, {"x": images}))
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    points = [values[node.input[2]] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert points
    assert {point.data_type for point in points} == {TensorProto.INT8}


def test_the_int8_graph_that_ships_finds_the_lungs_that_the_other_finds(repository: Path, squares: NDArray[np.uint8]) -> None:
    folder = repository / "lung_segmentation" / "1"
    exact, quantised = (CpuEngine(folder / name)(squares[::3]) for name in ("model.onnx", "model.int8.onnx"))
    dice = [dice_coefficient(found > 0, wanted > 0) for found, wanted in zip(quantised[0], exact[0], strict=True)]
    assert min(dice) > 0.98
    assert not np.array_equal(quantised[1], exact[1]), "nothing was lowered"


def test_asymmetric_activations_have_no_signed_form() -> None:
    values = [numpy_helper.from_array(np.array(0.1, np.float32), "scale"), numpy_helper.from_array(np.array(3, np.uint8), "zero")]
    graph = helper.make_graph([helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], name="q")], "g", [], [], values)
    with pytest.raises(SetupError, match="q: zero point is not 0"):
        signed(helper.make_model(graph))
