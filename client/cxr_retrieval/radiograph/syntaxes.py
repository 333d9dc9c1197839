"""DICOM transfer syntaxes (PS3.5 Annex A): which are read, by which decoder, and the values as the detector stored them.

One decoder for each syntax, the same on every machine. `docs/dicom.md` shows the table, and a test holds the two together.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels import get_decoder

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.elements import first_number, named
from cxr_retrieval.radiograph.grey import MAX_PIXELS, too_large

ENCAPSULATED_UNCOMPRESSED: Final = "1.2.840.10008.1.2.1.98"
DECODERS: Final[dict[str, str]] = {
    uid.ImplicitVRLittleEndian: "numpy",
    uid.ExplicitVRLittleEndian: "numpy",
    ENCAPSULATED_UNCOMPRESSED: "numpy",
    uid.DeflatedExplicitVRLittleEndian: "numpy",
    uid.ExplicitVRBigEndian: "numpy",
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGExtended12Bit: "gdcm",
    uid.JPEGLossless: "gdcm",
    uid.JPEGLosslessSV1: "gdcm",
    uid.JPEGLSLossless: "gdcm",
    uid.JPEGLSNearLossless: "gdcm",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
    uid.RLELossless: "pylibjpeg",
}
"""Transfer Syntax UID → what decodes it, by pydicom's name; "numpy": nothing needs decoding."""

_LOSSY: Final = frozenset({uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K})
_NEWER: Final = {
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
}
"""Names that pydicom 3.0 does not know."""
_GROUP_2: Final = 0x0002
_SOF: Final = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
"""Markers that begin a frame: of JPEG, of any process, and of JPEG-LS."""
_MOST_INFLATED: Final = 4 * MAX_PIXELS
"""Bytes that a deflated data set may have: 16 bits a pixel, twice over."""


def inflated(data: bytes, name: str) -> bytes:
    """A file whose data set is deflated (PS3.5 A.5) as one in Explicit VR Little Endian; any other as it is.

    pydicom would unpack it itself, but without a bound.

    Raises:
        ImageError: More than `_MOST_INFLATED` bytes come out.
    """
    deflated = str(uid.DeflatedExplicitVRLittleEndian).encode()
    if deflated not in data[:4096]:
        return data
    file = io.BytesIO(data)
    read_preamble(file, force=True)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != _GROUP_2)
    if str(meta.get("TransferSyntaxUID")).encode() != deflated:
        return data
    head = data[: file.tell()]
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    body = unpacker.decompress(data[len(head) :], _MOST_INFLATED)
    if unpacker.unconsumed_tail:
        raise too_large(name, f"a deflated data set of more than {_MOST_INFLATED // 1_000_000} MB")
    plain = str(uid.ExplicitVRLittleEndian).encode().ljust(len(deflated), b"\0")
    return head.replace(deflated, plain) + body


def transfer_syntax(dataset: pydicom.Dataset, name: str) -> str:
    """The UID under which the pixels of a file are read; where it states none, as old files do, the one that its data set is written in.

    Raises:
        ImageError: No decoder here reads it.
    """
    syntax = str(dataset.file_meta.get("TransferSyntaxUID") or "")
    if not syntax and not dataset["PixelData"].is_undefined_length:
        implicit, little = dataset.original_encoding
        native = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        syntax = str(uid.ImplicitVRLittleEndian if implicit else native)
    if syntax not in DECODERS:
        raise ImageError(
            f"{name}: its transfer syntax is not read",
            expected="one of those in docs/dicom.md",
            got=f"{named('TransferSyntaxUID')} {_described(syntax)}",
            next_step="export the image again, uncompressed (Explicit VR Little Endian) if need be",
        )
    return syntax


