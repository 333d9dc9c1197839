"""A plan's day simulated for several numbers of replicas, with a roll-out and a failure in its busiest hour; and its picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from cxr_retrieval.scale.costs import Costs
from cxr_retrieval.scale.planning import Demand, replica_of
from cxr_retrieval.scale.simulation import HOUR_S, Batcher, Faults, Retries, Service, Simulated, System, arrivals, simulate

_LARGEST: Final = 64
_GATHERED: Final = 8
"""Films in the batches for which a CPU's rate was measured."""
_ON_GPU: Final = Batcher()
_ON_CPU: Final = Batcher(instances=2, preferred=(), delay_s=0.0)
"""As `serving/repository.py` derives it: two instances of the segmentation, and whatever waits goes at once."""


def system_of(demand: Demand, costs: Costs, replicas: int) -> System:
    """The replicas of a plan: their service times out of `costs`; a roll-out begins with the busiest hour, and one fails in its middle.

    Raises:
        UsageError: `costs` lacks something.
    """

    def cost(name: str, unit: str) -> float:
        return costs.cost(name, unit).value

    replica, variation = replica_of(demand, costs), cost("day.variation", "share")
    alone_s, rate = replica.alone.value, replica.rate.value
    if demand.gpu is None:
        gathered_s = max(alone_s, _GATHERED / rate)
        beside = ((1, max(alone_s, 2 / replica.singles.value)), (_GATHERED, 2 * gathered_s))
        service = Service(((1, alone_s), (_GATHERED, gathered_s)), beside, variation)
    else:
        service = Service(((1, alone_s), (_LARGEST, max(alone_s, _LARGEST / rate))), (), variation)
    busiest_s = HOUR_S * costs.profile.index(max(costs.profile))
    faults = Faults(
        mtbf_s=cost("faults.mtbf", "s"),
        fails_s=(busiest_s + HOUR_S / 2,),
        mttr_s=cost("faults.mttr", "s"),
        rollouts_s=(busiest_s,),
        restart_s=cost("faults.restart", "s"),
    )
    return System(replicas, service, _ON_CPU if demand.gpu is None else _ON_GPU, faults, Retries())


def simulated_days(
    demand: Demand, costs: Costs, replicas: Sequence[int], seed: int, done: Callable[[int], None] = lambda _: None
) -> tuple[Simulated, ...]:
    """The same films, of a busy day, through each of these numbers of replicas.

    Args:
        done: Told 1 after each.

    Raises:
        UsageError: More films than can be simulated, or no replicas.
    """
    times_s = arrivals(demand.per_day * costs.cost("day.surge", "times").value, costs.profile, seed)
    found: list[Simulated] = []
    for count in replicas:
        found.append(simulate(system_of(demand, costs, count), times_s, seed))
        done(1)
    return tuple(found)


def plot(days: Sequence[Simulated], path: Path) -> None:
    """Films by hour with each number's 99th percentile over them, and ranks of the whole day against the number of replicas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes: Any = figure.subplots(1, 2, width_ratios=(3, 2))
    hours, behind = days[0].hours, axes[0].twinx()
    behind.bar([hour.hour + 0.5 for hour in hours], [hour.films for hour in hours], color="#dddddd", width=0.9)
    behind.set(ylabel="films an hour")
    axes[0].set_zorder(behind.get_zorder() + 1)
    axes[0].patch.set_visible(False)
    for day in days:
        label = f"{day.replicas} replica{'s' if day.replicas > 1 else ''}{f', {day.failed} failed' if day.failed else ''}"
        axes[0].plot(
            [hour.hour + 0.5 for hour in day.hours], [1000 * hour.latency.p99_s for hour in day.hours], "-o", markersize=3, label=label
        )
    axes[0].set(title="p99 by hour, ms", xlabel="hour of the day; a roll-out and a failure in the busiest", yscale="log", xlim=(0, 24))
    axes[0].legend(fontsize=7)
    for name, style in (("p50_s", ":o"), ("p95_s", "--o"), ("p99_s", "-o")):
        axes[1].plot(
            [day.replicas for day in days], [1000 * getattr(day.latency, name) for day in days], style, color="#2a6f97", label=name[:3]
        )
    axes[1].set(title="whole day, ms", xlabel="replicas", yscale="log", xticks=[day.replicas for day in days])
    axes[1].legend(fontsize=7)
    for axis in axes:
        axis.grid(visible=True, which="both", alpha=0.25)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(which="both", labelsize=7)
    figure.savefig(path, dpi=130)
