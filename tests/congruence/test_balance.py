"""Semantic against visual in both kinds of Milvus: neighbours are those of the exact fusion, whatever the balance."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmark.fusion import measure_fusion
from benchmark.galleries import synthetic_embeddings, synthetic_entries
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import EMBEDDING_SIZE
from cxr_retrieval.errors import StoreError, UsageError
from cxr_retrieval.gallery.backup import export_gallery, import_gallery, read_backup
from cxr_retrieval.gallery.balance import comparable, halves, weighed
from cxr_retrieval.gallery.store import Case, Store
from cxr_retrieval.settings import MilvusSettings
from vectors import make_former_gallery, unit_vectors

CASES, ASKED = 2000, 20


@pytest.fixture(scope="module", params=["lite", "server"])
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MilvusSettings:
    lite = str(tmp_path_factory.mktemp("balance") / "gallery.db")
    return MilvusSettings(lite if request.param == "lite" else request.getfixturevalue("milvus_server"))


@pytest.fixture(scope="module")
def store(settings: MilvusSettings, pseudonyms: Pseudonyms) -> Iterator[Store]:
    """Cases in clumps, sealed, so that a server has them in its index."""
    with Store(settings, "balanced", pseudonyms, create=True) as opened:
        opened.upsert(synthetic_entries(0, CASES, pseudonyms), [""] * CASES, synthetic_embeddings(CASES, seed=1))
        opened.publish()
        yield opened


@pytest.fixture(scope="module")
def held(store: Store) -> tuple[list[Case], NDArray[np.float32]]:
    return store.vectors()


@pytest.mark.parametrize("balance", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_neighbours_are_those_of_the_exact_fusion(store: Store, held: tuple[list[Case], NDArray[np.float32]], balance: float) -> None:
    cases, stored = held
    place = {case.key: i for i, case in enumerate(cases)}
    queries = synthetic_embeddings(ASKED, seed=9)
    fused = comparable(queries, balance) @ comparable(stored, balance).T
    parts = [query @ one.T for query, one in zip(halves(queries), halves(stored), strict=True)]
    agreed = 0
    for number, hits in enumerate(store.search_many(queries, 10, balance=balance)):
        rows = [place[hit.case.key] for hit in hits]
        assert [hit.similarity for hit in hits] == pytest.approx(fused[number, rows].tolist(), abs=1e-5)
        assert [hit.semantic for hit in hits] == pytest.approx(parts[0][number, rows].tolist(), abs=1e-5)
        assert [hit.visual for hit in hits] == pytest.approx(parts[1][number, rows].tolist(), abs=1e-5)
        assert all(a.similarity >= b.similarity for a, b in pairwise(hits))
        agreed += len({*rows} & {*np.argsort(-fused[number])[:10].tolist()})
    assert agreed / (10 * ASKED) > 0.99, "HNSW is approximate"


def test_a_balance_that_is_none_asks_nothing(store: Store) -> None:
    with pytest.raises(UsageError, match="correct --balance"):
        store.search(unit_vectors(1)[0], 3, balance=1.5)


def test_a_gallery_of_the_former_layout_says_what_to_do(settings: MilvusSettings, pseudonyms: Pseudonyms, tmp_path: Path) -> None:
    """It is not searched; its rows can be read, and carried over. A file of it is refused before anything is made of it."""
    if settings.is_lite:
        settings = MilvusSettings(str(tmp_path / "former.db"))
    with Store(settings, "of_now", pseudonyms, create=True) as opened:
        opened.upsert(synthetic_entries(0, 3, pseudonyms), ["a", "b", "c"], unit_vectors(3))
        rows = list(opened.rows(["*"]))
    make_former_gallery(settings, pseudonyms, "former_layout", rows)
    for create in (False, True):
        with pytest.raises(StoreError, match=r"one vector of a case; expected 120 numbers.*got 64, both mixed.*`cxr reindex`"):
            Store(settings, "former_layout", pseudonyms, create=create)
    with Store(settings, "former_layout", pseudonyms, outdated=True) as opened:
        assert opened.outdated
        assert len(list(opened.rows(["key", "label"]))) == 3
        assert len(opened.held([row["key"] for row in opened.rows(["key"])])) == 3
        export_gallery(opened, tmp_path / "former.parquet")
    with pytest.raises(StoreError, match=r"no gallery for model version later.*`cxr reindex` to carry over"):
        Store(settings, "later", pseudonyms)
    with pytest.raises(UsageError, match=r"another layout; expected a vector of 120 numbers of each case; got 64.*`cxr reindex`"):
        import_gallery(settings, pseudonyms, tmp_path / "former.parquet", read_backup(tmp_path / "former.parquet"))


def test_hybrid_search_would_answer_by_the_length_of_its_lists(tmp_path: Path) -> None:
    """Why both parts stand in one field: a case that only one list holds counts as if it were nothing like the film in the other part."""
    stored, queries = unit_vectors(800), unit_vectors(8, 1)
    rows = measure_fusion(str(tmp_path / "fusion.db"), stored, queries, (0.5,), (10, 200, 800))
    found = {row["way"]: row["found"] for row in rows}
    assert found["one field"] == 1
    assert found["hybrid_search, lists of 10"] < found["hybrid_search, lists of 200"] < 1
    assert found["hybrid_search, lists of 800"] == 1, "of every case; a server's are of 16,384 at most"
    assert weighed(queries, 0.5).shape[1] == stored.shape[1] > EMBEDDING_SIZE
