"""A DICOM radiograph: which are refused, and how stored values become grey.

The order is fixed by PS3.3 C.11 and PS3.4 N.2: Modality LUT, then VOI LUT or window, then inversion. Of all elements only the pixels
and the Patient ID leave this module, and messages name view words alone.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.grey import MAX_PIXELS, NEXT_STEP, Grey8, Radiograph, shown_range, to_8_bit, too_large, truncated, varies

_PROJECTION_MODALITIES: Final = frozenset({"CR", "DX", "RG", "XA", "RF", "OT", "SC", ""})
_OTHER_VIEW_CODES: Final = frozenset(
    {
        ("SCT", "399067008"),  # lateral
        ("SCT", "399173006"),  # left lateral
        ("SCT", "399198007"),  # right lateral
        ("SCT", "399352003"),  # lateral-medial
        ("SCT", "399260004"),  # medial-lateral
        ("SCT", "30730003"),  # sagittal
        ("SCT", "399182000"),  # oblique
        ("SCT", "399184004"),  # left oblique
        ("SCT", "399236003"),  # right oblique
        ("SCT", "399135007"),  # left anterior oblique
        ("SCT", "399356000"),  # right anterior oblique
        ("SCT", "399006002"),  # left posterior oblique
        ("SCT", "399038007"),  # right posterior oblique
        ("SRT", "R-102CD"),
        ("SRT", "R-10236"),
        ("SRT", "R-10232"),
        ("SRT", "R-10228"),
        ("SRT", "R-10224"),
        ("SRT", "G-A145"),
        ("SRT", "R-102C1"),
        ("SRT", "R-10238"),
        ("SRT", "R-10234"),
        ("SRT", "R-10220"),
        ("SRT", "R-40985"),
        ("SRT", "R-10212"),
        ("SRT", "R-10210"),
    }
)
"""PS3.16 CID 4010 "DX View", in SNOMED CT and in the older SNOMED-RT codes of the same concepts, which SNM3 named, too."""
_DESCRIPTIONS: Final = ("SeriesDescription", "ProtocolName", "AcquisitionDeviceProcessingDescription")
_FRONTAL_WORDS: Final = frozenset(
    {"PA", "AP", "FRONTAL", "FRONTALE", "DV", "VD", "FACE", "FRENTE", "POSTEROANTERIOR", "ANTEROPOSTERIOR", "POSTERO", "ANTERO"}
)
_LATERAL_WORDS: Final = frozenset(
    {"LAT", "LLAT", "RLAT", "LATL", "LATR", "LATERAL", "LATERALE", "LATÉRAL", "LATÉRALE", "LATERO", "LATEROLATERAL", "LATEROLATERALE"}
    | {"SEITL", "SEITLICH", "PROFIL", "PERFIL"}
)
_LATERAL_VIEWS: Final = _LATERAL_WORDS | {"LL", "RL"}
_TURNED_VIEWS: Final = frozenset(
    {"LLD", "RLD", "DECUB", "DECUBITUS", "LLO", "RLO", "LAO", "RAO", "LPO", "RPO", "OBL", "OBLIQUE"}  # even where PA or AP stands beside
)
"""What scanners and people write, in capitals. LL and RL mean a view only in View Position, whose defined terms they are (C.8.7.1)."""
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
            dataset = pydicom.dcmread(io.BytesIO(data), force=data[128:132] != b"DICM")
            notes = _refuse_what_is_no_frontal_film(dataset, name)
            pixels = _square_pixels(_rendered(dataset, name, notes), dataset, notes)
    except ImageError:
        raise
    except (InvalidDicomError, EOFError, OSError) as error:
        raise truncated(name, error) from error
    except Exception as error:  # decoders raise anything on a damaged file, and one file must not end a batch
        raise ImageError(
            f"{name}: the DICOM pixel data cannot be decoded",
            expected="a complete image in a supported transfer syntax",
            got=" ".join(str(error).split())[:300],
            next_step="export the image again, uncompressed if need be",
        ) from error
    return Radiograph(pixels, "DICOM", tuple(notes), "\\".join(_texts(dataset, "PatientID")) or None)


def _refuse_what_is_no_frontal_film(dataset: pydicom.Dataset, name: str) -> list[str]:
    """Returns what a careful reader should know of the file's own words."""
    if "PixelData" not in dataset:
        raise ImageError(
            f"{name}: the DICOM file holds no pixels",
            expected="an image object",
            got=_text(dataset, "Modality") or "no Modality",
            next_step=NEXT_STEP,
        )
    modality = _text(dataset, "Modality")
    if modality not in _PROJECTION_MODALITIES:
        raise ImageError(f"{name}: not a projection radiograph", expected="modality CR or DX", got=modality, next_step=NEXT_STEP)
    notes = _refuse_other_views(dataset, name)
    body_part = _text(dataset, "BodyPartExamined").upper()
    if body_part and not any(word in body_part for word in ("CHEST", "THORAX", "LUNG")):
        notes.append(f"DICOM says the body part is {body_part}, not CHEST")
    if _text(dataset, "BurnedInAnnotation").upper() == "YES":
        notes.append("DICOM says text is burned into the picture (0028,0301): it may name the patient")
    frames = int(_first_number(dataset, "NumberOfFrames") or 1)
    if frames == 1 and "NumberOfFrames" in dataset:
        del dataset.NumberOfFrames  # pydicom fails where it is blank
    if frames > 1:
        raise ImageError(
            f"{name}: a multi-frame DICOM", expected="one radiograph per file", got=f"{frames} frames", next_step="export a single frame"
        )
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows * columns > MAX_PIXELS:
        raise too_large(name, f"{columns}×{rows} = {rows * columns / 1e6:.0f} million pixels")
    return notes


