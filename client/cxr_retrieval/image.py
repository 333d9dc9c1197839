"""From a file to the 256×256 uint8 radiograph on the wire: decode, check, map to 8 bits, letterbox.

The DICOM order is fixed by PS3.3 C.11 and PS3.4 N.2: Modality LUT, then VOI LUT or window, then inversion of
MONOCHROME1. Only pixels leave this module: no DICOM element travels further, so no patient data does.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

from cxr_retrieval.contract import IMAGE_SIZE
from cxr_retrieval.errors import ImageError

SUFFIXES: Final = frozenset({".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff"})
"""File name endings that a folder scan picks up (content, not name, decides how a file is read)."""

MIN_SIDE: Final = 64
"""Pixels; a smaller picture holds no lung texture."""
MAX_PIXELS: Final = 100_000_000
"""Pixels; about three times the largest detector in use, and a bound on what a hostile file can make us allocate."""
MAX_ASPECT: Final = 4.0

_PROJECTION_MODALITIES: Final = frozenset({"CR", "DX", "RG", "XA", "RF", "OT", "SC", ""})
_LATERAL_VIEWS: Final = frozenset({"LL", "RL", "LATERAL", "LLD", "RLD"})
_NEXT_STEP: Final = "give a frontal chest radiograph as DICOM, PNG, JPEG or TIFF"

Grey8 = NDArray[np.uint8]


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


@dataclass(frozen=True)
class Radiograph:
    """A decoded radiograph.

    Attributes:
        pixels: `[height, width]` uint8, 0 black to 255 white, bone bright (MONOCHROME2 sense).
        format: "DICOM", "PNG", "JPEG" or "TIFF".
        warnings: What a careful reader should know; empty for an ordinary file.
    """

    pixels: Grey8
    format: str
    warnings: tuple[str, ...] = ()
    patient_id: str | None = None


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
        radiograph = _read_dicom(data, name)
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


def _checked(radiograph: Radiograph, name: str) -> Radiograph:
    height, width = radiograph.pixels.shape
    if min(height, width) < MIN_SIDE:
        raise ImageError(
            f"{name}: too small for a radiograph",
            expected=f"at least {MIN_SIDE}×{MIN_SIDE} pixels",
            got=f"{width}×{height}",
            next_step=_NEXT_STEP,
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError(
            f"{name}: too narrow for a chest radiograph",
            expected=f"sides at most {MAX_ASPECT:g}:1",
            got=f"{width}×{height}",
            next_step=_NEXT_STEP,
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


def _to_8_bit(values: NDArray[np.generic], low: float, high: float) -> Grey8:
    """Maps [low, high] linearly to [0, 255], clipping."""
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255.0 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- PNG, JPEG, TIFF


def _read_raster(data: bytes, name: str) -> Radiograph:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, tighter limit follows
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF"))
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image this system reads", expected="DICOM, PNG, JPEG or TIFF", got=_describe(data), next_step=_NEXT_STEP
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise _truncated(name, error) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width}×{height} = {width * height / 1e6:.0f} million pixels")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageError(
            f"{name}: holds several pages", expected="one radiograph per file", got=f"{frames} pages", next_step="split the file"
        )
    kind = image.format or "image"
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise _truncated(name, error) from error
    return Radiograph(_grey8(upright, name), kind)


def _grey8(image: Image.Image, name: str) -> Grey8:
    """8-bit modes go through luma (ITU-R 601-2); deeper grey is stretched from its own minimum to its maximum,
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
        return _to_8_bit(values, float(values.min()), float(values.max()))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        flat = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image = Image.alpha_composite(flat, rgba)
    return np.asarray(image.convert("L"))


def _too_large(name: str, got: str) -> ImageError:
    return ImageError(
        f"{name}: too large",
        expected=f"at most {MAX_PIXELS // 1_000_000} million pixels",
        got=got,
        next_step="scale the image down; no detector is this large",
    )


