"""What a gallery costs as it grows, on the real Milvus 2.3.5 server that comes as a package: `make growth-speed SIZES="100000 1000000"`.

    PYTHONPATH=tests python tests/benchmark/growth.py 100000 1000000 [--out runs/growth.json] [--segment-mb 1024] [--note "other work beside it"]
    PYTHONPATH=tests python tests/benchmark/growth.py --report runs/growth.json

Each size is measured in a server of its own: it is filled (rows as an ingest makes them, but inserted straight), given one index after another,
and asked. Recall@10 is against all comparisons, made here block by block while the vectors are drawn. What is measured is written after each
index; a size that is whole is not measured again, one that was interrupted begins anew. `--report` prints the tables, what a model of it says
of 100 million, and the model's parameters.

The vectors are a mixture, as `clusters.py` has it: 60 label sets of one to three out of 13 findings, each a direction, with noise of 1.3 on
every axis; both parts brought to unit length as the ensemble's are, and asked at the default balance. Neighbours lie close together without
being copies, in as many dimensions as vectors have: harder for an index than the ensemble's own, which keep to fewer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from galleries import resident_mb
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException
from rich.console import Console

from cxr_retrieval.cases.pseudonyms import open_pseudonyms
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, VECTOR_SIZE, comparable, weighed
from cxr_retrieval.gallery.indexes import FIELD, METRIC, breadth
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.progress import track
from cxr_retrieval.retrieval.own import OWN_EXPECTED
from cxr_retrieval.settings import IndexName, MilvusSettings, PseudonymSettings
from tests_support import real_milvus
from vectors import with_unit_parts

K: Final = 10
ASKED: Final = 200
"""Queries whose recall is measured; new vectors of the same law."""
CALLERS: Final = 8
ROUND_S: Final = 5.0
"""That one measurement of latency lasts at most; and 2,000 calls."""
BLOCK: Final = 20_000
INSERTED_AT_ONCE: Final = 2_000
SOURCES: Final = 20
PARTITIONS: Final = 64
GIVEN_UP_S: Final = 60.0
"""Without a case more in the index, where the server has none built of this kind at all."""
LABELS: Final = {"one_percent": 0.01, "ten_percent": 0.10, "half": 0.50, "rest": 0.39}
FILTERS: Final = {
    "none": "",
    "1 %": 'label == "one_percent"',
    "10 %": 'label == "ten_percent"',
    "50 %": 'label == "half"',
    "a source, 5 %": 'source == "h07"',
}
"""`label` is a field that a collection of 2.3.5 describes, `source` one that it does not, as in our galleries there."""
DEFAULT: Final = "HNSW M 32"
LEAN: Final = "HNSW M 16"
KEYED: Final = "keyed"
GROWN: Final = "cxr_growth"

Vectors = NDArray[np.float32]
console = Console(stderr=True)


@dataclass(frozen=True)
class Tried:
    """An index with the efforts at which it is asked."""

    name: str
    type: str
    parameters: Mapping[str, int]
    efforts: Sequence[Mapping[str, int]]


def tried(size: int) -> list[Tried]:
    """What 2.3.5 has, or says it has, as one would set it up for so many cases; what takes long comes last."""
    lists = max(64, round(4 * math.sqrt(size) / 64) * 64)
    graph = [{"ef": ef} for ef in (32, 64, 128, 256, 512)]
    lists_looked_at = [{"nprobe": number} for number in (16, 64)]
    return [
        Tried("FLAT", "FLAT", {}, [{}]),
        Tried("IVF_SQ8", "IVF_SQ8", {"nlist": lists}, lists_looked_at),
        Tried("SCANN", "SCANN", {"nlist": lists}, [{**one, "reorder_k": 100} for one in lists_looked_at]),
        Tried(LEAN, "HNSW", {"M": 16, "efConstruction": 128}, graph[2:]),
        Tried(DEFAULT, "HNSW", {"M": 32, "efConstruction": 256}, graph),
        Tried("DISKANN", "DISKANN", {}, [{"search_list": 128}]),
    ]


class Drawn:
    """Cases block by block, always the same ones: vectors `[n, 120]`, labels, sources."""

    def __init__(self) -> None:
        fixed = np.random.default_rng(1)
        directions = fixed.normal(size=(13, VECTOR_SIZE))
        sets = [fixed.choice(13, fixed.integers(1, 4), replace=False) for _ in range(60)]
        self._centres = np.array([directions[one].mean(axis=0) for one in sets]) + 0.5 * fixed.normal(size=(60, VECTOR_SIZE))

    def vectors(self, block: int, count: int) -> Vectors:
        random = np.random.default_rng((7, block))
        of = random.integers(60, size=count)
        return with_unit_parts(self._centres[of] + 1.3 * random.normal(size=(count, VECTOR_SIZE)))

    def block(self, block: int, count: int) -> tuple[Vectors, NDArray[np.str_], NDArray[np.str_]]:
        random = np.random.default_rng((8, block))
        labels = random.choice(list(LABELS), size=count, p=list(LABELS.values()))
        return self.vectors(block, count), labels, np.array([f"h{one:02d}" for one in random.integers(SOURCES, size=count)])

    def queries(self) -> Vectors:
        return self.vectors(10**9, ASKED)


class Exact:
    """The nearest of each query, by filter, among what was seen."""

    def __init__(self, queries: Vectors) -> None:
        self._queries = comparable(queries, DEFAULT_BALANCE)
        self._best = {name: (np.full((len(queries), K), -np.inf, np.float32), np.full((len(queries), K), -1, np.int64)) for name in FILTERS}

    def see(self, start: int, vectors: Vectors, labels: NDArray[np.str_], sources: NDArray[np.str_]) -> None:
        alike = self._queries @ comparable(vectors, DEFAULT_BALANCE).T
        numbers = np.arange(start, start + len(vectors))
        masks = {
            "1 %": labels == "one_percent",
            "10 %": labels == "ten_percent",
            "50 %": labels == "half",
            "a source, 5 %": sources == "h07",
        }
        for name, (similarities, known) in self._best.items():
            some = np.ones(len(vectors), np.bool_) if name == "none" else masks[name]
            both = np.concatenate([similarities, alike[:, some]], axis=1)
            all_numbers = np.concatenate([known, np.broadcast_to(numbers[some], (len(alike), int(some.sum())))], axis=1)
            best = np.argpartition(-both, K - 1, axis=1)[:, :K]
            self._best[name] = np.take_along_axis(both, best, axis=1), np.take_along_axis(all_numbers, best, axis=1)

    def nearest(self, name: str) -> list[set[str]]:
        return [{key_of(int(one)) for one in row if one >= 0} for row in self._best[name][1]]


def key_of(number: int) -> str:
    """As long as a pseudonym, and as little in order: a product modulo 2^128 with an odd number."""
    return f"{(number * 0x9E3779B97F4A7C15F39CC0605CEDC835) % 2**128:032x}"


def rows_of(start: int, vectors: Vectors, labels: NDArray[np.str_], sources: NDArray[np.str_]) -> Iterator[dict[str, Any]]:
    """As a gallery on a server without nullable fields has them."""
    for number, (vector, label, source) in enumerate(zip(vectors.tolist(), labels.tolist(), sources.tolist(), strict=True), start):
        key = key_of(number)
        digests = {"file": key * 2, "facts": key * 2, "pixels": key * 2}
        facts = {"source": source, "age": float(number % 90), "sex": "FM"[number % 2]}
        yield {"key": key, "embedding": vector, "label": label, "extra": {}, **digests, **facts}


def fill(client: Any, collection: str, size: int, each: Callable[..., None], hospital: bool) -> float:
    """Inserts so many cases; the seconds that this took, without drawing and comparing."""
    world, spent = Drawn(), 0.0
    for start in track(range(0, size, BLOCK), f"{collection}: {size} cases"):
        vectors, labels, sources = world.block(start // BLOCK, min(BLOCK, size - start))
        each(start, vectors, labels, sources)
        began = time.perf_counter()
        rows = list(rows_of(start, vectors, labels, sources))
        for row in rows if hospital else ():
            row["hospital"] = row["source"]
        for at in range(0, len(rows), INSERTED_AT_ONCE):
            client.insert(collection, rows[at : at + INSERTED_AT_ONCE], timeout=120)
        spent += time.perf_counter() - began
    began = time.perf_counter()
    client.flush(collection, timeout=600)
    spent += time.perf_counter() - began
    job = client.compact(collection)  # else it would come while an index is built, and part of that be built twice
    while client.get_compaction_state(job) != "Completed":
        time.sleep(0.5)
    return spent


def indexed(client: Any, collection: str, one: Tried) -> float | None:
    """Gives it an index; seconds until all cases are in it, None if none comes."""
    client.release_collection(collection)
    for name in client.list_indexes(collection, FIELD):
        client.drop_index(collection, name)
    parameters = client.prepare_index_params()
    parameters.add_index(FIELD, index_type=one.type, metric_type=METRIC, params=dict(one.parameters))
    began = time.perf_counter()
    client.create_index(collection, parameters, sync=False)
    done, moved = 0, began
    while True:
        about = client.describe_index(collection, FIELD)
        if int(about["pending_index_rows"]) == 0 and int(about["total_rows"]) > 0:
            return time.perf_counter() - began
        if int(about["indexed_rows"]) > done:
            done, moved = int(about["indexed_rows"]), time.perf_counter()
            console.print(f"  {one.name}: {done} of {about['total_rows']} cases indexed", highlight=False)
        if done == 0 and time.perf_counter() - moved > GIVEN_UP_S and one.type in ("DISKANN", "SCANN"):
            return None
        time.sleep(0.5)


def percentiles(times_ms: Sequence[float]) -> dict[str, float]:
    """Of some latencies."""
    found = np.percentile(times_ms, [50, 99])
    return {"p50_ms": round(float(found[0]), 2), "p99_ms": round(float(found[1]), 2), "calls": len(times_ms)}


def timed(ask: Callable[[int], object], callers: int, pid: int) -> dict[str, float]:
    """Latency of so many callers, each of whom asks again as soon as he is answered; and what a call costs both sides in time of a core."""
    server = psutil.Process(pid)

    def spent() -> tuple[float, float]:
        times = server.cpu_times()
        return times.user + times.system, time.process_time()

    ends = time.perf_counter() + ROUND_S
    counts = iter(range(10**9))
    lock = threading.Lock()

    def one(_: int) -> list[float]:
        times: list[float] = []
        while len(times) < 2000 // callers and time.perf_counter() < ends:
            with lock:
                number = next(counts)
            began = time.perf_counter()
            ask(number)
            times.append(1000 * (time.perf_counter() - began))
        return times

    ask(0)
    before, began = spent(), time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        times = [value for some in pool.map(one, range(callers)) for value in some]
    seconds, after = time.perf_counter() - began, spent()
    server_ms, client_ms = (round(1000 * (now - then) / len(times), 2) for now, then in zip(after, before, strict=True))
    rate = round(len(times) / seconds, 1)
    return {**percentiles(times), "per_second": rate, "server_core_ms": server_ms, "client_core_ms": client_ms}


class Asking:
    """A collection that is asked as the store asks, but for the keys alone."""

    def __init__(self, client: Any, collection: str, queries: Vectors, exact: Exact, pid: int) -> None:
        self._client, self._collection, self._exact, self.pid = client, collection, exact, pid
        self._asked: list[list[float]] = weighed(queries, DEFAULT_BALANCE).tolist()

    def ask(self, numbers: Sequence[int], effort: Mapping[str, int], where: str = "") -> list[set[str]]:
        found = self._client.search(
            self._collection,
            data=[self._asked[number % ASKED] for number in numbers],
            anns_field=FIELD,
            limit=K,
            filter=where,
            output_fields=["key"],
            search_params={"metric_type": METRIC, "params": dict(effort)},
            consistency_level="Session",
            timeout=120,
        )
        return [{hit["entity"]["key"] for hit in hits} for hits in found]

    def recall(self, effort: Mapping[str, int], name: str = "none") -> float:
        found = [one for start in range(0, ASKED, 50) for one in self.ask(range(start, start + 50), effort, FILTERS[name])]
        nearest = self._exact.nearest(name)
        shares = [len(one & all_) / max(1, len(all_)) for one, all_ in zip(found, nearest, strict=True)]
        return round(float(np.mean(shares)), 4)

    def measured(self, effort: Mapping[str, int], name: str = "none", callers: int = 1) -> dict[str, float]:
        return timed(lambda number: self.ask([number], effort, FILTERS[name]), callers, self.pid)

    def batch(self, effort: Mapping[str, int], at_once: int = 100) -> float:
        """Milliseconds a query where so many go in one call."""
        times: list[float] = []
        ends = time.perf_counter() + ROUND_S / 2
        while time.perf_counter() < ends and len(times) < 20:
            began = time.perf_counter()
            self.ask(range(at_once), effort)
            times.append(1000 * (time.perf_counter() - began) / at_once)
        return round(statistics.median(times), 3)


def measured_index(client: Any, asking: Asking, one: Tried, pid: int, collection: str) -> dict[str, Any]:
    """One index over the whole: how long it takes to build, what it takes in memory, and what it answers."""
    try:
        seconds = indexed(client, collection, one)
    except MilvusException as error:
        return {"index": one.name, "failed": str(error.message)[:200]}
    if seconds is None:
        return {"index": one.name, "failed": f"nothing indexed within {GIVEN_UP_S:g} s: this server does not build it"}
    client.load_collection(collection, timeout=1800)
    settle(client, collection)
    row: dict[str, Any] = {
        "index": one.name,
        "build_s": round(seconds, 1),
        "memory_mb": round(resident_mb(pid)),
        "segments": len(client.list_loaded_segments(collection)),
    }
    row["efforts"] = [{**effort, "recall": asking.recall(effort), **asking.measured(effort)} for effort in one.efforts]
    best = next((number for number, told in enumerate(row["efforts"]) if told["recall"] >= 0.99), len(one.efforts) - 1)
    effort = one.efforts[best]
    row |= {"effort": dict(effort), "eight": asking.measured(effort, callers=CALLERS), "batch_of_100_ms_a_query": asking.batch(effort)}
    row["filters"] = {name: {"recall": asking.recall(effort, name), **asking.measured(effort, name)} for name in FILTERS if name != "none"}
    return row


def settle(client: Any, collection: str) -> None:
    """Waits until the same segments are there for five seconds."""
    before, since = -1, time.monotonic()
    while time.monotonic() - since < 5:
        now = len(client.list_loaded_segments(collection))
        if now != before:
            before, since = now, time.monotonic()
        time.sleep(0.5)


def as_the_store_asks(store: Store, queries: Vectors, pid: int) -> dict[str, Any]:
    """With all that is kept of each case, at the effort of a recall of 0.99, as `cxr query` and `cxr batch` do."""

    def one(number: int) -> object:
        return store.search(queries[number % ASKED], K + OWN_EXPECTED)

    began = time.perf_counter()
    store.search_many(queries, K + OWN_EXPECTED)
    batch = 1000 * (time.perf_counter() - began) / len(queries)
    return {
        "one": timed(one, 1, pid),
        "eight": timed(one, CALLERS, pid),
        "batch_ms_a_query": round(batch, 2),
        "ef": breadth(K + OWN_EXPECTED, 0.99),
    }


def keyed(client: Any, size: int, queries: Vectors, exact: Exact, pid: int) -> dict[str, Any]:
    """The same cases in a collection whose partition key is the hospital."""
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("key", DataType.VARCHAR, max_length=32, is_primary=True)
    schema.add_field(FIELD, DataType.FLOAT_VECTOR, dim=VECTOR_SIZE)
    for name in ("label", "file", "facts", "pixels"):
        schema.add_field(name, DataType.VARCHAR, max_length=256)
    schema.add_field("extra", DataType.JSON)
    schema.add_field("hospital", DataType.VARCHAR, max_length=256, is_partition_key=True)
    client.create_collection(KEYED, schema=schema, consistency_level="Strong", num_partitions=PARTITIONS)
    seconds = fill(client, KEYED, size, lambda *_: None, hospital=True)
    one = next(one for one in tried(size) if one.name == LEAN)
    built = indexed(client, KEYED, one)
    client.load_collection(KEYED, timeout=1800)
    settle(client, KEYED)
    asking, effort, name = Asking(client, KEYED, queries, exact, pid), {"ef": 256}, "a source, 5 %"
    by_key = 'hospital == "h07"'
    found = [one for start in range(0, ASKED, 50) for one in asking.ask(range(start, start + 50), effort, by_key)]
    shares = [len(one & all_) / max(1, len(all_)) for one, all_ in zip(found, exact.nearest(name), strict=True)]
    row: dict[str, Any] = {
        "insert_s": round(seconds, 1),
        "build_s": built,
        "memory_mb": round(resident_mb(pid)),
        "segments": len(client.list_loaded_segments(KEYED)),
        "all": {"recall": asking.recall(effort), **asking.measured(effort), "eight": asking.measured(effort, callers=CALLERS)},
        "a source": {"recall": round(float(np.mean(shares)), 4), **timed(lambda number: asking.ask([number], effort, by_key), 1, pid)},
    }
    return row


def measure(
    size: int,
    report: dict[str, Any],
    save: Callable[[], None],
    settings: Mapping[str, object],
    only: Sequence[str] | None,
    about: Mapping[str, Any],
) -> None:
    """One size, from an empty server on. `only`: names of indexes; None: all."""
    told: dict[str, Any] = {"cases": size, "whole": False, "indexes": [], "machine": about, "server": dict(settings)}
    report["sizes"] = [one for one in report["sizes"] if one["cases"] != size] + [told]
    report["sizes"].sort(key=lambda one: one["cases"])
    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="cxr-growth-") as folder,
        real_milvus(**settings) as server,
        open_pseudonyms(PseudonymSettings(Path(folder) / "pseudonym.key"), create=True) as pseudonyms,
    ):
        pid, uri = server.server_proc.pid, f"http://127.0.0.1:{server.listen_port}"
        told["empty_mb"] = round(resident_mb(pid))
        queries = Drawn().queries()
        exact = Exact(queries)
        with Store(MilvusSettings(uri, timeout_s=1800), "growth", pseudonyms, create=True, new_index=IndexName.flat):
            pass
        client: Any = MilvusClient(uri, timeout=120)
        client.release_collection(GROWN)
        told["insert_s"] = round(fill(client, GROWN, size, exact.see, hospital=False), 1)
        save()
        asking = Asking(client, GROWN, queries, exact, pid)
        for one in (one for one in tried(size) if only is None or one.name in only):
            console.print(f"{size} cases: {one.name}", highlight=False)
            told["indexes"].append(measured_index(client, asking, one, pid, GROWN))
            if one.name == DEFAULT:
                with Store(MilvusSettings(uri, timeout_s=120), "growth", pseudonyms) as store:
                    told["store"] = as_the_store_asks(store, queries, pid)
            save()
        client.drop_collection(GROWN)
        time.sleep(5)
        console.print(f"{size} cases: partition key", highlight=False)
        told["partition_key"] = keyed(client, size, queries, exact, pid)
        client.close()
    told |= {"whole": True, "seconds": round(time.perf_counter() - began)}
    save()


def machine(note: str) -> dict[str, Any]:
    """What the figures belong to."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {"cpu": cpu[1] if cpu else platform.machine(), "cores": os.cpu_count(), "load_before": os.getloadavg()[1], "note": note}


