from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, Phantom, make_phantom, write_dicom
from cxr_retrieval.radiograph.reading import read_radiograph


def test_same_seed_same_phantom_other_seed_other_phantom() -> None:
    first, again, other = make_phantom(5, "covid19"), make_phantom(5, "covid19"), make_phantom(6, "covid19")
    assert (first.pixels == again.pixels).all()
    assert first.facts == again.facts
    assert first.pixels.shape != other.pixels.shape or (first.pixels != other.pixels).any()


def test_masks_are_exact_in_kind(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        lungs, lesion = phantom.lung_mask > 0, phantom.lesion_mask > 0
        assert set(np.unique(phantom.lung_mask)) == {0, 255}
        assert 0.12 < lungs.mean() < 0.5
        assert not (lesion & ~lungs).any(), "lesions lie in the lungs"
        assert lesion.any() == (phantom.label != "control")
        middle = lungs.shape[1] // 2
        assert lungs[:, :middle].any()
        assert lungs[:, middle:].any()


def test_lungs_are_dark_and_lesions_brighter_than_the_lung_around(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        lungs, lesion = phantom.lung_mask > 0, phantom.lesion_mask > 0
        assert phantom.pixels[lungs & ~lesion].mean() < phantom.pixels[~lungs].mean() - 40
    sick = [phantom for phantom in phantoms if phantom.label != "control"]
    assert len(sick) == 6
    for phantom in sick:
        lungs, lesion = phantom.lung_mask > 0, phantom.lesion_mask > 0
        assert phantom.pixels[lesion].mean() > phantom.pixels[lungs & ~lesion].mean() + 8


def test_patterns(phantoms: list[Phantom]) -> None:
    """Consolidation is in one lung, ground-glass in both."""
    for phantom in phantoms:
        middle = phantom.pixels.shape[1] // 2
        sides = sum(bool((part > 0).any()) for part in (phantom.lesion_mask[:, :middle], phantom.lesion_mask[:, middle:]))
        assert sides == {"control": 0, "non_covid_pneumonia": 1, "covid19": 2}[phantom.label]


def test_gallery_on_disk_is_a_manifest_like_any_other(phantom_manifest: Path) -> None:
    rows = read_manifest(phantom_manifest).rows
    assert {row.label for row in rows} == set(PHANTOM_LABELS)
    assert all(row.path.is_file() and (row.folder / row.fields["lung_mask_path"]).is_file() for row in rows)
    assert all("ynthetic" in row.fields["clinical_notes"] for row in rows)


def test_dicom_form_shows_the_same_picture(tmp_path: Path) -> None:
    phantom = make_phantom(3, "control")
    write_dicom(phantom, tmp_path / "p.dcm")
    read = read_radiograph(tmp_path / "p.dcm")
    assert read.format == "DICOM"
    assert np.abs(read.pixels.astype(int) - phantom.pixels).max() <= 1


@pytest.mark.parametrize("site", ["NORTH", "SOUTH"])
def test_every_phantom_says_that_it_is_synthetic(site: str) -> None:
    """The stamp is burnt in: the corner's brightest pixels stand out from what lies beneath."""
    phantom = next(p for p in (make_phantom(seed, "control") for seed in range(20)) if p.site.upper() == site)
    height, width = phantom.pixels.shape
    corner = phantom.pixels[height - 30 :, :170] if site == "NORTH" else phantom.pixels[height - 30 :, width - 170 :]
    assert corner.max() >= 230
    assert corner.min() <= 40
