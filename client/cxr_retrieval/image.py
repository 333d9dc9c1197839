"""From a file to the 256×256 uint8 radiograph on the wire: decode, check, map to 8 bits, letterbox."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from cxr_retrieval.contract import IMAGE_SIZE
from cxr_retrieval.dicom import read_dicom
from cxr_retrieval.errors import ImageError
from cxr_retrieval.grey import MAX_PIXELS, NEXT_STEP, Grey8, Radiograph, shown_range, to_8_bit, too_large, truncated

SUFFIXES: Final = frozenset({".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff"})
"""File name endings that a folder scan picks up (content, not name, decides how a file is read)."""

MIN_SIDE: Final = 64
"""Pixels; a smaller picture holds no lung texture."""
MAX_ASPECT: Final = 4.0
_DARK: Final = 128
"""Grey that no pixel of a film in 16-bit colours reaches where its values have fewer than 16 bits."""


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


def read_radiograph(source: Path | bytes, name: str | None = None) -> Radiograph:
    """Decodes one file.

    Args:
        source: A path, or the file's bytes.
        name: What to call it in messages (default: the file's name).

    Raises:
        ImageError: It cannot be read, or cannot be a frontal chest radiograph.
    """
    if isinstance(source, Path):
        name = name or source.name
        try:
            data = source.read_bytes()
        except OSError as error:
            raise ImageError(
                f"{name}: cannot be read",
                expected="a readable file",
                got=error.strerror or str(error),
                next_step="check path and permissions",
            ) from error
    else:
        name, data = name or "image", source
    if not data:
        raise ImageError(f"{name}: the file is empty", expected="an image", got="0 bytes", next_step="copy the file again")
    if data[128:132] == b"DICM" or data[:2] in (b"\x08\x00", b"\x02\x00"):
        radiograph = read_dicom(data, name)
    else:
        radiograph = _read_raster(data, name)
    return _checked(radiograph, name)


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


def _checked(radiograph: Radiograph, name: str) -> Radiograph:
    height, width = radiograph.pixels.shape
    if min(height, width) < MIN_SIDE:
        raise ImageError(
            f"{name}: too small for a radiograph",
            expected=f"at least {MIN_SIDE}×{MIN_SIDE} pixels",
            got=f"{width}×{height}",
            next_step=NEXT_STEP,
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError(
            f"{name}: too narrow for a chest radiograph",
            expected=f"sides at most {MAX_ASPECT:g}:1",
            got=f"{width}×{height}",
            next_step=NEXT_STEP,
        )
    low, high = int(radiograph.pixels.min()), int(radiograph.pixels.max())
    if low == high:
        raise ImageError(
            f"{name}: the picture is blank",
            expected="a radiograph with contrast",
            got=f"every pixel {low}",
            next_step="check the export or window",
        )
    return radiograph


# ---------------------------------------------------------------------------------------------- PNG, JPEG, TIFF


def _read_raster(data: bytes, name: str) -> Radiograph:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, tighter limit follows
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF"))
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image this system reads", expected="DICOM, PNG, JPEG or TIFF", got=_describe(data), next_step=NEXT_STEP
        ) from error
    except Image.DecompressionBombError as error:
        raise too_large(name, str(error)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise truncated(name, error) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise too_large(name, f"{width}×{height} = {width * height / 1e6:.0f} million pixels")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageError(
            f"{name}: holds several pages", expected="one radiograph per file", got=f"{frames} pages", next_step="split the file"
        )
    kind = image.format or "image"
    white_is_zero, reduced = _white_is_zero(image), _is_16_bit_colour(image)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise truncated(name, error) from error
    grey = _grey8(upright, name, white_is_zero=white_is_zero)
    if reduced and 0 < int(grey.max()) < _DARK:
        note = f"16-bit colours are read as 8 bits, of which this film fills {int(grey.max()).bit_length()}: save it as 16-bit grey"
        return Radiograph(to_8_bit(grey, *shown_range(grey)), kind, (note,))
    return Radiograph(grey, kind)


def _grey8(image: Image.Image, name: str, *, white_is_zero: bool) -> Grey8:
    """8-bit modes go through luma (ITU-R 601-2); deeper grey is stretched over the range that its values take (`shown_range`),
    because such files hold 10 to 16 significant bits and do not say which.
    """
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(image).astype(np.float32)
        if not np.isfinite(values).all():
            raise ImageError(
                f"{name}: has pixels that are no numbers",
                expected="finite values",
                got="NaN or infinity",
                next_step="export the image again",
            )
        grey = to_8_bit(values, *shown_range(values))
        return np.asarray(255 - grey, np.uint8) if white_is_zero else grey
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        flat = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image = Image.alpha_composite(flat, rgba)
    return np.asarray(image.convert("L"))


def _white_is_zero(image: Image.Image) -> bool:
    """TIFF 6.0, PhotometricInterpretation 0. Pillow turns such files of 8 bits and less itself, deeper ones not."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _is_16_bit_colour(image: Image.Image) -> bool:
    """Pillow keeps the higher byte of such colours, and of grey with alpha: little where 12 bits lie in 16. Asked before it loads."""
    return image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile.args) for tile in image.tile)


def _describe(data: bytes) -> str:
    for magic, text in (
        (b"%PDF", "a PDF"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"\x1f\x8b", "a gzip archive"),
        (b"GIF8", "a GIF"),
        (b"BM", "a BMP"),
    ):
        if data.startswith(magic):
            return text
    return f"{len(data)} bytes beginning {data[:8].hex(' ')}"
