"""A DICOM radiograph: how its stored values become grey.

The order is fixed by PS3.3 C.11 and PS3.4 N.2: Modality LUT, then VOI LUT or window, then inversion. Of all elements only the pixels
and the Patient ID leave this module, for who answers an archive also those of a `Header`; messages repeat no words but the standard's own.
"""

from __future__ import annotations

import io
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.elements import first_number, named, numbers, text, texts
from cxr_retrieval.radiograph.grey import MAX_PIXELS, Grey8, Own, Radiograph, shown_range, to_8_bit, truncated, varies
from cxr_retrieval.radiograph.header import FORMS, REQUIRED, Header
from cxr_retrieval.radiograph.refused import refuse_what_is_no_frontal_film
from cxr_retrieval.radiograph.syntaxes import inflated, stored_values, transfer_syntax

_MAX_PIXEL_ASPECT: Final = 4.0
_SQUARE_ENOUGH: Final = 0.01


def read_dicom(data: bytes, name: str) -> Radiograph:
    """Decodes a DICOM file, with or without preamble.

    Raises:
        ImageError: It cannot be read, or is no frontal projection radiograph of a single frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(inflated(data, name)), force=data[128:132] != b"DICM")
            notes = refuse_what_is_no_frontal_film(dataset, name)
            stored = stored_values(dataset, transfer_syntax(dataset, name), name)
            own = _own(stored, dataset, notes)
            pixels = _square_pixels(own.grey(), dataset, notes)
    except ImageError:
        raise
    except (InvalidDicomError, EOFError, OSError) as error:
        raise truncated(name, error) from error
    except Exception as error:  # decoders raise anything on a damaged file, and one file must not end a batch
        raise ImageError(
            f"{name}: the DICOM pixel data cannot be decoded",
            expected="a complete image in a supported transfer syntax",
            got=without_values(error),
            next_step="export the image again, uncompressed if need be",
        ) from error
    return Radiograph(pixels, own, "DICOM", tuple(notes), _patient_id(dataset))


def patient_and_day(data: bytes) -> tuple[str | None, str | None]:
    """The Patient ID that `read_dicom` finds, and the Study Date (0008,0020), without the pixels; None where there is none or the file is
    damaged before it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain, force = io.BytesIO(inflated(data, "")), data[128:132] != b"DICM"
            dataset = pydicom.dcmread(plain, stop_before_pixels=True, force=force, specific_tags=["PatientID", "StudyDate"])
            patient, day = _patient_id(dataset), None
            with suppress(Exception):  # a day that is none costs nobody the patient
                day = text(dataset, "StudyDate") or None
            return patient, day
    except Exception:  # what is wrong with it, decoding will say
        return None, None


def read_header(data: bytes, name: str) -> Header:
    """What the file says of itself, without the pixels; elements that are not as their VR has them count as absent.

    Raises:
        ImageError: It cannot be read, or lacks one of `header.REQUIRED`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = io.BytesIO(inflated(data, name))
            tags = ["SpecificCharacterSet", *FORMS]
            dataset = pydicom.dcmread(file, stop_before_pixels=True, force=data[128:132] != b"DICM", specific_tags=tags)
            said = {keyword: text(dataset, keyword) for keyword in FORMS}
    except ImageError:
        raise
    except Exception as error:  # whatever pydicom raises on a damaged file
        raise truncated(name, error) from error
    elements = {keyword: value for keyword, value in said.items() if FORMS[keyword].fullmatch(value)}
    for keyword in REQUIRED:
        if keyword not in elements:
            raise ImageError(
                f"{name}: no archive could file this instance",
                expected=named(keyword),
                got="none that is a UID",
                next_step="correct what made it; `dciodvfy` shows what else is wrong",
            )
    return Header(elements)


def _patient_id(dataset: pydicom.Dataset) -> str | None:
    return "\\".join(texts(dataset, "PatientID")) or None


def without_values(error: Exception) -> str:
    """What pydicom or a decoder says; what it quotes may be anything that somebody typed."""
    said = re.sub(r"""'[^']*'|"[^"]*"|b'.*'""", "'…'", " ".join(str(error).split()))
    return f"{type(error).__name__}: {said[:300]}"


