"""Galleries that grow, on a real server: another index in the place of one, what it misses, many cases at once."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
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
from cxr_retrieval.gallery.backup import export_gallery, import_gallery, read_backup
from cxr_retrieval.gallery.bulk import Imported, bulk_import
from cxr_retrieval.gallery.indexes import FLAT, INDEXES, rebuild
from cxr_retrieval.gallery.store import CALIBRATION, SEARCH_ROWS, Entry, Store, make_entry
from cxr_retrieval.settings import IndexName, MilvusSettings
from tests_support import run_cxr
from vectors import unit_vectors

pytestmark = pytest.mark.server

COUNT = 2003
"""Cases: more than the 1,024 below which a server compares with every case whatever its index."""
FEW = 701
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


@pytest.fixture(scope="module")
def exported(pseudonyms: Pseudonyms, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of Milvus Lite in a file."""
    folder = tmp_path_factory.mktemp("exported")
    with Store(MilvusSettings(str(folder / "gallery.db")), "bulk", pseudonyms, create=True) as store:
        fill(store, pseudonyms, unit_vectors(FEW))
        store.keep({CALIBRATION: "a text"})
        export_gallery(store, folder / "gallery.parquet")
    return folder / "gallery.parquet"


def test_read_by_the_server_twice_each_case_is_there_once(
    server: MilvusSettings, pseudonyms: Pseudonyms, exported: Path, tmp_path: Path
) -> None:
    about = read_backup(exported)
    (tmp_path / "shared").mkdir()

    def imported(seen_as: str = str(tmp_path / "shared")) -> Imported:
        return bulk_import(server, pseudonyms, exported, about, tmp_path / "shared", seen_as, threading.Event())

    with pytest.raises(StoreError, match=r"cannot read the files; expected that it finds /nowhere/cxr-.*give by --bulk-as"):
        imported("/nowhere")
    with pytest.raises(StoreError, match="is not filled yet"):
        Store(server, "bulk", pseudonyms)
    assert imported() == Imported([CALIBRATION])
    assert imported() == Imported((), already=True)
    assert not list((tmp_path / "shared").iterdir()), "files are taken away again"
    query = unit_vectors(1, 5)[0]
    with Store(server, "bulk", pseudonyms) as store:
        assert (store.count(), store.calibration, store.index) == (FEW, "a text", FLAT)
        hits = store.search(query, 10)
        facts = {hit.case.key: (hit.case.source, dict(hit.case.metadata)) for hit in hits}
        assert len(store.search(query, 20, "source is null")) == 20
        store.upsert(entries_of(10, pseudonyms), ["0" * 64] * 10, unit_vectors(10, 3))
        assert store.count() == FEW, "what is ingested later replaces what was read"
    with Store(MilvusSettings(str(exported.with_name("gallery.db"))), "bulk", pseudonyms) as lite:
        assert {hit.case.key: (hit.case.source, dict(hit.case.metadata)) for hit in lite.search(query, 10)} == facts
    other = replace(about, sha256="0" * 64)
    with pytest.raises(UsageError, match=f"holds {FEW}.*leave --bulk out"):
        bulk_import(server, pseudonyms, exported, other, tmp_path, str(tmp_path), threading.Event())
    with pytest.raises(UsageError, match="Milvus Lite reads no files"):
        bulk_import(MilvusSettings(str(tmp_path / "x.db")), pseudonyms, exported, about, tmp_path, "", threading.Event())
    said = run_cxr("gallery", "import", exported, "--bulk", tmp_path / "shared", "--milvus", server.uri)
    assert (said.returncode, said.stdout) == (0, "the gallery of model version bulk was made of this file before; nothing to do\n")


def test_kept_by_source(server: MilvusSettings, pseudonyms: Pseudonyms, tmp_path: Path) -> None:
    """A search within a source says so to the partition key, and finds what a gallery that is not kept so finds; moved cases, too."""
    entries, vectors, digests = entries_of(300, pseudonyms), unit_vectors(300), [f"{number:064x}" for number in range(300)]
    clauses = ("", 'source == "h1"', 'age < 60 and source in ["h0", "h2"]', "source is null", 'source == "h1" or age < 9', 'source != "h1"')
    narrowed = [False, True, True, False, False, False]

    def answers(store: Store) -> list[list[str]]:
        return [[hit.case.key for hit in store.search(vectors[7], 30, where)] for where in clauses]

    with (
        Store(server, "by_source", pseudonyms, create=True, by_source=True) as keyed,
        Store(server, "plain", pseudonyms, create=True) as plain,
    ):
        assert (keyed.by_source, plain.by_source) == (True, False)
        for store in (keyed, plain):
            store.upsert(entries, digests, vectors)
            moved = [replace(one, row=replace(one.row, source="h1")) for one in entries[:40]]
            store.correct(moved, digests[:40])
            store.upsert(entries[:20], digests[:20], vectors[:20])
            assert store.count() == 300
        assert answers(keyed) == answers(plain)
        assert [clause.asked.startswith("hospital in [") for clause in map(keyed.clause, clauses)] == narrowed
        export_gallery(keyed, tmp_path / "keyed.parquet")
        for hit in keyed.search(vectors[0], 5):
            assert "hospital" not in hit.case.metadata
    lite = MilvusSettings(str(tmp_path / "gallery.db"))
    import_gallery(lite, pseudonyms, tmp_path / "keyed.parquet", read_backup(tmp_path / "keyed.parquet"))
    with Store(lite, "by_source", pseudonyms) as elsewhere, Store(server, "plain", pseudonyms) as plain:
        assert not elsewhere.by_source
        assert answers(elsewhere) == answers(plain)
    with pytest.raises(UsageError, match="Milvus Lite keeps nothing by source"):
        Store(MilvusSettings(str(tmp_path / "x.db")), "lite", pseudonyms, create=True, by_source=True)


def test_many_questions_are_one_call(server: MilvusSettings, pseudonyms: Pseudonyms, grown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = unit_vectors(SEARCH_ROWS // 10 + 1, 5)
    calls: list[int] = []
    search = MilvusClient.search

    def counted(self: MilvusClient, *given: Any, **options: Any) -> Any:
        calls.append(len(options["data"]))
        return search(self, *given, **options)

    with Store(server, grown, pseudonyms) as store:
        one_by_one = [store.search(question, 10) for question in questions[:5]]
        monkeypatch.setattr(MilvusClient, "search", counted)
        at_once = store.search_many(questions, 10)
    assert calls == [SEARCH_ROWS // 10, 1], "so many answers as one call may bring"
    assert [[hit.case.key for hit in hits] for hits in at_once[:5]] == [[hit.case.key for hit in hits] for hits in one_by_one]


def test_commands(server: MilvusSettings, grown: str) -> None:
    at = ("--milvus", server.uri, "--model-version", grown)
    said = run_cxr("gallery", "index", "--recall", "0.5", "--json", *at)
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    assert told.pop("seconds") < 30
    index = "HNSW (M 32, efConstruction 256)"
    assert told == {"model_version": grown, "before": index, "index": index, "recall": 0.5, "cases": COUNT, "whole": True}
    said = run_cxr("gallery", "audit", "--sample", "40", "--where", "age > 20", "--recall", "0.999", "--json", *at)
    assert said.returncode == 1
    assert "the index finds too little" in said.stderr
    told = json.loads(said.stdout)
    assert (told["index"], told["search"], told["passed"], told["wanted"]) == (index, {"ef": 32}, False, 0.999)
    assert [one["where"] for one in told["audited"]] == ["", "age > 20"]
