"""Builds a TensorRT engine from each graph, stamps it, and refuses to serve one that does not fit: `cxr build engines`.

One builder API has two homes: `tensorrt` in the serving container, `tensorrt_rtx` as a wheel, which builds without a GPU. Networks are
strongly typed (TensorRT 11 knows nothing else): precision is in the graph (`lower_precision`), not in builder flags. An engine belongs to
one TensorRT version and, but for TensorRT-RTX, to one GPU architecture; a file beside it says which.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from cxr_retrieval.contract import ENSEMBLE, LEAVES, LeafSpec
from cxr_retrieval.errors import SetupError
from cxr_retrieval.progress import progress_bar
from cxr_retrieval.serving.choices import ENGINE_GRAPHS_RUNTIME, EnginePrecision, Networks, gate, missed
from cxr_retrieval.serving.repository import ModelConfig, announce, read_config, write_config
from cxr_retrieval_build.lower_precision import engine_graph

PLAN: Final = "model.plan"
STAMP: Final = "model.plan.json"
TIMING_CACHE: Final = "timing.cache"
REPORT: Final = "engines.json"

_NAMES: Final = {"tensorrt": "TensorRT", "compute_capability": "GPU", "precision": "precision"}
_NEXT: Final = "run `cxr build engines` again, on the machine and in the image that serve"


@dataclass(frozen=True)
class Stamp:
    """What an engine was built by, for and from."""

    tensorrt: str
    """Flavour and version, as "tensorrt 11.0.0" or "tensorrt_rtx 1.7.1"."""
    compute_capability: str
    """Of the GPU, as "9.0"; "any" for TensorRT-RTX, which compiles for the GPU it finds when it loads the engine."""
    precision: str
    onnx_sha256: str
    batches: str
    """Least, tuned-for and greatest batch, as "1 32 64": a configuration that asks for others needs another engine."""
    plan_sha256: str


@dataclass(frozen=True)
class TensorRT:
    """The builder API and where it was found."""

    api: Any
    flavour: str

    @property
    def name(self) -> str:
        """As a stamp gives it."""
        return f"{self.flavour} {self.api.__version__}"

    def compute_capability(self) -> str:
        """Which GPUs an engine built here is for."""
        return "any" if self.flavour == "tensorrt_rtx" else gpu_compute_capability() or "none"


def find_tensorrt() -> TensorRT:
    """`tensorrt` if it is there (the serving container), else the TensorRT-RTX wheels.

    Raises:
        SetupError: Neither.
    """
    for flavour, modules in {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx_libs", "tensorrt_rtx_bindings")}.items():
        try:
            found = [importlib.import_module(module) for module in modules]
        except ImportError:
            continue
        return TensorRT(found[-1], flavour)
    raise SetupError(
        "TensorRT is not installed",
        expected="the module tensorrt, or the wheels of TensorRT-RTX",
        next_step="use the serving image of compose.yaml, or pip install 'cxr-retrieval[tensorrt-rtx]'",
    )


def gpu_compute_capability() -> str | None:
    """Of the first NVIDIA GPU as its driver tells it, "major.minor"; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return f"{major.value}.{minor.value}"