def _own(stored: NDArray[Any], dataset: pydicom.Dataset, notes: list[str]) -> Own:
    photometric = str(dataset.PhotometricInterpretation)
    bits = int(dataset.BitsStored)
    if photometric == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        bits = 8 * stored.dtype.itemsize
    if stored.ndim == 3:  # pydicom has already turned YBR into RGB
        return Own(np.asarray(Image.fromarray(to_8_bit(stored, 0, 2**bits - 1)).convert("L")), 0, 255)
    padding = _padding(stored, dataset)
    if padding is not None and padding.all():
        notes.append("DICOM says every pixel is padding; that is not believed")
        padding = None
    values, low, high = _shown(stored, padding, dataset, notes)
    return Own(values, low, high, _is_inverted(dataset, photometric, notes), padding)


def _shown(
    stored: NDArray[Any], padding: NDArray[np.bool_] | None, dataset: pydicom.Dataset, notes: list[str]
) -> tuple[NDArray[Any], float, float]:
    """Modality LUT (C.11.1), then VOI LUT or the first window (C.11.2); without one that shows anything, the range of the values.

    Returns:
        Values, and from where to where they are shown.
    """
    values = _modality_values(stored, dataset)
    for shown_by in (_through_voi_lut, _windowed):
        shown = shown_by(values, dataset)
        if shown is not None and varies(*shown, padding):
            return shown
    if dataset.get("VOILUTSequence") or (numbers(dataset, "WindowCenter") and numbers(dataset, "WindowWidth")):
        notes.append("DICOM's window or VOI LUT shows nothing of this film; it is shown over the range of its values")
    return values, *shown_range(values, padding)


def _modality_values(stored: NDArray[Any], dataset: pydicom.Dataset) -> NDArray[Any]:
    """C.11.1. Elements that are there but empty, as after anonymisation, or no numbers, change nothing."""
    table = _table(dataset, "ModalityLUTSequence", stored)
    if table is not None:
        return _looked_up(stored, table)
    slope, intercept = first_number(dataset, "RescaleSlope") or 1.0, first_number(dataset, "RescaleIntercept") or 0.0
    if (slope, intercept) == (1.0, 0.0):
        return stored
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _through_voi_lut(values: NDArray[Any], dataset: pydicom.Dataset) -> tuple[NDArray[Any], float, float] | None:
    """C.11.2.1.1, from 0 to the most that the descriptor's bits hold; None where there is no table.

    A descriptor that states fewer bits than its entries have, or at least three more, which would leave the film black, is not believed.
    """
    table = _table(dataset, "VOILUTSequence", values)
    if table is None:
        return None
    needed = max(8, int(table.entries.max()).bit_length())
    return _looked_up(values, table), 0, 2 ** (table.bits if needed <= table.bits < needed + 3 else needed) - 1


@dataclass(frozen=True)
class _Table:
    """A LUT: `entries[v - first]` for a value v, the first or last entry for values beside it; `bits` as the descriptor states them."""

    entries: NDArray[np.uint16]
    first: int
    bits: int


def _table(dataset: pydicom.Dataset, sequence: str, values: NDArray[Any]) -> _Table | None:
    """The LUT of a sequence's first item (C.11.1.1, C.11.2.1.1); None where there is none or it lacks its parts.

    pydicom's own functions (3.0) read 8-bit tables of more than 256 entries wrongly, and 12-bit Modality LUTs not at all.
    """
    item = next(iter(dataset.get(sequence) or ()), None)
    if item is None:
        return None
    descriptor = numbers(item, "LUTDescriptor")
    data: Any = item.get("LUTData")
    if len(descriptor) != 3 or not np.isfinite(descriptor).all() or not data:
        return None
    count, first, bits = (int(number) for number in descriptor)
    count = (count & 0xFFFF) or 2**16
    if isinstance(data, bytes):
        order = ">" if dataset.original_encoding[1] is False else "<"
        packed = len(data) < 2 * count  # a byte for each entry, as some write 8-bit tables
        entries = np.frombuffer(data, np.uint8) if packed else np.frombuffer(data[: 2 * count], f"{order}u2")
    else:
        entries = np.atleast_1d(np.asarray(data, np.int64)) & 0xFFFF
    return _Table(entries[:count].astype(np.uint16), _as_signed(first, values), bits)


