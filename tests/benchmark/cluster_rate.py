"""A cluster's rate: `cxr batch --engine ray` beside `cxr batch` on one node, and two nodes of one core beside one of them."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from archive_rate import SHARES

from chaos.world import PSEUDONYM_KEY, Client, make_archive, triton_service
from ray_nodes import ray_cluster

ROUNDS: Final = 3
HELD: Final = ("--inference", "openvino", "--segmentation", "student")
"""Networks in the workers."""


def measure_cluster(count: int) -> dict[str, Any]:
    """Films a second between the first tenth and the last twentieth of an archive, in turns, medians kept; seconds to the first result.

    Args:
        count: Films, each another picture.
    """
    rates: dict[str, list[float]] = defaultdict(list)
    first: dict[str, list[float]] = defaultdict(list)

    def run(name: str, folder: Path, archive: Path, *options: str | Path) -> None:
        rate, began = batch(folder / f"{name}-{len(rates[name])}", archive, count, options)
        rates[name].append(rate)
        first[name].append(began)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cxr-cluster-")))
        make_archive(folder / "archive", count)
        with ExitStack() as serving:
            triton, port = triton_service(folder / "triton", "--segmentation", "student")
            serving.enter_context(triton)
            for _ in range(ROUNDS):
                for name, options in (("alone", ()), ("ray", ("--engine", "ray"))):
                    run(name, folder, folder / "archive", "--triton", f"127.0.0.1:{port}", *options)
        nodes = folder / "nodes"
        nodes.mkdir()
        with ray_cluster(nodes, 0, {"CXR_PSEUDONYM_KEY": PSEUDONYM_KEY}) as cluster:
            for workers in (1, 2):
                cluster.add_worker(core=workers - 1)
                for _ in range(ROUNDS):
                    run(f"workers_{workers}", folder, folder / "archive", *HELD, "--engine", "ray", "--address", cluster.address)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "networks": "student",
        "films": count,
        "images_per_second": {name: round(value, 2) for name, value in medians.items()},
        "ray_over_alone": round(medians["ray"] / medians["alone"], 3),
        "two_workers_over_one": round(medians["workers_2"] / medians["workers_1"], 3),
        "first_result_s": {name: round(statistics.median(values), 1) for name, values in first.items()},
        "rounds": {name: [round(value, 2) for value in values] for name, values in rates.items()},
    }


def batch(folder: Path, archive: Path, count: int, options: Sequence[str | Path]) -> tuple[float, float]:
    """Runs it: its steady rate, and the seconds until its first result."""
    out = folder / "results.jsonl"
    began = time.perf_counter()
    client = Client.start(folder, "", "batch", archive, "--no-gate", "--embed-only", "--out", out, *options)
    marks: list[tuple[float, int]] = []
    wanted = [1, *(share * count for share in SHARES)]
    while client.process.poll() is None:
        done = out.read_bytes().count(b"\n") if out.is_file() else 0
        while len(marks) < len(wanted) and done >= wanted[len(marks)]:
            marks.append((time.perf_counter(), done))
        time.sleep(0.05)
    assert client.process.returncode == 0, (folder / "client.err").read_text()
    assert len(marks) == len(wanted), "the results came all at once; more films"
    (first, _), (start, before), (end, after) = marks
    return (after - before) / (end - start), first - began
