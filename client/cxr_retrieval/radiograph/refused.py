"""Which DICOM objects are no frontal chest films, by what their elements say; every refusal names the element and its value.

Only words of the standard's own lists are ever repeated, for people write names into any element.
"""

from __future__ import annotations

import re

import pydicom
from pydicom import uid

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.elements import first_number, items, named, text, texts, words
from cxr_retrieval.radiograph.grey import MAX_PIXELS, NEXT_STEP, too_large
from cxr_retrieval.radiograph.terms import (
    CHEST,
    CHEST_REGIONS,
    DESCRIPTIONS,
    DOUBTFUL_PARTS,
    FOR_PROCESSING,
    FRONTAL_WORDS,
    LATERAL_VIEWS,
    LATERAL_WORDS,
    OTHER_MODALITIES,
    OTHER_PARTS,
    OTHER_REGIONS,
    OTHER_VIEW_CODES,
    PROJECTION_CLASSES,
    PROJECTION_MODALITIES,
    TURNED_VIEWS,
)


def refuse_what_is_no_frontal_film(dataset: pydicom.Dataset, name: str) -> list[str]:
    """Returns what a careful reader should know of the file's own words.

    Raises:
        ImageError: No frontal projection radiograph of the chest, ready to be looked at, in a single frame; or too large.
    """
    _refuse_other_objects(dataset, name)
    notes = [*_refuse_other_parts(dataset, name), *_refuse_other_views(dataset, name)]
    if text(dataset, "BurnedInAnnotation").upper() == "YES":
        notes.append("DICOM says text is burned into the picture (0028,0301): it may name the patient")
    frames = int(first_number(dataset, "NumberOfFrames") or 1)
    if frames > 1:
        raise _refusal(name, "a multi-frame DICOM", "one radiograph per file", "NumberOfFrames", str(frames), "export a single frame")
    if "NumberOfFrames" in dataset:
        del dataset.NumberOfFrames  # pydicom fails where it is blank
    rows, columns, bits = (int(first_number(dataset, element) or 0) for element in ("Rows", "Columns", "BitsAllocated"))
    if rows * columns > MAX_PIXELS:
        raise too_large(name, f"{columns}×{rows} = {rows * columns / 1e6:.0f} million pixels")
    if bits not in (8, 16, 32):
        raise _refusal(name, "not a grey radiograph", "8, 16 or 32 bits a pixel", "BitsAllocated", str(bits))
    return notes


def _refusal(name: str, what: str, expected: str, element: str, value: str, next_step: str = NEXT_STEP) -> ImageError:
    return ImageError(f"{name}: {what}", expected=expected, got=f"{named(element)} {value}", next_step=next_step)


def _refuse_other_objects(dataset: pydicom.Dataset, name: str) -> None:
    """SOP Class, Modality, Presentation Intent, Image Type."""
    kind = uid.UID(text(dataset, "SOPClassUID"))
    modality = text(dataset, "Modality").upper()
    intent = text(dataset, "PresentationIntentType").upper()
    for element, found, shown in (
        ("SOPClassUID", kind == FOR_PROCESSING, f"{kind} ({kind.name})"),
        ("PresentationIntentType", intent == "FOR PROCESSING", intent),
    ):
        if found:
            raise _refusal(
                name,
                "raw detector data, not meant to be looked at",
                "an image FOR PRESENTATION",
                element,
                shown,
                'send the "for presentation" image of the same exposure (DX For Presentation, or CR)',
            )
    if kind.name != kind and kind not in PROJECTION_CLASSES:
        raise _refusal(name, "not a projection radiograph", "a CR, DX or Secondary Capture image", "SOPClassUID", f"{kind} ({kind.name})")
    if modality not in PROJECTION_MODALITIES:
        shown = modality if modality in OTHER_MODALITIES else "of no known term"
        raise _refusal(name, "not a projection radiograph", "modality CR or DX", "Modality", shown)
    if "PixelData" not in dataset:
        raise ImageError(f"{name}: the DICOM file holds no pixels", expected=named("PixelData"), got="none", next_step=NEXT_STEP)
    if "LOCALIZER" in (value.upper() for value in texts(dataset, "ImageType")):
        raise _refusal(name, "the scout view of another examination", "a radiograph", "ImageType", "LOCALIZER")