def _refuse_other_views(dataset: pydicom.Dataset, name: str) -> list[str]:
    """View Position, View Code Sequence and Patient Orientation; the descriptions only where neither of the first two says frontal."""

    def refusal(element: str, got: str) -> ImageError:
        return ImageError(f"{name}: not a frontal view", expected="a PA or AP view", got=f"{element} {got}", next_step=NEXT_STEP)

    view = _words(" ".join(_texts(dataset, "ViewPosition")))
    frontal = bool(view & _FRONTAL_WORDS)
    if view & _TURNED_VIEWS or (view & _LATERAL_VIEWS and not frontal):
        raise refusal("View Position (0018,5101)", " ".join(sorted(view & (_TURNED_VIEWS | _LATERAL_VIEWS))))
    for item in dataset.get("ViewCodeSequence") or ():
        scheme, code = _text(item, "CodingSchemeDesignator").upper(), _text(item, "CodeValue")
        if ("SRT" if scheme in ("SNM3", "99SDM") else scheme, code) in _OTHER_VIEW_CODES:
            raise refusal("View Code Sequence (0054,0220)", f"{code} ({scheme})")
        meaning = _words(_text(item, "CodeMeaning"))
        if meaning & (_LATERAL_WORDS | _TURNED_VIEWS):
            raise refusal("View Code Sequence (0054,0220)", " ".join(sorted(meaning & (_LATERAL_WORDS | _TURNED_VIEWS))))
        frontal = frontal or bool(meaning & _FRONTAL_WORDS)
    directions = [value.upper() for value in _texts(dataset, "PatientOrientation") if re.fullmatch("[ALRPHFalrphf]{1,3}", value)]
    axes = {next(axis for axis in ("AP", "LR", "HF") if direction[0] in axis) for direction in directions}
    if len(axes) == 2 and "AP" in axes:  # PS3.3 C.7.6.1.1.1: rows' and columns' direction; one alone, or "A\\P", is a view put there
        raise refusal("Patient Orientation (0020,0020)", "\\".join(directions))
    if view & _LATERAL_VIEWS:
        return ["View Position (0018,5101) names a lateral and a frontal view: is this the frontal one?"]
    return [] if frontal else _refuse_described_laterals(dataset, refusal)


