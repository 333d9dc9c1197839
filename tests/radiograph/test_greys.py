"""A film's own grey values for a viewer: what the window of the film makes of them is what everything else sees of the film."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.grey import Own, Radiograph
from cxr_retrieval.radiograph.greys import Greys, greys_of
from cxr_retrieval.radiograph.phantoms import make_phantom, write_dicom
from cxr_retrieval.radiograph.reading import read_radiograph


def shown(greys: Greys) -> np.ndarray[Any, Any]:
    """As the page draws it (`shade` in film.js)."""
    own = greys.intercept + greys.slope * greys.stored.astype(np.float64)
    grey = np.clip(np.rint(255 * (own - greys.low) / (greys.high - greys.low)), 0, 255)
    return 255 - grey if greys.inverted else grey


def dicom(path: Path, **elements: Any) -> Path:
    """A phantom of 12 bits, MONOCHROME1, window 2048/4096, with other elements."""
    write_dicom(make_phantom(21, "control"), path)
    dataset = pydicom.dcmread(path)
    for name, value in elements.items():
        if name.startswith("PixelPadding"):
            dataset.add_new(name, "US", value)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)
    return path


@pytest.mark.parametrize(
    "elements",
    [
        {},
        {"PhotometricInterpretation": "MONOCHROME2"},
        {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 800, "WindowWidth": 2000},
        {"RescaleSlope": 0.37, "RescaleIntercept": 5.5, "WindowCenter": 700, "WindowWidth": 1500},
        {"VOILUTFunction": "SIGMOID"},
        {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 100},
        {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 4095, "PhotometricInterpretation": "MONOCHROME2"},
        {"PixelSpacing": [0.2, 0.15]},
    ],
)
def test_its_own_window_shows_the_film_as_it_is_read(elements: dict[str, Any], tmp_path: Path, reader: FilmReader) -> None:
    path = dicom(tmp_path / "film.dcm", **elements)
    greys, pixels = reader.greys(path).result(), read_radiograph(path).pixels
    assert greys.stored.shape == pixels.shape
    apart = np.abs(shown(greys) - pixels)
    assert apart.max() <= (1 if "PixelSpacing" not in elements else 4), "resampled before or after the window"
    assert (apart > 0).mean() < 0.02 or "PixelSpacing" in elements


def test_values_of_a_detector_are_kept_exactly(tmp_path: Path, reader: FilmReader) -> None:
    path = dicom(tmp_path / "film.dcm", RescaleSlope=1, RescaleIntercept=-1024)
    stored = pydicom.dcmread(path).pixel_array.astype(int)
    greys = reader.greys(path).result()
    assert greys.slope == 1
    assert (greys.intercept + greys.stored.astype(int) == stored - 1024).all()
    assert (greys.low, greys.high, greys.inverted, greys.shrunk) == (2048 - 0.5 - 4095 / 2, 2048 - 0.5 + 4095 / 2, True, 1)


def test_a_picture_of_16_bits_is_windowed_over_its_range(tmp_path: Path, reader: FilmReader) -> None:
    values = (make_phantom(3, "covid19").pixels.astype(np.uint16) * 13) + 500
    Image.fromarray(values).save(tmp_path / "film.png")
    greys = reader.greys(tmp_path / "film.png").result()
    assert (greys.intercept + greys.stored.astype(int) == values).all()
    assert greys.low >= 500


def test_messages_name_a_film_as_it_is_called(tmp_path: Path, reader: FilmReader) -> None:
    (tmp_path / "Doe_John.png").write_bytes(b"no picture")
    for asked in (reader.greys, reader.submit):
        with pytest.raises(Exception, match=r"^this file: not an image") as refused:
            asked(tmp_path / "Doe_John.png", None, "this file").result()
        assert "Doe" not in str(refused.value)


@given(st.integers(64, 200), st.integers(64, 200), st.integers(1000, 20_000))
def test_a_large_film_is_averaged_over_whole_blocks(height: int, width: int, most: int) -> None:
    values = np.random.default_rng(height * width).integers(100, 4000, (height, width)).astype(np.uint16)
    greys = greys_of(Radiograph(np.zeros((height, width), np.uint8), Own(values, 0, 4095), "PNG"), most)
    assert greys.shrunk == 1 or height * width > most
    assert greys.stored.size <= most * 1.2
    block = values[: greys.shrunk, : greys.shrunk].mean()
    assert greys.intercept + greys.slope * float(greys.stored[0, 0]) == pytest.approx(block, abs=0.51)
