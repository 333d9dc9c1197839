"""DICOM films with an identity planted in every text element and file name, and the search for what came out elsewhere."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

MARKS: Final = (b"zqxplant", b"77191705520", b"18770707")
"""One of them is in everything planted: in words, in UIDs and numbers, in dates. Compared without regard to case."""
_PLANTED_GROUPS: Final = (0x0008, 0x0010, 0x0012, 0x0018, 0x0020, 0x0032, 0x0038, 0x0040)
_STEERING: Final = frozenset(
    {
        "SpecificCharacterSet",
        "SOPClassUID",
        "Modality",
        "SeriesDescription",  # what the film shows is read from these three
        "ProtocolName",
        "AcquisitionDeviceProcessingDescription",
    }
)
_PREFACE: Final = 24
_DATA_FRAME: Final = 0


def planted_film(path: Path, pixels: NDArray[np.uint8], number: int) -> Path:
    """Writes `[height, width]` uint8 as Computed Radiography, valid by PS3.10, shown as it is; every text element carries a mark.

    Args:
        path: Of a folder; the file's name gets a mark, too.
        number: Makes what is planted different from film to film.
    """
    dataset = Dataset()
    for tag, (vr, multiplicity, _, retired, keyword) in DicomDictionary.items():
        if tag >> 16 not in _PLANTED_GROUPS or retired or not keyword or keyword in _STEERING:
            continue
        value = _value(vr, number)
        if value and multiplicity in ("1", "1-n"):
            setattr(dataset, keyword, value)
    block = dataset.private_block(0x0011, "ZQXPLANT PRIVATE", create=True)
    block.add_new(0x01, "LO", f"ZQXPLANTprivate{number}")
    block.add_new(0x02, "UN", f"ZQXPLANTunknown{number}".encode())
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.Modality, dataset.ViewPosition, dataset.BodyPartExamined = "CR", "PA", "CHEST"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.WindowCenter, dataset.WindowWidth = 128, 256  # PS3.3 C.11.2.1.2: every value as it is
    data = pixels.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OW" if dataset.BitsAllocated > 8 else "OB"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    file = path / f"ZQXPLANTdoe_erika_18770707_{number:05d}.dcm"
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file


def planted_elements(file: Path) -> int:
    """How many elements of a file carry a mark."""
    return sum(_marked(str(element.value).encode()) for element in pydicom.dcmread(file).iterall() if element.tag != 0x7FE00010)


def _value(vr: str, number: int) -> str:
    return {
        "PN": f"ZQXPLANTdoe{number}^Erika^^Dr.",
        "LO": f"ZQXPLANTlo{number}",
        "SH": f"ZQXPLANTsh{number}",
        "ST": f"ZQXPLANTst{number} lives in Zqxplantville",
        "LT": f"ZQXPLANTlt{number}",
        "UT": f"ZQXPLANTut{number}",
        "UC": f"ZQXPLANTuc{number}",
        "AE": f"ZQXPLANTAE{number}",
        "UI": f"2.25.77191705520{number:05d}",
        "DA": "18770707",
        "DT": "18770707070707",
    }.get(vr, "")


def searched(what: Mapping[str, Iterator[bytes]]) -> dict[str, list[str]]:
    """Place → what was found there, each with a little of what stands around it; empty where nothing was."""
    return {place: [piece for data in pieces for piece in _marked_pieces(data)][:20] for place, pieces in what.items()}


def files_under(*folders: Path, but: frozenset[str] = frozenset()) -> Iterator[bytes]:
    """The bytes of every file, but those of these names; the names themselves, too."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name not in but:
                yield path.name.encode()
                yield path.read_bytes()


def results_without_input(lines: Path) -> Iterator[bytes]:
    """Each result without what names its input."""
    for line in lines.read_text("utf-8").splitlines():
        result: dict[str, Any] = json.loads(line)
        for name in ("input", "same_as", "attention"):
            result.pop(name, None)
        yield json.dumps(result, ensure_ascii=False).encode()


def wire(folder: Path) -> Iterator[bytes]:
    """What a recording proxy kept: as it was, and the messages put together from their frames (RFC 9113, section 4.1)."""
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        yield raw
        streams: dict[int, bytearray] = {}
        at = _PREFACE if raw.startswith(b"PRI * HTTP/2.0") else 0
        while at + 9 <= len(raw):
            size = int.from_bytes(raw[at : at + 3], "big")
            kind, stream = raw[at + 3], struct.unpack(">I", raw[at + 5 : at + 9])[0] & 0x7FFFFFFF
            if kind == _DATA_FRAME:
                streams.setdefault(stream, bytearray()).extend(raw[at + 9 : at + 9 + size])
            at += 9 + size
        yield from map(bytes, streams.values())


def _marked(data: bytes) -> bool:
    return any(mark in data.lower() for mark in MARKS)


def _marked_pieces(data: bytes) -> list[str]:
    if not _marked(data):
        return []
    found = re.finditer(b"|".join(map(re.escape, MARKS)), data, re.IGNORECASE)
    return [repr(data[max(0, hit.start() - 30) : hit.end() + 30]) for _, hit in zip(range(20), found, strict=False)]
