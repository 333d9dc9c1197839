"""Galleries that grow, on a real server: another index in the place of one, what it misses, many cases at once."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pymilvus import MilvusClient

from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.errors import StoreError, UsageError
from cxr_retrieval.evaluation.exact import audit_index
from cxr_retrieval.gallery.indexes import FLAT, INDEXES, rebuild
from cxr_retrieval.gallery.store import Entry, Store, make_entry
from cxr_retrieval.settings import IndexName, MilvusSettings
from tests_support import run_cxr
from vectors import unit_vectors

pytestmark = pytest.mark.server

COUNT = 2003
"""Cases: more than the 1,024 below which a server compares with every case whatever its index."""
HNSW = INDEXES[IndexName.hnsw]


def entries_of(count: int, pseudonyms: Pseudonyms) -> list[Entry]:
    folder = Path("/nowhere")
    labels = ["control", "covid19", "control", "control", "control", "control", "control"]
    rows = [
        ManifestRow(folder, f"g{i}", folder / f"{i}.png", labels[i % 7], None, f"h{i % 3}" if i % 5 else None, None, {"age": str(i % 90)})
        for i in range(count)
    ]
    return [make_entry(row, f"{number:064x}", pseudonyms) for number, row in enumerate(rows)]


def fill(store: Store, pseudonyms: Pseudonyms, vectors: NDArray[np.float32]) -> None:
    store.upsert(entries_of(len(vectors), pseudonyms), [f"{number:064x}" for number in range(len(vectors))], vectors)
    store.publish()


@pytest.fixture(scope="module")
def server(milvus_server: str) -> MilvusSettings:
    return MilvusSettings(milvus_server)


@pytest.fixture(scope="module")
def grown(server: MilvusSettings, pseudonyms: Pseudonyms) -> str:
    """The model version of a gallery of so many cases."""
    with Store(server, "grown", pseudonyms, create=True, expected=10**6) as store:
        assert store.index == HNSW
        fill(store, pseudonyms, unit_vectors(COUNT))
    return "grown"


def found(settings: MilvusSettings, pseudonyms: Pseudonyms, version: str, query: NDArray[np.float32]) -> list[str]:
    with Store(settings, version, pseudonyms) as store:
        return [hit.case.image_id for hit in store.search(query, 10)]


def test_a_gallery_gets_what_fits(server: MilvusSettings, pseudonyms: Pseudonyms, tmp_path: Path) -> None:
    with Store(server, "small_one", pseudonyms, create=True, expected=100) as store:
        assert (store.index, store.has_index, store.recall) == (FLAT, False, 0.99)
    with Store(server, "small_one", pseudonyms, create=True, new_index=IndexName.hnsw) as store:
        assert store.index == FLAT, "it was there before"
    with pytest.raises(UsageError, match="no index HNSW_SQ"):
        Store(server, "other", pseudonyms, create=True, new_index=IndexName.hnsw_sq)
    with Store(MilvusSettings(str(tmp_path / "gallery.db")), "lite", pseudonyms, create=True, expected=10**9) as store:
        assert store.index == FLAT


def test_another_index_finds_the_same(server: MilvusSettings, pseudonyms: Pseudonyms, grown: str) -> None:
    query = unit_vectors(1, 5)[0]
    before = found(server, pseudonyms, grown, query)
    told: list[Any] = []
    indexed: list[int] = []
    done = rebuild(server, "cxr_grown", IndexName.auto, None, threading.Event(), begun=lambda *of: told.append(of), advance=indexed.append)
    assert (done.before, done.after, done.cases, done.whole) == (HNSW, FLAT, COUNT, True)
    assert told == [(HNSW, FLAT, COUNT)]
    assert sum(indexed) == COUNT
    assert found(server, pseudonyms, grown, query) == before

    stopped = threading.Event()
    stopped.set()
    rebuild(server, "cxr_grown", IndexName.hnsw, 0.999, stopped)  # whole or not, the same command ends it
    again = rebuild(server, "cxr_grown", None, None, threading.Event())
    assert (again.before, again.after, again.recall, again.whole) == (HNSW, HNSW, 0.999, True)
    assert found(server, pseudonyms, grown, query) == before
    with Store(server, grown, pseudonyms) as store:
        assert store.recall == 0.999
        assert store.index.search(10, store.recall)["ef"] > store.index.search(10)["ef"]


def test_what_cannot_be_built_is_taken_back(server: MilvusSettings, pseudonyms: Pseudonyms, grown: str) -> None:
    """The 2.3.5 that comes as a package has no DISKANN within, and says so in its log alone."""
    query = unit_vectors(1, 5)[0]
    before = found(server, pseudonyms, grown, query)
    with pytest.raises(StoreError, match=r"does not build DISKANN over cxr_grown.*the gallery has HNSW \(M 32, efConstruction 256\) again"):
        rebuild(server, "cxr_grown", IndexName.diskann, None, threading.Event(), stalled_s=1)
    assert found(server, pseudonyms, grown, query) == before
    with pytest.raises(UsageError, match="no gallery cxr_nowhere"):
        rebuild(server, "cxr_nowhere", None, None, threading.Event())


def test_a_gallery_left_without_an_index_says_what_to_do(server: MilvusSettings, pseudonyms: Pseudonyms, grown: str) -> None:
    client: Any = MilvusClient(server.uri)
    client.release_collection("cxr_grown")
    client.drop_index("cxr_grown", "embedding")
    client.close()
    with pytest.raises(StoreError, match=r"has no index.*Next: `cxr gallery index --model-version grown`"):
        Store(server, grown, pseudonyms)
    done = rebuild(server, "cxr_grown", IndexName.hnsw, 0.99, threading.Event())
    assert (done.before, done.after, done.whole) == (None, HNSW, True)
    with Store(server, grown, pseudonyms) as store:
        assert store.count() == COUNT


def test_an_audit_tells_what_an_index_misses(server: MilvusSettings, pseudonyms: Pseudonyms, grown: str) -> None:
    compared: list[int] = []
    with Store(server, grown, pseudonyms) as store:
        everything, rarest = audit_index(store, queries=50, advance=compared.append)
        assert (everything.where, everything.cases, everything.queries, everything.k) == ("", COUNT, 50, 10)
        assert (rarest.where, rarest.cases) == ('label == "covid19"', COUNT // 7)
        assert sum(compared) == COUNT + COUNT // 7
        for one in (everything, rarest):
            assert 0.98 < one.recall <= 1
            assert one.interval[0] < one.recall <= one.interval[1]
        store.recall = 0.5
        store.index = type(HNSW)("HNSW", {})
        narrow = audit_index(store, ["age < 3 and source is null", "age > 20"], queries=50)
        assert [one.where for one in narrow] == ["", "age < 3 and source is null", "age > 20"]
        assert narrow[0].recall < everything.recall, "a narrow search misses some of vectors that lie nowhere near each other"
        with pytest.raises(UsageError, match="expected more than 2003; got 2003"):
            audit_index(store, queries=5000, k=COUNT)


def test_commands(server: MilvusSettings, grown: str) -> None:
    at = ("--milvus", server.uri, "--model-version", grown)
    said = run_cxr("gallery", "index", "--recall", "0.999", "--json", *at)
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    assert told.pop("seconds") < 30
    index = "HNSW (M 32, efConstruction 256)"
    assert told == {"model_version": grown, "before": index, "index": index, "recall": 0.999, "cases": COUNT, "whole": True}
    said = run_cxr("gallery", "audit", "--sample", "40", "--where", "age > 20", "--recall", "0.9", "--json", *at)
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    assert (told["index"], told["search"], told["passed"], told["wanted"]) == (index, {"ef": 512}, True, 0.9)
    assert [one["where"] for one in told["audited"]] == ["", "age > 20"]
    assert run_cxr("gallery", "index", "--recall", "0.5", *at).returncode == 0
    said = run_cxr("gallery", "audit", "--sample", "40", "--recall", "0.999", *at)
    assert said.returncode == 1
    assert "the index finds too little" in said.stderr
    assert "without a filter: 40 queries" in said.stdout
