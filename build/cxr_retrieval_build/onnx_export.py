"""Writes the graphs as ONNX with weights of half the size, or a quarter: `cxr build onnx`.

Weights are stored as fp16 initialisers behind a Cast, or as int8 ones behind a Cast and a Div where int8 holds them, so the graph computes
in fp32 and any runtime may lower it further; that changes nothing, for the networks compute with weights that are so held (`shipped.py`).

A graph's metadata says how its network is built and which of its tensors is which of the network's, so that `cxr build checkpoints` can
make a checkpoint of it again.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from cxr_retrieval.contract import (
    ATTENTION_MAP_MODEL,
    EMBEDDER,
    ENSEMBLE,
    LEAVES,
    LUNG_SEGMENTATION,
    LeafSpec,
    TensorSpec,
)
from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.choices import Networks
from cxr_retrieval.serving.repository import graph_file
from cxr_retrieval_build.lower_precision import CONVOLUTIONS
from cxr_retrieval_training.embedding.embedder import AttentionMapHead
from cxr_retrieval_training.embedding.train_embedder import load_embedder
from cxr_retrieval_training.segmentation.lungs import load_segmenter
from cxr_retrieval_training.shipped import HALVED_FROM, int8_scale

OPSET: Final = 18
DESCRIPTION: Final = ("config", "members", "data_sha256")
"""Of a checkpoint, what a graph's metadata repeats: how the network is built, and what it learnt from."""
_TORCH_TYPES: Final = {"UINT8": torch.uint8, "INT32": torch.int32, "FP32": torch.float32}


STUDENT: Final = "student"
PUBLISHED: Final = "published"
"""The graph of the published embedder; `student` is that of the small segmentation network."""


@dataclass(frozen=True)
class Graph:
    """One exported graph: the leaf whose tensors it has, and its file in the repository."""

    name: str
    leaf: LeafSpec
    file: Path


GRAPHS: Final = (
    *(Graph(leaf.name, leaf, Path(leaf.name, "1", "model.onnx")) for leaf in LEAVES),
    Graph(STUDENT, LEAVES[0], Path(LUNG_SEGMENTATION, "1", "student.onnx")),
    Graph(PUBLISHED, LEAVES[1], Path(EMBEDDER, "1", "published.onnx")),
)


def load_networks(segmenter: Path, embedder: Path, student: Path | None = None, published: Path | None = None) -> dict[str, nn.Module]:
    """Builds the graphs from the checkpoints of `cxr train`, in evaluation mode, by name.

    Raises:
        UsageError: A checkpoint is absent, damaged, or not of its kind.
    """
    modules: dict[str, nn.Module] = {
        LUNG_SEGMENTATION: load_segmenter(segmenter),
        EMBEDDER: load_embedder(embedder, torch.device("cpu")),
        ATTENTION_MAP_MODEL: AttentionMapHead(),
    }
    if student is not None:
        modules[STUDENT] = load_segmenter(student)
    if published is not None:
        modules[PUBLISHED] = load_embedder(published, torch.device("cpu"))
    return {name: module.eval() for name, module in modules.items()}


def export(network: nn.Module, leaf: LeafSpec, path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Exports one graph with the contract's names, a dynamic batch dimension and small weights.

    Args:
        about: Its checkpoint but for the weights; None for a network without weights.

    Raises:
        SetupError: PyTorch exported nothing, a weight does not fit fp16, or the graph lacks a weight.
    """
    model = traced(network, leaf)
    if about is not None:
        kept = {key: about[key] for key in DESCRIPTION if key in about}
        stored = {"checkpoint": kept, "stored_as": stored_as(network, model)}
        onnx.helper.set_model_props(model, {key: json.dumps(value, sort_keys=True) for key, value in stored.items()})
    save(with_small_weights(with_own_biases(model)), path)


def traced(network: nn.Module, leaf: LeafSpec) -> onnx.ModelProto:
    """The graph with the contract's names, a dynamic batch dimension and its weights in fp32.

    Raises:
        SetupError: PyTorch exported nothing.
    """
    batch = torch.export.Dim("batch", min=1, max=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the exporter remarks on axes that share a name, as ours do
        program = torch.onnx.export(
            network,
            tuple(_example(spec) for spec in leaf.inputs),
            input_names=[spec.name for spec in leaf.inputs],
            output_names=[spec.name for spec in leaf.outputs],
            dynamic_shapes=tuple({0: batch} for _ in leaf.inputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise SetupError(f"{leaf.name}: PyTorch exported nothing", next_step="check the installed torch and onnxscript")
    return without_traces(program.model_proto)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Checks a graph and writes it."""
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def stored_as(network: nn.Module, model: onnx.ModelProto) -> dict[str, str | int]:
    """Name in the network's state → initialiser, for those that the exporter names otherwise: equal tensors it stores once, those of a
    group norm in another shape. A bias of nothing but zeros it drops; of that, how many.

    Raises:
        SetupError: A tensor that the graph does not hold.
    """
    held = {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in model.graph.initializer}
    first = {data: name for name, data in reversed(held.items())}
    found: dict[str, str | int] = {}
    for name, tensor in network.state_dict().items():
        data = tensor.numpy().tobytes()
        if not tensor.is_floating_point() or held.get(name) == data:
            continue
        if data not in first and not tensor.any():
            found[name] = tensor.numel()
            continue
        if data not in first:
            raise SetupError(f"the exported graph does not hold {name}", next_step="check the installed torch and onnxscript")
        found[name] = first[data]
    return found


def without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Takes away the exporter's notes on where in the source each node comes from: paths and line numbers of one machine, which would
    make another file, and another model version, of the same network.
    """
    for part in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.initializer,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
    ):
        del part.metadata_props[:]
        part.doc_string = ""
    return model


def with_own_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """Gives each convolution a bias of its own where the exporter stored equal ones once (the embedder's frozen first layers).

    OpenVINO adds a bias within the convolution only if nothing else reads it; added afterwards they took a sixth of the embedder's time.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    taken: set[str] = set()
    for node in model.graph.node:
        bias = node.input[2] if node.op_type in CONVOLUTIONS and len(node.input) > 2 else ""
        if bias in taken:
            node.input[2] = f"{node.name}_bias"
            model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(tensors[bias]), node.input[2]))
        elif bias:
            taken.add(bias)
    return model


