"""The ensemble's networks in this process, chained as Triton chains them: for workers of bulk work that have no server near them.

Asked as a `TritonClient` is, and with the same answers: the graphs, precisions and version of the weights are those that `cxr serve` would
choose from the same repository on this machine. On a CPU OpenVINO runs them; on an NVIDIA GPU TensorRT does, which ONNX Runtime is left to
build engines with and to feed, and which is kept for the next start.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.contract import (
    ENSEMBLE_OUTPUTS,
    IMAGE,
    LEAVES,
    LUNG_MASK,
    LUNG_SEGMENTATION,
    MASK,
    LeafSpec,
    TensorSpec,
)
from cxr_retrieval.errors import InferenceError, SetupError, UnusableOutputError
from cxr_retrieval.inference.trace import Trace
from cxr_retrieval.inference.triton import BATCH_SIZE, Images, Outputs
from cxr_retrieval.locations import cache_folder, default_repository
from cxr_retrieval.serving.choices import Networks, Precision, resolve
from cxr_retrieval.serving.repository import graph_file, model_version

Run = Callable[[Mapping[str, NDArray[np.generic]]], Outputs]
"""A leaf: tensors `[n, ...]` by name → tensors `[n, ...]` by name; from any thread."""


class Runtime(str, Enum):
    """What executes the networks where no Triton does."""

    openvino = "openvino"
    tensorrt = "tensorrt"


@dataclass(frozen=True)
class InProcess:
    """Which networks, and how they are run; says the same on every machine that has the repository.

    Args:
        repository: Of production's form; None: the one that ships, wherever it lies on the machine that opens this.
        threads: Of a CPU, and so many films at a time; a GPU is given whole requests.
    """

    runtime: Runtime = Runtime.openvino
    networks: Networks = Networks.ensemble
    precision: Precision = Precision.auto
    repository: Path | None = None
    threads: int = 1

    @property
    def model_version(self) -> str:
        """Of the weights; a gallery of theirs has it in its name.

        Raises:
            SetupError: No such repository here.
        """
        return model_version(self.repository or default_repository(), self.networks)

    def open(self) -> Engines:
        """Loads them; seconds.

        Raises:
            SetupError: A graph is not here, or what should run it.
        """
        repository = self.repository or default_repository()
        if self.runtime is Runtime.tensorrt:
            kept = cache_folder() / "tensorrt"
            graphs = {leaf: graph_file(repository, leaf.name, self.networks) for leaf in LEAVES}
            return Engines({leaf.name: onnx_leaf(graph, _tensorrt(leaf, kept)) for leaf, graph in graphs.items()}, self.model_version)
        precision = resolve(repository, self.precision, self.networks)
        leaves: dict[str, Run] = {}
        for leaf in LEAVES:
            lowered = precision if leaf.name == LUNG_SEGMENTATION else Precision.fp32  # as `derive_embedded` has it
            graph = graph_file(repository, leaf.name, self.networks, int8=lowered is Precision.int8)
            leaves[leaf.name] = _openvino_leaf(graph, lowered, self.threads)
        return Engines(leaves, self.model_version)


class Engines:
    """The networks, loaded. Thread-safe. Use as a context manager."""

    def __init__(self, leaves: Mapping[str, Run], model_version: str) -> None:
        self._leaves, self.model_version = leaves, model_version

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def probe(self) -> None:
        """They are never away."""

    def infer(
        self,
        images: Images,
        outputs: Sequence[TensorSpec] = ENSEMBLE_OUTPUTS,
        on_overload: Callable[[], None] = lambda: None,
        trace: Trace | None = None,
    ) -> Outputs:
        """As `TritonClient.infer`: only the leaves that the wanted outputs need are run.

        Raises:
            InferenceError: An output that no leaf has; NaN or infinity in one.
        """
        known: Outputs = {IMAGE.name: images}
        for leaf in _needed(outputs):
            if LUNG_MASK.name in known:
                known[MASK.name] = known[LUNG_MASK.name]
            known |= self._leaves[leaf.name]({spec.name: known[spec.name] for spec in leaf.inputs})
        for output in outputs:
            if known[output.name].dtype.kind == "f" and not np.isfinite(known[output.name]).all():
                raise UnusableOutputError(
                    f"the networks answered {output.name} with NaN or infinity", next_step="check the model's weights and precision"
                )
        return {output.name: known[output.name] for output in outputs}


def _needed(outputs: Sequence[TensorSpec]) -> list[LeafSpec]:
    """Leaves in their order, up to the last one that an output comes from first.

    Raises:
        InferenceError: One comes from none.
    """
    first = {output: number for number, leaf in reversed(list(enumerate(LEAVES))) for output in leaf.outputs}
    strange = [output.name for output in outputs if output not in first]
    if strange:
        raise InferenceError(
            f"the networks in this process have no {', '.join(strange)}",
            expected="outputs of the ensemble",
            next_step="ask a Triton server that serves that further model (`cxr serve`)",
        )
    return list(LEAVES[: max(first[output] for output in outputs) + 1])


def _openvino_leaf(graph: Path, precision: Precision, threads: int) -> Run:
    """Compiled for one image, which is faster than for many (`openvino_model.py`); as many at a time as there are threads."""
    import openvino as ov

    core: Any = ov.Core()
    core.set_property({"CACHE_DIR": str(cache_folder() / "openvino")})
    model = core.read_model(graph)
    model.reshape({tensor: [1, *list(tensor.get_partial_shape())[1:]] for tensor in model.inputs})
    hint = "bf16" if precision is Precision.bf16 else "f32"
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads, "ENABLE_CPU_PINNING": False}
    compiled = core.compile_model(model, "CPU", settings)
    names = [output.get_any_name() for output in compiled.outputs]
    free: SimpleQueue[Any] = SimpleQueue()
    for _ in range(threads):
        free.put(compiled.create_infer_request())

    def run(inputs: Mapping[str, NDArray[np.generic]]) -> Outputs:
        request = free.get()
        try:
            found: dict[str, list[NDArray[np.generic]]] = {name: [] for name in names}
            for number in range(len(next(iter(inputs.values())))):
                answer = request.infer({name: values[number : number + 1] for name, values in inputs.items()})
                for name in names:
                    found[name].append(np.array(answer[name]))
        finally:
            free.put(request)
        return {name: np.concatenate(values) for name, values in found.items()}

    return run


def onnx_leaf(graph: Path, providers: Sequence[Any]) -> Run:
    """By ONNX Runtime, with these execution providers.

    Raises:
        SetupError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise _no_tensorrt("no onnxruntime") from error
    session: Any = onnxruntime.InferenceSession(graph, providers=list(providers))
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _tensorrt(leaf: LeafSpec, kept: Path) -> list[Any]:
    """TensorRT with engines kept between starts, for one film up to a whole request; what it cannot run, CUDA does.

    Raises:
        SetupError: This ONNX Runtime has it not.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise _no_tensorrt("no onnxruntime") from error
    has: Any = onnxruntime.get_available_providers()
    if "TensorrtExecutionProvider" not in has:
        raise _no_tensorrt(f"an onnxruntime with {', '.join(has)}")
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    shapes = {
        f"trt_profile_{which}_shapes": ",".join(f"{spec.name}:{count}x{'x'.join(map(str, spec.shape))}" for spec in leaf.inputs)
        for which, count in (("min", 1), ("opt", BATCH_SIZE), ("max", BATCH_SIZE))
    }
    options = {"trt_engine_cache_enable": True, "trt_engine_cache_path": os.fspath(kept), **shapes}
    return [("TensorrtExecutionProvider", options), "CUDAExecutionProvider"]


def _no_tensorrt(got: str) -> SetupError:
    return SetupError(
        "TensorRT cannot be run in this process",
        expected="onnxruntime-gpu, with its TensorRT execution provider, on a machine with an NVIDIA GPU",
        got=got,
        next_step="pip install onnxruntime-gpu tensorrt there, or take --inference openvino or triton",
    )
