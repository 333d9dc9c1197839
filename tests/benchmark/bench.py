"""`make bench`: everything that is said about speed, measured in one run on one machine, as ratios.

What is compared takes turns, the busy core comes and goes, so that all see the same machine; medians are kept. The service is measured through gRPC as
users reach it. Writes docs/performance.json and docs/performance.png; the words around them are in docs/performance.md.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from archive_rate import measure_archive
from cluster_rate import measure_cluster
from engines import CORES, BareEngines, Images, gigaflop, peak_gigaflops
from galleries import measure_gallery, milvus_server, resident_mb, synthetic_embeddings, synthetic_entries
from node_rate import measure_node
from page import measure_page
from queueing import measure_queueing
from rich.console import Console
from rich.table import Table
from sleeping import measure_batcher
from stage_costs import measure_stages

from cxr_retrieval.cases.pseudonyms import open_pseudonyms
from cxr_retrieval.contract import ATTENTION_MAP, EMBEDDER, LUNG_SEGMENTATION
from cxr_retrieval.gallery.balance import PARTS, side_by_side
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.locations import default_repository
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom
from cxr_retrieval.retrieval.own import OWN_EXPECTED
from cxr_retrieval.serving.choices import Networks, Precision, cpu_flags, supported
from cxr_retrieval.serving.repository import graph_file, has_graph, model_version
from cxr_retrieval.serving.server import ServerOptions, embedded_triton
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, TritonSettings

ROUNDS: Final = 3
LOAD_S: Final = 60.0
"""How long films come at random at one rate."""
ROUND_S: Final = 3.5
"""About how long one measurement of throughput lasts."""
CALLS: Final = 8
"""Calls in a row whose latency is taken, in every round, after one that is not: threads of whoever had his turn before still spin."""
IN_FLIGHT: Final = 8
PEER_GALLERY: Final = 5000
LITE_SIZES: Final = (1_000, 10_000, 100_000)
SERVER_SIZES: Final = (1_000, 10_000, 100_000, 1_000_000)
DOCS: Final = Path(__file__).parents[2] / "docs"
HALF_BUSY: Final = """
import time
while True:
    until = time.perf_counter() + 0.05
    while time.perf_counter() < until: pass
    time.sleep(0.05)
