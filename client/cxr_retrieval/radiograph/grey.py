"""What a decoded radiograph is, and how values of any depth become its 8 bits of grey."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.errors import ImageError

MAX_PIXELS: Final = 100_000_000
"""Pixels; about three times the largest detector in use, and a bound on what a hostile file can make us allocate."""
NEXT_STEP: Final = "give a frontal chest radiograph as DICOM, PNG, JPEG or TIFF"
LEFT_OUT: Final = 0.001
"""Share of the pixels at either end that a range may leave out: a dead or hot pixel, or line, is less; a letter of lead is more."""
_LOOKED_AT: Final = 1 << 20
"""Pixels, evenly taken, that quantiles are found from; at most twice as many."""

Grey8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Own:
    """A film's own grey values and how they are shown: `low` black and `high` white, in proportion between, or inverted.

    Attributes:
        values: `[height, width]` of any depth, as they are before the window; of a film that is shown through a table or a curve, after it.
        inverted: `low` is white and `high` black.
        padding: Where nothing was exposed, shown black whatever the values.
    """

    values: NDArray[Any]
    low: float
    high: float
    inverted: bool = False
    padding: NDArray[np.bool_] | None = None

    def grey(self) -> Grey8:
        """As it is shown, `[height, width]`."""
        grey = to_8_bit(self.values, self.low, self.high)
        if self.inverted:
            grey = np.asarray(255 - grey, np.uint8)
        return grey if self.padding is None else np.where(self.padding, np.uint8(0), grey)


@dataclass(frozen=True)
class Radiograph:
    """A decoded radiograph.

    Attributes:
        pixels: `[height, width]` uint8, 0 black to 255 white, bone bright (MONOCHROME2 sense), pixels square.
        own: What `pixels` shows, in the film's own values; of another height or width where its pixels are not square.
        format: "DICOM", "PNG", "JPEG" or "TIFF".
        warnings: What a careful reader should know; empty for an ordinary file.
        patient_id: DICOM's Patient ID (0010,0020), if there is one. It serves to leave the patient's own films out of a vote, and
            leaves this computer for no other purpose and no other place.
    """

    pixels: Grey8
    own: Own
    format: str
    warnings: tuple[str, ...] = ()
    patient_id: str | None = None


def to_8_bit(values: NDArray[np.generic], low: float, high: float) -> Grey8:
    """Maps [low, high] linearly to [0, 255], clipping; all 0 where there is no range."""
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255.0 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def shown_range(values: NDArray[np.generic], padding: NDArray[np.bool_] | None = None) -> tuple[float, float]:
    """From where to where values that bring no window are shown: all but `LEFT_OUT` at either end, padding apart.

    One hot pixel of 65535 over a film of 0 to 3000 would otherwise leave it 12 of 255 levels. Where nothing but the ends varies, all.
    """
    low, high = np.quantile(_looked_at(values, padding).astype(np.float64), [LEFT_OUT, 1 - LEFT_OUT], method="nearest")
    if low < high:
        return float(low), float(high)
    shown = values if padding is None else values[~padding]
    return float(shown.min()), float(shown.max())


def varies(values: NDArray[np.generic], low: float, high: float, padding: NDArray[np.bool_] | None = None) -> bool:
    """Whether more than `LEFT_OUT` of the pixels, padding apart, differ from the most frequent grey, shown from `low` to `high`."""
    counts = np.bincount(to_8_bit(_looked_at(values, padding), low, high))
    return bool(counts.sum() - counts.max() > LEFT_OUT * counts.sum())


def _looked_at(values: NDArray[np.generic], padding: NDArray[np.bool_] | None) -> NDArray[np.generic]:
    """Every k-th pixel that is no padding. k and the width have no common divisor: else every row would give the same columns, and
    one hot column, where it is among them, k times its share.
    """
    step = max(1, values.size // _LOOKED_AT)
    while math.gcd(step, values.shape[-1]) > 1:
        step += 1
    seen = values.ravel()[::step]
    if padding is not None:
        seen = seen[~padding.ravel()[::step]]
        if not seen.size:
            seen = values[~padding]
    return seen


def too_large(name: str, got: str) -> ImageError:
    """A picture of more than `MAX_PIXELS`."""
    return ImageError(
        f"{name}: too large",
        expected=f"at most {MAX_PIXELS // 1_000_000} million pixels",
        got=got,
        next_step="scale the image down; no detector is this large",
    )


def truncated(name: str, error: Exception) -> ImageError:
    """A file that ends too early, or whose parts do not fit."""
    return ImageError(
        f"{name}: the file is damaged", expected="a complete image", got=str(error), next_step="copy or export the file again"
    )
