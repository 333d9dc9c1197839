"""Ingest and query through real Triton and real Milvus Lite: results, idempotence, and every bad file of a batch."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cxr_retrieval.contract import LUNG_AGREEMENT, LUNG_MASK
from cxr_retrieval.embedding import embed_rows, ingest
from cxr_retrieval.errors import ImageError, UsageError
from cxr_retrieval.evaluation import LabelledSet, rank
from cxr_retrieval.image import letterbox
from cxr_retrieval.manifest import read_manifest
from cxr_retrieval.phantoms import make_phantom, write_dicom
from cxr_retrieval.retrieve import lung_warnings, query
from cxr_retrieval.settings import MilvusSettings
from cxr_retrieval.store import Store
from cxr_retrieval.triton import TritonClient


def silent(count: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def gallery(triton: TritonClient, phantom_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("store")
    with Store(MilvusSettings(str(folder / "gallery.db")), triton.model_version, create=True) as store:
        report = ingest(read_manifest(phantom_manifest).rows, triton, store, silent)
        assert (report.stored, report.unchanged, report.problems) == (9, 0, ())
        yield store


def test_a_gallery_image_finds_itself_first(gallery: Store, triton: TritonClient, phantom_manifest: Path) -> None:
    row = read_manifest(phantom_manifest).rows[4]
    result = query(row.path, triton, gallery, top_k=4)
    first = result.neighbours[0]
    assert first.case.image_id == row.image_id
    assert first.similarity == pytest.approx(1, abs=1e-3)
    assert result.prediction.label == row.label
    assert len(result.neighbours) == 4
    assert first.case.metadata["age"] == float(row.fields["age"])


def test_published_json(gallery: Store, triton: TritonClient, phantom_manifest: Path) -> None:
    answer = query(read_manifest(phantom_manifest).rows[0].path, triton, gallery, top_k=3).as_json()
    assert set(answer) == {"image_id", "model_version", "prediction", "neighbours", "timings_ms", "warnings"}
    assert set(answer["prediction"]) == {"label", "confidence", "scores"}
    assert [set(neighbour) for neighbour in answer["neighbours"]] == [{"rank", "image_id", "similarity", "label", "metadata"}] * 3
    assert [neighbour["rank"] for neighbour in answer["neighbours"]] == [1, 2, 3]
    assert sum(answer["prediction"]["scores"].values()) == pytest.approx(1)
    assert answer["timings_ms"]["total"] > 0


def test_dicom_query_and_where(gallery: Store, triton: TritonClient, tmp_path: Path) -> None:
    write_dicom(make_phantom(77, "covid19"), tmp_path / "q.dcm")
    result = query(tmp_path / "q.dcm", triton, gallery, where='label != "covid19"')
    assert {hit.case.label for hit in result.neighbours} == {"control", "non_covid_pneumonia"}
    assert "only 6 of 10 neighbours" in result.warnings[-1]
    with pytest.raises(UsageError, match="no case to compare with"):
        query(tmp_path / "q.dcm", triton, gallery, where="age > 200")


def test_hardly_any_lung_is_a_warning() -> None:
    """Counted on the picture itself, not on the black bars beside it."""
    _, box = letterbox(np.full((512, 128), 9, np.uint8))
    mask = np.zeros((256, 256), np.uint8)
    assert "cover 0% of the picture" in lung_warnings(mask, box, 0.0)[0]
    mask[:32, box.left : box.left + box.width] = 255
    assert lung_warnings(mask, box, 0.97) == []


def test_networks_that_disagree_are_a_warning(triton: TritonClient) -> None:
    """A phantom's lungs are agreed upon; a lung-like mask on an even picture is not."""
    _, box = letterbox(np.full((256, 256), 9, np.uint8))
    mask = np.full((256, 256), 255, np.uint8)
    assert "agree to 0.62 only" in lung_warnings(mask, box, 0.62)[0]
    phantom = letterbox(make_phantom(5, "control").pixels)[0]
    even = np.full((256, 256), 128, np.uint8)
    found = triton.infer(np.stack([phantom, even])[:, None], (LUNG_MASK, LUNG_AGREEMENT))
    agreed = found["LUNG_AGREEMENT"][:, 0]
    assert 0 <= float(agreed[1]) < float(agreed[0]) <= 1
    assert lung_warnings(np.asarray(found["LUNG_MASK"][0, 0], np.uint8), box, float(agreed[0])) == []
    assert lung_warnings(np.asarray(found["LUNG_MASK"][1, 0], np.uint8), box, float(agreed[1])) != []