"""

console = Console(stderr=True)


def main() -> None:
    """Runs what is named on the command line, or all of it: services, peer, retrieval, arithmetic, archive, node, page, cluster, stages,
    queueing.
    """
    parts: dict[str, Callable[[], Any]] = {
        "services": services,
        "peer": peer,
        "retrieval": retrieval,
        "arithmetic": arithmetic,
        "archive": archive,
        "node": node,
        "page": measure_page,
        "cluster": lambda: measure_cluster(400, 1400, ROUNDS),
        "stages": measure_stages,
        "queueing": queueing,
    }
    chosen = sys.argv[1:] or list(parts)
    report_file = DOCS / "performance.json"
    report: dict[str, Any] = json.loads(report_file.read_text()) if report_file.is_file() and sys.argv[1:] else {}
    for name in chosen:
        started = time.monotonic()
        report.setdefault("machines", {})[name] = machine()
        report[name] = parts[name]()
        report.setdefault("seconds", {})[name] = round(time.monotonic() - started)
    report_file.write_text(json.dumps(report, indent=2) + "\n")
    show(report)


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": CORES,
        "features": sorted(cpu_flags() & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}),
        "model_version": model_version(default_repository()),
    }


def pictures() -> Images:
    """Phantoms `[9, 1, 256, 256]`."""
    return np.stack([letterbox(make_phantom(seed, label).pixels)[0] for label in PHANTOM_LABELS for seed in range(3)])[:, None]


def variants() -> list[tuple[Precision, Networks]]:
    """What can be served here: networks, as far as their graphs are here, in each precision that this CPU multiplies in."""
    return [
        (precision, networks)
        for networks in Networks
        for precision in (Precision.fp32, Precision.bf16, Precision.int8)
        if supported(precision, cpu_flags())
        and has_graph(default_repository(), LUNG_SEGMENTATION, networks, int8=precision is Precision.int8)
        and has_graph(default_repository(), EMBEDDER, networks)
    ]


def services() -> list[dict[str, Any]]:
    """Each variant: the bare engines beside the service, on an idle machine and with one core half busy."""
    return [_service(precision, networks) for precision, networks in variants()]


def _service(precision: Precision, networks: Networks) -> dict[str, Any]:
    images = pictures()
    bare = BareEngines(precision, networks)
    with serving(precision, networks) as (client, process), ThreadPoolExecutor(IN_FLIGHT) as pool:

        def ask(batch: Images) -> None:
            client.infer(batch, (*PARTS, ATTENTION_MAP))

        def served(size: int, count: int) -> float:
            requests = [images[i % 2 : i % 2 + size] for i in range(max(1, count // size))]
            started = time.perf_counter()
            list(pool.map(ask, requests))
            return size * len(requests) / (time.perf_counter() - started)

        for _ in range(2):
            bare.one(images[:1])
            ask(images[:1])
            ask(images[:8])
        count = 8 * max(3, round(ROUND_S * bare.rate(images, 8) / 8))
        rates: dict[str, Callable[[], float]] = {
            "bare": lambda: bare.rate(images, count),
            "served_batches_of_8": lambda: served(8, count),
            "served_single_images": lambda: served(1, count),
        }
        calls = {"bare_latency_ms": lambda: bare.one(images[:1]), "latency_ms": lambda: ask(images[:1])}
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        with half_busy() as working:
            for _ in range(ROUNDS):
                for state in ("idle", "half_busy"):
                    with working(state == "half_busy"):
                        for name, rate in rates.items():
                            found[state, name].append(rate())
                        for name, call in calls.items():
                            call()
                            found[state, name] += [milliseconds(call) for _ in range(CALLS)]
        row: dict[str, Any] = {"precision": precision.value, "networks": networks.value, "idle": {}, "half_busy": {}}
        for (state, name), values in found.items():
            row[state][name] = round(statistics.median(values), 3)
        row["memory_mb"] = resident_mb(process)
    console.print(f"{networks.value} {precision.value}: {row['idle']}")
    return row


def milliseconds(call: Callable[[], None]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


@contextmanager
def half_busy() -> Generator[Callable[[bool], AbstractContextManager[None]]]:
    """Another process that computes half of the time, while it is told to."""
    process = subprocess.Popen([sys.executable, "-c", HALF_BUSY])
    process.send_signal(signal.SIGSTOP)

    @contextmanager
    def working(wanted: bool) -> Generator[None]:
        process.send_signal(signal.SIGCONT if wanted else signal.SIGSTOP)
        yield
        process.send_signal(signal.SIGSTOP)

    try:
        yield working
    finally:
        process.kill()
        process.wait()


@contextmanager
def serving(precision: Precision, networks: Networks) -> Generator[tuple[TritonClient, int]]:
    """The embedded server on free ports: its client and process number."""
    options = ServerOptions(default_repository(), precision, networks, grpc_port=0, http_port=0, metrics_port=0)
    with embedded_triton(options) as server, TritonClient(TritonSettings(server.grpc)) as client:
        yield client, server.process.pid


def peer() -> dict[str, Any]:
    """Whole queries per second, single images, some in flight: PyTorch eager, FastAPI and FAISS against each variant with Milvus Lite."""
    images = pictures()
    found: dict[str, Any] = {"gallery": PEER_GALLERY, "in_flight": IN_FLIGHT, "pytorch": {}}
    for at_once, threads in ((1, CORES), (CORES, 1), (IN_FLIGHT, CORES)):  # the last is what comes of writing no more than one must
        with uvicorn(at_once, threads) as url:

            def ask(i: int, url: str = url) -> None:
                request = urllib.request.Request(url, images[i % len(images)].tobytes(), method="POST")
                json.loads(urllib.request.urlopen(request, timeout=120).read())

            found["pytorch"][f"{at_once} at once, {threads} threads each"] = in_flight(ask, seconds=12.0)
    best = max(found["pytorch"].values())
    found["ours"] = {}
    with tempfile.TemporaryDirectory(prefix="cxr-bench-") as folder:
        milvus = MilvusSettings(str(Path(folder) / "gallery.db"))
        keys = PseudonymSettings(Path(folder) / "pseudonym.key")
        with open_pseudonyms(keys, create=True) as pseudonyms, Store(milvus, "benchmark", pseudonyms, create=True) as store:
            store.upsert(synthetic_entries(0, PEER_GALLERY, pseudonyms), [""] * PEER_GALLERY, synthetic_embeddings(PEER_GALLERY, seed=1))
            store.publish()
            for precision, networks in variants():
                with serving(precision, networks) as (client, _):

                    def query(i: int, client: TritonClient = client) -> None:
                        outputs = client.infer(images[i % len(images)][None], (*PARTS, ATTENTION_MAP))
                        store.search(side_by_side(outputs)[0], 10 + OWN_EXPECTED)

                    rate = in_flight(query, seconds=8.0)
                found["ours"][f"{networks.value} {precision.value}"] = {
                    "queries_per_second": rate,
                    "times_pytorch": round(rate / best, 2),
                }
    console.print(found)
    return found


def in_flight(ask: Callable[[int], None], seconds: float) -> float:
    """Calls per second with `IN_FLIGHT` of them open."""
    for i in range(2):
        ask(i)
    started = time.perf_counter()

    def work(lane: int) -> int:
        done = 0
        while time.perf_counter() - started < seconds:
            ask(lane + done)
            done += 1
        return done

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        done = sum(pool.map(work, range(IN_FLIGHT)))
    return round(done / (time.perf_counter() - started), 3)


@contextmanager
def uvicorn(at_once: int, threads: int) -> Generator[str]:
    """The peer in a process of its own: the URL to post to."""
    port = 18432
    environment = {
        **os.environ,
        "CXR_PEER_AT_ONCE": str(at_once),
        "CXR_PEER_THREADS": str(threads),
        "CXR_PEER_GALLERY": str(PEER_GALLERY),
        "OMP_NUM_THREADS": str(threads),
    }
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "peer:app",
        "--app-dir",
        str(Path(__file__).parent),
        "--port",
        str(port),
        "--log-level",
        "error",
    ]
    process = subprocess.Popen(command, env=environment)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/query"
    finally:
        process.terminate()
        process.wait()


def retrieval() -> dict[str, Any]:
    """Latency, recall and memory by size of the gallery, in Milvus Lite and in a Milvus server."""
    with tempfile.TemporaryDirectory(prefix="cxr-bench-") as folder:
        lite = measure_gallery(MilvusSettings(str(Path(folder) / "gallery.db")), LITE_SIZES, None)
    with milvus_server() as (uri, process):
        server = measure_gallery(MilvusSettings(uri, timeout_s=600), SERVER_SIZES, process)
    return {"Milvus Lite 3.2.2, FLAT": lite, "Milvus 2.3.5, HNSW": server}


def arithmetic() -> dict[str, Any]:
    """GFLOP of each graph, GFLOP/s reached by the bare engines, and by a large matrix product in the same precision."""
    images, repository = pictures(), default_repository()
    embedder = gigaflop(graph_file(repository, EMBEDDER, Networks.ensemble))
    rows: list[dict[str, Any]] = []
    peaks = {precision: peak_gigaflops(precision) for precision in dict.fromkeys(precision for precision, _ in variants())}
    for precision, networks in variants():
        work = gigaflop(graph_file(repository, LUNG_SEGMENTATION, networks)) + embedder
        bare = BareEngines(precision, networks)
        bare.rate(images, 4)
        reached = work * bare.rate(images, max(16, round(400 / work)))
        rows.append(
            {
                "precision": precision.value,
                "networks": networks.value,
                "gflop_per_image": round(work, 2),
                "gflops": round(reached, 1),
                "peak_gflops": round(peaks[precision], 1),
                "share": round(reached / peaks[precision], 3),
            }
        )
    return {"embedder_gflop": round(embedder, 2), "engines": rows}


def archive() -> list[dict[str, Any]]:
    """`cxr batch` beside perf_analyzer, through the networks that ship and through the student."""
    return [measure_archive(networks.value, count) for networks, count in ((Networks.ensemble, 600), (Networks.student, 1200))]


def node() -> list[dict[str, Any]]:
    """`cxr listen` beside Orthanc: its own cost, and with the fastest networks that ship."""
    return [measure_node(networks) for networks in ("instant", "student")]


def queueing() -> dict[str, Any]:
    """The simulated queue beside a Triton that sleeps, and beside the student's server, which wants a machine with nothing else to do."""
    images, batchers = pictures(), measure_batcher()
    with serving(Precision.fp32, Networks.student) as (client, process):
        for size in (1, 8, 8):
            client.infer(images[:size], (*PARTS, ATTENTION_MAP))
        return {"sleeping": batchers, "student": measure_queueing(client, process, images, LOAD_S)}