@dataclass(frozen=True)
class Law:
    """`value = base + slope · x(n)`, by least squares; through the only point and 0 where there is one size."""

    what: str
    x: Callable[[float], float]
    form: str
    base: float
    slope: float

    def at(self, n: float) -> float:
        return self.base + self.slope * self.x(n)

    def __str__(self) -> str:
        return f"{self.what} = {self.base:.3g} + {self.slope:.3g} · {self.form}"


def fitted(what: str, form: str, x: Callable[[float], float], points: Sequence[tuple[float, float]], base: float | None = None) -> Law:
    """A law through measured points; `base`: known beforehand."""
    xs, ys = np.array([x(n) for n, _ in points]), np.array([y for _, y in points])
    if base is not None or len(points) == 1:
        known = base or 0.0
        return Law(what, x, form, known, float(xs @ (ys - known) / (xs @ xs)))
    slope, intercept = np.polyfit(xs, ys, 1)
    return Law(what, x, form, float(intercept), float(slope))


def laws(sizes: Sequence[Mapping[str, Any]], index: str) -> list[Law]:
    """Of one index: memory and build by cases, search by cases (if the server kept one graph) and by segments (as it does keep)."""
    rows = [(one["cases"], row, one) for one in sizes for row in one["indexes"] if row["index"] == index and "failed" not in row]
    if not rows:
        return []
    empty = statistics.mean(one["empty_mb"] for one in sizes)
    last_n, last, _ = rows[-1]
    each = last_n / max(1, last["segments"])
    p50 = [(n, effort_of(row)["p50_ms"]) for n, row, _ in rows]
    return [
        fitted("memory, MB", "n", lambda n: n, [(n, row["memory_mb"]) for n, row, _ in rows], base=empty),
        fitted("build, s", "n · log2 n", lambda n: n * math.log2(n), [(n, row["build_s"]) for n, row, _ in rows], base=0.0),
        fitted("insert, s", "n", lambda n: n, [(n, one["insert_s"]) for n, _, one in rows], base=0.0),
        fitted("p50 of one caller, ms, one graph", "log2 n", math.log2, p50),
        fitted(f"p50 of one caller, ms, segments of {each:.0f} cases", "n / cases of a segment", lambda n: n / each, p50),
    ]


