"""Real radiographs, where they are at hand. What these small samples show is that the path works, not how well; that is `cxr evaluate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cxr_retrieval.contract import LABELS, LUNG_AGREEMENT, LUNG_MASK
from cxr_retrieval.embedding import embed_rows, ingest
from cxr_retrieval.evaluation import LabelledSet, evaluate
from cxr_retrieval.fields import parse_clinical
from cxr_retrieval.image import letterbox, read_radiograph
from cxr_retrieval.manifest import Manifest, ManifestRow, read_manifest
from cxr_retrieval.retrieve import MIN_LUNG_AGREEMENT, query
from cxr_retrieval.settings import MilvusSettings
from cxr_retrieval.store import Store
from cxr_retrieval.triton import TritonClient

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="module")
def manifest(real_data: Path) -> Manifest:
    return read_manifest(real_data / "manifest.csv")


def sample(rows: tuple[ManifestRow, ...], per_class: int, seed: int) -> list[ManifestRow]:
    """Rows of the radiography source and of kermany pneumonia, so many of each class, fixed by the seed."""
    random = np.random.default_rng(seed)
    chosen: list[ManifestRow] = []
    for label in LABELS:
        pool = [row for row in rows if row.label == label]
        chosen += [pool[i] for i in random.choice(len(pool), per_class, replace=False)]
    return chosen


def test_reference_manifest_is_read_and_typed(manifest: Manifest) -> None:
    assert len(manifest.select(split="train")) == 4293
    assert len(manifest.select(split="val")) == 759
    assert len(manifest.select()) == 4293 + 759, "extra takes no part unless asked for"
    assert not {row.patient for row in manifest.select(split="train")} & {row.patient for row in manifest.select(split="val")}
    for row in manifest.rows:
        parse_clinical(row.fields)


def test_the_dicom_pair_shows_one_radiograph_inverted(real_data: Path) -> None:
    """The second file says MONOCHROME1 over the same pixels: it must come out as the negative of the first."""
    first = read_radiograph(real_data / "dicom" / "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm")
    second = read_radiograph(real_data / "dicom" / "Fake_MONOHR1.dcm")
    assert first.format == second.format == "DICOM"
    assert first.pixels.shape == (1024, 1024)
    assert (second.pixels == 255 - first.pixels).all()


def test_every_validation_image_is_readable(manifest: Manifest) -> None:
    for row in manifest.select(split="val")[::5]:
        square, box = letterbox(read_radiograph(row.path).pixels)
        assert square.shape == (256, 256)
        assert max(box.width, box.height) == 256


def test_lungs_against_the_radiologist(manifest: Manifest, triton: TritonClient) -> None:
    """14 validation films with radiologist-drawn lungs: close to the radiologist, and none bad without a warning."""
    rows = [row for row in manifest.select(split="val") if row.fields.get("mask_source") == "radiologist"]
    images = np.stack([letterbox(read_radiograph(row.path).pixels)[0] for row in rows])[:, None]
    answers = [triton.infer(images[i : i + 7], (LUNG_MASK, LUNG_AGREEMENT)) for i in range(0, len(images), 7)]
    found = np.concatenate([answer["LUNG_MASK"] for answer in answers])[:, 0].astype(np.bool_)
    agreed = np.concatenate([answer["LUNG_AGREEMENT"] for answer in answers])[:, 0].astype(np.float64)
    truth = np.stack([drawn_mask(row) for row in rows])
    dice = 2 * (found & truth).sum(axis=(1, 2)) / (found.sum(axis=(1, 2)) + truth.sum(axis=(1, 2)))
    assert len(rows) == 14
    assert dice.mean() > 0.93, dice.round(3)
    assert ((dice >= 0.85) | (agreed < MIN_LUNG_AGREEMENT)).all()
    assert (agreed >= MIN_LUNG_AGREEMENT).mean() > 0.8, "the warning is not cried at every film"


def drawn_mask(row: ManifestRow) -> NDArray[np.bool_]:
    with Image.open(row.folder / row.fields["lung_mask_path"]) as image:
        return letterbox(np.asarray(image.convert("L")))[0] > 127


def test_retrieval_beats_chance_on_a_small_sample(manifest: Manifest, triton: TritonClient, tmp_path: Path) -> None:
    """60 cases, 30 queries of other patients: well above the 1/3 of guessing, and a query shows clinical facts."""
    gallery, queries = sample(manifest.select(split="train"), 20, 1), sample(manifest.select(split="val"), 10, 2)
    with Store(MilvusSettings(str(tmp_path / "g.db")), triton.model_version, create=True) as store:
        report = ingest(gallery, triton, store, lambda count: None)
        assert (report.stored, report.problems) == (60, ())
        sets = []
        for rows in (gallery, queries):
            found = embed_rows(rows, triton, store, lambda count: None)
            assert not found.problems
            entries = [entry.row for entry in found.entries]
            sets.append(
                LabelledSet(
                    [row.image_id for row in entries],
                    found.embeddings,
                    [row.label for row in entries],
                    [row.patient for row in entries],
                    [row.source or "" for row in entries],
                )
            )
        result = evaluate(*sets, k=5, model_version=triton.model_version)
        assert result["overall"]["balanced_accuracy"] > 0.6
        answer = query(queries[0].path, triton, store).as_json()
    assert len(answer["neighbours"]) == 10
    assert {neighbour["metadata"]["source"] for neighbour in answer["neighbours"]} <= {row.source for row in gallery}