def show(report: dict[str, Any]) -> None:
    """Ratios as tables on stdout, and the plot."""
    out = Console()
    if found := report.get("services"):
        table = Table("networks", "precision", "machine", "bare images/s", "served / bare, 8s", "singles", "latency / bare", "MB")
        for row in found:
            for state in ("idle", "half_busy"):
                one = row[state]
                ratios = (
                    one["served_batches_of_8"] / one["bare"],
                    one["served_single_images"] / one["bare"],
                    one["latency_ms"] / one["bare_latency_ms"],
                )
                rate, memory = f"{one['bare']:.2f}", f"{row['memory_mb']:.0f}"
                table.add_row(row["networks"], row["precision"], state, rate, *(f"{value:.2f}" for value in ratios), memory)
        out.print(table)
    if found := report.get("peer"):
        table = Table("whole queries", "per second", "times PyTorch + FastAPI + FAISS")
        for name, rate in found["pytorch"].items():
            table.add_row(f"PyTorch, {name}", f"{rate:.2f}", "")
        for name, one in found["ours"].items():
            table.add_row(name, f"{one['queries_per_second']:.2f}", f"{one['times_pytorch']:.2f}")
        out.print(table)
    if found := report.get("retrieval"):
        table = Table("gallery", "cases", "p50 ms", "p95 ms", "recall@10", "upserts/s", "MB")
        for name, rows in found.items():
            for row in rows:
                figures = (row["p50_ms"], row["p95_ms"])
                table.add_row(
                    name,
                    f"{row['cases']:,}",
                    *(f"{value:.1f}" for value in figures),
                    f"{row['recall_at_10']:.3f}",
                    f"{row['upserts_per_second']:.0f}",
                    f"{row['memory_mb']:.0f}",
                )
        out.print(table)
    if found := report.get("arithmetic"):
        table = Table("networks", "precision", "GFLOP/image", "GFLOP/s", "matrix product GFLOP/s", "share")
        for row in found["engines"]:
            table.add_row(*(str(row[key]) for key in ("networks", "precision", "gflop_per_image", "gflops", "peak_gflops", "share")))
        out.print(table)
    if found := report.get("archive"):
        table = Table("cxr batch", "images/s", "of perf_analyzer's", "CPU ms a film: client", "workers", "Triton", "Milvus")
        for row in found:
            table.add_row(f"{row['networks']}, perf_analyzer", f"{row['images_per_second']['perf_analyzer']:.2f}")
            for name, share in row["of_perf_analyzer"].items():
                spent = row["cpu_ms_per_film"][name]  # of an earlier run maybe, in which workers were not told apart
                costs = (f"{spent[part]:.1f}" if part in spent else "–" for part in ("client", "workers", "triton", "milvus"))
                table.add_row(f"{row['networks']}, {name}", f"{row['images_per_second'][name]:.2f}", f"{share:.2f}", *costs)
        out.print(table)
    if found := report.get("node"):
        table = Table("cxr listen", "films/s", "of storescu into Orthanc alone")
        for row in found:
            for name, rate in row["per_second"].items():
                share = row["of_orthanc"].get(name)
                table.add_row(f"{row['networks']}, {name}", f"{rate:.1f}", "" if share is None else f"{share:.2f}")
        out.print(table)
    if found := report.get("page"):
        table = Table("cxr view", "ms", "of the answer's own time")
        table.add_row(f"answer over HTTP, {found['cases']:,} cases", f"{found['api_ms']:.0f}", "")
        table.add_row("neighbours drawn", f"{found['neighbours_ms']:.0f}", f"{found['neighbours_over_api']:.2f}")
        table.add_row("with their pictures", f"{found['pictures_ms']:.0f}", f"{found['pictures_over_api']:.2f}")
        out.print(table)
    if found := report.get("cluster"):
        table = Table("cxr batch", "films/s", "start and end, s", "")
        told = {
            "ray": f"{found['ray_over_alone']:.2f} of alone, the same Triton",
            "workers_2": f"{found['two_workers_over_one']:.2f} of one, networks in the workers",
        }
        for name, rate in found["images_per_second"].items():
            table.add_row(name, f"{rate:.1f}", f"{found['start_and_end_s'][name]:.1f}", told.get(name, ""))
        out.print(table)
    if found := report.get("stages"):
        table = Table("stage", "core ms", "bytes")
        for form, row in found["reading"].items():
            table.add_row(f"reading a film, {form}", f"{1000 * row['core_s']:.0f}", f"{row['bytes']:,}")
        for row in found["milvus"]:
            table.add_row(f"a search, Milvus 2.3.5, {row['cases']:,} cases", f"{1000 * row['search_core_s']:.2f}", "")
            held = sum(size for part, size in row["disk_bytes"].items() if part.endswith("_log") or part == "index_files")
            table.add_row(
                f"an upsert, {row['cases']:,} cases; on disk", f"{1000 * row['upsert_core_s']:.3f}", f"{held / row['cases']:,.0f}"
            )
        for name, size in found["batch"].items():
            table.add_row(name.removesuffix("_bytes"), "", f"{size:,.0f}")
        out.print(table)
    if found := report.get("queueing"):
        table = Table(
            "Triton that sleeps", "films", *(f"{name}: measured / simulated = ratio" for name in ("mean ms", "p95 ms", "films a batch"))
        )
        for row in found["sleeping"]:
            cells = (
                f"{row['measured'][name]:.4g} / {row['simulated'][name]:.4g} = {ratio:.2f}"
                for name, ratio in row["measured_over_simulated"].items()
            )
            table.add_row(row["what"], str(row["films"]), *cells)
        out.print(table)
        table = Table(
            "student, load", "films", "cores of others", *(f"{name} ms: measured / simulated = ratio" for name in ("mean", "p95", "p99"))
        )
        for row in found.get("student", {"loads": []})["loads"]:
            cells = (
                f"{row['measured_ms'][name]:.0f} / {row['simulated_ms'][name]:.0f} = {ratio:.2f}"
                for name, ratio in row["measured_over_simulated"].items()
            )
            table.add_row(f"{row['share']:.0%}", str(row["films"]), f"{row['cores_of_others']:.2f}", *cells)
        out.print(table)
    if {"peer", "retrieval"} <= report.keys():
        plot(report, DOCS / "performance.png")


def plot(report: dict[str, Any], path: Path) -> None:
    """Queries per second beside the peer's, and latency by size of the gallery."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes: Any = figure.subplots(1, 2, width_ratios=(3, 2))
    rates: Sequence[tuple[str, float]] = [
        ("PyTorch + FastAPI + FAISS", max(report["peer"]["pytorch"].values())),
        *((name, one["queries_per_second"]) for name, one in report["peer"]["ours"].items()),
    ]
    axes[0].barh([name for name, _ in rates][::-1], [rate for _, rate in rates][::-1], color=["#2a6f97"] * (len(rates) - 1) + ["#999999"])
    where = report["machines"]["peer"]
    axes[0].set(title="whole queries per second", xlabel=f"{where['cores']} cores, {where['cpu']}")
    for name, rows in report["retrieval"].items():
        axes[1].plot([row["cases"] for row in rows], [row["p50_ms"] for row in rows], "-o", label=name)
    axes[1].set(title="search, p50 ms", xlabel="cases in the gallery", xscale="log", yscale="log")
    axes[1].grid(visible=True, which="both", alpha=0.25)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
