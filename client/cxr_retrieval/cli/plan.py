"""`cxr plan`: reads its options, calls the library, prints."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json, progress, results, talk
from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.scale.costs import CHOICE, Costs, read_costs, read_profile
from cxr_retrieval.scale.planning import Demand, Figure, Group, Plan, Segmentation
from cxr_retrieval.scale.planning import plan as planned

if TYPE_CHECKING:
    from cxr_retrieval.scale.simulation import Simulated

_NONE = "none"
_BAR = 24
_AROUND = (-1, 0, 1, 2)
"""Replicas simulated beside those that the plan has."""


def plan(
    films: Annotated[float, typer.Option(help="Films in the gallery, all read and embedded once; 100e6 is a hundred million.")],
    per_day: Annotated[float, typer.Option(help="Films asked about each day from then on.")],
    gpu: Annotated[str, typer.Option(metavar="NAME", help="What Triton computes on: h100, h200, a100, l4; or none, a CPU.")] = _NONE,
    days: Annotated[float, typer.Option(help="Days in which all films are to be read and embedded.")] = 30.0,
    segmentation: Annotated[Segmentation, typer.Option(help="Who finds the lungs.")] = Segmentation.ensemble,
    read_as: Annotated[
        str, typer.Option(metavar="FORM", help="Form of the films: dicom, dicom_jpeg_lossless, dicom_jpeg_ls, dicom_jpeg_2000, …")
    ] = "dicom_jpeg_lossless",
    index: Annotated[str | None, typer.Option(metavar="NAME", help="Of the gallery: lite, hnsw, diskann.", show_default="by size")] = None,
    p99: Annotated[float, typer.Option(help="Seconds within which Triton answers 99 of 100 films in the busiest hour.")] = 1.0,
    profile: Annotated[
        Path | None, typer.Option(help="Weights of the 24 hours: TOML with `hours = […]`, or CSV.", show_default="a hospital's")
    ] = None,
    costs: Annotated[Path | None, typer.Option(help="Your own costs over the shipped ones; docs/scale.md has the form.")] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Also simulate a busy day, with a roll-out and a failure.")] = False,
    replicas: Annotated[
        list[int] | None, typer.Option(min=1, help="Replicas to simulate; may be repeated.", show_default="around the plan's")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the simulated day; the same gives the same.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Picture of the simulated day.")] = None,
    json: options.Json = False,
) -> None:
    """What it costs: machines, hours, memory, storage and network for so many films, each figure with its source."""
    known = read_costs(costs)
    if profile is not None:
        known = replace(known, profile=read_profile(profile))
    demand = Demand(films, per_day, days, None if gpu == _NONE else gpu, segmentation, read_as, index, p99)
    found = planned(demand, known)
    days_simulated: tuple[Simulated, ...] = ()
    if simulate:
        wanted = sorted(set(replicas or [max(1, found.replicas + more) for more in _AROUND]))
        days_simulated = _simulated(demand, known, wanted, seed, png)
    elif replicas or png:
        raise UsageError("--replicas and --png are of a simulated day", expected="--simulate", next_step="give it, too, or leave them out")
    if json:
        print_json({**found.as_json(), "days": [day.as_json() for day in days_simulated]})
        return
    _print_plan(found)
    if days_simulated:
        _print_days(days_simulated)


def _simulated(demand: Demand, known: Costs, wanted: list[int], seed: int, png: Path | None) -> tuple[Simulated, ...]:
    lacking = [module for module in ("simpy", *(("matplotlib",) if png else ())) if importlib.util.find_spec(module) is None]
    if lacking:
        raise SetupError(
            f"`cxr plan --simulate` lacks {' and '.join(lacking)}",
            expected="the extra 'plan'",
            next_step="pip install 'cxr-retrieval[plan]'",
        )
    from cxr_retrieval.scale.day import plot, simulated_days

    with progress("simulating", len(wanted)) as advance:
        days = simulated_days(demand, known, wanted, seed, advance)
    if png:
        try:
            plot(days, png)
        except (OSError, ValueError) as error:  # no such folder; no such kind of picture
            got = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UsageError(
                f"{png}: cannot be written", expected="a .png in a folder that is there", got=got, next_step="correct --png"
            ) from error
        talk().print(f"wrote {png}", soft_wrap=True)
    return days


def _print_plan(found: Plan) -> None:
    sources = list(dict.fromkeys(cost.source for figure in found.figures.values() for cost in figure.costs))
    numbers = {source.key: number for number, source in enumerate(sources, 1)}
    table = Table("", "", "figure", "how", "source", box=None, header_style="dim", pad_edge=False)
    shown: set[Group] = set()
    for figure in found.figures.values():
        keys = sorted({numbers[cost.source.key] for cost in figure.costs})
        group = "" if figure.group in shown else figure.group.value
        shown.add(figure.group)
        value = f"{'~' if figure.assumed else ''}{value_shown(figure)}"
        table.add_row(group, figure.what, value, figure.formula, " ".join(map(str, keys)))
    console = results()
    console.print(table)
    busy = next(cost.value for figure in found.figures.values() for cost in figure.costs if cost.name == "machine.busy")
    console.print(f"~ rests on what was neither measured on this system nor chosen; / {busy:g}: as busy as is planned with\n", style="dim")
    used = {cost for figure in found.figures.values() for cost in figure.costs}
    for source in sources:
        measured = {cost.measured for cost in used if cost.source == source}
        kind = (
            "chosen" if source.key == CHOICE else "partly assumed" if len(measured) > 1 else "measured" if True in measured else "assumed"
        )
        where = f" ({source.machine}, {source.date})" if source.machine else ""
        console.print(f"{numbers[source.key]} {kind}: {source.what}{where}", soft_wrap=True, style="dim")


def _print_days(days: tuple[Simulated, ...]) -> None:
    most = max(hour.films for hour in days[0].hours)
    table = Table(
        "hour",
        "films",
        "",
        *(f"p99, {day.replicas} replica{'s' if day.replicas > 1 else ''}" for day in days),
        box=None,
        header_style="dim",
        pad_edge=False,
    )
    for number, hour in enumerate(days[0].hours):
        bar = "█" * round(_BAR * hour.films / most) if most else ""
        table.add_row(f"{hour.hour:02d}", f"{hour.films:,}", bar, *(_seconds(day.hours[number].latency.p99_s) for day in days))
    table.add_row("day", f"{days[0].films:,}", "", *(_seconds(day.latency.p99_s) for day in days))
    for name, values in (
        ("p50 of the day", [_seconds(day.latency.p50_s) for day in days]),
        ("p95 of the day", [_seconds(day.latency.p95_s) for day in days]),
        ("waited, p99", [_seconds(day.waiting.p99_s) for day in days]),
        ("busy", [f"{day.busy:.1%}" for day in days]),
        ("films a batch", [f"{day.mean_batch:.2f}" for day in days]),
        ("sent again", [f"{day.again:,}" for day in days]),
        ("failed", [f"{day.failed:,}" for day in days]),
    ):
        table.add_row("", "", name, *values)
    console = results()
    console.print()
    console.print(table)


def value_shown(figure: Figure) -> str:
    """A figure as people read it: decimal bytes, bits a second, whole machines."""
    value = figure.value
    match figure.unit:
        case "bytes":
            return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))
        case "bytes/s":
            return _scaled(8 * value, ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"))
        case "s":
            return _seconds(value)
        case "machines" | "replicas":
            return f"{value:,.0f}"
        case unit:
            return f"{value:,.{0 if value >= 100 else 1 if value >= 1 else 3}f} {unit}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    step = min(len(units) - 1, max(0, int(math.log10(value) // 3))) if value > 0 else 0
    return f"{value / 1000**step:.3g} {units[step]}"


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
