"""Pictures as PNG bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_retrieval.radiograph.grey import Grey8
from cxr_retrieval.radiograph.letterbox import Letterbox


@dataclass(frozen=True)
class Explained:
    """What lies over a film, without the bars of its letterbox: `[height, width]` uint8 each, so that it fits the film when stretched.

    Attributes:
        lungs: 0 or 255.
        attention: 0…255 for 0…1 (`contract.ATTENTION_MAP`).
    """

    lungs: Grey8
    attention: Grey8

    @staticmethod
    def of(mask: NDArray[np.uint8], attention: NDArray[np.float32], box: Letterbox) -> Explained:
        """From LUNG_MASK and ATTENTION_MAP `[256, 256]`."""
        shares = np.rint(255 * np.clip(np.asarray(box.crop(attention), np.float32), 0, 1))
        return Explained(np.array(box.crop(mask), np.uint8), shares.astype(np.uint8))

    def png(self) -> bytes:
        """Both in one picture: red is attention, green lungs."""
        return png(np.stack([self.attention, self.lungs, np.zeros_like(self.lungs)], axis=-1))


def png(pixels: Grey8) -> bytes:
    """`[height, width]` or `[height, width, 3]`, packed lightly: it seldom goes farther than this machine."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
