"""Compares each exported graph with its PyTorch original, output by output, in ONNX Runtime and in OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import openvino as ov
import torch
from numpy.typing import NDArray
from torch import nn

from cxr_retrieval.contract import (
    APPEARANCE,
    ATTENTION,
    ATTENTION_MAP,
    EMBEDDING,
    FEATURES,
    IMAGE,
    LUNG_AGREEMENT,
    LUNG_MASK,
    LUNGS,
    MASK,
    LeafSpec,
)
from cxr_retrieval.errors import SetupError
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom
from cxr_retrieval_build.onnx_export import GRAPHS, STUDENT

Arrays = dict[str, NDArray[np.generic]]
Runtime = Callable[[Path, Mapping[str, NDArray[np.generic]], list[str]], Arrays]


@dataclass(frozen=True)
class Tolerance:
    """Largest absolute difference and least cosine (per image) that pass."""

    maximum: float
    cosine: float


TOLERANCES: Final = {
    LUNG_MASK.name: Tolerance(255.0, 0.998),  # a pixel at the threshold may flip whole: the cosine is the gate
    LUNGS.name: Tolerance(255.0, 0.998),
    LUNG_AGREEMENT.name: Tolerance(0.005, 0.9999),
    EMBEDDING.name: Tolerance(0.01, 0.9995),
    APPEARANCE.name: Tolerance(0.01, 0.9995),
    FEATURES.name: Tolerance(0.1, 0.999),
    ATTENTION.name: Tolerance(0.02, 0.9999),
    ATTENTION_MAP.name: Tolerance(0.001, 0.99999),
}


@dataclass(frozen=True)
class Parity:
    """How far one output of one graph is from PyTorch in one runtime."""

    model: str
    output: str
    runtime: str
    maximum: float
    cosine: float
    passed: bool


def parity_inputs(per_class: int = 2) -> NDArray[np.uint8]:
    """Phantoms and one picture of noise, `[n, 1, 256, 256]`: the same everywhere, no patient's image needed."""
    pictures = [letterbox(make_phantom(500 + seed, label).pixels)[0] for label in PHANTOM_LABELS for seed in range(per_class)]
    noise = np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8)
    return np.stack([*pictures, noise])[:, None]


def compare(networks: Mapping[str, nn.Module], repository: Path, images: NDArray[np.uint8]) -> list[Parity]:
    """Runs every graph in every runtime on the same inputs, each step fed with PyTorch's output of the step before."""
    results: list[Parity] = []
    known: Arrays = {IMAGE.name: images}
    for graph in GRAPHS:
        if graph.name not in networks:
            continue
        inputs = {spec.name: known[spec.name] for spec in graph.leaf.inputs}
        reference = in_torch(networks[graph.name], graph.leaf, inputs)
        for runtime, run in RUNTIMES.items():
            outputs = run(repository / graph.file, inputs, list(reference))
            results += [measure(graph.name, name, runtime, reference[name], outputs[name]) for name in reference]
        if graph.name != STUDENT:
            known |= reference
            known[MASK.name] = known[LUNG_MASK.name]
    return results


def measure(model: str, output: str, runtime: str, reference: NDArray[np.generic], got: NDArray[np.generic]) -> Parity:
    """One comparison; anything not finite fails, whatever the tolerance."""
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (reference, got))
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Parity(model, output, runtime, float("inf"), -1.0, passed=False)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same_zero = (np.linalg.norm(a, axis=1) == 0) & (np.linalg.norm(b, axis=1) == 0)
    cosine = np.where(same_zero, 1.0, (a * b).sum(axis=1) / np.maximum(norms, 1e-30))
    maximum, least = float(np.abs(a - b).max()), float(cosine.min())
    limit = TOLERANCES[output]
    return Parity(model, output, runtime, maximum, least, passed=maximum <= limit.maximum and least >= limit.cosine)


def require_parity(results: list[Parity]) -> None:
    """Refuses an export that misses a tolerance.

    Raises:
        SetupError: Which outputs missed by how much.
    """
    bad = [result for result in results if not result.passed]
    if bad:
        worst = "; ".join(f"{r.model}.{r.output} in {r.runtime}: maximum {r.maximum:.2g}, cosine {r.cosine:.6f}" for r in bad)
        raise SetupError(
            "the export differs from PyTorch", expected="every output within its tolerance", got=worst, next_step="do not ship it"
        )


def as_report(results: list[Parity]) -> list[dict[str, Any]]:
    """JSON form, tolerances included."""
    return [{**asdict(result), "tolerance": asdict(TOLERANCES[result.output])} for result in results]


@torch.inference_mode()
def in_torch(network: nn.Module, leaf: LeafSpec, inputs: Arrays) -> Arrays:
    """What the network itself answers, by output name."""
    outputs = network(*(torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in leaf.inputs))
    return {spec.name: value.numpy() for spec, value in zip(leaf.outputs, outputs, strict=True)}


def _onnx_runtime(path: Path, inputs: Mapping[str, NDArray[np.generic]], outputs: list[str]) -> Arrays:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values: Any = session.run(outputs, dict(inputs))
    return dict(zip(outputs, values, strict=True))


def _openvino(path: Path, inputs: Mapping[str, NDArray[np.generic]], outputs: list[str]) -> Arrays:
    core = ov.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled(dict(inputs))
    return {name: np.array(result[name]) for name in outputs}


RUNTIMES: Final[Mapping[str, Runtime]] = {"ONNX Runtime": _onnx_runtime, "OpenVINO": _openvino}
