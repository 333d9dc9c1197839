"""Load tests with NVIDIA's perf_analyzer: the ensemble and each of its steps, over concurrency and request rate.

perf_analyzer measures what a client sees; what each step did meanwhile is the difference of Triton's own statistics before and after.
"""

from __future__ import annotations

import base64
import csv
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import tritonclient.grpc as grpcclient
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from cxr_retrieval.contract import ENSEMBLE, IMAGE, LEAF_MODELS, LEAVES, LUNG_MASK, MASK
from cxr_retrieval.errors import InferenceError, UsageError
from cxr_retrieval.evaluation.perf_analyzer import PerfAnalyzer
from cxr_retrieval.inference.triton import open_channel
from cxr_retrieval.settings import Tls, TritonSettings

MODELS: Final = (ENSEMBLE, *LEAF_MODELS)
Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Load:
    """One point of a sweep.

    Args:
        kind: `concurrency`, so many requests always in flight; `rate`, so many a second, at random intervals (Poisson).
        level: How many.
        shared_memory: Images and results go through POSIX shared memory instead of gRPC; client and server on one machine.
    """

    model: str
    kind: Literal["concurrency", "rate"]
    level: float
    shared_memory: bool = False
    batch: int = 1


@dataclass(frozen=True)
class Window:
    """How long and how strictly perf_analyzer measures: it repeats windows until the last three agree within so many percent."""

    seconds: float = 5.0
    stable_percent: float = 10.0
    trials: int = 10


@dataclass(frozen=True)
class Step:
    """What one model did: requests' mean time in the queue and in the model (ms), and images per execution."""

    queue_ms: float
    compute_ms: float
    batch: float


@dataclass(frozen=True)
class Outcome:
    """One measured point; latencies in ms. `stable` is false, and there are no figures, where perf_analyzer saw them still moving."""

    load: Load
    stable: bool
    images_per_second: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    steps: Mapping[str, Step]
    said: str

    def as_json(self) -> dict[str, Any]:
        """Plain values; the load's own among them."""
        values = asdict(self)
        return {**values.pop("load"), **values}


def run_loads(
    loads: Sequence[Load],
    images: NDArray[np.uint8],
    triton: TritonSettings,
    program: PerfAnalyzer,
    window: Window,
    done: Callable[[Outcome], None],
) -> list[Outcome]:
    """Measures one load after the other, and tells each outcome as it is there.

    Args:
        images: `[n, 1, 256, 256]`, sent in turn.

    Raises:
        UsageError: Triton is reached with a token or a header, which perf_analyzer takes on its command line alone, for all to see.
        InferenceError: Triton does not answer, or perf_analyzer failed for another reason than unstable figures.
    """
    if triton.metadata:
        raise UsageError(
            "perf_analyzer cannot keep a secret",
            expected="a Triton that asks for no token or header, which it takes on its command line, where the process list shows them",
            next_step="measure from behind the proxy, or with a client certificate",
        )
    if triton.several:
        raise UsageError("perf_analyzer loads one server", expected="one host:port", got=triton.url, next_step="correct --triton")
    if triton.tls is not None and triton.tls.server_name:
        raise UsageError(
            "perf_analyzer cannot check another name than the address's",
            expected="a certificate for the host in --triton",
            next_step="leave --triton-server-name out",
        )
    outcomes: list[Outcome] = []
    try:
        with open_channel(triton) as client, tempfile.TemporaryDirectory(prefix="cxr-loadtest-") as folder:
            tensors = _step_inputs(client, images)
            for load in loads:
                data = Path(folder, f"{load.model}.json")
                if not data.is_file():
                    write_input_data(data, tensors[load.model])
                outcomes.append(_run(load, data, triton, client, program, window))
                done(outcomes[-1])
    except InferenceServerException as error:
        raise InferenceError(
            f"Triton at {triton.url} could not be measured",
            got=str(error.message())[:300],
            next_step="start it with `cxr serve`, or give --triton, and what TLS needs",
        ) from error
    return outcomes


def write_input_data(path: Path, tensors: Arrays) -> None:
    """perf_analyzer's JSON of real inputs: one entry an image, bytes in base64."""
    count = len(next(iter(tensors.values())))
    entries = [
        {name: {"b64": base64.b64encode(values[i].tobytes()).decode(), "shape": list(values.shape[1:])} for name, values in tensors.items()}
        for i in range(count)
    ]
    path.write_text(json.dumps({"data": entries}))


def _step_inputs(client: grpcclient.InferenceServerClient, images: NDArray[np.uint8]) -> dict[str, Arrays]:
    """What each model is given in service: the steps' inputs come from the steps before."""
    known: Arrays = {IMAGE.name: images}
    inputs: dict[str, Arrays] = {ENSEMBLE: dict(known)}
    for leaf in LEAVES:
        inputs[leaf.name] = {spec.name: known[spec.name] for spec in leaf.inputs}
        tensors = []
        for spec in leaf.inputs:
            tensor = grpcclient.InferInput(spec.name, list(known[spec.name].shape), spec.dtype)
            tensor.set_data_from_numpy(known[spec.name])
            tensors.append(tensor)
        result: Any = client.infer(leaf.name, tensors)
        known |= {spec.name: result.as_numpy(spec.name) for spec in leaf.outputs}
        known[MASK.name] = known[LUNG_MASK.name]
    return inputs


