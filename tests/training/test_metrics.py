"""Measures against what can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cxr_retrieval_training.segmentation.metrics import (
    centre_prior,
    extent_correlation,
    hausdorff_95,
    pixel_auroc,
    pointing_hit,
    source_probe,
)


def square(top: int, left: int, side: int = 20) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    mask = np.zeros((64, 64), np.bool_)
    mask[top : top + side, left : left + side] = True
    return mask


def test_hausdorff_of_shifted_squares() -> None:
    assert hausdorff_95(square(10, 10), square(10, 10)) == 0
    assert hausdorff_95(square(10, 10), square(10, 17)) == 7
    assert hausdorff_95(square(10, 10), square(10, 17)) == hausdorff_95(square(10, 17), square(10, 10))
    nothing = np.zeros((64, 64), np.bool_)
    assert hausdorff_95(square(10, 10), nothing) == pytest.approx(64 * 2**0.5)
    assert hausdorff_95(nothing, nothing) == 0


def test_one_stray_pixel_does_not_count_at_the_95th_percentile() -> None:
    stray = square(10, 10)
    stray[60, 60] = True
    assert hausdorff_95(stray, square(10, 10)) < 1


def test_pointing_game() -> None:
    lesions, attention = square(30, 30), np.zeros((64, 64))
    attention[35, 35] = 1
    assert pointing_hit(attention, lesions) == 1
    attention[0, 0] = 1
    assert pointing_hit(attention, lesions) == 0.5, "a tie counts by halves"
    attention[0, 0] = 2
    assert pointing_hit(attention, lesions) == 0


def test_pixel_auroc_looks_inside_the_lungs_only() -> None:
    inside, lesions = square(10, 10, 40), square(20, 20, 10)
    attention = lesions.astype(float)
    attention[:5] = 9.0
    assert pixel_auroc(attention, lesions, inside) == 1
    assert pixel_auroc(-attention, lesions, inside) == 0
    assert pixel_auroc(attention, inside, inside) is None


def test_attention_that_covers_what_lesions_cover() -> None:
    inside = np.stack([square(10, 10, 40)] * 12)
    lesions = np.stack([square(12, 12, 3 + film) for film in range(12)])
    patients = np.arange(12)
    grows = extent_correlation(lesions.astype(float), lesions, inside, patients)
    assert grows["correlation"] == pytest.approx(1)
    assert grows["ci"] == pytest.approx([1, 1])
    assert extent_correlation(-lesions.astype(float), lesions, inside, patients)["correlation"] == pytest.approx(-1)
    outside = np.where(inside, 0.5, lesions.cumsum(axis=0).astype(float))
    assert np.isnan(extent_correlation(outside, lesions, inside, patients)["correlation"]), "what lies outside the lungs does not count"
    assert extent_correlation(lesions.astype(float), lesions, inside, patients // 3)["ci"] is None, "of four patients"


def test_centre_prior_peaks_in_the_middle_of_the_box() -> None:
    prior = centre_prior(square(10, 20, 21))
    assert np.unravel_index(int(prior.argmax()), prior.shape) == (20, 30)
    assert prior[0, 0] == 0
    assert centre_prior(np.zeros((8, 8), np.bool_)).max() == 0


def test_source_probe_finds_what_is_there_and_only_within_a_label() -> None:
    random = np.random.default_rng(0)
    labels = ["control"] * 100 + ["covid19"] * 100
    sources = ["north", "south"] * 50 + ["north"] * 100
    blind = [random.normal(size=(200, 5)).astype(np.float32) for _ in range(2)]
    telling = [part + 6 * np.array([[source == "north"] for source in sources], np.float32) for part in blind]
    unknown, known = (source_probe((train, labels, sources), (test, labels, sources)) for train, test in (blind, telling))
    assert set(known) == {"control"}, "covid19 has one source: nothing to tell"
    assert known["control"]["balanced_accuracy"] > 0.95
    assert unknown["control"]["balanced_accuracy"] == pytest.approx(0.5, abs=0.15)
    assert known["control"]["chance"] == 0.5
