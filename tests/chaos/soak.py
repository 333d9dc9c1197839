"""`make soak`: hours in which nothing may grow. Part one: batch, ingest and queries at once, for as long as asked. Part two: very many files.
Part three: a DICOM node between a modality and an archive.

Sampled every second: resident memory and open descriptors of the client, its workers, Triton and Milvus. After a warm-up a line is fitted;
it must be flat within a bound that is printed beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from chaos.instant import instant_repository
from chaos.world import Client, environment, make_archive, milvus_service, triton_service, write_manifest
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom
from pacs.peers import instances, orthanc
from tests_support import cxr_command, free_ports

EVERY_S: Final = 1.0
WARM_UP: Final = 0.4
"""Share of a run whose samples are left out: caches fill, allocators learn."""
FLAT_SHARE: Final = 0.05
FLAT_MB: Final = 15.0
"""Memory may seem to grow by a twentieth of itself, or by 15 MB where that is more, over what is fitted: allocators breathe."""
FLAT_DESCRIPTORS: Final = 3.0
SAMPLED_AT: Final = (0.1, 0.5, 1.0)
_BARS: Final = "▁▂▃▄▅▆▇█"

console = Console(stderr=True, highlight=False)


@dataclass
class Series:
    """What was sampled of one part of the system."""

    seconds: list[float] = field(default_factory=list)
    mb: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    def add(self, seconds: float, processes: Sequence[psutil.Process], done: int) -> None:
        """Takes a sample, unless nobody lives."""
        mb, descriptors = 0.0, 0
        for process in processes:
            with contextlib.suppress(psutil.Error):
                mb += process.memory_info().rss / 1e6
                descriptors += process.num_fds()
        if mb:
            self.seconds.append(seconds)
            self.mb.append(mb)
            self.descriptors.append(descriptors)
            self.done.append(done)

    def verdict(self) -> dict[str, Any]:
        """Growth over the fitted part, and whether it is flat."""
        first = int(WARM_UP * len(self.seconds))
        x, mb, descriptors = np.array(self.seconds[first:]), np.array(self.mb[first:]), np.array(self.descriptors[first:])
        span = float(x[-1] - x[0])
        grown = {name: float(np.polyfit(x - x[0], values, 1)[0] * span) for name, values in (("mb", mb), ("descriptors", descriptors))}
        bound = max(FLAT_MB, FLAT_SHARE * float(mb.mean()))
        return {
            "mean_mb": round(float(mb.mean()), 1),
            "most_mb": round(max(self.mb), 1),
            "grown_mb": round(grown["mb"], 2),
            "bound_mb": round(bound, 1),
            "mean_descriptors": round(float(descriptors.mean()), 1),
            "grown_descriptors": round(grown["descriptors"], 2),
            "fitted_s": round(span),
            "flat": grown["mb"] <= bound and grown["descriptors"] <= FLAT_DESCRIPTORS,
        }

    def at(self, done: float) -> float:
        """MB when so many files were done: the median of the samples around."""
        near = np.argsort(np.abs(np.array(self.done) - done))[:7]
        return round(float(np.median(np.array(self.mb)[near])), 1)

    def sparkline(self, width: int = 48) -> str:
        """The memory's course, from 0 up."""
        parts = [float(part.mean()) for part in np.array_split(np.array(self.mb), min(width, len(self.mb)))]
        return "".join(_BARS[min(7, int(8 * part / (max(parts) * 1.001)))] for part in parts)


def watch(
    parts: Mapping[str, Callable[[], Sequence[psutil.Process]]], done: Callable[[], int], goes_on: Callable[[float], bool]
) -> dict[str, Series]:
    """Samples until `goes_on`, told the seconds so far, says no."""
    series = {name: Series() for name in parts}
    started = time.monotonic()
    while goes_on(time.monotonic() - started):
        for name, processes in parts.items():
            series[name].add(time.monotonic() - started, processes(), done())
        time.sleep(EVERY_S)
    return series


def counted(path: Path) -> Callable[[], int]:
    """Lines of a growing file, each byte read once."""
    state = {"at": 0, "lines": 0}

    def count() -> int:
        if path.is_file():
            with path.open("rb") as file:
                file.seek(state["at"])
                while block := file.read(1 << 20):
                    state["lines"] += block.count(b"\n")
                    state["at"] += len(block)
        return state["lines"]

    return count


