"""A reader's marks: what they do to a question, and to an answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.phantoms import make_phantom, write_dicom
from cxr_retrieval.retrieval.feedback import MOST_MARKS, MOVED, Mark, moved
from cxr_retrieval.retrieval.query import query
from cxr_retrieval.settings import MilvusSettings


def vectors(count: int, seed: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).normal(size=(count, 7)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 99))
def test_marks_draw_and_push(relevant: int, other: int, seed: int) -> None:
    """Of unit length and the same every time; nearer to what was right, as seen from the film alone farther from what was not."""
    query, right, wrong = vectors(1, seed)[0], vectors(relevant, seed + 100), vectors(other, seed + 200)
    found = moved(query, right, wrong)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
    assert (found == moved(query, right, wrong)).all()
    if not relevant and not other:
        assert (found == query).all()
    if relevant:
        drawn = moved(query, right, wrong[:0])
        assert drawn @ right.mean(0) >= query @ right.mean(0) - 1e-6
    if other:
        pushed = moved(query, right[:0], wrong)
        assert pushed @ wrong.mean(0) <= query @ wrong.mean(0) + 1e-6


def test_one_wrong_mark_does_not_outweigh_ten_right_ones() -> None:
    query, right, wrong = vectors(3, 5)
    alike = np.stack([right] * 10)
    few, many = moved(query, alike[:1], wrong[None]), moved(query, alike, wrong[None])
    assert many @ right > few @ right


def test_marks_that_leave_nothing_of_the_question_leave_it() -> None:
    only = np.array([1.0, 0.0], np.float32)
    assert (moved(only, only[None], only[None], pull=0.0) == only).all()
    assert np.isfinite(moved(only, only[None][:0], only[None], pull=1.0)).all(), "pushed back upon itself it is nowhere"


@pytest.mark.parametrize("key", ["", "a" * 31, "A" * 32, "x" * 32, "a" * 33, "a" * 32 + "\n", '" or key != "' + "a" * 20])
def test_a_mark_names_a_case(key: str) -> None:
    with pytest.raises(UsageError, match="names no case"):
        Mark(key, relevant=True)


@pytest.fixture
def gallery(served_gallery: str, triton: TritonClient, pseudonyms: Pseudonyms) -> Iterator[Store]:
    with Store(MilvusSettings(served_gallery), triton.model_version, pseudonyms) as store:
        yield store


@pytest.fixture
def film(tmp_path: Path) -> Path:
    write_dicom(make_phantom(1000, "covid19"), tmp_path / "film.dcm")
    return tmp_path / "film.dcm"


def test_marked_cases_move_an_answer(gallery: Store, reader: FilmReader, triton: TritonClient, film: Path) -> None:
    plain = query(film, reader, triton, gallery, top_k=4)
    assert query(film, reader, triton, gallery, top_k=4, marks=[]).neighbours == plain.neighbours
    assert "marked" not in plain.as_json()
    right, wrong = plain.neighbours[3].case, plain.neighbours[0].case
    said = [Mark(right.key, relevant=False), Mark(right.key, relevant=True), Mark(wrong.key, relevant=False)]
    led = query(film, reader, triton, gallery, top_k=4, marks=said)
    keys = [hit.case.key for hit in led.neighbours]
    assert keys[0] == right.key, "the later mark of a case counts"
    assert wrong.key not in keys
    assert len(keys) == 4, "the next case has taken its place"
    assert [(one["image_id"], one["relevant"]) for one in led.as_json()["marked"]] == [(right.image_id, True), (wrong.image_id, False)]
    assert led.marked[0].hit.similarity == pytest.approx(led.neighbours[0].similarity, abs=1e-3)
    assert led.trust.calibrated is None
    assert led.trust.labels is None
    assert any(MOVED in warning for warning in led.warnings)
    assert led.sentence.endswith(MOVED)
    assert led.own == plain.own
    again = query(film, reader, triton, gallery, top_k=4, marks=said)
    assert [(hit.case.key, hit.similarity) for hit in again.neighbours] == [(hit.case.key, hit.similarity) for hit in led.neighbours]


def test_the_clause_and_the_patient_hold_under_marks(
    gallery: Store, reader: FilmReader, triton: TritonClient, film: Path, phantom_manifest: Path
) -> None:
    others = [hit.case for hit in query(film, reader, triton, gallery, top_k=9).neighbours if hit.case.label != "control"]
    led = query(film, reader, triton, gallery, top_k=9, where='label == "control"', marks=[Mark(others[0].key, relevant=True)])
    assert {hit.case.label for hit in led.neighbours} == {"control"}
    assert led.marked[0].hit.case.key == others[0].key, "it is shown all the same"
    row = read_manifest(phantom_manifest).rows[0]
    own = gallery.pseudonyms.image(row.image_id)
    mine = query(row.path, reader, triton, gallery, top_k=3, marks=[Mark(others[0].key, relevant=True), Mark(own, relevant=True)])
    assert [hit.case.key for hit in mine.own] == [own]
    assert own not in {hit.case.key for hit in mine.neighbours}


def test_marks_on_cases_that_have_gone_and_too_many(gallery: Store, reader: FilmReader, triton: TritonClient, film: Path) -> None:
    plain = query(film, reader, triton, gallery, top_k=3)
    gone = query(film, reader, triton, gallery, top_k=3, marks=[Mark("0" * 32, relevant=True)])
    assert gone.neighbours == plain.neighbours
    assert any("1 marked case(s) are no longer in the gallery" in warning for warning in gone.warnings)
    with pytest.raises(UsageError, match=f"at most {MOST_MARKS}"):
        query(film, reader, triton, gallery, marks=[Mark(f"{number:032x}", relevant=True) for number in range(MOST_MARKS + 1)])
    with pytest.raises(UsageError, match="no case to compare with"):
        query(
            film,
            reader,
            triton,
            gallery,
            marks=[Mark(hit.case.key, relevant=False) for hit in query(film, reader, triton, gallery).neighbours],
        )
