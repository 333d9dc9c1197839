"""A DICOM radiograph: which are refused, and how stored values become grey.

The order is fixed by PS3.3 C.11 and PS3.4 N.2: Modality LUT, then VOI LUT or window, then inversion. Of all elements only the pixels
and the Patient ID leave this module, and messages name view words alone.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

from cxr_retrieval.errors import ImageError
from cxr_retrieval.grey import MAX_PIXELS, NEXT_STEP, Grey8, Radiograph, shown_range, to_8_bit, too_large, truncated

_PROJECTION_MODALITIES: Final = frozenset({"CR", "DX", "RG", "XA", "RF", "OT", "SC", ""})
_FRONTAL_VIEWS: Final = frozenset({"PA", "AP", "FRONTAL"})
_OTHER_VIEWS: Final = frozenset({"LL", "RL", "LAT", "LLAT", "RLAT", "LATERAL", "LLD", "RLD", "LLO", "RLO", "OBLIQUE"})
"""View Position (0018,5101): laterals, lateral decubitus and obliques, with the words that scanners write besides the defined terms."""
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
_LATERAL_WORDS: Final = frozenset({"LAT", "LATERAL", "LATERALE", "LATERO", "SEITLICH", "PROFIL"})
_FRONTAL_WORDS: Final = frozenset({"PA", "AP", "FRONTAL", "FRONTALE", "DV", "VD"})
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
    return Radiograph(pixels, "DICOM", tuple(notes), _text(dataset, "PatientID") or None)


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
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    if frames > 1:
        raise ImageError(
            f"{name}: a multi-frame DICOM", expected="one radiograph per file", got=f"{frames} frames", next_step="export a single frame"
        )
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows * columns > MAX_PIXELS:
        raise too_large(name, f"{columns}×{rows} = {rows * columns / 1e6:.0f} million pixels")
    return notes


def _refuse_other_views(dataset: pydicom.Dataset, name: str) -> list[str]:
    """View Position, View Code Sequence, Patient Orientation and, where none of them says frontal, the descriptions."""

    def refusal(element: str, got: str) -> ImageError:
        return ImageError(f"{name}: not a frontal view", expected="a PA or AP view", got=f"{element} {got}", next_step=NEXT_STEP)

    view = _text(dataset, "ViewPosition").upper()
    if view in _OTHER_VIEWS:
        raise refusal("View Position (0018,5101)", view)
    for item in dataset.get("ViewCodeSequence") or ():
        scheme, code = _text(item, "CodingSchemeDesignator").upper(), _text(item, "CodeValue")
        if ("SRT" if scheme in ("SNM3", "99SDM") else scheme, code) in _OTHER_VIEW_CODES:
            raise refusal("View Code Sequence (0054,0220)", f"{code} ({scheme})")
    directions = [str(value).strip().upper() for value in _values(dataset, "PatientOrientation")]
    if any(direction[:1] in ("A", "P") for direction in directions):  # PS3.3 C.7.6.1.1.1: a frontal film's rows run right to left
        raise refusal("Patient Orientation (0020,0020)", "\\".join(directions))
    if view in _FRONTAL_VIEWS:
        return []
    notes: list[str] = []
    for element in _DESCRIPTIONS:
        words = set(re.split(r"[^A-ZÀ-Þ]+", _text(dataset, element).upper()))
        if words & _LATERAL_WORDS and words & _FRONTAL_WORDS:
            notes.append(f"{element} speaks of a lateral and a frontal view: is this the frontal one?")
        elif words & _LATERAL_WORDS:
            raise refusal(element, " ".join(sorted(words & _LATERAL_WORDS)))
    return notes


def _rendered(dataset: pydicom.Dataset, name: str, notes: list[str]) -> Grey8:
    photometric = str(dataset.PhotometricInterpretation)
    stored: NDArray[np.generic] = dataset.pixel_array
    bits = int(dataset.BitsStored)
    if photometric == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        bits = 8 * stored.dtype.itemsize
    if stored.ndim == 3:  # pydicom has already turned YBR into RGB
        return np.asarray(Image.fromarray(to_8_bit(stored, 0, 2**bits - 1)).convert("L"))
    grey, padding = _shown(stored, dataset, name, notes), _padding(stored, dataset)
    if _is_inverted(dataset, photometric):
        grey = np.asarray(255 - grey, np.uint8)
    return grey if padding is None else np.where(padding, np.uint8(0), grey)


def _shown(stored: NDArray[np.generic], dataset: pydicom.Dataset, name: str, notes: list[str]) -> Grey8:
    """Modality LUT (C.11.1), then VOI LUT or the first window (C.11.2); without one that shows anything, the range of the values."""
    values = _modality_values(stored, dataset)
    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        integers = values if values.dtype.kind in "iu" else np.rint(values).astype(np.int32)
        grey = to_8_bit(apply_voi_lut(integers, dataset, prefer_lut=True), 0, 2**bits - 1)
    else:
        grey = _windowed(values, dataset)
    if grey is not None and grey.min() < grey.max():
        return grey
    padding = _padding(stored, dataset)
    kept = values if padding is None or padding.all() else values[~padding]
    if grey is not None and kept.min() < kept.max():
        notes.append("DICOM's window or VOI LUT shows nothing of this film; it is shown over the range of its values")
    return to_8_bit(values, *shown_range(kept))


def _modality_values(stored: NDArray[np.generic], dataset: pydicom.Dataset) -> NDArray[np.generic]:
    """C.11.1. Elements that are there but empty, as after anonymisation, change nothing."""
    if dataset.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, dataset)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if not slope and not intercept:
        return stored
    return stored.astype(np.float32) * np.float32(slope or 1) + np.float32(intercept or 0)


def _windowed(values: NDArray[np.generic], dataset: pydicom.Dataset) -> Grey8 | None:
    """C.11.2.1.2 LINEAR, C.11.2.1.3.1 SIGMOID, C.11.2.1.3.2 LINEAR_EXACT, to 0…255; None where there is no window."""
    centres, widths = _values(dataset, "WindowCenter"), _values(dataset, "WindowWidth")
    if not centres or not widths:
        return None
    centre, width = float(centres[0]), float(widths[0])
    function = _text(dataset, "VOILUTFunction").upper() or "LINEAR"
    if not (np.isfinite(centre) and np.isfinite(width)) or width < (1 if function == "LINEAR" else 1e-9):
        return None
    if function == "SIGMOID":
        return to_8_bit(1 / (1 + np.exp(np.clip(-4 * (values.astype(np.float32) - centre) / width, -80, 80))), 0, 1)
    if function == "LINEAR_EXACT":
        return to_8_bit(values, centre - width / 2, centre + width / 2)
    low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    return to_8_bit(values, low, high) if high > low else np.where(np.asarray(values, np.float32) > low, np.uint8(255), np.uint8(0))


def _padding(stored: NDArray[Any], dataset: pydicom.Dataset) -> NDArray[np.bool_] | None:
    """Pixel Padding Value, or the range up to Pixel Padding Range Limit (C.7.5.1.1.2), in stored values; it is shown black."""
    value, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if value is None or value == "":
        return None
    ends = (int(value), int(value) if limit is None or limit == "" else int(limit))
    return (stored >= min(ends)) & (stored <= max(ends))


def _is_inverted(dataset: pydicom.Dataset, photometric: str) -> bool:
    """MONOCHROME1, or Presentation LUT Shape INVERSE (C.11.6), or both, which DX images for presentation are (C.8.11.3.1.2): once.

    MONOCHROME1 with IDENTITY contradicts itself; the photometric interpretation, which older viewers go by, decides.
    """
    return photometric == "MONOCHROME1" or _text(dataset, "PresentationLUTShape").upper() == "INVERSE"


def _square_pixels(grey: Grey8, dataset: pydicom.Dataset, notes: list[str]) -> Grey8:
    """Enlarges the axis along which pixels are farther apart, so that shapes are true (PS3.3 10.7.1.3, C.7.6.3.1.7)."""
    for element in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        between = [float(value) for value in _values(dataset, element)]
        if len(between) == 2 and min(between) > 0:
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


def _values(dataset: pydicom.Dataset, element: str) -> list[Any]:
    """All values of an element; none where it is absent or empty."""
    value = dataset.get(element)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, MultiValue | list | tuple) else [value]


def _text(dataset: pydicom.Dataset, element: str) -> str:
    """The first value as text, without padding; empty where it is absent."""
    values = _values(dataset, element)
    return str(values[0]).strip(" \0") if values else ""
