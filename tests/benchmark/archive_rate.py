"""An archive's rate: `cxr batch` as a user runs it, beside what perf_analyzer reaches on the same server in the same run."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from galleries import synthetic_embeddings, synthetic_entries
from numpy.typing import NDArray

from chaos.world import PSEUDONYM_KEY, Client, Service, make_archive, milvus_service, triton_service
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import ENSEMBLE
from cxr_retrieval.evaluation.loadtest import Load, Window, run_loads
from cxr_retrieval.evaluation.perf_analyzer import find_perf_analyzer
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import BATCH_SIZE, TritonClient
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.reading import read_radiograph
from cxr_retrieval.settings import MilvusSettings, TritonSettings

GALLERY: Final = 10_000
CONCURRENCIES: Final = (1, 2, 4, 8)
ROUNDS: Final = 3
SHARES: Final = (0.1, 0.95)
"""Of the films, between which the rate is taken: what a start and an end cost does not grow with an archive."""


def measure_archive(segmentation: str, count: int) -> dict[str, Any]:
    """Films a second of the load generator, of embeddings alone, and of answers from a gallery; in turns, medians kept; and whose CPU it is.

    Args:
        count: Films, each another picture.
    """
    found: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cxr-archive-")))
        films = make_archive(folder / "archive", count)
        squares = np.stack([letterbox(read_radiograph(film.path).pixels)[0] for film in films[:48]])[:, None]
        triton, port = triton_service(folder / "triton", "--segmentation", segmentation)
        stack.enter_context(triton)
        fill_gallery(folder / "gallery.db", f"127.0.0.1:{port}")
        milvus, milvus_port = milvus_service(folder / "milvus", folder / "gallery.db")
        stack.enter_context(milvus)
        ways: dict[str, list[str]] = {"embeddings": ["--embed-only"], "answers": ["--milvus", f"http://127.0.0.1:{milvus_port}"]}
        for turn in range(ROUNDS):
            found["perf_analyzer"].append(load_generator(squares, f"127.0.0.1:{port}"))
            for name, how in ways.items():
                out = folder / f"{name}-{turn}.jsonl"
                arguments = ["batch", folder / "archive", "--no-gate", "--out", out, "--triton", f"127.0.0.1:{port}", *how]
                run = batch(folder / f"client-{name}-{turn}", arguments, count, {"triton": triton, "milvus": milvus})
                found[name].append(run.pop("rate"))
                costs[name] = run
    best = statistics.median(found["perf_analyzer"])
    rates = {name: round(statistics.median(values), 2) for name, values in found.items()}
    return {
        "networks": segmentation,
        "films": count,
        "gallery": GALLERY,
        "images_per_second": rates,
        "of_perf_analyzer": {name: round(rates[name] / best, 3) for name in ways},
        "rounds": {name: [round(value, 2) for value in values] for name, values in found.items()},
        "cpu_ms_per_film": costs,
    }


def fill_gallery(folder: Path, triton: str) -> None:
    """`GALLERY` cases without films, under the version that is served."""
    with TritonClient(TritonSettings(triton)) as client:
        version = client.model_version
    with (
        Pseudonyms(PSEUDONYM_KEY.encode(), folder.with_name("table")) as pseudonyms,
        Store(MilvusSettings(str(folder)), version, pseudonyms, create=True) as store,
    ):
        store.upsert(synthetic_entries(0, GALLERY, pseudonyms), [""] * GALLERY, synthetic_embeddings(GALLERY, seed=1))
        store.publish()


def load_generator(squares: NDArray[np.uint8], triton: str) -> float:
    """The most that perf_analyzer reaches with requests of the same size, over how many are in flight."""
    loads = [Load(ENSEMBLE, "concurrency", level, batch=BATCH_SIZE) for level in CONCURRENCIES]
    outcomes = run_loads(loads, squares, TritonSettings(triton), find_perf_analyzer(), Window(4.0, 15.0), lambda _: None)
    return max(outcome.images_per_second or 0.0 for outcome in outcomes)


def batch(folder: Path, arguments: Sequence[str | Path], count: int, servers: dict[str, Service]) -> dict[str, float]:
    """Runs it: its steady rate, and the milliseconds of CPU that each process spent on a film of that while."""
    client = Client.start(folder, "", *arguments)
    lines = Path(arguments[arguments.index("--out") + 1])
    watched: dict[str, Callable[[], list[psutil.Process]]] = {
        "client": lambda: client.family()[:1],
        "workers": lambda: client.family()[1:],
        **{name: server.processes for name, server in servers.items()},
    }
    marks: list[tuple[float, int, dict[str, dict[int, float]]]] = []
    wanted = [share * count for share in SHARES]
    while client.process.poll() is None:
        done = lines.read_bytes().count(b"\n") if lines.is_file() else 0
        if len(marks) < len(wanted) and done >= wanted[len(marks)]:
            marks.append((time.perf_counter(), done, {name: cpu_s(processes()) for name, processes in watched.items()}))
        time.sleep(0.05)
    assert client.process.returncode == 0, (folder / "client.err").read_text()
    assert len(marks) == len(wanted), "the results came all at once; more films"
    (start, first, before), (end, last, after) = marks
    spent = {name: sum(seconds - before[name].get(pid, 0.0) for pid, seconds in after[name].items()) for name in watched}
    costs = {name: round(1000 * seconds / (last - first), 2) for name, seconds in spent.items()}
    return {"rate": (last - first) / (end - start), **costs}


def cpu_s(processes: Sequence[psutil.Process]) -> dict[int, float]:
    """Seconds of CPU that each has used, by its id; of one that has ended nothing is known any more."""
    used: dict[int, float] = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used[process.pid] = times.user + times.system
    return used