def build_engines(
    repository: Path, out: Path, precision: EnginePrecision, networks: Networks, trt: TensorRT, console: Console
) -> dict[str, Any]:
    """Writes a production repository with engines: configurations, `model.plan` and its stamp for each leaf, the timing cache, a report.

    An engine whose stamp fits is kept, so that starting a service again takes no time. Configurations are written every time, each behind
    its engine and the ensemble's, which announces the version of the weights, behind all: what `repository` says is what Triton reads.

    Returns:
        What `engines.json` holds: versions, GPU, and per engine sizes in bytes, seconds, tensors and TensorRT's warnings.

    Raises:
        SetupError: The precision missed its parity gate, a graph is missing, or TensorRT refused it (its own words).
    """
    parity = _parity(repository, precision, networks)
    engines: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    for leaf in LEAVES:
        config = read_config(repository / leaf.name)
        graph = engine_graph(repository, leaf.name, precision, networks)
        serialised = graph.SerializeToString()
        batches = " ".join(map(str, batch_range(config)))
        wanted = (trt.name, trt.compute_capability(), precision.value, sha256(serialised).hexdigest(), batches)
        folder = out / leaf.name / "1"
        if _present(folder) == wanted:
            console.print(f"{leaf.name}: engine fits, kept")
            report = json.loads((folder / STAMP).read_text())["report"]
        else:
            plan, report = _build(trt, leaf, serialised, config, out / TIMING_CACHE)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PLAN).write_bytes(plan)
            stamp = Stamp(*wanted, plan_sha256=sha256(plan).hexdigest())
            (folder / STAMP).write_text(json.dumps({**asdict(stamp), "report": report}, indent=2) + "\n")
            console.print(f"{leaf.name}: {len(plan) / 1e6:.1f} MB in {report['seconds']:.1f} s, {len(report['warnings'])} warnings")
        write_config(out / leaf.name, config)
        engines[leaf.name] = report
    write_config(out / ENSEMBLE, announce(read_config(repository / ENSEMBLE), networks))
    summary = {
        "tensorrt": trt.name,
        "compute_capability": trt.compute_capability(),
        "gpu_here": gpu_compute_capability(),
        "precision": precision.value,
        "networks": networks.value,
        "parity": parity,
        "engines": engines,
    }
    (out / REPORT).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _parity(repository: Path, precision: EnginePrecision, networks: Networks) -> dict[str, Any] | None:
    """The parity gate of the graphs to build from, measured where they can be executed without a GPU; None if it was not.

    Raises:
        SetupError: It was missed.
    """
    measured = gate(repository, ENGINE_GRAPHS_RUNTIME, precision.value, networks)
    if measured is not None and not measured["passed"]:
        raise SetupError(
            f"{precision.value} missed its parity gate with these weights",
            expected="neighbours as fp32 finds them",
            got=missed(measured),
            next_step="build with --precision fp32",
        )
    return measured


def require_fitting(out: Path, repository: Path, trt: TensorRT) -> None:
    """Refuses what a server should not be started on: engines that this TensorRT or this GPU cannot run, and configurations that differ.

    A configuration differs when an edit of `repository`, or new weights, never reached `out`; its engines are then of other weights, or
    of a build that was broken off. Triton would serve them, under a version of the weights that may not be theirs.

    Args:
        out: What `build_engines` wrote.
        repository: What it would write from.

    Raises:
        SetupError: No engine, no stamp, another TensorRT, another GPU, another precision than the last build's, a file that is not the one
            stamped, or a `config.pbtxt` that is not the one derived from `repository`.
    """
    try:
        last = json.loads((out / REPORT).read_text("utf-8"))
        networks = Networks(last["networks"])
        here = {"tensorrt": trt.name, "compute_capability": trt.compute_capability(), "precision": str(last["precision"])}
    except (OSError, ValueError, LookupError) as error:
        raise SetupError(f"{out}: no finished build", expected=f"{REPORT} of `cxr build engines`", next_step=_NEXT) from error
    for leaf in LEAVES:
        folder = out / leaf.name / "1"
        stamp = _stamp(folder)
        if stamp is None or not (folder / PLAN).is_file():
            raise SetupError(f"{leaf.name}: no stamped engine", expected=f"{PLAN} and {STAMP} in {folder}", next_step=_NEXT)
        for key, expected in here.items():
            if stamp.get(key) != expected:
                raise SetupError(
                    f"{leaf.name}: this engine was built for another {_NAMES[key]}",
                    expected=expected,
                    got=str(stamp.get(key)),
                    next_step=_NEXT,
                )
        if sha256((folder / PLAN).read_bytes()).hexdigest() != stamp.get("plan_sha256"):
            raise SetupError(f"{leaf.name}: {PLAN} is not the engine that {STAMP} describes", next_step=_NEXT)
    expected_configs = {leaf.name: read_config(repository / leaf.name) for leaf in LEAVES}
    expected_configs[ENSEMBLE] = announce(read_config(repository / ENSEMBLE), networks)
    for name, config in expected_configs.items():
        if read_config(out / name) != config:
            raise SetupError(
                f"{name}: config.pbtxt in {out} is not the one derived from {repository}",
                expected=f"what {repository / name / 'config.pbtxt'} says now",
                next_step=_NEXT,
            )


def _stamp(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((folder / STAMP).read_text("utf-8")))
    except (OSError, ValueError):
        return None