def stored_values(dataset: pydicom.Dataset, syntax: str, name: str) -> NDArray[Any]:
    """The pixels of the first frame before any LUT: `[rows, columns]`, or `[rows, columns, 3]` in RGB.

    Raises:
        ImageError: Not as many pixels, or not in the shape, as Rows and Columns say.
        Exception: Whatever a decoder raises on damaged data.
    """
    use = uid.UID(syntax)
    if syntax == ENCAPSULATED_UNCOMPRESSED:
        dataset.PixelData = get_frame(dataset.PixelData, 0, number_of_frames=1)
        dataset["PixelData"].is_undefined_length = False
        use = uid.ExplicitVRLittleEndian
    elif syntax == uid.JPEGExtended12Bit:  # GDCM reads whatever process the codestream has; pydicom 3.0 keeps 12 bits from it, but not here
        use = uid.JPEGLossless
    dataset.file_meta.TransferSyntaxUID = use
    decoder = get_decoder(use)
    if decoder.is_native:
        _refuse_more_than_a_frame(dataset, name)
    else:
        _refuse_another_shape(dataset, name)
    plugin = "" if DECODERS[syntax] == "numpy" else DECODERS[syntax]
    try:
        values, _ = decoder.as_array(dataset, index=0, decoding_plugin=plugin, correct_unused_bits=False)  # pyright: ignore[reportArgumentType]
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of pylibjpeg-rle, which is written in Rust: no Exception, and not to be imported
            raise
        raise ValueError(str(error)) from error
    return _significant(values, dataset, syntax)


def _significant(values: NDArray[Any], dataset: pydicom.Dataset, syntax: str) -> NDArray[Any]:
    """Without what lies in the unused bits beside Bits Stored, such as overlays (PS3.5 8.1.1, until 2004); the sign is kept.

    What a lossy codec puts there is no overlay, but a value beyond the range: it becomes the end of the range.
    """
    container, stored = 8 * values.dtype.itemsize, int(dataset.BitsStored)
    if stored >= container:
        return values
    if syntax in _LOSSY:
        low = -(2 ** (stored - 1)) if values.dtype.kind == "i" else 0
        return np.clip(values, low, low + 2**stored - 1, out=values)
    high = first_number(dataset, "HighBit")
    as_stated = DECODERS[syntax] == "numpy" and high is not None and stored <= high + 1 <= container
    np.left_shift(values, container - (int(high) + 1 if high is not None and as_stated else stored), out=values)
    return np.right_shift(values, container - stored, out=values)


def _refuse_more_than_a_frame(dataset: pydicom.Dataset, name: str) -> None:
    rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.SamplesPerPixel)
    frame = rows * columns * samples * int(dataset.BitsAllocated) // 8
    if frame and len(dataset.PixelData) >= 2 * frame:
        raise ImageError(
            f"{name}: holds more pixels than it says",
            expected=f"{frame} bytes, as {named('Rows')} {rows} and {named('Columns')} {columns} have it",
            got=f"{len(dataset.PixelData)} bytes",
            next_step="export the image again",
        )


def _refuse_another_shape(dataset: pydicom.Dataset, name: str) -> None:
    """What the codestream says of its size must be what the data set says: decoders allocate the one, and fill the other."""
    said = int(dataset.Rows), int(dataset.Columns)
    found = _codestream_shape(get_frame(dataset.PixelData, 0, number_of_frames=1))
    if found not in (None, said):
        raise ImageError(
            f"{name}: its pixels have another shape than it says",
            expected=f"{named('Rows')} {said[0]} and {named('Columns')} {said[1]}",
            got="a codestream of {} rows and {} columns".format(*found or said),
            next_step="export the image again",
        )


def _codestream_shape(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns by SIZ, which comes first (ITU-T T.800 A.5.1), or SOF (T.81 B.2.2, T.87 C.2.2); None where it has neither."""
    if frame[:4] == b"\xff\x4f\xff\x51" and len(frame) >= 24:
        right, bottom, left, top = struct.unpack(">4I", frame[8:24])
        return bottom - top, right - left
    at = 2
    while frame[:2] == b"\xff\xd8" and frame[at : at + 1] == b"\xff" and at + 9 <= len(frame):
        if frame[at + 1] in _SOF:
            rows, columns = struct.unpack(">HH", frame[at + 5 : at + 9])
            return rows, columns
        at += 1 if frame[at + 1] == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def _described(syntax: str) -> str:
    """UID and name; nothing of what is no UID."""
    if not re.fullmatch(r"[0-9.]{5,64}", syntax):
        return "that is no UID" if syntax else "absent"
    title = _NEWER.get(syntax) or uid.UID(syntax).name
    return f"{syntax} ({'private or unknown' if title == syntax else title})"
