"""A film's own grey values as a viewer wants them: 16 bits each, square pixels, and the window they came with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_retrieval.radiograph.grey import Radiograph

MOST_PIXELS: Final = 16_000_000
"""Of a film as it is shown; a detector of 43 × 43 cm at 0.1 mm has 18 million. What has more is averaged over blocks."""
_LEVELS: Final = 65_535


@dataclass(frozen=True)
class Greys:
    """A film's own value is `intercept + slope × stored`.

    Attributes:
        stored: `[height, width]` uint16.
        low: Own value that is black as the film is shown, and `high`: that is white; the other way round if `inverted`.
        shrunk: So many of the film's pixels, along each side, are one of these.
    """

    stored: NDArray[np.uint16]
    intercept: float
    slope: float
    low: float
    high: float
    inverted: bool
    shrunk: int


def greys_of(radiograph: Radiograph, most: int = MOST_PIXELS) -> Greys:
    """Of the same shape as `radiograph.pixels`, or smaller by a whole factor if that has more pixels than `most`.

    Whole numbers stay what they are as long as they span 16 bits; others are rounded to one of 65,536 levels. Padding takes the value at
    the dark end.
    """
    own, (height, width) = radiograph.own, radiograph.pixels.shape
    values, padding = own.values, own.padding
    exposed = values if padding is None else values[~padding]
    least, greatest = float(exposed.min()), float(exposed.max())
    whole = greatest - least <= _LEVELS and (values.dtype.kind in "iu" or bool((exposed == np.rint(exposed)).all()))
    slope = 1.0 if whole or greatest == least else (greatest - least) / _LEVELS
    shrunk = math.ceil(math.sqrt(height * width / most)) if height * width > most else 1
    if values.shape != (height, width) or shrunk > 1:
        values = _resized(values.astype(np.float32), (width, height), shrunk)
        padding = None if padding is None else _resized(padding.astype(np.float32), (width, height), shrunk) > 0.5
    stored = np.clip(np.rint((values.astype(np.float32) - np.float32(least)) / np.float32(slope)), 0, _LEVELS).astype(np.uint16)
    if padding is not None:
        stored[padding] = round((greatest - least) / slope) if own.inverted else 0
    return Greys(stored, least, slope, own.low, own.high, own.inverted, shrunk)


def _resized(values: NDArray[Any], size: tuple[int, int], shrunk: int) -> NDArray[Any]:
    image = Image.fromarray(values)
    image = image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image.reduce(shrunk) if shrunk > 1 else image)