def _run(
    load: Load, data: Path, triton: TritonSettings, client: grpcclient.InferenceServerClient, program: PerfAnalyzer, window: Window
) -> Outcome:
    table = data.with_suffix(".csv")
    table.unlink(missing_ok=True)
    sweep = (
        ["--concurrency-range", f"{load.level:g}"]
        if load.kind == "concurrency"
        else ["--request-rate-range", f"{load.level:g}", "--request-distribution", "poisson"]
    )
    shared = ["--shared-memory", "system", "--output-shared-memory-size", str(load.batch * 2**20)] if load.shared_memory else []
    command = [
        *(str(program.binary), "-m", load.model, "-i", "grpc", "-u", triton.url, "-b", str(load.batch), "--input-data", str(data)),
        *_encrypted(triton.tls),
        *sweep,
        *shared,
        *("--measurement-interval", f"{1000 * window.seconds:.0f}", "--stability-percentage", f"{window.stable_percent:g}"),
        *("--max-trials", str(window.trials), "-f", str(table)),
    ]
    before = _statistics(client)
    result = subprocess.run(command, env=program.environment(), capture_output=True, text=True, check=False)
    steps = _difference(before, _statistics(client))
    said = " ".join(
        line.strip() for line in (result.stdout + result.stderr).splitlines() if "stable" in line.lower() or "error" in line.lower()
    )
    if not table.is_file():
        if load.shared_memory and "shared memory region" in result.stdout + result.stderr:
            raise InferenceError(
                f"Triton at {triton.url} does not see this client's shared memory",
                expected="one machine; of containers, one IPC namespace",
                next_step="give --shared-memory off, or let the client join Triton's (`ipc` in compose.yaml)",
            )
        if "Failed to obtain stable measurement" not in result.stdout + result.stderr:
            raise InferenceError(
                f"perf_analyzer failed on {load.model}",
                got=(result.stderr or result.stdout).strip()[-400:],
                next_step="see its words above",
            )
        return Outcome(load, False, None, None, None, None, steps, said)
    with table.open() as lines:
        row = next(csv.DictReader(lines))
    p50, p95, p99 = (float(row[f"p{rank} latency"]) / 1000 for rank in (50, 95, 99))
    return Outcome(load, True, float(row["Inferences/Second"]), p50, p95, p99, steps, "")


def _encrypted(tls: Tls | None) -> list[str]:
    """perf_analyzer's words for it."""
    if tls is None:
        return []
    files = {"root-certifications": tls.ca, "private-key": tls.key, "certificate-chain": tls.certificate}
    named = [word for name, path in files.items() if path is not None for word in (f"--ssl-grpc-{name}-file", str(path))]
    return ["--ssl-grpc-use-ssl", *named]


def _statistics(client: grpcclient.InferenceServerClient) -> dict[str, tuple[int, int, int, int, int]]:
    """Model → requests, images, executions, and ns in the queue and in the model, since the server started."""
    answer: Any = client.get_inference_statistics()
    found: dict[str, tuple[int, int, int, int, int]] = {}
    for model in answer.model_stats:
        times = model.inference_stats
        compute = times.compute_input.ns + times.compute_infer.ns + times.compute_output.ns
        found[model.name] = (times.success.count, model.inference_count, model.execution_count, times.queue.ns, compute)
    return found


def _difference(
    before: Mapping[str, tuple[int, int, int, int, int]], after: Mapping[str, tuple[int, int, int, int, int]]
) -> dict[str, Step]:
    steps: dict[str, Step] = {}
    for name in LEAF_MODELS:
        requests, images, executions, queue, compute = (b - a for a, b in zip(before[name], after[name], strict=True))
        if requests and executions:
            steps[name] = Step(queue / requests / 1e6, compute / requests / 1e6, images / executions)
    return steps


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Images per second and p95 latency over requests in flight, a line for each model and way; unstable loads are left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    lines: dict[tuple[str, bool], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.stable and outcome.load.kind == "concurrency":
            lines.setdefault((outcome.load.model, outcome.load.shared_memory), []).append(outcome)
    for (model, shared), points in lines.items():
        points.sort(key=lambda point: point.load.level)
        levels = [point.load.level for point in points]
        label, style = f"{model}{', shared memory' if shared else ''}", "--o" if shared else "-o"
        axes[0].plot(levels, [point.images_per_second for point in points], style, label=label, markersize=3)
        axes[1].plot(levels, [point.p95_ms for point in points], style, label=label, markersize=3)
    for axis, title in zip(axes, ("images per second", "p95 latency, ms"), strict=True):
        axis.set(xlabel="requests in flight", title=title, xscale="log", yscale="log")
        axis.grid(visible=True, which="both", alpha=0.25)
    if lines:
        axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