def soak(folder: Path, minutes: float) -> dict[str, Any]:
    """A long batch, and beside it one ingest and one query after the other."""
    films = make_archive(folder / "films", 120)
    archive = folder / "archive"
    archive.mkdir()
    for number in range(round(minutes * 60 * 60)):  # more than two cores can answer in that time
        os.link(films[number % len(films)].path, archive / f"{number:06d}.png")
    with ExitStack() as stack:
        triton, port = triton_service(folder / "triton", "--segmentation", "student")
        milvus, milvus_port = milvus_service(folder / "milvus", folder / "gallery.db")
        stack.enter_context(triton)
        stack.enter_context(milvus)
        servers = ["--triton", f"127.0.0.1:{port}", "--milvus", f"http://127.0.0.1:{milvus_port}"]
        beside = _beside(folder, servers)
        next(beside)  # the gallery's first filling
        client = Client.start(folder / "client", "", "batch", archive, "--out", folder / "results.jsonl", *servers)
        state = {"steps": 0}

        def goes_on(seconds: float) -> bool:
            state["steps"] += bool(next(beside))
            return seconds < 60 * minutes and client.process.poll() is None

        series = watch(
            {
                "client": lambda: client.family()[:1],
                "workers": lambda: client.family()[1:],
                "triton": triton.processes,
                "milvus": milvus.processes,
            },
            counted(folder / "results.jsonl"),
            goes_on,
        )
        client.process.send_signal(signal.SIGINT)
        code = client.process.wait(120)
    answered = max(series["client"].done)
    console.print(f"soak: {answered} films answered, {state['steps']} ingests and queries beside, client ended with {code}")
    return {"minutes": minutes, "answered": answered, "beside": state["steps"], "exit": code, **_judged("soak", series)}


def _beside(folder: Path, servers: Sequence[str]) -> Iterator[int]:
    """Commands one after the other, each begun where the one before has ended; yields 1 where one has, 0 while it runs."""
    cases = make_archive(folder / "cases", 60, seed=5, variants=1)
    home = environment(folder / "beside")
    with (folder / "beside.log").open("wb") as log:
        for turn in itertools.count():
            manifest = write_manifest(folder / "cases.csv", cases)
            commands = [["ingest", "--manifest", manifest, *servers], *[["query", case.path, *servers, "--json"] for case in cases[:3]]]
            for command in commands if turn else commands[:1]:
                process = subprocess.Popen(cxr_command(*command), env=home, stdout=log, stderr=log)
                while turn and process.poll() is None:
                    yield 0
                assert process.wait() == 0, (folder / "beside.log").read_text()[-800:]
                yield 1
            for case in cases[turn % 5 :: 5]:  # the same number of cases for ever, every fifth of them another picture
                label = PHANTOM_LABELS[turn % 3]
                Image.fromarray(make_phantom(10_000 + turn, label).pixels).save(case.path, compress_level=1)


def many_files(folder: Path, count: int, *, gallery: bool) -> dict[str, Any]:
    """`count` small films, no two alike, against networks that answer at once: what is left is the client's own."""
    name = "with a gallery" if gallery else "embeddings alone"
    archive = folder / "archive"
    _small_films(archive, count)
    with ExitStack() as stack:
        triton, port = triton_service(
            folder / "triton", "--repository", str(instant_repository(folder / "repository")), "--precision", "fp32"
        )
        milvus, milvus_port = milvus_service(folder / "milvus", folder / "gallery.db")
        stack.enter_context(triton)
        stack.enter_context(milvus)
        store = ["--milvus", f"http://127.0.0.1:{milvus_port}"] if gallery else ["--embed-only"]
        servers = ["--triton", f"127.0.0.1:{port}", "--no-gate", *store]  # these networks find no lungs
        if gallery:
            cases = write_manifest(folder / "cases.csv", make_archive(folder / "cases", 30, variants=1))
            filling = Client.start(folder / "filling", "", "ingest", "--manifest", cases, *servers)
            assert filling.process.wait(240) == 0, (folder / "filling" / "client.err").read_text()
        started = time.monotonic()
        client = Client.start(folder / "client", "", "batch", archive, "--out", folder / "results.jsonl", *servers)
        done = counted(folder / "results.jsonl")
        series = watch(
            {"client": lambda: client.family()[:1], "workers": lambda: client.family()[1:]}, done, lambda _: client.process.poll() is None
        )
        seconds = time.monotonic() - started
        assert client.process.returncode in (0, 1), (folder / "client" / "client.err").read_text()[-800:]
        assert done() == count, f"{done()} lines for {count} films"
    at = {part: {f"{round(share * count)}": series[part].at(share * count) for share in SAMPLED_AT} for part in series}
    console.print(f"{count} files, {name}: {count / seconds:.0f} a second; MB at so many: {at}")
    return {"files": count, "per_second": round(count / seconds, 1), "mb_at": at, **_judged(f"{count} files, {name}", series)}


