"""`make bench`: images per second through Triton over gRPC beside the bare OpenVINO engines, in one run on one machine.

Bare: the three graphs called one after another in this process, batch 8, as OpenVINO runs them best (throughput hint left
out, all threads to one stream). Served: EMBEDDING and ATTENTION_MAP of the same pictures from the embedded server, saturated
by requests of 8. Rounds alternate, so that both see the same machine; the ratio is what counts.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from cxr_retrieval.contract import ATTENTION_MAP, EMBEDDING, LEAVES
from cxr_retrieval.image import letterbox
from cxr_retrieval.locations import default_repository
from cxr_retrieval.phantoms import PHANTOM_LABELS, make_phantom
from cxr_retrieval.serving.choices import Precision
from cxr_retrieval.serving.server import ServerOptions, embedded_triton
from cxr_retrieval.settings import TritonSettings
from cxr_retrieval.triton import TritonClient

BATCH = 8
BATCHES = 6
ROUNDS = 3
OUT = Path("bench")


def main() -> None:
    """Prints a table and writes bench/throughput.json."""
    images = np.stack([letterbox(make_phantom(seed, label).pixels)[0] for label in PHANTOM_LABELS for seed in range(3)])[:BATCH, None]
    results = {precision.value: measure(precision, images) for precision in Precision}
    console = Console()
    table = Table("precision", "bare images/s", "served images/s", "served / bare", "single image, ms", "bare sum, ms", "ratio")
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['bare']:.2f}",
            f"{row['served']:.2f}",
            f"{row['served'] / row['bare']:.2f}",
            f"{row['latency_ms']:.0f}",
            f"{row['bare_latency_ms']:.0f}",
            f"{row['latency_ms'] / row['bare_latency_ms']:.2f}",
        )
    console.print(table)
    OUT.mkdir(exist_ok=True)
    (OUT / "throughput.json").write_text(
        json.dumps({"cores": os.cpu_count(), "batch": BATCH, "rounds": ROUNDS, **results}, indent=2) + "\n"
    )


def measure(precision: Precision, images: NDArray[np.uint8]) -> dict[str, float]:
    """Medians over alternating rounds."""
    bare = BareEngines(precision)
    options = ServerOptions(default_repository(), precision, grpc_port=0, http_port=0, metrics_port=0)
    rates: dict[str, list[float]] = {"bare": [], "served": []}
    latencies: dict[str, list[float]] = {"bare_latency_ms": [], "latency_ms": []}
    with embedded_triton(options) as server, TritonClient(TritonSettings(server.grpc)) as client, ThreadPoolExecutor(4) as pool:

        def ask(batch: NDArray[np.uint8]) -> None:
            client.infer(batch, (EMBEDDING, ATTENTION_MAP))

        for warm_up in (bare, ask):
            warm_up(images)
            warm_up(images[:1])
        for _ in range(ROUNDS):
            started = time.perf_counter()
            for _ in range(BATCHES):
                bare(images)
            rates["bare"].append(BATCHES * BATCH / (time.perf_counter() - started))
            started = time.perf_counter()
            list(pool.map(ask, [images] * BATCHES))
            rates["served"].append(BATCHES * BATCH / (time.perf_counter() - started))
            for name, call in (("bare_latency_ms", bare), ("latency_ms", ask)):
                started = time.perf_counter()
                for _ in range(5):
                    call(images[:1])
                latencies[name].append(200 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in (rates | latencies).items()}


class BareEngines:
    """The three graphs in this process, chained as the ensemble chains them."""

    def __init__(self, precision: Precision) -> None:
        core = ov.Core()
        hint = {"fp32": "f32", "bf16": "bf16"}[precision.value]
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": os.cpu_count() or 1, "NUM_STREAMS": 1}
        self._requests = [
            core.compile_model(
                core.read_model(default_repository() / leaf.name / "1" / "model.onnx"), "CPU", settings
            ).create_infer_request()
            for leaf in LEAVES
        ]

    def __call__(self, images: NDArray[np.uint8]) -> None:
        segmented = self._requests[0].infer({"IMAGE": images})
        embedded = self._requests[1].infer({"LUNGS": segmented["LUNGS"]})
        self._requests[2].infer({"ATTENTION": embedded["ATTENTION"], "MASK": segmented["LUNG_MASK"]})


if __name__ == "__main__":
    main()
