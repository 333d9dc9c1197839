"""How near the simulated queue is to a real one: the embedded Triton under films that come at random, beside `scale/simulation.py`.

First what the simulation is given is measured, with so many requests always open: a batch's time by its size, how two at once slow each other,
and the most films a second. Then films come by a Poisson process at shares of that, and the simulation is given the very same moments. A film's
time counts from the moment at which it should have been sent, so that a client that falls behind hides nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import psutil
from archive_rate import cpu_s
from engines import Images
from numpy.typing import NDArray

from cxr_retrieval.contract import ATTENTION_MAP
from cxr_retrieval.gallery.balance import PARTS
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.scale.simulation import Batcher, Faults, Retries, Service, Spread, System, simulate

SIZES: Final = (1, 2, 4, 8)
SHARES: Final = (0.3, 0.5, 0.7, 0.85)
"""Of the most films a second."""
CLOSED_S: Final = 8.0
"""How long each of the first measurements lasts."""
OPEN_AT_ONCE: Final = 64
IN_FLIGHT: Final = 8
SEEDS: Final = 5
Times = NDArray[np.float64]


def measure_queueing(client: TritonClient, server: int, images: Images, seconds: float) -> dict[str, Any]:
    """Both, and the measured over the simulated.

    Args:
        server: Its process number, to tell its work from that of others on the machine.
        seconds: Length of each load.
    """
    with ThreadPoolExecutor(OPEN_AT_ONCE) as pool:
        service = {size: closed(client, images, size, 1, pool) for size in SIZES}
        beside = {size: statistics.mean(closed(client, images, size, 2, pool)) for size in SIZES}
        capacity = IN_FLIGHT / statistics.mean(closed(client, images, 1, IN_FLIGHT, pool))
        means = {size: statistics.mean(times) for size, times in service.items()}
        system = System(
            1,
            Service(
                tuple(means.items()),
                tuple(beside.items()),
                float(np.median([statistics.stdev(times) / means[size] for size, times in service.items()])),
            ),
            Batcher(instances=2, preferred=(), delay_s=0.0),
            Faults(),
            Retries(),
        )
        rows: list[dict[str, Any]] = []
        for share in SHARES:
            others = _others_spent(server)
            began = time.perf_counter()
            row = _load(client, images, system, share, capacity, seconds, pool)
            rows.append({**row, "cores_of_others": round((_others_spent(server) - others) / (time.perf_counter() - began), 2)})
    return {
        "service_ms": {str(size): round(1000 * mean, 2) for size, mean in means.items()},
        "beside_ms": {str(size): round(1000 * mean, 2) for size, mean in beside.items()},
        "variation": round(system.service.variation, 3),
        "films_per_second": round(capacity, 2),
        "seconds": seconds,
        "loads": rows,
    }


def closed(client: TritonClient, images: Images, size: int, at_once: int, pool: ThreadPoolExecutor) -> list[float]:
    """Seconds of requests of so many films, so many always open; the first of each lane is left out."""
    until = time.perf_counter() + CLOSED_S

    def lane(_: int) -> list[float]:
        times: list[float] = []
        while time.perf_counter() < until:
            began = time.perf_counter()
            client.infer(images[:size], (*PARTS, ATTENTION_MAP))
            times.append(time.perf_counter() - began)
        return times[1:]

    return [taken for times in pool.map(lane, range(at_once)) for taken in times]


def opened(client: TritonClient, images: Images, when_s: Times, pool: ThreadPoolExecutor) -> Times:
    """Seconds of each film, sent at these moments."""
    taken = np.empty(len(when_s))
    started = time.perf_counter() + 0.2

    def one(number: int) -> None:
        client.infer(images[number % len(images)][None], (*PARTS, ATTENTION_MAP))
        taken[number] = time.perf_counter() - started - when_s[number]

    futures = []
    for number, when in enumerate(when_s):
        time.sleep(max(0.0, started + when - time.perf_counter()))
        futures.append(pool.submit(one, number))
    for future in futures:
        future.result()
    return taken


def _load(
    client: TritonClient, images: Images, system: System, share: float, capacity: float, seconds: float, pool: ThreadPoolExecutor
) -> dict[str, Any]:
    gaps = np.random.default_rng([7, round(100 * share)]).exponential(1 / (share * capacity), round(share * capacity * seconds))
    when_s = np.cumsum(gaps)
    measured = figures(opened(client, images, when_s, pool))
    runs = [simulate(system, when_s, seed).latency for seed in range(SEEDS)]
    simulated = {name: statistics.median(_of(run)[name] for run in runs) for name in measured}
    return {
        "share": share,
        "films": len(when_s),
        "measured_ms": {name: round(1000 * value, 1) for name, value in measured.items()},
        "simulated_ms": {name: round(1000 * value, 1) for name, value in simulated.items()},
        "measured_over_simulated": {name: round(measured[name] / simulated[name], 3) for name in measured},
    }


def _others_spent(server: int) -> float:
    """Seconds of CPU that everybody else on this machine has used: a calm machine's hardly grow."""
    times = psutil.cpu_times()
    own = [psutil.Process(), psutil.Process(server), *psutil.Process(server).children(recursive=True)]
    return times.user + times.nice + times.system - sum(cpu_s(own).values())


def figures(times: Sequence[float] | Times) -> dict[str, float]:
    """Seconds: mean, and two ranks."""
    p95, p99 = np.percentile(times, (95, 99))
    return {"mean": float(np.mean(times)), "p95": float(p95), "p99": float(p99)}


def _of(spread: Spread) -> dict[str, float]:
    return {"mean": spread.mean_s, "p95": spread.p95_s, "p99": spread.p99_s}