def _refuse_other_parts(dataset: pydicom.Dataset, name: str) -> list[str]:
    """Body Part Examined and Anatomic Region Sequence: refused where one names another part of the body, and none the chest."""
    said = " ".join(texts(dataset, "BodyPartExamined")).upper().replace("_", " ")
    parts = {word if word in OTHER_PARTS else word.removesuffix("S") for word in words(said)}
    regions = {_code(item) for item in items(dataset, "AnatomicRegionSequence")}
    if CHEST.search(said) or regions & CHEST_REGIONS:
        return []
    if parts & OTHER_PARTS:
        raise _refusal(name, "not a film of the chest", "CHEST", "BodyPartExamined", " ".join(sorted(parts & OTHER_PARTS)))
    for region in sorted(regions & OTHER_REGIONS.keys()):
        shown = f"{region[1]} ({region[0]}: {OTHER_REGIONS[region]})"
        raise _refusal(name, "not a film of the chest", "the chest", "AnatomicRegionSequence", shown)
    if not said:
        return []
    shown = " ".join(sorted(words(said) & DOUBTFUL_PARTS)) or "of no known term"
    return [f"DICOM says {named('BodyPartExamined')} {shown}, not CHEST: is this a chest film?"]


def _code(item: pydicom.Dataset) -> tuple[str, str]:
    """Coding scheme and code; SNOMED-RT under any of the names that it had (PS3.16 8.1)."""
    scheme = text(item, "CodingSchemeDesignator").upper()
    return ("SRT" if scheme in ("SNM3", "99SDM") else scheme, text(item, "CodeValue"))


def _refuse_other_views(dataset: pydicom.Dataset, name: str) -> list[str]:
    """View Position, View Code Sequence and Patient Orientation; the descriptions only where neither of the first two says frontal."""
    view = words(" ".join(texts(dataset, "ViewPosition")))
    frontal = bool(view & FRONTAL_WORDS)
    if view & TURNED_VIEWS or (view & LATERAL_VIEWS and not frontal):
        raise _other_view(name, "ViewPosition", " ".join(sorted(view & (TURNED_VIEWS | LATERAL_VIEWS))))
    for item in items(dataset, "ViewCodeSequence"):
        if _code(item) in OTHER_VIEW_CODES:
            raise _other_view(name, "ViewCodeSequence", "{1} ({0})".format(*_code(item)))
        meaning = words(text(item, "CodeMeaning"))
        if meaning & (LATERAL_WORDS | TURNED_VIEWS):
            raise _other_view(name, "ViewCodeSequence", " ".join(sorted(meaning & (LATERAL_WORDS | TURNED_VIEWS))))
        frontal = frontal or bool(meaning & FRONTAL_WORDS)
    directions = [value.upper() for value in texts(dataset, "PatientOrientation") if re.fullmatch("[ALRPHFalrphf]{1,3}", value)]
    axes = {next(axis for axis in ("AP", "LR", "HF") if direction[0] in axis) for direction in directions}
    if len(axes) == 2 and "AP" in axes:  # PS3.3 C.7.6.1.1.1: rows' and columns' direction; one alone, or "A\\P", is a view put there
        raise _other_view(name, "PatientOrientation", "\\".join(directions))
    if view & LATERAL_VIEWS:
        return [f"{named('ViewPosition')} names a lateral and a frontal view: is this the frontal one?"]
    return [] if frontal else _refuse_described_laterals(dataset, name)


def _refuse_described_laterals(dataset: pydicom.Dataset, name: str) -> list[str]:
    """A description that speaks of a lateral view alone is believed, unless another speaks of a frontal view alone."""
    described = [(element, words(text(dataset, element))) for element in DESCRIPTIONS]
    frontal = any(said & FRONTAL_WORDS and not said & LATERAL_WORDS for _, said in described)
    for element, said in described:
        if said & LATERAL_WORDS and not said & FRONTAL_WORDS and not frontal:
            raise _other_view(name, element, " ".join(sorted(said & LATERAL_WORDS)))
    if any(said & LATERAL_WORDS for _, said in described):
        return ["DICOM's descriptions speak of a lateral and a frontal view: is this the frontal one?"]
    return []


def _other_view(name: str, element: str, value: str) -> ImageError:
    return _refusal(name, "not a frontal view", "a PA or AP view", element, value)
