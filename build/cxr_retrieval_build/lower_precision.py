"""Derives the graphs of lower precision from the one that ships: fp16 for TensorRT, int8 (Q/DQ) for TensorRT and for CPUs.

Only what lies between the first and the last convolution of a path is lowered; that is nearly all of the arithmetic. Before it grey
values are standardised (sums over 65,536 pixels overflow fp16), behind it probabilities are cut and embeddings whitened and brought to
unit length, all of which stays fp32.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from cxr_retrieval.contract import LUNG_SEGMENTATION
from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.choices import EnginePrecision, Networks
from cxr_retrieval.serving.repository import graph_file

CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose"})
_STEM: Final = 3
"""Convolutions from the image on that int8 leaves alone: under 1 % of the arithmetic, and their rounding is in all that follows."""


def with_plain_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its fp16 and int8 weights as fp32 initialisers, without what stands behind each (`with_small_weights` undone)."""
    plain = copy.deepcopy(model)
    held = {tensor.name: tensor for tensor in plain.graph.initializer}
    small = {name for name, tensor in held.items() if tensor.data_type in (TensorProto.FLOAT16, TensorProto.INT8)}
    raised: dict[str, NDArray[np.float32]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in plain.graph.node:
        if node.op_type == "Cast" and node.input[0] in small:
            raised[node.output[0]] = numpy_helper.to_array(held[node.input[0]]).astype(np.float32)
        elif node.op_type == "Div" and node.input[0] in raised:
            raised[node.output[0]] = raised[node.input[0]] / numpy_helper.to_array(held[node.input[1]])
        else:
            nodes.append(node)
    del plain.graph.node[:]
    plain.graph.node.extend(nodes)
    plain.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in raised.items())
    _drop_unused(plain.graph)
    return plain


