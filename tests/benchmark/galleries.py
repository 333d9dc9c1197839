"""How a gallery's size costs: latency and recall@10 of Milvus Lite and of a Milvus server against exact search, and memory."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.cases.pseudonyms import Pseudonyms, open_pseudonyms
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, VECTOR_SIZE, comparable
from cxr_retrieval.gallery.store import Entry, Store, make_entry
from cxr_retrieval.progress import track
from cxr_retrieval.retrieval.own import OWN_EXPECTED
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings
from tests_support import real_milvus
from vectors import with_unit_parts

QUERIES: Final = 100
K: Final = 10
Vectors = NDArray[np.float32]


def synthetic_embeddings(count: int, seed: int) -> Vectors:
    """Vectors in clumps, as embeddings lie: uniform ones would make approximate search look worse than it is."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(200, VECTOR_SIZE))
    vectors = centres[random.integers(0, len(centres), count)] + 0.6 * random.normal(size=(count, VECTOR_SIZE))
    return with_unit_parts(vectors)


def synthetic_entries(start: int, count: int, pseudonyms: Pseudonyms) -> list[Entry]:
    """Cases without a file."""
    folder = Path("/nowhere")
    rows = [
        ManifestRow(folder, f"case-{i}", folder / f"{i}.png", "control", None, None, None, {"age": "50"})
        for i in range(start, start + count)
    ]
    return [make_entry(row, "", pseudonyms) for row in rows]


def measure_gallery(settings: MilvusSettings, sizes: tuple[int, ...], process: int | None) -> list[dict[str, Any]]:
    """Grows one gallery through the sizes; at each the median and 95th-percentile latency of a query as `cxr query` makes it, and recall.

    Args:
        process: Whose memory to read; None where the store lives in this process.
    """
    queries = synthetic_embeddings(QUERIES, seed=9)
    gallery = np.empty((0, VECTOR_SIZE), np.float32)
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(prefix="cxr-bench-") as folder,
        open_pseudonyms(PseudonymSettings(Path(folder) / "pseudonym.key"), create=True) as pseudonyms,
        Store(settings, "benchmark", pseudonyms, create=True) as store,
    ):
        for size in sizes:
            fresh = synthetic_embeddings(size - len(gallery), seed=size)
            started = time.perf_counter()
            for at in track(range(0, len(fresh), 5000), f"{'Milvus Lite' if settings.is_lite else 'Milvus server'}: {size} cases"):
                part = fresh[at : at + 5000]
                store.upsert(synthetic_entries(len(gallery) + at, len(part), pseudonyms), [""] * len(part), part)
            store.publish()
            seconds = time.perf_counter() - started
            gallery = np.concatenate([gallery, fresh])
            exact = np.argsort(-(comparable(queries, DEFAULT_BALANCE) @ comparable(gallery, DEFAULT_BALANCE).T), axis=1)[:, :K]
            store.search(queries[0], K + OWN_EXPECTED)
            times, hits = [], 0
            for query, nearest in zip(queries, exact, strict=True):
                started = time.perf_counter()
                found = store.search(query, K + OWN_EXPECTED)[:K]
                times.append(1000 * (time.perf_counter() - started))
                hits += len({hit.case.image_id for hit in found} & {f"case-{i}" for i in nearest})
            rows.append(
                {
                    "cases": size,
                    "p50_ms": statistics.median(times),
                    "p95_ms": float(np.percentile(times, 95)),
                    "recall_at_10": hits / (QUERIES * K),
                    "upserts_per_second": len(fresh) / seconds,
                    "memory_mb": resident_mb(process),
                }
            )
    return rows


def resident_mb(process: int | None) -> float:
    """Resident memory of a process and its children, in MB."""
    import psutil

    parent = psutil.Process(process)
    total = parent.memory_info().rss + sum(child.memory_info().rss for child in parent.children(recursive=True) if process is not None)
    return total / 1e6


@contextmanager
def milvus_server() -> Generator[tuple[str, int]]:
    """The real Milvus 2.3.5 that comes as a wheel: its URI and process number."""
    with real_milvus() as server:
        yield f"http://127.0.0.1:{server.listen_port}", server.server_proc.pid