def node(folder: Path, minutes: float) -> dict[str, Any]:
    """`cxr listen` between a modality that sends 20 films every four seconds and an archive that gets reports and pictures; strangers, garbage
    and films that are no news beside.
    """
    (port,) = free_ports(1)
    with ExitStack() as stack:
        triton, triton_port = triton_service(
            folder / "triton", "--repository", str(instant_repository(folder / "repository")), "--precision", "fp32"
        )
        milvus, milvus_port = milvus_service(folder / "milvus", folder / "gallery.db")
        stack.enter_context(triton)
        stack.enter_context(milvus)
        archive = stack.enter_context(orthanc(folder / "orthanc", MaximumStorageSize=500))
        servers = ["--triton", f"127.0.0.1:{triton_port}", "--milvus", f"http://127.0.0.1:{milvus_port}"]
        cases = write_manifest(folder / "cases.csv", make_archive(folder / "cases", 30, variants=1))
        filling = Client.start(folder / "filling", "", "ingest", "--no-gate", "--manifest", cases, *servers)
        assert filling.process.wait(240) == 0, (folder / "filling" / "client.err").read_text()
        rules = folder / "rules.toml"
        to = f'[destinations.archive]\naet = "{archive.aet}"\nhost = "127.0.0.1"\nport = {archive.port}\n'
        rules.write_text(f'{to}[[rules]]\nname = "all"\ngate = false\nto = ["archive"]\n')
        listening = ["listen", "--out", folder / "results.jsonl", "--spool", folder / "spool", "--port", f"{port}", "--rules", rules]
        client = Client.start(folder / "client", "", *listening, "--metrics", "0", *servers)
        done = counted(folder / "results.jsonl")
        modality = _modality(folder / "films", port)
        series = watch(
            {"node": lambda: client.family()[:1], "workers": lambda: client.family()[1:]},
            done,
            lambda seconds: bool(next(modality)) and seconds < 60 * minutes and client.process.poll() is None,
        )
        client.process.send_signal(signal.SIGTERM)
        code = client.process.wait(120)
    console.print(f"node: {max(series['node'].done)} films answered, ended with {code}")
    return {"minutes": minutes, "answered": max(series["node"].done), "exit": code, **_judged("node", series)}


def _modality(folder: Path, port: int) -> Iterator[int]:
    """Sends; yields again and again, at once."""
    due = time.monotonic() + 10  # until it listens
    sending: list[subprocess.Popen[bytes]] = []
    films: list[Path] = []
    for _ in itertools.count():
        if time.monotonic() >= due and all(process.poll() is not None for process in sending):
            again = [film.rename(film.with_name(f"again-{film.name}")) for film in films[-2:]]
            films = [*again, *instances(folder, 20)]
            commands = [["storescu", "-aec", "CXR", "127.0.0.1", port, *films], ["echoscu", "-aec", "STRANGER", "127.0.0.1", port]]
            sending = [
                subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                for command in commands
            ]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as garbage:
                garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
            due = max(due + 4, time.monotonic())
        yield 1


def _small_films(folder: Path, count: int) -> None:
    if folder.is_dir():
        return
    folder.mkdir(parents=True)
    bases = [
        np.asarray(Image.fromarray(make_phantom(seed, label).pixels).resize((96, 96))) for label in PHANTOM_LABELS for seed in range(4)
    ]
    for number in range(count):
        pixels = bases[number % len(bases)].copy()
        for bit in range(17):  # its number, in squares large enough to survive scaling
            pixels[88:96, 5 * bit : 5 * bit + 5] = 255 * (number >> bit & 1)
        Image.fromarray(pixels).save(folder / f"{number:06d}.png", compress_level=1)


def _judged(title: str, series: Mapping[str, Series]) -> dict[str, Any]:
    verdicts = {name: one.verdict() for name, one in series.items() if len(one.seconds) > 5}
    table = Table(title, "mean MB", "grown MB", "bound MB", "descriptors", "grown", "course from 0", "")
    for name, one in verdicts.items():
        cells = (one["mean_mb"], one["grown_mb"], one["bound_mb"], one["mean_descriptors"], one["grown_descriptors"])
        table.add_row(name, *map(str, cells), series[name].sparkline(), "flat" if one["flat"] else "GROWS")
    Console(width=140).print(table)
    return {"parts": verdicts, "series": {name: {"seconds": one.seconds, "mb": one.mb, "done": one.done} for name, one in series.items()}}


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Memory over time, a picture for each part of the report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(found), 3.4), layout="constrained")
    axes: Any = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (title, one) in zip(axes, found.items(), strict=True):
        for name, series in one["series"].items():
            axis.plot([seconds / 60 for seconds in series["seconds"]], series["mb"], label=name, linewidth=1)
        axis.set(title=title, xlabel="minutes", ylabel="resident MB", ylim=(0, None))
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    """All parts, or those that are not set to 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="of part one; 0 leaves it out")
    parser.add_argument("--files", type=int, default=0, help="of part two, once with and once without a gallery; 0 leaves it out")
    parser.add_argument("--node-minutes", type=float, default=0, help="of part three, `cxr listen`; 0 leaves it out")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="writes <out>.json and <out>.png")
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="cxr-soak-") as temporary:
        folder = Path(temporary)
        if asked.minutes:
            found["soak"] = soak(folder / "soak", asked.minutes)
        for gallery in (False, True) if asked.files else ():
            work = folder / f"files-{gallery}"
            if gallery:
                work.mkdir()
                shutil.move(folder / "files-False" / "archive", work / "archive")
            found[f"{asked.files} files, {'answers' if gallery else 'embeddings'}"] = many_files(work, asked.files, gallery=gallery)
        if asked.node_minutes:
            found["node"] = node(folder / "node", asked.node_minutes)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    plot(found, asked.out.with_suffix(".png"))
    asked.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    if not all(part["flat"] for one in found.values() for part in one["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
