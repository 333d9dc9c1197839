"""A file of any kind → its picture in 8-bit grey, or why it cannot be a frontal chest radiograph."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.dicom import patient_and_day, read_dicom
from cxr_retrieval.radiograph.grey import NEXT_STEP, Radiograph
from cxr_retrieval.radiograph.raster import read_raster

MIN_SIDE: Final = 64
"""Pixels; a smaller picture holds no lung texture."""
MAX_ASPECT: Final = 4.0


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
    if _is_dicom(data):
        radiograph = read_dicom(data, name)
    else:
        radiograph = read_raster(data, name)
    return _checked(radiograph, name)


def read_patient_and_day(data: bytes) -> tuple[str | None, str | None]:
    """DICOM's Patient ID and Study Date, without decoding the picture; None of a file that has none, or that cannot be read."""
    return patient_and_day(data) if _is_dicom(data) else (None, None)


def _is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM" or data[:2] in (b"\x08\x00", b"\x02\x00")


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