def _refuse_described_laterals(dataset: pydicom.Dataset, refusal: Callable[[str, str], ImageError]) -> list[str]:
    """A description that speaks of a lateral view alone is believed, unless another speaks of a frontal view alone."""
    described = [(element, _words(_text(dataset, element))) for element in _DESCRIPTIONS]
    frontal = any(words & _FRONTAL_WORDS and not words & _LATERAL_WORDS for _, words in described)
    for element, words in described:
        if words & _LATERAL_WORDS and not words & _FRONTAL_WORDS and not frontal:
            raise refusal(element, " ".join(sorted(words & _LATERAL_WORDS)))
    if any(words & _LATERAL_WORDS for _, words in described):
        return ["DICOM's descriptions speak of a lateral and a frontal view: is this the frontal one?"]
    return []


def _rendered(dataset: pydicom.Dataset, name: str, notes: list[str]) -> Grey8:
    photometric = str(dataset.PhotometricInterpretation)
    stored: NDArray[np.generic] = dataset.pixel_array
    bits = int(dataset.BitsStored)
    if photometric == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        bits = 8 * stored.dtype.itemsize
    if stored.ndim == 3:  # pydicom has already turned YBR into RGB
        return np.asarray(Image.fromarray(to_8_bit(stored, 0, 2**bits - 1)).convert("L"))
    padding = _padding(stored, dataset)
    if padding is not None and padding.all():
        notes.append("DICOM says every pixel is padding; that is not believed")
        padding = None
    grey = _shown(stored, padding, dataset, notes)
    if _is_inverted(dataset, photometric, notes):
        grey = np.asarray(255 - grey, np.uint8)
    return grey if padding is None else np.where(padding, np.uint8(0), grey)


def _shown(stored: NDArray[Any], padding: NDArray[np.bool_] | None, dataset: pydicom.Dataset, notes: list[str]) -> Grey8:
    """Modality LUT (C.11.1), then VOI LUT or the first window (C.11.2); without one that shows anything, the range of the values."""
    values = _modality_values(stored, dataset)
    for shown in (_through_voi_lut, _windowed):
        grey = shown(values, dataset)
        if grey is not None and varies(grey, padding):
            return grey
    if dataset.get("VOILUTSequence") or (_numbers(dataset, "WindowCenter") and _numbers(dataset, "WindowWidth")):
        notes.append("DICOM's window or VOI LUT shows nothing of this film; it is shown over the range of its values")
    return to_8_bit(values, *shown_range(values, padding))


def _modality_values(stored: NDArray[Any], dataset: pydicom.Dataset) -> NDArray[Any]:
    """C.11.1. Elements that are there but empty, as after anonymisation, or no numbers, change nothing."""
    table = _table(dataset, "ModalityLUTSequence", stored)
    if table is not None:
        return _looked_up(stored, table)
    slope, intercept = _first_number(dataset, "RescaleSlope") or 1.0, _first_number(dataset, "RescaleIntercept") or 0.0
    if (slope, intercept) == (1.0, 0.0):
        return stored
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _through_voi_lut(values: NDArray[Any], dataset: pydicom.Dataset) -> Grey8 | None:
    """C.11.2.1.1, from 0 to the most that the descriptor's bits hold; None where there is no table.

    A descriptor that states fewer bits than its entries have, or at least three more, which would leave the film black, is not believed.
    """
    table = _table(dataset, "VOILUTSequence", values)
    if table is None:
        return None
    needed = max(8, int(table.entries.max()).bit_length())
    return to_8_bit(_looked_up(values, table), 0, 2 ** (table.bits if needed <= table.bits < needed + 3 else needed) - 1)


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
    descriptor = _numbers(item, "LUTDescriptor")
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


