"""What an embedded server lets its user choose (apart, so that `--help` need not load a protobuf runtime)."""

from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from typing import Any, Final

from cxr_retrieval.contract import (
    EMBEDDER,
    LUNG_SEGMENTATION,
    MODEL_VERSION_PARAMETER,
    PUBLISHED_VERSION_PARAMETER,
    STUDENT_VERSION_PARAMETER,
)
from cxr_retrieval.errors import UsageError

PARITY_REPORT: Final = "parity.json"
"""In the model repository: how far each precision is from PyTorch, and which ones passed their gates (`cxr build parity`)."""

EMBEDDED_RUNTIME: Final = "OpenVINO"
ENGINE_GRAPHS_RUNTIME: Final = "ONNX Runtime"
"""Executes on a CPU, in the parity gates, the very graphs that TensorRT engines are built from."""

_NEEDS: Final = {"int8": {"avx512_vnni", "avx_vnni", "amx_int8"}, "bf16": {"avx512_bf16", "amx_bf16"}}


class Precision(str, Enum):
    """Arithmetic of the embedded engines."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


class EnginePrecision(str, Enum):
    """Arithmetic of the convolutions in a TensorRT engine; all else is fp32."""

    fp16 = "fp16"
    fp32 = "fp32"
    int8 = "int8"


class Segmentation(str, Enum):
    """Which networks find the lungs: the five published ones, or one small network that has learnt from them."""

    ensemble = "ensemble"
    student = "student"


class Embedder(str, Enum):
    """Which network describes the lungs: the one tuned to these data, or that of Zhong et al. 2020 as far as they describe it."""

    tuned = "tuned"
    published = "published"


class Networks(str, Enum):
    """Networks that are served together. Their weights have a version of their own, and so have their galleries."""

    ensemble = "ensemble"
    student = "student"
    """The small network finds the lungs."""
    published = "published"
    """The published embedder describes them."""

    @property
    def version_parameter(self) -> str:
        """Where the production ensemble's `config.pbtxt` has the version of their weights."""
        own = {Networks.student: STUDENT_VERSION_PARAMETER, Networks.published: PUBLISHED_VERSION_PARAMETER}
        return own.get(self, MODEL_VERSION_PARAMETER)

    @property
    def told(self) -> str:
        """For people."""
        segmentation = Segmentation.student if self is Networks.student else Segmentation.ensemble
        embedder = Embedder.published if self is Networks.published else Embedder.tuned
        return f"segmentation by {segmentation.value}, {embedder.value} embedder"

    def stem(self, leaf: str) -> str:
        """What the ONNX file of a leaf is called, without its endings."""
        own = {(Networks.student, LUNG_SEGMENTATION): "student", (Networks.published, EMBEDDER): "published"}
        return own.get((self, leaf), "model")


def networks_of(segmentation: Segmentation, embedder: Embedder) -> Networks:
    """Those that a user's two choices come to.

    Raises:
        UsageError: The student together with the published embedder: no version was measured of these two.
    """
    if embedder is Embedder.tuned:
        return Networks(segmentation.value)
    if segmentation is Segmentation.student:
        raise UsageError(
            "--segmentation student with --embedder published",
            expected="the published embedder on the lungs that the five networks find, on which it was trained",
            next_step="leave one of them out",
        )
    return Networks.published


def cpu_flags() -> frozenset[str]:
    """Features of this CPU as Linux names them; none where it does not tell."""
    try:
        found = re.search(r"^flags\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(found[1].split()) if found else frozenset()


def supported(precision: Precision, flags: frozenset[str]) -> bool:
    """Whether the CPU multiplies in this precision; elsewhere it would be emulated, and slow."""
    return precision is Precision.fp32 or bool(_NEEDS.get(precision.value, set()) & flags)


def graph_path(repository: Path, leaf: str, networks: Networks, *, int8: bool) -> Path:
    """Where the ONNX graph of a leaf belongs, whether it is there or not."""
    return repository / leaf / "1" / f"{networks.stem(leaf)}{'.int8' if int8 else ''}.onnx"


def gate(repository: Path, runtime: str, precision: str, networks: Networks) -> dict[str, Any] | None:
    """The gate as `cxr build parity` measured it for the weights at hand; None where it did not."""
    try:
        report = json.loads((repository / PARITY_REPORT).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    wanted = {"runtime": runtime, "precision": precision, "networks": networks.value}
    return next((dict(one) for one in report.get("gates", []) if all(one.get(key) == value for key, value in wanted.items())), None)


def resolve(repository: Path, precision: Precision, networks: Networks, flags: frozenset[str] | None = None) -> Precision:
    """The precision itself. `auto`: the fastest that the CPU (or `flags`) has and that passed its gates with these weights, else fp32.

    int8 has a graph of its own, which a repository may lack.
    """
    if precision is not Precision.auto:
        return precision
    for fast in (Precision.int8, Precision.bf16):
        if fast is Precision.int8 and not graph_path(repository, LUNG_SEGMENTATION, networks, int8=True).is_file():
            continue
        measured = gate(repository, EMBEDDED_RUNTIME, fast.value, networks)
        if supported(fast, cpu_flags() if flags is None else flags) and measured is not None and measured["passed"]:
            return fast
    return Precision.fp32


def doubts(repository: Path, precision: Precision, networks: Networks, flags: frozenset[str]) -> str:
    """What speaks against a precision that was asked for; empty where nothing does, and for fp32, there being nothing more exact."""
    if precision is Precision.fp32:
        return ""
    if not supported(precision, flags):
        return f"this CPU has no {precision.value} arithmetic; it is emulated, and slower than fp32"
    measured = gate(repository, EMBEDDED_RUNTIME, precision.value, networks)
    if measured is None:
        return f"{precision.value} was not measured with these weights (`cxr build parity`)"
    if measured["passed"]:
        return ""
    by = missed(measured)
    return f"{precision.value} missed its parity gate with these weights: {by}. Neighbours may differ from those that fp32 finds"


def missed(measured: dict[str, Any]) -> str:
    """The figures of a gate that are beyond their limits, for people."""
    beyond = {name: one for name, one in measured["figures"].items() if not one["passed"]}
    return ", ".join(f"{name} {one['value']:.4f} (limit {one['limit']:g})" for name, one in beyond.items())
