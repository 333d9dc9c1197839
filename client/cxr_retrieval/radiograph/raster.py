"""PNG, JPEG and TIFF → 8-bit grey."""

from __future__ import annotations

import io
import warnings
from typing import Final

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.grey import MAX_PIXELS, NEXT_STEP, Own, Radiograph, shown_range, too_large, truncated

_DARK: Final = 128
"""Grey that no pixel of a film in 16-bit colours reaches where its values have fewer than 16 bits."""


def read_raster(data: bytes, name: str) -> Radiograph:
    """Decodes a PNG, JPEG or TIFF of one page, turned as its EXIF orientation says.

    Raises:
        ImageError: None of these, damaged, of several pages, or larger than `MAX_PIXELS`.
    """
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
    if getattr(image, "is_animated", False):  # how many is not asked: Pillow would read a million of them
        raise ImageError(
            f"{name}: holds several pages", expected="one radiograph per file", got="more than one", next_step="split the file"
        )
    kind = image.format or "image"
    white_is_zero, reduced = _white_is_zero(image), _is_16_bit_colour(image)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise truncated(name, error) from error
    own = _own(upright, name, white_is_zero=white_is_zero)
    most = int(own.values.max())
    if reduced and 0 < most < _DARK:
        note = f"16-bit colours are read as 8 bits, of which this film fills {most.bit_length()}: save it as 16-bit grey"
        own = Own(own.values, *shown_range(own.values))
        return Radiograph(own.grey(), own, kind, (note,))
    return Radiograph(own.grey(), own, kind)


def _own(image: Image.Image, name: str, *, white_is_zero: bool) -> Own:
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
        return Own(values, *shown_range(values), inverted=white_is_zero)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        flat = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image = Image.alpha_composite(flat, rgba)
    return Own(np.asarray(image.convert("L")), 0, 255)


def _white_is_zero(image: Image.Image) -> bool:
    """TIFF 6.0, PhotometricInterpretation 0. Pillow turns such files of 8 bits and less itself, deeper ones not."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _is_16_bit_colour(image: ImageFile.ImageFile) -> bool:
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
