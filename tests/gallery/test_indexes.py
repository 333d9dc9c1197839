"""Which index a gallery gets, and how hard it looks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.indexes import (
    FLAT_UP_TO,
    HNSW_SQ_UP_TO,
    HNSW_UP_TO,
    INDEXES,
    Index,
    breadth,
    checked_recall,
    fitting,
    outgrown,
)
from cxr_retrieval.settings import IndexName

OLD, NEW = (2, 3), (2, 6)


@pytest.mark.parametrize(
    ("cases", "release", "expected"),
    [
        (None, OLD, "HNSW"),
        (0, OLD, "FLAT"),
        (FLAT_UP_TO, NEW, "FLAT"),
        (FLAT_UP_TO + 1, NEW, "HNSW"),
        (HNSW_UP_TO, NEW, "HNSW"),
        (HNSW_UP_TO + 1, NEW, "HNSW_SQ"),
        (HNSW_UP_TO + 1, OLD, "DISKANN"),
        (HNSW_SQ_UP_TO + 1, NEW, "DISKANN"),
    ],
)
def test_by_size_and_server(cases: int | None, release: tuple[int, int], expected: str) -> None:
    assert fitting(IndexName.auto, cases, release, lite=False).type == expected


@pytest.mark.parametrize("name", [name for name in IndexName if name is not IndexName.auto])
def test_what_is_asked_for_is_given(name: IndexName) -> None:
    assert fitting(name, 7, NEW, lite=False) == INDEXES[name]


def test_what_this_milvus_lacks_is_refused() -> None:
    assert fitting(IndexName.auto, 10**9, (0, 0), lite=True).type == "FLAT"
    with pytest.raises(UsageError, match=r"Milvus Lite has no index hnsw; expected flat.*--milvus"):
        fitting(IndexName.hnsw, 7, (0, 0), lite=True)
    with pytest.raises(UsageError, match=r"no index HNSW_SQ; expected Milvus 2\.6 or later; got 2\.3\. Next: give --index hnsw"):
        fitting(IndexName.hnsw_sq, 7, OLD, lite=False)


@given(st.integers(1, 16_384), st.floats(0.5, 0.9999))
def test_a_search_is_never_narrower_than_what_is_wanted(top_k: int, recall: float) -> None:
    assert breadth(top_k, recall) >= top_k
    assert breadth(top_k, recall) <= breadth(top_k + 1, recall)
    assert breadth(top_k, 0.5) <= breadth(top_k, recall) <= breadth(top_k, 0.9999)


def test_effort_follows_from_what_is_wanted() -> None:
    hnsw = INDEXES[IndexName.hnsw]
    assert [hnsw.search(18, recall)["ef"] for recall in (0.5, 0.9, 0.95, 0.99, 0.995, 0.999)] == [32, 64, 128, 256, 512, 2048]
    assert hnsw.search(18) == hnsw.search(18, 0.99) == {"ef": 256}
    assert hnsw.search(1000) == {"ef": 4000}
    assert hnsw.search(16_384, 0.999) == {"ef": 32_768}
    assert INDEXES[IndexName.flat].search(18, 0.999) == {}
    assert INDEXES[IndexName.diskann].search(18) == {"search_list": 256}
    assert INDEXES[IndexName.hnsw_sq].search(18)["ef"] == 256
    assert Index("IVF_FLAT", {}).search(18) == {}, "of somebody else's making: as the server has it"


def test_told_in_words() -> None:
    assert str(INDEXES[IndexName.hnsw]) == "HNSW (M 32, efConstruction 256)"
    assert str(INDEXES[IndexName.flat]) == "FLAT"
    assert outgrown(INDEXES[IndexName.flat], 3 * FLAT_UP_TO)
    assert not outgrown(INDEXES[IndexName.flat], FLAT_UP_TO)
    assert not outgrown(INDEXES[IndexName.hnsw], 10**9)


@pytest.mark.parametrize("recall", [0.49, 1.0, float("nan")])
def test_a_recall_that_no_index_reaches_is_refused(recall: float) -> None:
    with pytest.raises(UsageError, match=r"expected 0\.5 to 0\.999"):
        checked_recall(recall)