def convolutional_core(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes between the first and the last convolution of any path, both included (the graph is in topological order)."""
    behind = _reached(graph.node, lambda node: node.input, lambda node: node.output)
    before = _reached(tuple(reversed(graph.node)), lambda node: node.output, lambda node: node.input)
    return behind & before


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Strongly typed: the convolutional core in fp16, weights included, the rest and all inputs and outputs as they were."""
    plain = onnx.shape_inference.infer_shapes(with_plain_weights(model), strict_mode=True)
    graph = plain.graph
    core = convolutional_core(graph)
    initialisers = {tensor.name: tensor for tensor in graph.initializer}
    floats = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {name for name, tensor in initialisers.items() if tensor.data_type == TensorProto.FLOAT}
    made_inside = {name for node in graph.node if node.name in core for name in node.output} & floats
    nodes: list[onnx.NodeProto] = []
    lowered: dict[str, str] = {}
    raised: dict[str, str] = {}

    def cast(name: str, to: TensorProto.DataType, known: dict[str, str]) -> str:
        if name not in known:
            known[name] = f"{name}_as_{TensorProto.DataType.Name(to).lower()}"
            if name in initialisers:
                halved = numpy_helper.to_array(initialisers[name]).astype(np.float16)
                graph.initializer.append(numpy_helper.from_array(halved, known[name]))
            else:
                nodes.append(onnx.helper.make_node("Cast", [name], [known[name]], name=known[name], to=to))
        return known[name]

    for node in list(graph.node):
        inside = node.name in core
        for i, name in enumerate(node.input):
            if inside and name in floats - made_inside and not (node.op_type == "Resize" and i > 0):  # scales are fp32 by definition
                node.input[i] = cast(name, TensorProto.FLOAT16, lowered)
            elif not inside and name in made_inside:
                node.input[i] = cast(name, TensorProto.FLOAT, raised)
        nodes.append(node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    return plain


def to_int8(model: onnx.ModelProto, inputs: dict[str, NDArray[np.uint8]]) -> onnx.ModelProto:
    """Post-training quantisation (NNCF: mean of minima and maxima, bias correction) of the convolutional core, as Q/DQ nodes.

    Weights are symmetric per channel and stored as int8; activations symmetric per tensor, uint8 where nothing is negative (`signed`).
    NNCF corrects biases one convolution after another, each on what the quantised ones before it give (Nagel et al. 2019, section 4.2):
    its fast form, which looks at one convolution alone, leaves the lungs' outline half as far off again (docs/performance.md).

    Args:
        inputs: Input name → `[n, 1, 256, 256]`, what to calibrate on. Nothing of it is kept but the scales and biases.
    """
    with redirect_stdout(sys.stderr):  # stdout is for results
        import nncf

        nncf.set_log_level(logging.WARNING)
    plain = with_split_convolutions(with_plain_weights(model))
    core = convolutional_core(plain.graph) - _stem(plain.graph)
    left_alone = [node.name for node in plain.graph.node if node.name not in core or node.op_type == "Sum"]
    count = len(next(iter(inputs.values())))
    samples = nncf.Dataset([{name: values[i : i + 1] for name, values in inputs.items()} for i in range(count)])
    with redirect_stdout(sys.stderr):
        quantised: onnx.ModelProto = nncf.quantize(
            plain,
            samples,
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=count,
            fast_bias_correction=False,
            ignored_scope=nncf.IgnoredScope(names=left_alone, validate=False),
        )
    _drop_unused(quantised.graph)
    return quantised


def with_split_convolutions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function, with each convolution of concatenated features that are partly never negative as the sum of two.

    A decoder joins what it has made (behind a ReLU, 0 to 6) with the encoder's bottleneck (linear, -50 to 50). Of one convolution all
    inputs have one scale: eight bits for the bottleneck are two or three for the decoder. Of two, each has its own.

    NNCF's bias correction asks for the output and the input of each convolution by name; hence Sum (ONNX Runtime would fuse Add, and the
    output with it) and a concatenation even of one tensor.
    """
    split = copy.deepcopy(model)
    graph = split.graph
    shapes = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    channels = {value.name: value.type.tensor_type.shape.dim[1].dim_value for value in shapes if len(value.type.tensor_type.shape.dim) > 1}
    made_by = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}

    def joined(name: str) -> list[str]:
        node = made_by.get(name)
        if node is None or node.op_type != "Concat" or _attribute(node, "axis", 0) != 1:
            return [name]
        return [part for each in node.input for part in joined(each)]

    def unsigned(name: str) -> bool:
        node = made_by.get(name)
        while node is not None and node.op_type == "Resize":
            node = made_by.get(node.input[0])
        return node is not None and node.op_type in ("Relu", "Clip")

    nodes: list[onnx.NodeProto] = []
    for node in list(graph.node):
        parts = joined(node.input[0]) if node.op_type == "Conv" and _attribute(node, "group", 1) == 1 else []
        if len({unsigned(part) for part in parts}) < 2:
            nodes.append(node)
            continue
        ends = np.cumsum([channels[part] for part in parts])
        whole = np.split(numpy_helper.to_array(weights[node.input[1]]), ends[:-1], axis=1)
        bias = numpy_helper.to_array(weights[node.input[2]]) if len(node.input) > 2 else np.zeros(len(whole[0]), np.float32)
        sums: list[str] = []
        for name, wanted, constant in (("signed", False, np.zeros_like(bias)), ("unsigned", True, bias)):
            mine = [i for i, part in enumerate(parts) if unsigned(part) is wanted]
            base = f"{node.output[0]}_{name}"
            arrays = {f"{base}_weight": np.concatenate([whole[i] for i in mine], axis=1), f"{base}_bias": constant}
            graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in arrays.items())
            nodes.append(onnx.helper.make_node("Concat", [parts[i] for i in mine], [f"{base}_in"], name=f"{base}_in", axis=1))
            half = copy.deepcopy(node)
            half.name = base
            half.input[:], half.output[:] = [f"{base}_in", *arrays], [base]
            nodes.append(half)
            sums.append(base)
        nodes.append(onnx.helper.make_node("Sum", sums, [node.output[0]], name=f"{node.name}_sum"))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    return split


def engine_graph(repository: Path, leaf: str, precision: EnginePrecision, networks: Networks) -> onnx.ModelProto:
    """What TensorRT builds the engine of a leaf from. In int8 the embedder is fp16: see `derive_embedded`.

    Raises:
        SetupError: The repository has no such graph.
    """
    int8 = precision is EnginePrecision.int8 and leaf == LUNG_SEGMENTATION
    graph = onnx.load(graph_file(repository, leaf, networks, int8=int8))
    if int8:
        return signed(graph)
    return with_plain_weights(graph) if precision is EnginePrecision.fp32 else to_fp16(graph)


def signed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The Q/DQ graph with all activations as int8, which is all that TensorRT knows on a GPU: uint8 with zero point 0 loses one bit.

    Raises:
        SetupError: An activation with another zero point, which has no symmetric form.
    """
    changed = copy.deepcopy(model)
    values = {tensor.name: tensor for tensor in changed.graph.initializer}
    for node in changed.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or values[node.input[2]].data_type != TensorProto.UINT8:
            continue
        if numpy_helper.to_array(values[node.input[2]]).any():
            raise SetupError(f"{node.name}: zero point is not 0", expected="symmetric quantisation", next_step="run `cxr build int8` again")
        names = [f"{name}_signed" for name in node.input[1:3]]
        if names[0] not in values:
            scale = numpy_helper.to_array(values[node.input[1]]) * np.float32(255 / 127)
            zero = np.zeros(scale.shape, np.int8)
            for name, array in zip(names, (scale, zero), strict=True):
                changed.graph.initializer.append(numpy_helper.from_array(array, name))
                values[name] = changed.graph.initializer[-1]
        node.input[1], node.input[2] = names
    del changed.graph.value_info[:]  # says uint8 still
    _drop_unused(changed.graph)
    return changed


def _reached(nodes: Sequence[onnx.NodeProto], takes: Any, gives: Any) -> set[str]:
    """Names of the convolutions and of all that is downstream of one, in the order given."""
    known: set[str] = set()
    found: set[str] = set()
    for node in nodes:
        if node.op_type in CONVOLUTIONS or not known.isdisjoint(takes(node)):
            known.update(name for name in gives(node) if name)
            found.add(node.name)
    return found


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _stem(graph: onnx.GraphProto) -> set[str]:
    """Names of the convolutions with fewer than `_STEM` others between them and the image."""
    depth: dict[str, int] = {}
    found: set[str] = set()
    for node in graph.node:
        before = max((depth.get(name, 0) for name in node.input), default=0)
        here = before + (node.op_type in CONVOLUTIONS)
        depth.update(dict.fromkeys(node.output, here))
        if here > before and here <= _STEM:
            found.add(node.name)
    return found


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Removes nodes and initialisers that nothing reads any more (the graph is in topological order)."""
    read = {value.name for value in graph.output}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if not read.isdisjoint(node.output):
            read.update(node.input)
            nodes.append(node)
    initialisers = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(initialisers)
