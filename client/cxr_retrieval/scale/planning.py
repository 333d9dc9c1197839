"""From films and days to machines, hours, memory, storage and network; every figure with its formula and what it rests on.

A plan is arithmetic over `costs.toml`: nothing is measured here. Each number carries the costs that went into it, so that a figure says
itself whether all of them were measured. Replicas are counted so that a film's 99th percentile stays below a target in the busiest hour,
by Erlang's formula for a queue with several servers (M/M/c), which takes service times for more uneven than they are and knows no batches:
it asks for too many rather than too few. `simulation.py` then shows such a day.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from cxr_retrieval.errors import UsageError
from cxr_retrieval.scale.costs import Cost, Costs

DAY_S: Final = 86_400.0
_MOST: Final = 1e10
_ALL_BUT: Final = 0.01
"""Share of films that may take longer than the target."""
SPARE: Final = 1
"""Replicas more than the load needs: one may fail, or be rolled out."""


class Segmentation(str, Enum):
    """Who finds the lungs: five networks, or the student alone."""

    ensemble = "ensemble"
    student = "student"


class Group(str, Enum):
    """What a figure is about, in the order in which they are shown."""

    machines = "machines"
    hours = "hours"
    memory = "memory"
    storage = "storage"
    network = "network"


@dataclass(frozen=True)
class Demand:
    """What is asked.

    Args:
        films: In the gallery, all of them read and embedded once. days: In which that is to be done.
        per_day: Films asked about each day, from then on.
        gpu: One of `costs.toml`'s; None: Triton computes on CPUs.
        read_as: A form of film of `costs.toml`'s table `reading`. index: One of its table `index`; None: by size.
        p99_s: Within which 99 of 100 films are answered by Triton in the busiest hour.

    Raises:
        UsageError: A number that cannot be meant.
    """

    films: float
    per_day: float
    days: float = 30.0
    gpu: str | None = None
    segmentation: Segmentation = Segmentation.ensemble
    read_as: str = "dicom_jpeg_lossless"
    index: str | None = None
    p99_s: float = 1.0

    def __post_init__(self) -> None:
        for option, value in (("--films", self.films), ("--per-day", self.per_day), ("--days", self.days), ("--p99", self.p99_s)):
            if not 0 < value <= _MOST:
                raise UsageError(
                    f"{option} cannot be planned for",
                    expected=f"a number above 0, at most {_MOST:.0e}",
                    got=f"{value:g}",
                    next_step="correct it",
                )


@dataclass(frozen=True)
class Figure:
    """One number of a plan.

    Attributes:
        formula: How it was got, with the numbers in it.
        costs: That went into it, and into what it was got from, by name.
    """

    name: str
    group: Group
    what: str
    value: float
    unit: str
    formula: str
    costs: tuple[Cost, ...]

    @property
    def assumed(self) -> bool:
        """Whether anything that it rests on was neither measured nor chosen."""
        return any(cost.assumed for cost in self.costs)


@dataclass(frozen=True)
class Plan:
    """All figures, by name and in order.

    Attributes:
        replicas: Of Triton for a day's films, the spare among them. index: Of the gallery.
    """

    demand: Demand
    figures: Mapping[str, Figure]
    replicas: int
    index: str

    def as_json(self) -> dict[str, Any]:
        """Plain values; keys as docs/scale.md has them."""
        used = {cost.name: cost for figure in self.figures.values() for cost in figure.costs}
        demand = self.demand
        return {
            "demand": {
                "films": demand.films,
                "per_day": demand.per_day,
                "days": demand.days,
                "gpu": demand.gpu,
                "segmentation": demand.segmentation.value,
                "read_as": demand.read_as,
                "index": self.index,
                "p99_s": demand.p99_s,
            },
            "figures": {
                name: {
                    "group": figure.group.value,
                    "what": figure.what,
                    "value": figure.value,
                    "unit": figure.unit,
                    "formula": figure.formula,
                    "assumed": figure.assumed,
                    "costs": [cost.name for cost in figure.costs],
                }
                for name, figure in self.figures.items()
            },
            "costs": {
                name: {
                    "value": cost.value,
                    "unit": cost.unit,
                    "measured": cost.measured,
                    "how": cost.how,
                    "source": {"what": cost.source.what, "machine": cost.source.machine, "date": cost.source.date},
                }
                for name, cost in used.items()
            },
        }


@dataclass(frozen=True)
class Traced:
    """A number, and the costs that went into it."""

    value: float
    used: tuple[Cost, ...] = ()

    def __add__(self, other: Traced) -> Traced:
        return self._with(self.value + other.value, other)

    def __mul__(self, other: Traced) -> Traced:
        return self._with(self.value * other.value, other)

    def __truediv__(self, other: Traced) -> Traced:
        return self._with(self.value / other.value, other)

    def up(self) -> Traced:
        """To the next whole number; what only rounding has put above one stays there."""
        return Traced(float(math.ceil(self.value * (1 - 1e-12))), self.used)

    def least(self, other: Traced) -> Traced:
        """The smaller of both, which rests on both."""
        return self._with(min(self.value, other.value), other)

    def most(self, other: Traced) -> Traced:
        """The larger of both, which rests on both."""
        return self._with(max(self.value, other.value), other)

    def _with(self, value: float, other: Traced) -> Traced:
        return Traced(value, tuple(dict.fromkeys((*self.used, *other.used))))


@dataclass(frozen=True)
class Replica:
    """What one Triton can do: films a second in batches, and singly; seconds of one film alone."""

    rate: Traced
    singles: Traced
    alone: Traced


def erlang_c(servers: int, load: float) -> float:
    """Probability that an arrival waits in M/M/c (Erlang 1917), by the recursion of Erlang B, which is exact for any size.

    Args:
        load: Arrivals a second times mean service time; below `servers`, else every arrival waits.
    """
    if load >= servers:
        return 1.0
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
    return servers * blocked / (servers - load * (1 - blocked))


def wait_s(servers: int, per_s: float, service_s: float, share: float) -> float:
    """Time that only this share of arrivals waits longer than, in M/M/c; infinite if the servers cannot keep up."""
    load = per_s * service_s
    if load >= servers:
        return math.inf
    waits = erlang_c(servers, load)
    return max(0.0, math.log(waits / share) * service_s / (servers - load)) if waits > share else 0.0


def servers_for(per_s: float, service_s: float, alone_s: float, target_s: float, busy: float) -> int:
    """The fewest servers that are busy for at most this share of their time, and keep the 99th percentile below the target.

    Args:
        service_s: Of a server that is kept busy. alone_s: Of a film that need not wait.

    Raises:
        UsageError: A film takes longer than the target even alone.
    """
    if alone_s >= target_s:
        raise UsageError(
            "no number of servers is fast enough",
            expected=f"--p99 above {alone_s:.3g} s, which one film takes alone",
            got=f"{target_s:g} s",
            next_step="give more, or faster networks or hardware",
        )
    load = per_s * service_s
    count = max(1, math.ceil(load / busy * (1 - 1e-12)))
    while alone_s + wait_s(count, per_s, service_s, _ALL_BUT) > target_s:
        count += 1
    return count


def replica_of(demand: Demand, costs: Costs) -> Replica:
    """A Triton on a CPU, or on a GPU, as it was measured.

    A GPU for which `costs` has nothing measured has what a similar network reaches on another card, times how much more this one has of
    arithmetic or of memory bandwidth, whichever grew less.

    Raises:
        UsageError: `costs` lacks something.
    """

    def cost(name: str, unit: str) -> Traced:
        found = costs.cost(name, unit)
        return Traced(found.value, (found,))

    measured = f"{f'gpu.{demand.gpu}' if demand.gpu else 'cpu'}.{demand.segmentation.value}"
    if demand.gpu is None or f"{measured}.rate" in costs.by_name:
        return Replica(cost(f"{measured}.rate", "films/s"), cost(f"{measured}.singles", "films/s"), cost(f"{measured}.alone", "s"))
    faster = (cost(f"gpu.{demand.gpu}.peak", "FLOP/s") / cost("reference.peak", "FLOP/s")).least(
        cost(f"gpu.{demand.gpu}.bandwidth", "bytes/s") / cost("reference.bandwidth", "bytes/s")
    )
    rate = cost("reference.reached", "FLOP/s") * faster / cost(f"work.{demand.segmentation.value}", "FLOP/film")
    return Replica(rate, rate, Traced(1.0) / rate + cost("reference.overhead", "s"))


def plan(demand: Demand, costs: Costs) -> Plan:
    """The whole plan.

    Raises:
        UsageError: A name that `costs` does not have, or a target that cannot be met.
    """
    return _Planner(demand, costs).plan()


class _Planner:
    """Notes figure after figure."""

    def __init__(self, demand: Demand, costs: Costs) -> None:
        for option, name, table in (
            ("--gpu", demand.gpu, "gpu"),
            ("--read-as", demand.read_as, "reading"),
            ("--index", demand.index, "index"),
        ):
            if name is not None and name not in costs.kinds(table):
                raise UsageError(
                    f"{option} {name} has no costs",
                    expected=", ".join(costs.kinds(table)),
                    got=name,
                    next_step="give one of them, or add it to a file and give that as --costs",
                )
        self._demand, self._costs = demand, costs
        self._figures: dict[str, Figure] = {}
        self._films, self._per_s = Traced(demand.films), Traced(demand.films / (demand.days * DAY_S))
        self._index = demand.index or self._fitting_index()
        self._busy, self._cores = self._cost("machine.busy", "share"), self._cost("machine.cores", "cores")
        self._replica = replica_of(demand, costs)
        self._triton = f"{demand.gpu.upper()} GPUs" if demand.gpu else f"Tritons of {self._cost('cpu.cores', 'cores').value:g} cores"
        self._file = self._cost(f"reading.{demand.read_as}.file", "bytes/film")
        self._read = self._cost(f"reading.{demand.read_as}.core", "core s/film")
        self._ingested = self._read + self._cost("client.embed", "core s/film")

    def plan(self) -> Plan:
        """All of it; each part may use the figures of those before."""
        peak = self._peak()
        backlog, embedding = self._backlog()
        replicas, day = self._day(peak)
        self._memory(backlog, day, embedding.most(replicas))
        self._storage()
        self._network(peak)
        ordered = {name: figure for group in Group for name, figure in self._figures.items() if figure.group is group}
        return Plan(self._demand, ordered, int(replicas.value), self._index)

    def _cost(self, name: str, unit: str) -> Traced:
        cost = self._costs.cost(name, unit)
        return Traced(cost.value, (cost,))

    def _note(self, name: str, group: Group, what: str, traced: Traced, unit: str, formula: str) -> Traced:
        self._figures[name] = Figure(name, group, what, traced.value, unit, formula, traced.used)
        return traced

    def _fitting_index(self) -> str:
        kinds = sorted(self._costs.kinds("index"), key=lambda kind: self._costs.cost(f"index.{kind}.up_to", "cases").value)
        return next((kind for kind in kinds if self._demand.films <= self._costs.cost(f"index.{kind}.up_to", "cases").value), kinds[-1])

    def _peak(self) -> Traced:
        share = max(self._costs.profile) / sum(self._costs.profile)
        surge = self._cost("day.surge", "times")
        return self._note(
            "peak",
            Group.hours,
            "films a second in the busiest hour",
            Traced(self._demand.per_day * share / 3600) * surge,
            "films/s",
            f"{self._demand.per_day:,.0f} × {share:.3f} × {surge.value:g} / 3,600 s",
        )

    def _backlog(self) -> tuple[Traced, Traced]:
        """Machines that read, embed and take in all films in time; replicas of Triton among them."""
        demand, per_s, rate = self._demand, self._per_s, self._replica.rate
        each, at_busy = f"{per_s.value:,.4g} films/s", f"/ {self._busy.value:g}"
        self._note(
            "backlog_rate", Group.hours, "films a second for the backlog", per_s, "films/s", f"{demand.films:,.0f} / {demand.days:g} days"
        )
        hours = self._films / rate / Traced(3600)
        what = f"hours of one {self._triton.removesuffix('s') if demand.gpu else self._triton.replace('s', '', 1)} to embed all"
        self._note("hours_one_replica", Group.hours, what, hours, "h", f"{demand.films:,.0f} / {rate.value:,.1f} films/s")
        hours, core_s = self._films * self._ingested / Traced(3600), self._ingested.value
        self._note("hours_one_core", Group.hours, "hours of one core to read all", hours, "h", f"{demand.films:,.0f} × {core_s:.4g} core s")

        what, reading = "cores that read the backlog", per_s * self._ingested / self._busy
        self._note("backlog_reading_cores", Group.machines, what, reading, "cores", f"{each} × {core_s:.4g} core s {at_busy}")
        what, embedding = f"{self._triton} that embed the backlog", (per_s / rate / self._busy).up()
        self._note("backlog_replicas", Group.machines, what, embedding, "replicas", f"{each} / {rate.value:,.1f} films/s {at_busy}")
        upsert, build = self._cost("gallery.upsert", "core s/case"), self._cost(f"index.{self._index}.build", "core s/case")
        what, filling = "cores with which Milvus takes it in", per_s * (upsert + build) / self._busy
        formula = f"{each} × ({upsert.value:g} + {build.value:g}) core s {at_busy}"
        self._note("backlog_gallery_cores", Group.machines, what, filling, "cores", formula)
        machines = self._machines_for(f"machines for the backlog, {demand.days:g} days", "backlog_machines", reading + filling, embedding)
        return machines, embedding

    def _day(self, peak: Traced) -> tuple[Traced, Traced]:
        """Replicas of Triton for a day's films, the spare among them, and the machines for all but holding the gallery."""
        demand, replica, busy = self._demand, self._replica, self._busy
        service_s, alone_s = 1 / replica.singles.value, replica.alone.value
        count = servers_for(peak.value, service_s, alone_s, demand.p99_s, busy.value)
        replicas = Traced(float(count + SPARE), (peak * replica.singles * replica.alone * busy).used)
        self._note(
            "replicas",
            Group.machines,
            f"{self._triton} for a day's films, one spare",
            replicas,
            "replicas",
            f"{peak.value:,.4g} films/s × {1000 * service_s:,.1f} ms, p99 ≤ {demand.p99_s:g} s; + {SPARE}",
        )
        waiting = wait_s(count, peak.value, service_s, _ALL_BUT)
        what, p99 = "p99 at Triton then, the spare away", Traced(alone_s + waiting, replicas.used)
        self._note("p99", Group.hours, what, p99, "s", f"{1000 * alone_s:.3g} ms alone + {1000 * waiting:.3g} ms of waiting")

        answered = self._read + self._cost("client.answer", "core s/film")
        what, answering, each = "cores that read and answer a day's films", peak * answered / busy, f"{peak.value:,.4g} films/s"
        self._note("client_cores", Group.machines, what, answering, "cores", f"{each} × {answered.value:.4g} core s / {busy.value:g}")
        search, one = (
            self._cost(f"index.{self._index}.search", "core s/search"),
            self._cost(f"index.{self._index}.search_segment", "core s/search"),
        )
        segments = self._films / self._cost(f"index.{self._index}.segment", "cases")
        searching = peak * (search + one * segments) / busy
        formula = f"{peak.value:,.4g}/s × ({search.value:g} + {segments.value:,.4g} × {one.value:g}) core s / {busy.value:g}"
        self._note("search_cores", Group.machines, "cores that search for a day's films", searching, "cores", formula)
        return replicas, self._machines_for("machines for a day's films", "day_machines", answering + searching, replicas)

    def _machines_for(self, what: str, name: str, cores: Traced, replicas: Traced) -> Traced:
        """That have so many cores, and room for so many replicas."""
        if self._demand.gpu:
            fitting = self._cost("machine.gpus", "GPUs")
            machines = (cores / self._cores).up().most((replicas / fitting).up())
            formula = f"{cores.value:,.1f} cores / {self._cores.value:g}, {replicas.value:,.0f} GPUs / {fitting.value:g}: the more"
        else:
            own = replicas * self._cost("cpu.cores", "cores")
            machines = ((cores + own) / self._cores).up()
            formula = f"({cores.value:,.1f} + {own.value:,.0f} of Triton) cores / {self._cores.value:g}"
        return self._note(name, Group.machines, what, machines, "machines", formula)

    def _memory(self, backlog: Traced, day: Traced, replicas: Traced) -> None:
        each, copies = self._cost(f"index.{self._index}.memory", "bytes/case"), self._cost("gallery.copies", "copies")
        water, machine = self._cost("gallery.high_water", "share"), self._cost("machine.memory", "bytes")
        memory = self._films * each * copies / water
        formula = f"{self._films.value:,.0f} × {each.value:,.0f} bytes × {copies.value:g} copies / {water.value:g}"
        self._note("gallery_memory", Group.memory, f"memory of Milvus' query nodes ({self._index})", memory, "bytes", formula)
        holding = (memory / machine).up().most(copies)
        formula = f"{memory.value / 1e9:,.4g} GB / {machine.value / 1e9:,.0f} GB, at least one a copy"
        self._note("gallery_machines", Group.memory, "machines that hold the gallery", holding, "machines", formula)
        if not self._demand.gpu:
            one = self._cost(f"cpu.{self._demand.segmentation.value}.memory", "bytes")
            self._note(
                "triton_memory",
                Group.memory,
                "memory of the Tritons",
                replicas * one,
                "bytes",
                f"{replicas.value:g} × {one.value / 1e9:.3g} GB",
            )
        every = holding + backlog.most(day)
        formula = f"{holding.value:,.0f} for the gallery + the more of {backlog.value:,.0f} and {day.value:,.0f}"
        self._note("machines", Group.machines, "machines in all", every, "machines", formula)

    def _storage(self) -> None:
        demand, films = self._demand, self._films
        disk, redundancy = self._cost(f"index.{self._index}.disk", "bytes/case"), self._cost("storage.redundancy", "times")
        formula = f"{films.value:,.0f} × {disk.value:,.0f} bytes × {redundancy.value:g}"
        self._note("gallery_storage", Group.storage, "object storage of the gallery", films * disk * redundancy, "bytes", formula)
        row = self._cost("client.pseudonym", "bytes/case")
        formula = f"{films.value:,.0f} × {row.value:g} bytes"
        self._note("pseudonym_storage", Group.storage, "local table of pseudonyms", films * row, "bytes", formula)
        line = self._cost("client.line", "bytes/film") + self._cost("client.journal", "bytes/film")
        formula = f"365 × {demand.per_day:,.0f} × {line.value:,.0f} bytes"
        what, year = "results and journal of a year", Traced(365 * demand.per_day) * line
        self._note("results_storage", Group.storage, what, year, "bytes", formula)
        formula = f"{films.value:,.0f} × {self._file.value / 1e6:.3g} MB"
        self._note("archive_bytes", Group.storage, "the films, where they lie already", films * self._file, "bytes", formula)

    def _network(self, peak: Traced) -> None:
        film, back, answer = (self._cost(f"wire.{name}", "bytes/film") for name in ("film", "ingest", "answer"))
        sent = self._cost("gallery.sent", "bytes/case")
        each = f"{self._per_s.value:,.4g} films/s"
        formula = f"{each} × {self._file.value / 1e6:.3g} MB"
        self._note("archive_network", Group.network, "out of the archive, backlog", self._per_s * self._file, "bytes/s", formula)
        formula = f"{each} × ({film.value:,.0f} + {back.value:,.0f}) bytes"
        self._note("triton_network", Group.network, "to Triton and back, backlog", self._per_s * (film + back), "bytes/s", formula)
        formula = f"{each} × {sent.value:,.0f} bytes"
        self._note("gallery_network", Group.network, "to Milvus, backlog", self._per_s * sent, "bytes/s", formula)
        formula = f"{peak.value:,.4g} films/s × ({' + '.join(f'{one.value / 1e6:.3g}' for one in (self._file, film, answer))}) MB"
        self._note(
            "day_network",
            Group.network,
            "all of a day's films in the busiest hour",
            peak * (self._file + film + answer),
            "bytes/s",
            formula,
        )