def with_small_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turns large fp32 initialisers into int8 ones with a divisor for each row, where those hold them, and else into fp16 ones.

    Not DequantizeLinear, nor a factor in the divisor's place: OpenVINO 2026.4 takes either for a wish to compute with int8, and with two
    streams gives other vectors (cosine 0.49 instead of 1; seen with 1×1 convolutions).

    Raises:
        SetupError: A weight that neither holds exactly: too large, or the network did not come through `as_shipped`.
    """
    graph = model.graph
    raised, divisors = [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < HALVED_FROM:
            continue
        name = tensor.name
        quantised = _as_int8(values)
        if quantised is None:
            tensor.CopyFrom(numpy_helper.from_array(_as_fp16(name, values), f"{name}_fp16"))
            raised.append(onnx.helper.make_node("Cast", [tensor.name], [name], name=f"{name}_cast", to=onnx.TensorProto.FLOAT))
        else:
            tensor.CopyFrom(numpy_helper.from_array(quantised[0], f"{name}_int8"))
            divisors.append(numpy_helper.from_array(quantised[1], f"{name}_divisor"))
            steps = f"{name}_steps"
            raised.append(onnx.helper.make_node("Cast", [tensor.name], [steps], name=f"{name}_cast", to=onnx.TensorProto.FLOAT))
            raised.append(onnx.helper.make_node("Div", [steps, divisors[-1].name], [name], name=f"{name}_divided"))
    graph.initializer.extend(divisors)
    nodes = [*raised, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _as_int8(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
    """int8's numbers and a divisor for each row, if they are the values exactly."""
    weight = torch.from_numpy(values.copy())
    if weight.dim() < 2:
        return None
    scale = int8_scale(weight)
    small = (weight / scale).to(torch.int8)
    return (small.numpy(), (1.0 / scale).numpy()) if torch.equal(small * scale, weight) else None


def _as_fp16(name: str, values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        halved = values.astype(np.float16)
    held = np.isfinite(halved) & (halved == values)
    if not held.all():
        raise SetupError(
            f"weight {name} does not fit fp16",
            expected="finite values that fp16 holds exactly",
            got=f"{1 - held.mean():.0%} that it does not",
            next_step="load the network with as_shipped, and check the training run",
        )
    return halved


def weights_version(repository: Path, networks: Networks = Networks.ensemble) -> str:
    """The model version: first 12 hex digits of the SHA-256 over the ONNX files served, in contract order."""
    digest = hashlib.sha256()
    for leaf in LEAVES:
        digest.update(graph_file(repository, leaf.name, networks).read_bytes())
    return digest.hexdigest()[:12]


def announce_versions(repository: Path, versions: Mapping[Networks, str]) -> None:
    """Writes the versions into the ensemble's config.pbtxt, leaving the rest of that hand-kept file as it is; empty where there is none."""
    path = repository / ENSEMBLE / "config.pbtxt"
    text = path.read_text("utf-8")
    for networks in Networks:
        key, value = networks.version_parameter, versions.get(networks, "")
        text, count = re.subn(rf'(key: "{key}" value \{{ string_value: ")[^"]*(")', rf"\g<1>{value}\g<2>", text)
        if count != 1:
            raise SetupError(
                f"{path}: no single {key} parameter", expected=f'parameters {{ key: "{key}" … }}', next_step="restore that line"
            )
    path.write_text(text, "utf-8")


def _example(spec: TensorSpec) -> Tensor:
    return torch.zeros((2, *spec.shape), dtype=_TORCH_TYPES[spec.dtype])
