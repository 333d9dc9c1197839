"""`cxr loadtest`: reads its options, calls the library, prints."""

from __future__ import annotations

import importlib.util
import json as jsonlib
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cxr_retrieval.cli import options
from cxr_retrieval.cli.console import print_json, progress, results, talk
from cxr_retrieval.errors import InferenceError, SetupError
from cxr_retrieval.settings import TritonSettings

if TYPE_CHECKING:
    from cxr_retrieval.evaluation.loadtest import Outcome

_RATE_SHARES = (0.5, 0.8)


class Model(str, Enum):
    """The ensemble and its steps."""

    cxr_retrieval = "cxr_retrieval"
    lung_segmentation = "lung_segmentation"
    embedder = "embedder"
    attention_map = "attention_map"


class SharedMemory(str, Enum):
    """How images reach the server."""

    both = "both"
    off = "off"
    on = "on"


@options.with_servers
def loadtest(
    triton: TritonSettings,
    images: Annotated[list[Path] | None, typer.Argument(help="Radiographs to send in turn.", show_default="synthetic phantoms")] = None,
    model: Annotated[list[Model] | None, typer.Option(help="What to load; may be repeated.", show_default="all four")] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests in flight; may be repeated.", show_default="1, 4, 16")
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(min=0.01, help="Requests a second; may be repeated.", show_default="half and four fifths of the best throughput"),
    ] = None,
    shared_memory: Annotated[
        SharedMemory, typer.Option(help="Through gRPC, through POSIX shared memory, or both ways.")
    ] = SharedMemory.both,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Images per request.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of a window; three in a row must agree.")] = 5.0,
    stable: Annotated[float, typer.Option(min=0.1, max=100, help="Percent by which they may differ.")] = 10.0,
    trials: Annotated[int, typer.Option(min=3, help="Windows before a load is given up as unstable.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder for loadtest.json and loadtest.png.")] = Path("loadtest"),
    json: options.Json = False,
) -> None:
    """Load a running Triton with perf_analyzer and say what it can take: throughput, latency, and where the time goes."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SetupError(
            "`cxr loadtest` is not installed", expected="the extra 'loadtest'", next_step="pip install 'cxr-retrieval[loadtest]'"
        )
    from cxr_retrieval.evaluation.loadtest import Load, Window, plot, run_loads
    from cxr_retrieval.evaluation.perf_analyzer import find_perf_analyzer

    console = talk()
    program = find_perf_analyzer()
    console.print(f"perf_analyzer  {program.binary}", soft_wrap=True)
    squares, window = _squares(images), Window(seconds, stable, trials)
    ways = {SharedMemory.both: (False, True), SharedMemory.off: (False,), SharedMemory.on: (True,)}[shared_memory]
    outcomes: list[Outcome] = []

    def measure(loads: list[Load]) -> list[Outcome]:
        with progress(f"loading {loads[0].model}", len(loads)) as advance:

            def done(outcome: Outcome) -> None:
                outcomes.append(outcome)
                _write(out, outcomes)
                advance(1)

            return run_loads(loads, squares, triton, program, window, done)

    for name in [one.value for one in model or list(Model)]:
        sweep = [Load(name, "concurrency", level, way, batch) for way in ways for level in concurrency or (1, 4, 16)]
        best = max((outcome.images_per_second or 0.0 for outcome in measure(sweep)), default=0.0)
        rates = rate or [round(share * best / batch, 2) for share in _RATE_SHARES if best]
        if rates:
            measure([Load(name, "rate", level, way, batch) for way in ways for level in rates])
    plot(outcomes, out / "loadtest.png")
    if json:
        print_json({"loads": [outcome.as_json() for outcome in outcomes]})
    else:
        results().print(_table(outcomes))
    console.print(f"wrote {out / 'loadtest.json'} and {out / 'loadtest.png'}", soft_wrap=True)
    if moving := [outcome for outcome in outcomes if not outcome.stable]:
        raise InferenceError(
            f"{len(moving)} of {len(outcomes)} loads were not stable, and have no figures",
            expected=f"three windows within {stable:g} %",
            next_step="measure on an idle machine, with longer --seconds, or less load",
        )


def _squares(images: list[Path] | None) -> Any:
    import numpy as np

    from cxr_retrieval.radiograph.decoding import FilmReader
    from cxr_retrieval.radiograph.letterbox import letterbox
    from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom

    if not images:
        return np.stack([letterbox(make_phantom(0, label).pixels)[0] for label in PHANTOM_LABELS])[:, None]
    with FilmReader() as reader:
        return np.stack([reader.read(path).square for path in images])[:, None]


def _write(out: Path, outcomes: list[Outcome]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "loadtest.json").write_text(jsonlib.dumps({"loads": [outcome.as_json() for outcome in outcomes]}, indent=2) + "\n")


def _table(outcomes: list[Outcome]) -> Table:
    table = Table("model", "load", "images/s", "p50 ms", "p95 ms", "p99 ms", "queue + compute ms per step", "batch per step", box=None)
    for outcome in outcomes:
        load = outcome.load
        what = f"{load.level:g} in flight" if load.kind == "concurrency" else f"{load.level:g} a second"
        figures = (outcome.images_per_second, outcome.p50_ms, outcome.p95_ms, outcome.p99_ms)
        table.add_row(
            load.model,
            f"{what}{', shared memory' if load.shared_memory else ''}",
            *(f"{value:.1f}" if value is not None else "unstable" for value in figures),
            " · ".join(f"{step.queue_ms:.1f} + {step.compute_ms:.1f}" for step in outcome.steps.values()),
            " · ".join(f"{step.batch:.1f}" for step in outcome.steps.values()),
        )
    return table
