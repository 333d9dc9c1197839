"""What all models that are no step of the ensemble have in common as folders that Triton serves: configuration, version, parity.

In production Triton's ONNX Runtime backend runs them; embedded, OpenVINO does.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tritonclient.grpc import model_config_pb2

from cxr_retrieval.contract import LeafSpec
from cxr_retrieval.errors import SetupError
from cxr_retrieval_build.parity import RUNTIMES, Arrays, in_torch

_pb: Any = model_config_pb2  # generated code without type information


def further_config(leaf: LeafSpec, parameters: Mapping[str, str], *, on_gpu: bool = False) -> Any:
    """The production `ModelConfig` of one. `on_gpu`: it is worth a GPU where there is one."""
    config = _pb.ModelConfig(name=leaf.name, platform="onnxruntime_onnx", max_batch_size=64)
    for tensors, specs in ((config.input, leaf.inputs), (config.output, leaf.outputs)):
        for spec in specs:
            tensors.add(name=spec.name, data_type=_pb.DataType.Value(f"TYPE_{spec.dtype}"), dims=spec.shape)
    kind = _pb.ModelInstanceGroup.KIND_AUTO if on_gpu else _pb.ModelInstanceGroup.KIND_CPU
    config.instance_group.add(count=1, kind=kind)
    config.dynamic_batching.SetInParent()
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


@contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """A folder beside `out` to write into, which becomes `out` once the block has ended well: it is there whole or not at all.

    Raises:
        SetupError: `out` is there already.
    """
    if out.exists():
        raise SetupError(f"{out}: already exists", expected="a new folder", next_step="remove it, or give another")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".building-") as folder:
        fresh = Path(folder) / "model"
        yield fresh
        fresh.rename(out)


def version_of(*graphs: Path) -> str:
    """The model version: first 12 hex digits of the SHA-256 over its graphs."""
    digest = hashlib.sha256()
    for graph in graphs:
        digest.update(graph.read_bytes())
    return digest.hexdigest()[:12]


def require_parity(network: nn.Module, leaf: LeafSpec, graph: Path, inputs: Arrays, tolerance: float) -> dict[str, float]:
    """Runtime → greatest difference of its output from PyTorch's.

    Raises:
        SetupError: One misses the tolerance, or says what is no number.
    """
    name = leaf.outputs[0].name
    reference = np.asarray(in_torch(network, leaf, inputs)[name], np.float64)
    found = {
        runtime: float(np.abs(np.asarray(run(graph, inputs, [name])[name], np.float64) - reference).max())
        for runtime, run in RUNTIMES.items()
    }
    if missed := {runtime: gap for runtime, gap in found.items() if not gap <= tolerance}:  # nor is NaN
        raise SetupError(
            f"{leaf.name}: the export differs from PyTorch",
            expected=f"{name} within {tolerance:g}",
            got=", ".join(f"{runtime} {gap:.2g}" for runtime, gap in missed.items()),
            next_step="do not serve it",
        )
    return found
