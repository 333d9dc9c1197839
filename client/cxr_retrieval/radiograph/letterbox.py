"""The 256×256 square that goes over the wire: any film, its shape kept, centred on black."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_retrieval.contract import IMAGE_SIZE
from cxr_retrieval.radiograph.grey import Grey8


@dataclass(frozen=True)
class Letterbox:
    """Where the original image lies inside the square: `scale` wire pixels per original pixel, offsets in wire pixels."""

    scale: float
    left: int
    top: int
    width: int
    height: int

    def crop(self, square: NDArray[np.generic]) -> NDArray[np.generic]:
        """Cuts the image area out of a `[..., 256, 256]` array made for the square."""
        return square[..., self.top : self.top + self.height, self.left : self.left + self.width]


def letterbox(pixels: Grey8, size: int = IMAGE_SIZE) -> tuple[Grey8, Letterbox]:
    """Scales the longer side to `size` with anti-aliasing, keeps the aspect ratio, centres on black.

    Args:
        pixels: `[height, width]` uint8.

    Returns:
        `[size, size]` uint8 and where the image lies in it.
    """
    height, width = pixels.shape
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    resized = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BILINEAR, reducing_gap=3.0))
    box = Letterbox(scale, (size - new_width) // 2, (size - new_height) // 2, new_width, new_height)
    square = np.zeros((size, size), np.uint8)
    square[box.top : box.top + new_height, box.left : box.left + new_width] = resized
    return square, box


def pixel_digest(square: Grey8) -> str:
    """SHA-256 (hex) of `[256, 256]` uint8: what tells whether two files show the networks one picture."""
    return hashlib.sha256(np.ascontiguousarray(square).tobytes()).hexdigest()
