"""The simulated batcher beside Triton's own: models that only sleep, so that whatever else the machine does hardly counts.

Films come at the same moments to both. What is compared is what a batcher decides: how many films go together, and how long each is on its way.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from cxr_retrieval.scale.simulation import Batcher, Floats, Service, System, simulate
from cxr_retrieval.serving.server import _install_backend  # pyright: ignore[reportPrivateUsage]
from tests_support import free_ports, until

SECONDS: Final = 20.0
ALONE_S, EACH_S = 0.10, 0.01
"""Of a batch, and of each film in it."""
_AT_ONCE: Final = 64
_MODEL: Final = f"""
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        values = [pb_utils.get_input_tensor_by_name(request, "FILM").as_numpy() for request in requests]
        time.sleep({ALONE_S} + {EACH_S} * sum(len(value) for value in values))
        return [pb_utils.InferenceResponse([pb_utils.Tensor("ANSWER", value)]) for value in values]
"""


@dataclass(frozen=True)
class Sleeper:
    """A batcher and a load for it. `bounded`: its configuration has `max_queue_size`, as production's segmentation has."""

    what: str
    batcher: Batcher
    per_s: float
    bounded: bool = False


_DELAYED: Final = Batcher(1, 64, (8, 16, 32, 64), 0.05)
SLEEPERS: Final = (
    Sleeper("two instances, a film at a time", Batcher(2, 1, (), 0.0), 10),
    Sleeper("two instances, whatever waits goes: the embedded server", Batcher(2, 64, (), 0.0), 40),
    Sleeper("preferred sizes, waiting 50 ms for them", _DELAYED, 30),
    Sleeper("the same with max_queue_size", _DELAYED, 30, bounded=True),
    Sleeper("the same with max_queue_size, few films", _DELAYED, 2, bounded=True),
)


def measure_batcher() -> list[dict[str, Any]]:
    """Each sleeper's films, all sleepers at once: measured, simulated, and their ratio."""
    arrivals = [
        np.cumsum(np.random.default_rng(number).exponential(1 / sleeper.per_s, round(sleeper.per_s * SECONDS)))
        for number, sleeper in enumerate(SLEEPERS)
    ]
    with _serving() as url, grpcclient.InferenceServerClient(url) as client, ThreadPoolExecutor(_AT_ONCE * len(SLEEPERS)) as pool:
        lanes = [pool.submit(_sent, client, _name(number), when_s) for number, when_s in enumerate(arrivals)]
        measured = [lane.result() for lane in lanes]
    service = Service(((1, ALONE_S + EACH_S), (64, ALONE_S + 64 * EACH_S)))
    rows: list[dict[str, Any]] = []
    for sleeper, when_s, (taken, together) in zip(SLEEPERS, arrivals, measured, strict=True):
        found = simulate(System(1, service, sleeper.batcher), when_s, seed=0)
        pairs = {
            "mean_ms": (1000 * float(taken.mean()), 1000 * found.latency.mean_s),
            "p95_ms": (1000 * float(np.percentile(taken, 95)), 1000 * found.latency.p95_s),
            "films_a_batch": (together, found.mean_batch),
        }
        rows.append(
            {
                "what": sleeper.what,
                "films": len(when_s),
                "measured": {name: round(real, 2) for name, (real, _) in pairs.items()},
                "simulated": {name: round(made, 2) for name, (_, made) in pairs.items()},
                "measured_over_simulated": {name: round(real / made, 3) for name, (real, made) in pairs.items()},
            }
        )
    return rows


def _name(number: int) -> str:
    return f"sleeper_{number}"


def _config(name: str, sleeper: Sleeper) -> str:
    batcher = sleeper.batcher
    sizes = f"preferred_batch_size: {list(batcher.preferred)}" if batcher.preferred else ""
    waits = f"max_queue_delay_microseconds: {round(1e6 * batcher.delay_s)}"
    room = f"default_queue_policy {{ max_queue_size: {batcher.waiting} }}" if sleeper.bounded else ""
    return f"""
        name: "{name}" backend: "python" max_batch_size: {batcher.largest}
        input {{ name: "FILM" data_type: TYPE_FP32 dims: 1 }} output {{ name: "ANSWER" data_type: TYPE_FP32 dims: 1 }}
        instance_group {{ count: {batcher.instances} kind: KIND_CPU }}
        dynamic_batching {{ {sizes} {waits} {room} }}
    """


@contextmanager
def _serving() -> Generator[str]:
    """A Triton with all of them: its gRPC address."""
    with tempfile.TemporaryDirectory(prefix="cxr-sleepers-") as folder:
        work, shared = Path(folder), f"cxr-sleepers-{os.getpid()}-"
        for number, sleeper in enumerate(SLEEPERS):
            model = work / "models" / _name(number)
            (model / "1").mkdir(parents=True)
            (model / "config.pbtxt").write_text(_config(model.name, sleeper))
            (model / "1" / "model.py").write_text(_MODEL)
        binary, environment = _install_backend(work)
        (port,) = free_ports(1)
        command = [
            *(str(binary), f"--model-repository={work / 'models'}", f"--backend-directory={work / 'backends'}", f"--grpc-port={port}"),
            *(f"--backend-config=python,shm-region-prefix-name={shared}", "--allow-http=false", "--allow-metrics=false"),
            *("--grpc-address=127.0.0.1", "--disable-auto-complete-config"),
        ]
        with (work / "log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            with grpcclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
                until(lambda: process.poll() is not None or _ready(client))
            assert process.poll() is None, (work / "log").read_text()
            yield f"127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            for left in Path("/dev/shm").glob(f"{shared}*"):
                left.unlink()


def _ready(client: grpcclient.InferenceServerClient) -> bool:
    try:
        return all(client.is_model_ready(_name(number)) for number in range(len(SLEEPERS)))
    except InferenceServerException:
        return False


def _sent(client: grpcclient.InferenceServerClient, model: str, when_s: Floats) -> tuple[Floats, float]:
    """Seconds of each film, from the moment at which it should be sent; and how many went together."""
    taken = np.empty(len(when_s))
    started = time.perf_counter() + 0.2

    def one(number: int) -> None:
        tensor = grpcclient.InferInput("FILM", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 1), np.float32))
        client.infer(model, [tensor], client_timeout=30)
        taken[number] = time.perf_counter() - started - when_s[number]

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures: list[Any] = []
        for number, when in enumerate(when_s):
            time.sleep(max(0.0, started + when - time.perf_counter()))
            futures.append(pool.submit(one, number))
        for future in futures:
            future.result(60)
    statistics: Any = client.get_inference_statistics(model)
    stats = statistics.model_stats[0]
    return taken, stats.inference_count / stats.execution_count