def test_ingest_is_idempotent_and_notices_changes(triton: TritonClient, phantom_manifest: Path, tmp_path: Path) -> None:
    rows = read_manifest(phantom_manifest).rows
    with Store(MilvusSettings(str(tmp_path / "g.db")), triton.model_version, create=True) as store:
        first = ingest(rows[:3], triton, store, silent)  # as if interrupted here
        again = ingest(rows[:5], triton, store, silent)
        assert (first.stored, again.stored, again.unchanged) == (3, 2, 3)
        corrected = [
            type(row)(row.folder, row.image_id, row.path, "control", row.patient_id, row.source, row.split, row.fields) for row in rows[3:5]
        ]
        third = ingest(corrected, triton, store, silent)
        assert (third.stored, third.unchanged) == (2, 0)
        assert store.count() == 5
        cases, _ = store.vectors()
        assert {case.label for case in cases if case.image_id in {row.image_id for row in corrected}} == {"control"}


def test_bad_files_are_reported_and_the_rest_goes_on(triton: TritonClient, phantom_manifest: Path, tmp_path: Path) -> None:
    good = read_manifest(phantom_manifest).rows[0]
    files = {
        "good": good.path.read_bytes(),
        "empty": b"",
        "text": b"not an image",
        "cut": good.path.read_bytes()[:5000],
        "fine": read_manifest(phantom_manifest).rows[1].path.read_bytes(),
    }
    for name, data in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "path", "label", "age"])
        writer.writerows([name, f"{name}.png", "control", ""] for name in (*files, "absent"))
        writer.writerow(["odd", "good.png", "control", "very old"])
    with Store(MilvusSettings(str(tmp_path / "g.db")), triton.model_version, create=True) as store:
        report = ingest(read_manifest(tmp_path / "manifest.csv").rows, triton, store, silent)
        assert report.stored == store.count() == 2
    reasons = {problem.image_id: str(problem.error) for problem in report.problems}
    assert set(reasons) == {"empty", "text", "cut", "absent", "odd"}
    assert "empty" in reasons["empty"]
    assert "not an image" in reasons["text"]
    assert "damaged" in reasons["cut"]
    assert "relative to the manifest's folder" in reasons["absent"]
    assert "column age: not understood" in reasons["odd"]


def test_bad_query_file(gallery: Store, triton: TritonClient, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"x\.png: the file is empty"):
        query(tmp_path / "x.png", triton, gallery)


def test_evaluation_ranks_as_the_store_searches(gallery: Store, triton: TritonClient, phantom_manifest: Path) -> None:
    """Exact neighbours in memory are what a user's query gets from Milvus."""
    rows = read_manifest(phantom_manifest).rows
    embedded = embed_rows(rows, triton, gallery, silent)
    assert embedded.from_store == len(rows), "nothing is computed twice"
    ids = [entry.row.image_id for entry in embedded.entries]
    everything = LabelledSet(ids, embedded.embeddings, [entry.row.label for entry in embedded.entries], ids, [""] * len(ids))
    other = LabelledSet(["q"], embedded.embeddings[:1], ["control"], ["nobody"], [""])
    order, similarity = rank(everything, 0, other)
    found = gallery.search(embedded.embeddings[0], 9)
    assert [hit.similarity for hit in found] == pytest.approx(similarity.tolist(), abs=1e-5)
    assert {hit.case.image_id for hit in found[:5]} == {ids[i] for i in order[:5]}
