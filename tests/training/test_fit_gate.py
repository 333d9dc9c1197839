"""The gate fitted on a few phantoms: it passes phantoms, refuses what is spoilt, and comes out the same to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cxr_retrieval.cases.manifest import Manifest, read_manifest
from cxr_retrieval.errors import ManifestError
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.phantoms import Phantom, make_phantom
from cxr_retrieval.retrieval.gate import KINDS, Gate
from cxr_retrieval_training.gate.fit_gate import Lessons, fit_gate
from cxr_retrieval_training.gate.outliers import DRAWN, SPOILT, Spoil, still_a_film

FEW = Lessons(per_source=8, phantoms=11, no_films=12)


@pytest.fixture(scope="module")
def manifest(phantom_manifest: Path) -> Manifest:
    """Phantoms of two sites; every third is val."""
    read = read_manifest(phantom_manifest)
    return replace(read, rows=tuple(replace(row, split="val" if number % 3 == 2 else "train") for number, row in enumerate(read.rows)))


def test_fits_and_repeats(manifest: Manifest, student: TritonClient, tmp_path: Path) -> None:
    seen = {"train": 0, "val": 0}

    def advance(part: str, count: int) -> None:
        seen[part] += count

    said = fit_gate(manifest, student, tmp_path / "gate.npz", FEW, advance)
    assert "of 3 films of val" in said
    assert seen["val"] == 3
    gate = Gate.load(tmp_path / "gate.npz")
    assert gate.about["model_version"] == student.model_version
    assert gate.about["manifest_sha256"] == manifest.sha256
    assert gate.about["train_pictures"] == seen["train"]
    assert gate.weights.shape == (len(KINDS), len(gate.mean))
    fit_gate(manifest, student, tmp_path / "again.npz", FEW)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "gate.npz").read_bytes()


def test_a_film_that_cannot_be_read_is_named(manifest: Manifest, student: TritonClient, tmp_path: Path) -> None:
    broken = replace(manifest, rows=tuple(replace(row, path=tmp_path / "gone.png") for row in manifest.rows))
    with pytest.raises(ManifestError, match=f"{manifest.rows[0].image_id}.*gone.png"):
        fit_gate(broken, student, tmp_path / "gate.npz", FEW)


@pytest.fixture(scope="module")
def film() -> Phantom:
    return make_phantom(77, "control")


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_spoiling_changes_the_film(spoil: Spoil, film: Phantom) -> None:
    for seed in range(30):
        pixels = spoil(film.pixels, np.random.default_rng(seed))
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 2
        assert pixels.shape != film.pixels.shape or not np.array_equal(pixels, film.pixels)
        assert np.array_equal(pixels, spoil(film.pixels, np.random.default_rng(seed)))


def test_drawings_are_of_all_sorts_and_repeat() -> None:
    for draw in DRAWN:
        first, second = (draw(np.random.default_rng(seed)) for seed in (1, 2))
        assert first.dtype == np.uint8
        assert min(first.shape) >= 64
        assert first.shape != second.shape or not np.array_equal(first, second)
        assert np.array_equal(first, draw(np.random.default_rng(1)))


def test_a_varied_film_is_still_alike(film: Phantom) -> None:
    varied = [still_a_film(film.pixels, np.random.default_rng(seed)) for seed in range(8)]
    assert all(pixels.dtype == np.uint8 and min(pixels.shape) > 200 for pixels in varied)
    assert len({pixels.tobytes() for pixels in varied}) == 8