def _looked_up(values: NDArray[Any], table: _Table) -> NDArray[np.uint16]:
    """Row by row: the indices of a whole large film would take eight bytes a pixel."""
    found = np.empty(values.shape, np.uint16)
    for row, into in zip(values, found, strict=True):
        into[...] = table.entries[np.clip(np.rint(row.astype(np.float64)) - table.first, 0, len(table.entries) - 1).astype(np.intp)]
    return found


def _windowed(values: NDArray[Any], dataset: pydicom.Dataset) -> tuple[NDArray[Any], float, float] | None:
    """C.11.2.1.2 LINEAR, C.11.2.1.3.1 SIGMOID, C.11.2.1.3.2 LINEAR_EXACT; None where there is no window.

    The first pair that is numbers counts. A LINEAR window of width 1, a usual placeholder, has but black and white: it counts as none.
    """
    pairs = zip(numbers(dataset, "WindowCenter"), numbers(dataset, "WindowWidth"), strict=False)
    centre, width = next((pair for pair in pairs if np.isfinite(pair).all()), (0.0, 0.0))
    function = text(dataset, "VOILUTFunction").upper()
    if width <= (0 if function in ("SIGMOID", "LINEAR_EXACT") else 1):
        return None
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values.astype(np.float32) - centre) / width, -80, 80))), 0, 1
    if function == "LINEAR_EXACT":
        return values, centre - width / 2, centre + width / 2
    return values, centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2


def _padding(stored: NDArray[Any], dataset: pydicom.Dataset) -> NDArray[np.bool_] | None:
    """Pixel Padding Value, or the range up to Pixel Padding Range Limit (C.7.5.1.1.2), in stored values; it is shown black."""
    value, limit = first_number(dataset, "PixelPaddingValue"), first_number(dataset, "PixelPaddingRangeLimit")
    if value is None:
        return None
    ends = (_as_signed(int(value), stored), _as_signed(int(value if limit is None else limit), stored))
    return (stored >= min(ends)) & (stored <= max(ends))


def _is_inverted(dataset: pydicom.Dataset, photometric: str, notes: list[str]) -> bool:
    """Photometric interpretation (C.7.6.3.1.2) and Presentation LUT Shape (C.7.6.1, C.8.11.3, C.11.6): inverted once or not at all.

    - MONOCHROME1 with INVERSE, or without a shape: inverted, once. The two say the same thing, as C.8.11.3 has it of DX images.
    - MONOCHROME2 with IDENTITY, or without a shape: as it is.
    - MONOCHROME2 with INVERSE: inverted; C.8.11.3 forbids the pair, and viewers that know the shape follow it.
    - MONOCHROME1 with IDENTITY: inverted; C.8.11.3 forbids the pair, and the element that every viewer knows decides.

    The pairs that contradict themselves are noted.
    """
    shape, negative = text(dataset, "PresentationLUTShape").upper(), photometric == "MONOCHROME1"
    if shape == ("IDENTITY" if negative else "INVERSE"):
        notes.append(f"DICOM contradicts itself on black and white ({photometric} with presentation shape {shape}); it is shown inverted")
    return negative or shape == "INVERSE"


def _square_pixels(grey: Grey8, dataset: pydicom.Dataset, notes: list[str]) -> Grey8:
    """Enlarges the axis along which pixels are farther apart, so that shapes are true (PS3.3 10.7.1.3, C.7.6.3.1.7)."""
    for element in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        between = numbers(dataset, element)
        if len(between) == 2 and np.isfinite(between).all() and min(between) > 0:
            break
    else:
        return grey
    aspect = between[0] / between[1]  # distance between rows, then between columns
    if not 1 / _MAX_PIXEL_ASPECT <= aspect <= _MAX_PIXEL_ASPECT:
        notes.append(f"DICOM says pixels are {aspect:.3g} times as high as wide; that is not believed")
        return grey
    if abs(aspect - 1) < _SQUARE_ENOUGH:
        return grey
    height, width = grey.shape
    taller, wider = (width, round(height * aspect)), (round(width / aspect), height)
    larger, smaller = (taller, wider) if aspect > 1 else (wider, taller)
    size = larger if larger[0] * larger[1] <= MAX_PIXELS else smaller
    return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))


def _as_signed(value: int, values: NDArray[Any]) -> int:
    """A value written as unsigned (US) though pixels are signed, as the signed one of the same 16 bits."""
    return value - 2**16 if values.dtype.kind == "i" and 2**15 <= value < 2**16 else value