def _present(folder: Path) -> tuple[str, ...] | None:
    """What an undamaged engine in the folder was built by, for and from."""
    stamp = _stamp(folder)
    if stamp is None or not (folder / PLAN).is_file() or sha256((folder / PLAN).read_bytes()).hexdigest() != stamp.get("plan_sha256"):
        return None
    return tuple(str(stamp.get(key)) for key in ("tensorrt", "compute_capability", "precision", "onnx_sha256", "batches"))


def _build(trt: TensorRT, leaf: LeafSpec, graph: bytes, config: ModelConfig, cache: Path) -> tuple[bytes, dict[str, Any]]:
    started = time.monotonic()
    said: dict[str, list[str]] = {"warnings": [], "errors": []}
    logger = _logger(trt, said)
    builder = trt.api.Builder(logger)
    network = builder.create_network(1 << int(trt.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.api.OnnxParser(network, logger)
    if not parser.parse(graph):
        raise _refused(leaf, [str(parser.get_error(i)) for i in range(parser.num_errors)])
    settings = builder.create_builder_config()
    settings.profiling_verbosity = trt.api.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    batches = batch_range(config)
    for spec in leaf.inputs:
        profile.set_shape(spec.name, *((batch, *spec.shape) for batch in batches))
    settings.add_optimization_profile(profile)
    times_kernels = trt.flavour == "tensorrt"  # TensorRT-RTX does so on the user's GPU, when it loads the engine
    if times_kernels:
        settings.set_timing_cache(settings.create_timing_cache(cache.read_bytes() if cache.is_file() else b""), ignore_mismatch=True)
    with _progress(trt, leaf.name) as monitor:
        settings.progress_monitor = monitor
        serialised = builder.build_serialized_network(network, settings)
    if serialised is None:
        raise _refused(leaf, said["errors"])
    if times_kernels:
        cache.write_bytes(bytes(settings.get_timing_cache().serialize()))
    tensors = [network.get_input(i) for i in range(network.num_inputs)] + [network.get_output(i) for i in range(network.num_outputs)]
    report = {
        "seconds": round(time.monotonic() - started, 1),
        "onnx_bytes": len(graph),
        "plan_bytes": int(serialised.nbytes),
        "batch": dict(zip(("min", "opt", "max"), batches, strict=True)),
        "layers": int(network.num_layers),
        "tensors": {tensor.name: f"{tensor.dtype.name} {list(tensor.shape)}" for tensor in tensors},
        "warnings": said["warnings"],
    }
    return bytes(serialised), report


def batch_range(config: ModelConfig) -> tuple[int, int, int]:
    """Least, tuned-for and greatest batch of a leaf, from its `config.pbtxt`.

    Tuned for the middle one of the preferred batch sizes, or the greatest where none is preferred.
    """
    preferred = sorted(config.dynamic_batching.preferred_batch_size)
    return 1, int(preferred[len(preferred) // 2] if preferred else config.max_batch_size), int(config.max_batch_size)


def _refused(leaf: LeafSpec, reasons: list[str]) -> SetupError:
    return SetupError(
        f"{leaf.name}: TensorRT refused the graph", got=" | ".join(reasons)[:500], next_step="export it again with `cxr build onnx`"
    )


def _logger(trt: TensorRT, said: dict[str, list[str]]) -> Any:
    """Keeps warnings and errors instead of printing them."""
    severity = trt.api.ILogger.Severity
    kept = {severity.WARNING: "warnings", severity.ERROR: "errors", severity.INTERNAL_ERROR: "errors"}

    class Logger(trt.api.ILogger):
        def __init__(self) -> None:
            trt.api.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level in kept:
                said[kept[level]].append(message)

    return Logger()


@contextmanager
def _progress(trt: TensorRT, name: str) -> Generator[Any]:
    """TensorRT's build phases as progress bars."""
    with progress_bar() as bar:

        class Monitor(trt.api.IProgressMonitor):
            def __init__(self) -> None:
                trt.api.IProgressMonitor.__init__(self)
                self._tasks: dict[str, Any] = {}

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                self._tasks[phase] = bar.add_task(f"{name}: {phase}", total=steps)

            def step_complete(self, phase: str, step: int) -> bool:
                bar.update(self._tasks[phase], completed=step + 1)
                return True

            def phase_finish(self, phase: str) -> None:
                bar.remove_task(self._tasks.pop(phase))

        yield Monitor()