def effort_of(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was measured at the least effort that reached 0.99, or at the most."""
    return next(told for told in row["efforts"] if all(told[name] == value for name, value in row["effort"].items()))


def show(report: Mapping[str, Any]) -> None:
    """The tables of docs/galleries.md."""
    sizes = [one for one in report["sizes"] if one["indexes"]]
    for one in sizes:
        print(f"{one['cases']:,}: {one.get('machine')}, {one.get('seconds', '?')} s in all\n")
    print(
        "| cases | index | recall@10 | effort | p50 ms | p99 ms | p50, 8 callers | p99, 8 callers | ms a query in batches of 100 | build s | server MB | segments |"
    )
    print("|---" * 12 + "|")
    for one in sizes:
        for row in one["indexes"]:
            if "failed" in row:
                print(f"| {one['cases']:,} | {row['index']} | not built: {row['failed']} |" + " |" * 9)
                continue
            best, eight = effort_of(row), row["eight"]
            effort = ", ".join(f"{name} {value}" for name, value in row["effort"].items()) or "all"
            print(
                f"| {one['cases']:,} | {row['index']} | {best['recall']:.3f} | {effort} | {best['p50_ms']:.1f} | {best['p99_ms']:.1f} | {eight['p50_ms']:.1f} "
                f"| {eight['p99_ms']:.1f} | {row['batch_of_100_ms_a_query']:.2f} | {row['build_s']:.0f} | {row['memory_mb']:,} | {row['segments']} |"
            )
    print("\n| cases | index | effort | recall@10 | p50 ms | p99 ms |\n|---|---|---|---|---|---|")
    for one in sizes:
        for row in one["indexes"]:
            for told in row.get("efforts", ()) if len(row.get("efforts", ())) > 1 else ():
                effort = ", ".join(f"{name} {told[name]}" for name in row["effort"])
                print(
                    f"| {one['cases']:,} | {row['index']} | {effort} | {told['recall']:.3f} | {told['p50_ms']:.1f} | {told['p99_ms']:.1f} |"
                )
    print("\n| cases | index | filter | recall@10 | p50 ms | p99 ms |\n|---|---|---|---|---|---|")
    for one in sizes:
        for row in one["indexes"]:
            for name, told in row.get("filters", {}).items():
                print(
                    f"| {one['cases']:,} | {row['index']} | {name} | {told['recall']:.3f} | {told['p50_ms']:.1f} | {told['p99_ms']:.1f} |"
                )
        if key := one.get("partition_key"):
            for name, told in (("a source, 5 %, by partition key", key["a source"]), ("none, with partition key", key["all"])):
                print(f"| {one['cases']:,} | {LEAN} | {name} | {told['recall']:.3f} | {told['p50_ms']:.1f} | {told['p99_ms']:.1f} |")
    for one in sizes:
        print(
            f"\n{one['cases']:,}: inserted in {one['insert_s']} s; as the store asks: {one.get('store')}; partition key: {one.get('partition_key')}"
        )
    for index in (DEFAULT, LEAN):
        print(f"\n| model, of {index} | 5,000,000 | 20,000,000 | 100,000,000 |\n|---|---|---|---|")
        for law in laws(sizes, index):
            print(f"| {law} | " + " | ".join(f"{law.at(n):,.0f}" for n in (5e6, 2e7, 1e8)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", nargs="*", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/growth.json"))
    parser.add_argument("--segment-mb", type=int, help="dataCoord.segment.maxSize of the server; its own default without it")
    parser.add_argument("--note", default="", help="what else the machine did meanwhile")
    parser.add_argument("--indexes", nargs="+", metavar="NAME", help="only these, such as 'HNSW M 32' FLAT")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    if given.report:
        show(json.loads(given.report.read_text()))
        return
    report: dict[str, Any] = json.loads(given.out.read_text()) if given.out.is_file() else {"sizes": []}
    settings = {"dataCoord.segment.maxSize": given.segment_mb} if given.segment_mb else {}

    def save() -> None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        partial = given.out.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        partial.replace(given.out)

    for size in given.sizes:
        if any(one["cases"] == size and one["whole"] for one in report["sizes"]):
            console.print(f"{size} cases: measured before", highlight=False)
            continue
        measure(size, report, save, settings, given.indexes, machine(given.note))
    show(report)


if __name__ == "__main__":
    main()