def _truncated(name: str, error: Exception) -> ImageError:
    return ImageError(
        f"{name}: the file is damaged", expected="a complete image", got=str(error), next_step="copy or export the file again"
    )


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


# ------------------------------------------------------------------------------------------------------- DICOM


def _read_dicom(data: bytes, name: str) -> Radiograph:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(data), force=data[128:132] != b"DICM")
            return _render_dicom(dataset, name)
    except ImageError:
        raise
    except (InvalidDicomError, EOFError, OSError) as error:
        raise _truncated(name, error) from error
    except Exception as error:  # decoders raise anything on a damaged file, and one file must not end a batch
        raise ImageError(
            f"{name}: the DICOM pixel data cannot be decoded",
            expected="a complete image in a supported transfer syntax",
            got=" ".join(str(error).split())[:300],
            next_step="export the image again, uncompressed if need be",
        ) from error


def _render_dicom(dataset: pydicom.Dataset, name: str) -> Radiograph:
    notes: list[str] = []
    if "PixelData" not in dataset:
        raise ImageError(
            f"{name}: the DICOM file holds no pixels",
            expected="an image object",
            got=str(dataset.get("Modality", "no Modality")),
            next_step=_NEXT_STEP,
        )
    modality = str(dataset.get("Modality", ""))
    if modality not in _PROJECTION_MODALITIES:
        raise ImageError(f"{name}: not a projection radiograph", expected="modality CR or DX", got=modality, next_step=_NEXT_STEP)
    view = str(dataset.get("ViewPosition", "") or "").upper()
    if view in _LATERAL_VIEWS:
        raise ImageError(f"{name}: not a frontal view", expected="view position PA or AP", got=view, next_step=_NEXT_STEP)
    body_part = str(dataset.get("BodyPartExamined", "") or "").upper()
    if body_part and not any(word in body_part for word in ("CHEST", "THORAX", "LUNG")):
        notes.append(f"DICOM says the body part is {body_part}, not CHEST")
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames > 1:
        raise ImageError(
            f"{name}: a multi-frame DICOM", expected="one radiograph per file", got=f"{frames} frames", next_step="export a single frame"
        )
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows * columns > MAX_PIXELS:
        raise _too_large(name, f"{columns}×{rows} = {rows * columns / 1e6:.0f} million pixels")
    photometric = str(dataset.PhotometricInterpretation)
    stored: NDArray[np.generic] = dataset.pixel_array
    if photometric == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
    if stored.ndim == 3:  # pydicom has already turned YBR into RGB
        bits = 8 * stored.dtype.itemsize
        rgb = _to_8_bit(stored, 0, 2**bits - 1)
        return Radiograph(np.asarray(Image.fromarray(rgb).convert("L")), "DICOM", tuple(notes))
    return Radiograph(_monochrome(stored, dataset, photometric), "DICOM", tuple(notes))


def _monochrome(stored: NDArray[np.generic], dataset: pydicom.Dataset, photometric: str) -> Grey8:
    """PS3.3 C.11.1 (Modality LUT), C.11.2 (VOI LUT, window), C.7.6.3.1.2 (photometric interpretation).

    Without a VOI the range of the values themselves is shown, leaving out Pixel Padding (C.7.5.1.1.2).
    """
    values = apply_modality_lut(stored, dataset)
    if "VOILUTSequence" in dataset:
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        grey = _to_8_bit(apply_voi_lut(values, dataset), 0, 2**bits - 1)
    elif "WindowCenter" in dataset and "WindowWidth" in dataset:
        low, high = apply_voi_lut(np.array([-1e12, 1e12]), dataset)  # the window's own output range
        grey = _to_8_bit(apply_voi_lut(values, dataset), float(low), float(high))
    else:
        shown = values
        if "PixelPaddingValue" in dataset:
            kept = values[stored != dataset.PixelPaddingValue]
            shown = kept if kept.size else values
        grey = _to_8_bit(values, float(shown.min()), float(shown.max()))
    return np.asarray(255 - grey, np.uint8) if photometric == "MONOCHROME1" else grey