def _windowed(values: NDArray[Any], dataset: pydicom.Dataset) -> Grey8 | None:
    """C.11.2.1.2 LINEAR, C.11.2.1.3.1 SIGMOID, C.11.2.1.3.2 LINEAR_EXACT, to 0…255; None where there is no window.

    The first pair that is numbers counts. A LINEAR window of width 1, a usual placeholder, has but black and white: it counts as none.
    """
    pairs = zip(_numbers(dataset, "WindowCenter"), _numbers(dataset, "WindowWidth"), strict=False)
    centre, width = next((pair for pair in pairs if np.isfinite(pair).all()), (0.0, 0.0))
    function = _text(dataset, "VOILUTFunction").upper()
    if width <= (0 if function in ("SIGMOID", "LINEAR_EXACT") else 1):
        return None
    if function == "SIGMOID":
        return to_8_bit(1 / (1 + np.exp(np.clip(-4 * (values.astype(np.float32) - centre) / width, -80, 80))), 0, 1)
    if function == "LINEAR_EXACT":
        return to_8_bit(values, centre - width / 2, centre + width / 2)
    return to_8_bit(values, centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2)


def _padding(stored: NDArray[Any], dataset: pydicom.Dataset) -> NDArray[np.bool_] | None:
    """Pixel Padding Value, or the range up to Pixel Padding Range Limit (C.7.5.1.1.2), in stored values; it is shown black."""
    value, limit = _first_number(dataset, "PixelPaddingValue"), _first_number(dataset, "PixelPaddingRangeLimit")
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
    shape, negative = _text(dataset, "PresentationLUTShape").upper(), photometric == "MONOCHROME1"
    if shape == ("IDENTITY" if negative else "INVERSE"):
        notes.append(f"DICOM contradicts itself on black and white ({photometric} with presentation shape {shape}); it is shown inverted")
    return negative or shape == "INVERSE"


def _square_pixels(grey: Grey8, dataset: pydicom.Dataset, notes: list[str]) -> Grey8:
    """Enlarges the axis along which pixels are farther apart, so that shapes are true (PS3.3 10.7.1.3, C.7.6.3.1.7)."""
    for element in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        between = _numbers(dataset, element)
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


# ---------------------------------------------------------------------------------------------------- elements


def _values(dataset: pydicom.Dataset, element: str) -> list[Any]:
    """All values of an element; none where it is absent, empty, or what its VR does not allow, such as a decimal comma."""
    try:
        value = dataset.get(element)
    except (ValueError, TypeError, ArithmeticError):
        return [None]
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, MultiValue | list | tuple) else [value]


def _numbers(dataset: pydicom.Dataset, element: str) -> list[float]:
    """All values as numbers; NaN in the place of one that is none."""
    return [float(value) if isinstance(value, int | float) else np.nan for value in _values(dataset, element)]


def _first_number(dataset: pydicom.Dataset, element: str) -> float | None:
    """The first value; None where it is absent, empty or not finite."""
    number = next(iter(_numbers(dataset, element)), np.nan)
    return number if np.isfinite(number) else None


def _as_signed(value: int, values: NDArray[Any]) -> int:
    """A value written as unsigned (US) though pixels are signed, as the signed one of the same 16 bits."""
    return value - 2**16 if values.dtype.kind == "i" and 2**15 <= value < 2**16 else value


def _texts(dataset: pydicom.Dataset, element: str) -> list[str]:
    """All values as text, without padding."""
    return [str(value).strip(" \0\t\r\n") for value in _values(dataset, element) if value is not None]


def _text(dataset: pydicom.Dataset, element: str) -> str:
    """The first value as text, without padding; empty where it is absent."""
    return next(iter(_texts(dataset, element)), "")


def _words(text: str) -> set[str]:
    """Whole words in capitals; "p.a.", "P-A" and "A/P" are words, too."""
    joined = re.sub(r"\b([APDV])[./-] ?([APDV])\b", r"\1\2", text.upper())
    return set(re.findall(r"[A-ZÀ-Þ]+", joined))
