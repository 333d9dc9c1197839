"""Derives the graphs of lower precision from the one that ships: fp16 for TensorRT, int8 (Q/DQ) for TensorRT and for CPUs.

Only what lies between the first and the last convolution of a path is lowered; that is nearly all of the arithmetic. Before it grey
values are standardised (sums over 65,536 pixels overflow fp16), behind it probabilities are cut and embeddings whitened and brought to
unit length, all of which stays fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from cxr_retrieval.errors import SetupError

_CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose"})


def with_plain_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its fp16 weights as fp32 initialisers, without the Cast behind each (`store_weights_as_fp16` undone)."""
    plain = copy.deepcopy(model)
    halved = {tensor.name: tensor for tensor in plain.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    nodes: list[onnx.NodeProto] = []
    for node in plain.graph.node:
        if node.op_type == "Cast" and node.input[0] in halved:
            tensor = halved[node.input[0]]
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), node.output[0]))
        else:
            nodes.append(node)
    del plain.graph.node[:]
    plain.graph.node.extend(nodes)
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
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return plain


def to_int8(model: onnx.ModelProto, inputs: dict[str, NDArray[np.uint8]]) -> onnx.ModelProto:
    """Post-training quantisation (NNCF: min-max statistics, bias correction) of the convolutional core, as Q/DQ nodes.

    Weights are symmetric per channel and stored as int8; activations symmetric per tensor, uint8 where nothing is negative (`signed`).

    Args:
        inputs: Input name → `[n, 1, 256, 256]`, what to calibrate on. Nothing of it is kept but the scales.
    """
    import nncf

    plain = with_plain_weights(model)
    core = convolutional_core(plain.graph)
    outside = [node.name for node in plain.graph.node if node.name not in core]
    count = len(next(iter(inputs.values())))
    samples = nncf.Dataset([{name: values[i : i + 1] for name, values in inputs.items()} for i in range(count)])
    return nncf.quantize(
        plain,
        samples,
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=count,
        ignored_scope=nncf.IgnoredScope(names=outside, validate=False),
    )


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
    return changed


def _reached(nodes: Sequence[onnx.NodeProto], takes: Any, gives: Any) -> set[str]:
    """Names of the convolutions and of all that is downstream of one, in the order given."""
    known: set[str] = set()
    found: set[str] = set()
    for node in nodes:
        if node.op_type in _CONVOLUTIONS or not known.isdisjoint(takes(node)):
            known.update(name for name in gives(node) if name)
            found.add(node.name)
    return found
