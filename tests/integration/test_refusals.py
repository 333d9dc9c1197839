"""A picture that is no film, through query, batch and ingest: no label, a reason, an exit code; and what overrides it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_retrieval.archive.embedding import ingest
from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.phantoms import make_phantom
from cxr_retrieval.retrieval.picture import montage, write_html
from cxr_retrieval.retrieval.query import query
from cxr_retrieval.serving.server import Endpoints, embedded_milvus
from cxr_retrieval.settings import MilvusSettings
from hostile_pictures import page_of_text
from tests_support import run_cxr


@pytest.fixture(scope="module")
def gallery(student_server: Endpoints, phantom_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded_milvus(tmp_path_factory.mktemp("milvus") / "gallery.db", "127.0.0.1", 0) as uri:
        done = run_cxr("ingest", "--manifest", phantom_manifest, "--triton", student_server.grpc, "--milvus", uri)
        assert done.returncode == 0, done.stderr
        yield uri


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A letter, a film upside down, and a film."""
    folder = tmp_path_factory.mktemp("pictures")
    film = make_phantom(90, "control").pixels
    for name, pixels in {"letter": page_of_text(np.random.default_rng(1)), "upside-down": film[::-1, ::-1], "film": film}.items():
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{name}.png")
    return folder


def test_query_says_no_in_words_and_exit_code(student_server: Endpoints, gallery: str, pictures: Path, tmp_path: Path) -> None:
    servers = ("--triton", student_server.grpc, "--milvus", gallery)
    said = run_cxr("query", pictures / "upside-down.png", "--html", tmp_path / "page.html", *servers)
    assert said.returncode == 1
    assert "no label, it seems to be upside down" in said.stdout
    assert "for information only" in said.stdout
    assert "confidence" not in said.stdout
    assert "got it seems to be upside down" in said.stderr
    assert "--no-gate" in said.stderr
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "No label" in page
    assert "it seems to be upside down" in page
    assert "share of votes" not in page
    told = run_cxr("query", pictures / "letter.png", "--json", *servers)
    assert told.returncode == 1
    answer: dict[str, Any] = json.loads(told.stdout)
    nothing = {"label": None, "confidence": 0.0, "scores": {}, "calibrated": None, "set": []}
    assert answer["prediction"] == {**nothing, "abstained": answer["ood"]["reason"]}
    assert len(answer["neighbours"]) == 9
    assert answer["ood"]["refused"] is True
    assert answer["ood"]["score"] > 0.5
    assert not [words for words in answer["warnings"] if "lungs not found" in words], "said once"
    overridden = run_cxr("query", pictures / "letter.png", "--json", "--no-gate", *servers)
    assert overridden.returncode == 0, overridden.stderr
    answer = json.loads(overridden.stdout)
    assert answer["prediction"]["label"] is not None
    assert (answer["ood"]["refused"], answer["ood"]["score"] > 0.5) == (False, True)
    assert [words for words in answer["warnings"] if "the gate was overridden" in words]


def test_batch_counts_and_lists_refusals(student_server: Endpoints, gallery: str, pictures: Path, tmp_path: Path) -> None:
    servers = ("--triton", student_server.grpc, "--milvus", gallery)
    done = run_cxr("batch", pictures, "--out", tmp_path / "r.jsonl", *servers)
    assert done.returncode == 1
    assert "3 inputs: 1 answered, 2 refused" in done.stdout
    found = {Path(line["input"]).stem: line for line in map(json.loads, (tmp_path / "r.jsonl").read_text("utf-8").splitlines())}
    assert {name: line["status"] for name, line in found.items()} == {"letter": "refused", "upside-down": "refused", "film": "answered"}
    assert found["letter"]["prediction"]["label"] is None
    assert found["upside-down"]["ood"]["reason"] == "it seems to be upside down"
    table = run_cxr("batch", pictures, "--out", tmp_path / "r.csv", "--format", "csv", *servers)
    assert table.returncode == 1
    with (tmp_path / "r.csv").open(newline="", encoding="utf-8") as file:
        rows = {Path(row["input"]).stem: row for row in csv.DictReader(file)}
    assert rows["letter"]["label"] == ""
    assert json.loads(rows["letter"]["ood"])["refused"] is True
    embedded = run_cxr("batch", pictures, "--out", tmp_path / "e.jsonl", "--embed-only", *servers)
    assert embedded.returncode == 1
    assert "1 answered, 2 refused" in embedded.stdout
    all_of_it = run_cxr("batch", pictures, "--out", tmp_path / "n.jsonl", "--no-gate", *servers)
    assert all_of_it.returncode == 0, all_of_it.stderr
    assert "3 answered" in all_of_it.stdout


def test_ingest_stores_no_letter_unless_told_to(
    pictures: Path, reader: FilmReader, student: TritonClient, pseudonyms: Pseudonyms, tmp_path: Path
) -> None:
    names = sorted(path.stem for path in pictures.iterdir())
    manifest = tmp_path / "m.csv"
    manifest.write_text("image_id,path,label\n" + "".join(f"{name},{pictures / name}.png,control\n" for name in names))
    rows = read_manifest(manifest).rows
    with Store(MilvusSettings(str(tmp_path / "g.db")), student.model_version, pseudonyms, create=True) as store:
        report = ingest(rows, reader, student, store, lambda count: None)
        assert (report.stored, store.count()) == (1, 1)
        assert {problem.image_id for problem in report.problems} == {"letter", "upside-down"}
        assert "upside down" in str(next(problem.error for problem in report.problems if problem.image_id == "upside-down"))
        told = ingest(rows, reader, student, store, lambda count: None, gate=False)
        assert (told.stored, told.unchanged, store.count()) == (2, 1, 3)
        refused = query(pictures / "letter.png", reader, student, store)
        assert refused.prediction.label is None
        assert montage(refused, reader, store.thumbnails).width > 1200
        write_html(refused, tmp_path / "page.html", reader, store.thumbnails)
