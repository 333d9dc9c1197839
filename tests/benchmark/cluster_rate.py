"""A cluster's rate: `cxr batch --engine ray` beside `cxr batch` on one node, and two nodes of one core beside one of them."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from chaos.world import PSEUDONYM_KEY, make_archive, triton_service
from ray_nodes import ray_cluster
from tests_support import ENVIRONMENT, cxr_command

HELD: Final = ("--inference", "openvino", "--segmentation", "student")
"""Networks in the workers."""
SETTINGS: Final = {"CXR_PSEUDONYM_KEY": PSEUDONYM_KEY}


def measure_cluster(small: int, large: int, rounds: int) -> dict[str, Any]:
    """Seconds for a small archive and a large one, in turns, medians kept. What the large one has more takes no start and no end, which of a
    cluster are long: bundles are under way in many places when the first result comes.

    Args:
        small, large: Films, each another picture.
    """
    seconds: dict[str, dict[int, list[float]]] = defaultdict(lambda: {small: [], large: []})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cxr-cluster-")))
        for count in (small, large):
            make_archive(folder / f"archive-{count}", count)

        def run(name: str, count: int, environment: Mapping[str, str], *options: str | Path) -> None:
            out = folder / f"{name}-{count}-{len(seconds[name][count])}"
            seconds[name][count].append(batch(out, folder / f"archive-{count}", environment, options))

        with ExitStack() as serving:
            triton, port = triton_service(folder / "triton", "--segmentation", "student")
            serving.enter_context(triton)
            for _ in range(rounds):
                for name, options in (("alone", ()), ("ray", ("--engine", "ray"))):
                    for count in (small, large):
                        run(name, count, {**ENVIRONMENT, **SETTINGS}, "--triton", f"127.0.0.1:{port}", *options)
        nodes = folder / "nodes"
        nodes.mkdir()
        with ray_cluster(nodes, 0, SETTINGS) as cluster:
            for workers in (1, 2):
                cluster.add_worker(core=workers - 1)
                for _ in range(rounds):
                    for count in (small, large):
                        run(f"workers_{workers}", count, cluster.environment, *HELD, "--engine", "ray", "--address", cluster.address)
    medians = {name: {count: statistics.median(values) for count, values in found.items()} for name, found in seconds.items()}
    rates = {name: (large - small) / (found[large] - found[small]) for name, found in medians.items()}
    return {
        "networks": "student",
        "films": [small, large],
        "images_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "start_and_end_s": {name: round(found[small] - small / rates[name], 1) for name, found in medians.items()},
        "ray_over_alone": round(rates["ray"] / rates["alone"], 3),
        "two_workers_over_one": round(rates["workers_2"] / rates["workers_1"], 3),
        "seconds": {
            name: {str(count): [round(value, 1) for value in values] for count, values in found.items()} for name, found in seconds.items()
        },
    }


def batch(folder: Path, archive: Path, environment: Mapping[str, str], options: Sequence[str | Path]) -> float:
    """Runs it; the seconds that it takes."""
    folder.mkdir(parents=True)
    command = cxr_command("batch", archive, "--no-gate", "--embed-only", "--out", folder / "results.jsonl", *options)
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - began
