"""Readers against tiny reference images with known pixel values, the letterbox, and every kind of unusable file."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as DicomSequence
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.grey import MAX_PIXELS
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.reading import read_radiograph
from cxr_retrieval.radiograph.terms import OTHER_PARTS, OTHER_REGIONS, OTHER_VIEW_CODES

SIDE = 64


def ramp(top: int, dtype: str = "uint16") -> NDArray[np.generic]:
    """A 64×67 picture (unequal, so that swapped axes fail) rising from 0 to `top` along its columns."""
    return np.tile(np.round(np.linspace(0, top, 67)), (SIDE, 1)).astype(dtype)


EXPECTED = np.round(np.linspace(0, 255, 67)).astype(int)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def dicom(stored: NDArray[np.generic], change: Callable[[pydicom.Dataset], None] | None = None, bits: int = 12) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3.4"
    dataset.PatientName, dataset.Modality, dataset.ViewPosition = "SYNTHETIC^TEST", "DX", "PA"
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * stored.dtype.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    if change:
        change(dataset)
    return dataset


def written(dataset: pydicom.Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def compressed(syntax: str, stored: NDArray[np.generic], bits: int) -> bytes:
    dataset = dicom(stored, bits=bits)
    dataset.compress(syntax, generate_instance_uid=False)
    return written(dataset)


def jpeg_baseline() -> bytes:
    grey = ramp(255, "uint8")
    dataset = dicom(grey, bits=8)
    dataset.PixelData = encapsulate([encoded(Image.fromarray(grey), "JPEG", quality=100)])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    return written(dataset)


def window(center: float, width: float) -> Callable[[pydicom.Dataset], None]:
    def change(dataset: pydicom.Dataset) -> None:
        dataset.WindowCenter, dataset.WindowWidth = center, width

    return change


def rescaled(dataset: pydicom.Dataset) -> None:
    """Stored −1024…1023 becomes 0…2047 by the Modality LUT; the window is in those units."""
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 1024
    dataset.WindowCenter, dataset.WindowWidth = 1024, 2048


def monochrome1(dataset: pydicom.Dataset) -> None:
    dataset.PhotometricInterpretation = "MONOCHROME1"


def voi_lut(dataset: pydicom.Dataset) -> None:
    """A table that inverts: 0 → 255, 255 → 0."""
    item = pydicom.Dataset()
    item.LUTDescriptor = [256, 0, 8]
    item.LUTData = np.arange(255, -1, -1, dtype="uint16").tobytes()
    item["LUTData"].VR = "OW"
    dataset.VOILUTSequence = DicomSequence([item])


def padded(dataset: pydicom.Dataset) -> None:
    dataset.PixelPaddingValue = 4095


def with_padding() -> bytes:
    stored = ramp(1000)
    stored[:8] = 4095
    return written(dicom(stored, padded))


def elements(**values: object) -> Callable[[pydicom.Dataset], None]:
    """Sets elements by keyword; None leaves one in place without a value, as anonymisers do."""

    def change(dataset: pydicom.Dataset) -> None:
        for name, value in values.items():
            setattr(dataset, name, value)

    return change


def with_hot_pixel(top: int, hot: int) -> NDArray[np.generic]:
    stored = ramp(top)
    stored[0, 5] = hot
    return stored


def padded_at(columns: int, value: int, photometric: str = "MONOCHROME2", **further: object) -> bytes:
    """The first columns hold a padding value that no other pixel has."""
    stored = ramp(3000)
    stored[:, :columns] = value
    return written(dicom(stored, elements(PixelPaddingValue=value, PhotometricInterpretation=photometric, **further)))


def colour_12_in_16() -> bytes:
    stored = np.repeat(ramp(4095)[..., None], 3, axis=2)
    rgb = elements(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    return written(dicom(stored, rgb))


def white_is_zero(values: NDArray[np.generic]) -> bytes:
    return encoded(Image.fromarray(values), "TIFF", tiffinfo={262: 0})


def table(entries: NDArray[np.generic], bits: int, first: int = 0) -> DicomSequence:
    """A LUT sequence; entries of one byte are packed, of two are words."""
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.LUTData = entries.tobytes()
    item["LUTData"].VR = "OW"
    return DicomSequence([item])


FROM_12_TO_8 = (np.arange(4096) >> 4).astype("uint16")


def view_code_item(scheme: str, code: str, meaning: str) -> DicomSequence:
    item = pydicom.Dataset()
    item.CodingSchemeDesignator, item.CodeValue, item.CodeMeaning = scheme, code, meaning
    return DicomSequence([item])


def misspelt(**values: str) -> bytes:
    """Writes text as it is where the VR asks for numbers or defined terms, which pydicom would refuse to write."""

    def write(dataset: pydicom.Dataset) -> None:
        dataset.SpecificCharacterSet = "ISO_IR 100"
        for name, value in values.items():
            dataset.add_new(name, "LO", value)

    data = written(dicom(ramp(3000), write))
    for name in values:
        group, element = divmod(tag_for_keyword(name) or 0, 0x10000)
        key = struct.pack("<HH", group, element)
        assert data.count(key + b"LO") == 1
        data = data.replace(key + b"LO", key + dictionary_VR(name).encode())
    return data


def signed_padding_as_unsigned() -> bytes:
    stored = ramp(3000, "int16")
    stored[:, :5] = -2000
    return written(dicom(stored, lambda d: d.add_new("PixelPaddingValue", "US", 65536 - 2000), bits=16))


def window_beside_all_but(value: int, rows: slice, columns: slice) -> bytes:
    stored = ramp(3000)
    stored[rows, columns] = value
    return written(dicom(stored, elements(PixelPaddingValue=4095, WindowCenter=value, WindowWidth=100), bits=16))


def png_16_bit_rgb(values: NDArray[np.generic]) -> bytes:
    """Pillow writes none."""
    height, width = values.shape
    rows = np.repeat(values[..., None], 3, axis=2).astype(">u2")
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return png(header, b"".join(b"\0" + row.tobytes() for row in rows))


def png(header: bytes, data: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def black_up_to(columns: int, values: NDArray[np.int_]) -> NDArray[np.int_]:
    return np.where(np.arange(67) < columns, 0, values)


def stretched(columns: int, top: int = 3000) -> NDArray[np.int_]:
    """The ramp when only what is no padding counts."""
    stored = np.round(np.linspace(0, top, 67))
    return np.clip(np.round((stored - stored[columns]) / (top - stored[columns]) * 255), 0, 255).astype(int)


SIGMOID = np.round(255 / (1 + np.exp(-4 * (np.round(np.linspace(0, 4095, 67)) - 2048) / 1024))).astype(int)
EXACT = np.clip(np.round((np.round(np.linspace(0, 4095, 67)) - 1024) / 2048 * 255), 0, 255).astype(int)

REFERENCE: dict[str, tuple[Callable[[], bytes], NDArray[np.int_], int]] = {
    # name: (file, expected value of each column in the last row, tolerance)
    "PNG 8-bit grey": (lambda: encoded(Image.fromarray(ramp(255, "uint8")), "PNG"), EXPECTED, 0),
    "PNG 16-bit grey": (lambda: encoded(Image.fromarray(ramp(65535)), "PNG"), EXPECTED, 1),
    "PNG 16-bit holding 12": (lambda: encoded(Image.fromarray(ramp(4095)), "PNG"), EXPECTED, 1),
    "PNG RGB": (lambda: encoded(Image.fromarray(ramp(255, "uint8")).convert("RGB"), "PNG"), EXPECTED, 1),
    "PNG transparent is black": (
        lambda: encoded(Image.merge("LA", [Image.fromarray(ramp(255, "uint8"))] * 2), "PNG"),
        (EXPECTED**2) // 255,
        2,
    ),
    "JPEG": (lambda: encoded(Image.fromarray(ramp(255, "uint8")), "JPEG", quality=100), EXPECTED, 3),
    "TIFF 8-bit": (lambda: encoded(Image.fromarray(ramp(255, "uint8")), "TIFF"), EXPECTED, 0),
    "TIFF 16-bit LZW": (lambda: encoded(Image.fromarray(ramp(65535)), "TIFF", compression="tiff_lzw"), EXPECTED, 1),
    "TIFF RGB": (lambda: encoded(Image.fromarray(ramp(255, "uint8")).convert("RGB"), "TIFF"), EXPECTED, 1),
    "DICOM no window": (lambda: written(dicom(ramp(3000))), EXPECTED, 1),
    "DICOM window": (lambda: written(dicom(ramp(4095), window(2048, 4096))), EXPECTED, 1),
    "DICOM narrow window clips": (
        lambda: written(dicom(ramp(4095), window(1024, 2048))),
        np.clip(np.round(np.linspace(0, 4095, 67) / 2047 * 255), 0, 255).astype(int),
        1,
    ),
    "DICOM signed, Modality LUT before window": (
        lambda: written(dicom(np.subtract(ramp(2047, "int16"), 1024).astype("int16"), rescaled)),
        EXPECTED,
        1,
    ),
    "DICOM MONOCHROME1": (lambda: written(dicom(ramp(4095), monochrome1)), 255 - EXPECTED, 1),
    "DICOM VOI LUT": (lambda: written(dicom(ramp(255, "uint8"), voi_lut, bits=8)), 255 - EXPECTED, 1),
    "DICOM padding left out": (with_padding, EXPECTED, 1),
    "DICOM window without values": (lambda: written(dicom(ramp(3000), elements(WindowCenter=None, WindowWidth=None))), EXPECTED, 1),
    "DICOM VOI LUT without items": (lambda: written(dicom(ramp(3000), elements(VOILUTSequence=DicomSequence([])))), EXPECTED, 1),
    "DICOM empty rescale": (lambda: written(dicom(ramp(3000), elements(RescaleSlope=None, RescaleIntercept=None))), EXPECTED, 1),
    "DICOM empty padding": (lambda: written(dicom(ramp(3000), elements(PixelPaddingValue=None))), EXPECTED, 1),
    "DICOM several windows, the first counts": (
        lambda: written(dicom(ramp(4095), elements(WindowCenter=[2048, 100], WindowWidth=[4096, 50]))),
        EXPECTED,
        1,
    ),
    "DICOM negative slope with a window": (
        lambda: written(dicom(ramp(4095), elements(RescaleSlope=-1, RescaleIntercept=4095, WindowCenter=2048, WindowWidth=4096))),
        255 - EXPECTED,
        1,
    ),
    "DICOM window SIGMOID": (
        lambda: written(dicom(ramp(4095), elements(WindowCenter=2048, WindowWidth=1024, VOILUTFunction="SIGMOID"))),
        SIGMOID,
        1,
    ),
    "DICOM window LINEAR_EXACT": (
        lambda: written(dicom(ramp(4095), elements(WindowCenter=2048, WindowWidth=2048, VOILUTFunction="LINEAR_EXACT"))),
        EXACT,
        1,
    ),
    "DICOM window of no width": (lambda: written(dicom(ramp(3000), elements(WindowCenter=40, WindowWidth=0))), EXPECTED, 1),
    "DICOM window beside all values": (lambda: written(dicom(ramp(3000), elements(WindowCenter=-9000, WindowWidth=400))), EXPECTED, 1),
    "DICOM one hot pixel": (lambda: written(dicom(with_hot_pixel(3000, 65535), bits=16)), EXPECTED, 1),
    "PNG one hot pixel": (lambda: encoded(Image.fromarray(with_hot_pixel(3000, 65535)), "PNG"), EXPECTED, 1),
    "TIFF 16-bit WhiteIsZero": (lambda: white_is_zero(ramp(4095)), 255 - EXPECTED, 1),
    "DICOM padding range": (
        lambda: padded_at(5, 4000, PixelPaddingRangeLimit=4095, WindowCenter=2048, WindowWidth=4096),
        black_up_to(5, np.round(np.round(np.linspace(0, 3000, 67)) / 4095 * 255).astype(int)),
        1,
    ),
    "DICOM padding is black without a window": (lambda: padded_at(5, 4095), black_up_to(5, stretched(5)), 1),
    "DICOM padding is black in MONOCHROME1": (lambda: padded_at(5, 0, "MONOCHROME1"), black_up_to(5, 255 - stretched(5)), 1),
    "DICOM RGB with 12 bits in 16": (colour_12_in_16, EXPECTED, 1),
    "DICOM Presentation LUT INVERSE": (lambda: written(dicom(ramp(4095), elements(PresentationLUTShape="INVERSE"))), 255 - EXPECTED, 1),
    "DICOM MONOCHROME1 with INVERSE, once": (
        lambda: written(dicom(ramp(4095), elements(PresentationLUTShape="INVERSE", PhotometricInterpretation="MONOCHROME1"))),
        255 - EXPECTED,
        1,
    ),
    "DICOM MONOCHROME1 with IDENTITY": (
        lambda: written(dicom(ramp(4095), elements(PresentationLUTShape="IDENTITY", PhotometricInterpretation="MONOCHROME1"))),
        255 - EXPECTED,
        1,
    ),
    "DICOM MONOCHROME2 with IDENTITY": (lambda: written(dicom(ramp(4095), elements(PresentationLUTShape="IDENTITY"))), EXPECTED, 1),
    "DICOM VOI LUT from 12 bits to 8": (lambda: written(dicom(ramp(4095), elements(VOILUTSequence=table(FROM_12_TO_8, 8)))), EXPECTED, 1),
    "DICOM VOI LUT of packed bytes": (
        lambda: written(dicom(ramp(4095), elements(VOILUTSequence=table(FROM_12_TO_8.astype("uint8"), 8)))),
        EXPECTED,
        1,
    ),
    "DICOM VOI LUT of 12 bits that says 16": (
        lambda: written(dicom(ramp(4095), elements(VOILUTSequence=table(np.arange(4096, dtype="uint16"), 16)))),
        EXPECTED,
        1,
    ),
    "DICOM VOI LUT of 11 bits that says 12": (
        lambda: written(dicom(ramp(4095), elements(VOILUTSequence=table(np.arange(4096, dtype="uint16") >> 1, 12)))),
        EXPECTED // 2,
        1,
    ),
    "DICOM VOI LUT that begins below zero": (
        lambda: written(
            dicom(
                np.subtract(ramp(4095, "int16"), 2048).astype("int16"),
                elements(VOILUTSequence=table(np.arange(4096, dtype="uint16"), 12, -2048)),
            )
        ),
        EXPECTED,
        1,
    ),
    "DICOM VOI LUT without a table": (lambda: written(dicom(ramp(3000), elements(VOILUTSequence=[pydicom.Dataset()]))), EXPECTED, 1),
    "DICOM VOI LUT of one value, then a window": (
        lambda: written(
            dicom(
                ramp(4095),
                elements(VOILUTSequence=table(np.full(4096, 7, "uint16"), 8), WindowCenter=1024, WindowWidth=2048),
            )
        ),
        np.clip(np.round(np.linspace(0, 4095, 67) / 2047 * 255), 0, 255).astype(int),
        1,
    ),
    "DICOM Modality LUT of 12 bits": (
        lambda: written(dicom(ramp(4095), elements(ModalityLUTSequence=table(np.arange(4095, -1, -1, dtype="uint16"), 12)))),
        255 - EXPECTED,
        1,
    ),
    "DICOM Modality LUT without items": (lambda: written(dicom(ramp(3000), elements(ModalityLUTSequence=[]))), EXPECTED, 1),
    "DICOM window with a decimal comma": (lambda: misspelt(WindowCenter="40,5", WindowWidth="80,0"), EXPECTED, 1),
    "DICOM first window blank": (lambda: misspelt(WindowCenter="\\1500.5", WindowWidth="\\3001"), EXPECTED, 1),
    "DICOM slope that is no number": (lambda: misspelt(RescaleSlope="nan", RescaleIntercept="x"), EXPECTED, 1),
    "DICOM spacing that is no number": (lambda: misspelt(PixelSpacing="0.2\\x"), EXPECTED, 1),
    "DICOM number of frames blank": (lambda: misspelt(NumberOfFrames=" "), EXPECTED, 1),
    "DICOM window of width 1, a placeholder": (lambda: written(dicom(ramp(3000), elements(WindowCenter=1500, WindowWidth=1))), EXPECTED, 1),
    "DICOM window at a hot pixel": (lambda: window_beside_all_but(50_000, slice(1), slice(1)), EXPECTED, 1),
    "DICOM window at the padding": (
        lambda: window_beside_all_but(4095, slice(None), slice(5)),
        black_up_to(5, stretched(5)),
        1,
    ),
    "DICOM everything is padding": (
        lambda: written(dicom(ramp(3000), elements(PixelPaddingValue=0, PixelPaddingRangeLimit=4095))),
        EXPECTED,
        1,
    ),
    "DICOM signed padding written as unsigned": (signed_padding_as_unsigned, black_up_to(5, stretched(5)), 1),
    "PNG RGB with 12 bits in 16": (lambda: png_16_bit_rgb(ramp(4095)), EXPECTED // 17 * 17, 17),
    "PNG RGB 16-bit": (lambda: png_16_bit_rgb(ramp(65535)), EXPECTED, 1),
    "DICOM RLE": (lambda: compressed(RLELossless, ramp(4095), 12), EXPECTED, 1),
    "DICOM JPEG 2000": (lambda: compressed(JPEG2000Lossless, ramp(4095), 12), EXPECTED, 1),
    "DICOM JPEG Baseline": (jpeg_baseline, EXPECTED, 3),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_image(name: str) -> None:
    make, expected, tolerance = REFERENCE[name]
    pixels = read_radiograph(make()).pixels
    assert pixels.shape == (SIDE, 67)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels[-1].astype(int) - expected).max() <= tolerance


def test_a_hot_column_costs_nothing_wherever_it_lies() -> None:
    """Every 16th pixel of a film 4096 wide, say, would lie in 256 columns alone: a hot one among them would count 16 times."""
    stored = np.tile(np.linspace(0, 3000, 4096).astype("uint16"), (1024, 1))
    for column in (1600, 1601):
        stored[:, column] = 65535
        pixels = read_radiograph(written(dicom(stored, bits=16))).pixels
        assert pixels[0, 2048] == pytest.approx(128, abs=1)
        stored[:, column] = stored[:, column - 1]


def test_dicom_without_preamble_is_read() -> None:
    dataset = dicom(ramp(4095))
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, implicit_vr=True, little_endian=True)
    data = buffer.getvalue()
    assert data[128:132] != b"DICM"
    assert read_radiograph(data).format == "DICOM"


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to view
    pixels = read_radiograph(encoded(Image.fromarray(ramp(255, "uint8")), "JPEG", quality=100, exif=exif)).pixels
    assert pixels.shape == (67, SIDE)
    assert pixels[0].mean() < pixels[-1].mean()


@pytest.mark.parametrize(
    ("element", "between", "shape"),
    [
        ("PixelSpacing", [0.4, 0.2], (2 * SIDE, 67)),
        ("PixelSpacing", [0.2, 0.4], (SIDE, 2 * 67)),
        ("ImagerPixelSpacing", [0.3, 0.2], (96, 67)),
        ("NominalScannedPixelSpacing", [0.2, 0.3], (SIDE, 100)),
        ("PixelAspectRatio", [3, 2], (96, 67)),
        ("PixelSpacing", [0.1430, 0.1431], (SIDE, 67)),
        ("PixelSpacing", [9.0, 0.1], (SIDE, 67)),
        ("PixelSpacing", None, (SIDE, 67)),
    ],
)
def test_pixels_are_made_square(element: str, between: list[float] | None, shape: tuple[int, int]) -> None:
    """The distance between rows comes first; what cannot be believed is said and left alone."""
    found = read_radiograph(written(dicom(ramp(4095), elements(**{element: between}))))
    assert found.pixels.shape == shape
    assert bool(found.warnings) == (between == [9.0, 0.1])


@pytest.mark.parametrize(
    "change",
    [
        elements(ViewPosition="PA", SeriesDescription="CHEST PA AND LAT"),
        elements(ViewPosition="AP", SeriesDescription="Thorax lateral"),
        elements(ViewPosition=None, SeriesDescription="bilateral lower lobes, platelike"),
        elements(ViewPosition=None, PatientOrientation=["L", "F"]),
        elements(ViewPosition=None, PatientOrientation=None, SeriesDescription=None),
        elements(ViewPosition=None, PatientOrientation="PA"),
        elements(ViewPosition=None, PatientOrientation=["A", "P"]),
        elements(ViewPosition=None, PatientOrientation=["LA", "FP"]),
        elements(ViewPosition="PA ERECT", SeriesDescription="THORAX LAT"),
        elements(ViewPosition=None, SeriesDescription="LAT", ViewCodeSequence=view_code_item("SCT", "272479007", "postero-anterior")),
    ],
)
def test_frontal_films_are_not_taken_for_laterals(change: Callable[[pydicom.Dataset], None]) -> None:
    assert read_radiograph(written(dicom(ramp(4095), change))).warnings == ()


def test_what_dicom_says_of_the_film_is_passed_on() -> None:
    def warnings(**values: object) -> str:
        return "; ".join(read_radiograph(written(dicom(ramp(4095), elements(**values)))).warnings)

    assert "it may name the patient" in warnings(BurnedInAnnotation="YES")
    assert warnings(BurnedInAnnotation="NO") == ""
    assert "is this the frontal one?" in warnings(ViewPosition=None, SeriesDescription="Thorax PA LAT")
    assert "over the range of its values" in warnings(WindowCenter=-9000, WindowWidth=400)
    assert "over the range of its values" in warnings(WindowCenter=0.5, WindowWidth=0.5)
    assert "that is not believed" in warnings(PixelPaddingValue=0, PixelPaddingRangeLimit=4095)
    for text in ("Thorax p.a. und lat.", "AP / seitl.", "thorax face et profil", "postero-anterior and lateral"):
        assert "is this the frontal one?" in warnings(ViewPosition=None, SeriesDescription=text)
    assert "is this the frontal one?" in warnings(ViewPosition=None, SeriesDescription="CHEST PA", ProtocolName="CHEST LAT")
    assert "is this the frontal one?" in "; ".join(read_radiograph(misspelt(ViewPosition="PA/LAT")).warnings)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("shape", ["INVERSE", "IDENTITY", None])
def test_only_contradictions_of_black_and_white_are_noted(photometric: str, shape: str | None) -> None:
    found = read_radiograph(written(dicom(ramp(4095), elements(PhotometricInterpretation=photometric, PresentationLUTShape=shape))))
    contradict = (photometric, shape) in {("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")}
    assert ["contradicts itself" in note for note in found.warnings] == [True] * contradict


def test_what_is_left_of_16_bit_colours_is_noted() -> None:
    assert "fills 4" in read_radiograph(png_16_bit_rgb(ramp(4095))).warnings[0]
    assert read_radiograph(png_16_bit_rgb(ramp(65535))).warnings == ()


@pytest.mark.parametrize("code", sorted(OTHER_VIEW_CODES))
def test_view_codes_are_those_of_the_standard(code: tuple[str, str]) -> None:
    """Each is in CID 4010 under the value that pydicom's dictionary has, and names no frontal view."""
    views = [getattr(codes.cid4010, name) for name in codes.cid4010.dir()]
    (meaning,) = {view.meaning for view in views if view == Code(code[1], code[0], "")}
    assert set(meaning.lower().replace("-", " ").split()) & {"lateral", "medial", "sagittal", "oblique"}


def test_the_patient_is_known_from_dicom_alone() -> None:
    def patient(value: object) -> str | None:
        return read_radiograph(written(dicom(ramp(4095), elements(PatientID=value)))).patient_id

    assert [patient(" P 12 "), patient(""), patient(None)] == ["P 12", None, None]
    assert read_radiograph(written(dicom(ramp(4095)))).patient_id is None
    assert read_radiograph(encoded(Image.fromarray(ramp(255, "uint8")), "PNG")).patient_id is None


def test_no_message_names_the_patient() -> None:
    who = elements(PatientID="Q4711", PatientName="MUELLER^ADA", SeriesDescription="MUELLER LAT 1955", ViewPosition=None)
    with pytest.raises(ImageError) as caught:
        read_radiograph(written(dicom(ramp(4095), who)), "film")
    assert "Series Description (0008,103E) LAT" in str(caught.value)
    assert not any(word in str(caught.value) for word in ("MUELLER", "Q4711", "1955"))
    for element in ("PhotometricInterpretation", "Modality", "BodyPartExamined", "ImageType"):
        try:
            notes = "; ".join(read_radiograph(misspelt(**{element: "MUELLER^ADA"}), "film").warnings)
        except ImageError as error:
            notes = str(error)
        assert "MUELLER" not in notes, element
    misplaced = elements(PatientOrientation=["ANNA", "MUELLER"], ViewPosition="MUELLER", BurnedInAnnotation="YES")
    assert not any("MUELLER" in note for note in read_radiograph(written(dicom(ramp(4095), misplaced)), "film").warnings)


@pytest.mark.parametrize(
    ("part", "noted"),
    [
        *(
            (part, False)
            for part in ("", "CHEST", "Thorax", "LUNG", "CHEST_TO_ABDOMEN", "CHESTABDPELVIS", "ABDOMENCHEST", "PORT CHEST", "CHEST SPINE")
        ),
        *(
            (part, False)
            for part in (
                "BRUST",
                "TORAX",
                "T?RAX",
                "TÒRAX",
                "POUMON",
                "PECHO",
                "PECTO",
                "KLATKA PIERSIOWA",
                "NECK CHEST",
                "CXR",
                "BABYGRAM",
            )
        ),
        *((part, True) for part in ("HEART", "RIBS", "BREAST", "WHOLEBODY", "FACE", "DEFAULT", "KNIE", "MUELLER^ADA")),
    ],
)
def test_what_may_be_a_chest_film_is_read(part: str, noted: bool) -> None:
    notes = read_radiograph(misspelt(BodyPartExamined=part)).warnings
    assert ["is this a chest film?" in note for note in notes] == [True] * noted
    assert not any("MUELLER" in note for note in notes)


@pytest.mark.parametrize("region", [("SCT", "51185008"), ("SRT", "T-D3000"), ("SNM3", "T-D3000"), ("99HERE", "7"), ("SCT", "113197003")])
def test_regions_that_may_be_the_chest_are_read(region: tuple[str, str]) -> None:
    item = view_code_item(*region, "of a region")
    assert read_radiograph(written(dicom(ramp(4095), elements(AnatomicRegionSequence=item)))).warnings == ()


def test_a_chest_named_once_is_believed_over_another_part() -> None:
    hand = view_code_item("SCT", "85562004", "Hand")
    assert read_radiograph(written(dicom(ramp(4095), elements(BodyPartExamined="CHEST", AnatomicRegionSequence=hand)))).format == "DICOM"
    chest = view_code_item("SRT", "T-D3000", "Chest")
    assert read_radiograph(written(dicom(ramp(4095), elements(BodyPartExamined="HAND", AnatomicRegionSequence=chest)))).format == "DICOM"


@pytest.mark.parametrize("region", sorted(OTHER_REGIONS))
def test_region_codes_are_those_of_the_standard(region: tuple[str, str]) -> None:
    """Each is in CID 4009 under the value that pydicom's dictionary has, or one of the two that were replaced in 2019."""
    name = OTHER_REGIONS[region]
    if name.endswith("as coded until 2019"):
        return
    images = [getattr(codes.cid4009, keyword) for keyword in codes.cid4009.dir()]
    (meaning,) = {image.meaning for image in images if image == Code(region[1], region[0], "")}
    assert set(re.findall("[a-z]+", name)) >= set(re.findall("[a-z]+", meaning.lower().replace("-", " "))) - {"structure", "of", "entire"}


@pytest.mark.parametrize("part", ["CHEST", "LUNG", "CHESTABDOMEN", "NECKCHEST", "HEART", "RIB", "MEDIASTINUM", "WHOLEBODY", "BREAST"])
def test_no_part_that_shows_the_lungs_is_another_part(part: str) -> None:
    assert part not in OTHER_PARTS


# ------------------------------------------------------------------------------------------------- unusable files


def bomb() -> bytes:
    """A PNG of 40,000×40,000 pixels in a few hundred bytes."""
    return png(struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0), b"\0" * 1000)


def large() -> bytes:
    """Above our limit, below Pillow's own."""
    return encoded(Image.new("1", (10_001, 10_001)), "PNG")


def multi_frame(dataset: pydicom.Dataset) -> None:
    dataset.NumberOfFrames = 2
    dataset.PixelData = dataset.PixelData * 2


def truncated_dicom() -> bytes:
    return written(dicom(ramp(4095)))[:-3000]


def tag(name: str, value: object) -> Callable[[], bytes]:
    return lambda: written(dicom(ramp(4095), lambda dataset: setattr(dataset, name, value)))


def view_code(scheme: str, code: str, meaning: str = "of a view") -> Callable[[], bytes]:
    return lambda: written(dicom(ramp(4095), elements(ViewPosition=None, ViewCodeSequence=view_code_item(scheme, code, meaning))))


def described(name: str, text: str) -> Callable[[], bytes]:
    return lambda: written(dicom(ramp(4095), elements(**{name: text, "ViewPosition": None})))


def not_finite() -> bytes:
    values = ramp(100, "float32")
    values[3, 3] = np.nan
    return encoded(Image.fromarray(values), "TIFF")


def without_pixels() -> bytes:
    dataset = dicom(ramp(4095))
    del dataset.PixelData
    return written(dataset)


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"hello, this is no image at all", "not an image"),
    "PDF": (lambda: b"%PDF-1.7 ...", "a PDF"),
    "truncated PNG": (lambda: encoded(Image.fromarray(ramp(255, "uint8")), "PNG")[:-60], "damaged"),
    "truncated JPEG": (
        lambda: encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99), "uint8")), "JPEG")[:-900],
        "damaged",
    ),
    "1×1": (lambda: encoded(Image.new("L", (1, 1), 7), "PNG"), "too small"),
    "too narrow": (lambda: encoded(Image.fromarray(np.tile(ramp(255, "uint8"), (6, 1))), "PNG"), "too narrow"),
    "decompression bomb": (bomb, "too large"),
    "larger than any detector": (large, "too large"),
    "all black": (lambda: encoded(Image.new("L", (99, 99), 0), "PNG"), "blank"),
    "all black, 16-bit": (lambda: encoded(Image.fromarray(np.zeros((99, 99), "uint16")), "PNG"), "blank"),
    "NaN": (not_finite, "NaN"),
    "two pages": (lambda: encoded(Image.new("L", (99, 99)), "TIFF", save_all=True, append_images=[Image.new("L", (99, 99))]), "pages"),
    "DICOM without pixels": (without_pixels, "no pixels"),
    "DICOM multi-frame": (lambda: written(dicom(ramp(4095), multi_frame)), "multi-frame"),
    "DICOM truncated": (truncated_dicom, "cannot be decoded"),
    "DICOM CT": (tag("Modality", "CT"), "not a projection"),
    "DICOM lateral": (tag("ViewPosition", "LL"), "frontal"),
    "DICOM LAT": (tag("ViewPosition", "LAT"), "View Position (0018,5101) LAT"),
    "DICOM LLAT": (tag("ViewPosition", "LLAT"), "frontal"),
    "DICOM oblique": (tag("ViewPosition", "RLO"), "frontal"),
    "DICOM lateral by orientation": (tag("PatientOrientation", ["A", "F"]), "Patient Orientation (0020,0020) A\\F"),
    "DICOM lateral by code": (view_code("SCT", "399067008"), "View Code Sequence (0054,0220) 399067008"),
    "DICOM lateral by older code": (view_code("SNM3", "R-10236"), "View Code Sequence (0054,0220) R-10236"),
    "DICOM lateral in two words": (tag("ViewPosition", "LEFT LATERAL"), "View Position (0018,5101) LATERAL"),
    "DICOM decubitus": (tag("ViewPosition", "AP DECUB"), "View Position (0018,5101) DECUB"),
    "DICOM anterior oblique": (tag("ViewPosition", "LAO"), "View Position (0018,5101) LAO"),
    "DICOM lateral by a private code": (view_code("99HERE", "7", "Left Lateral"), "View Code Sequence (0054,0220) LATERAL"),
    "DICOM axial by orientation": (tag("PatientOrientation", ["R", "A"]), "Patient Orientation (0020,0020) R\\A"),
    "DICOM lateral by an abbreviation": (described("SeriesDescription", "Thorax seitl."), "Series Description (0008,103E) SEITL"),
    "DICOM lateral by one letter more": (described("AcquisitionDeviceProcessingDescription", "CHEST_LLAT"), "LLAT"),
    "DICOM lateral in French": (described("SeriesDescription", "thorax latérale"), "Series Description (0008,103E) LATÉRALE"),
    "DICOM lateral beside both": (
        lambda: written(dicom(ramp(4095), elements(ViewPosition=None, SeriesDescription="CHEST PA AND LATERAL", ProtocolName="CHEST LAT"))),
        "Protocol Name (0018,1030) LAT",
    ),
    "DICOM lateral by description": (described("SeriesDescription", "CHEST_LAT"), "Series Description (0008,103E) LAT"),
    "DICOM lateral by protocol": (described("ProtocolName", "Thorax seitlich"), "Protocol Name (0018,1030) SEITLICH"),
    "DICOM huge": (tag("Rows", 65_000), ""),
    "DICOM raw detector data by intent": (
        tag("PresentationIntentType", "FOR PROCESSING"),
        'Presentation Intent Type (0008,0068) FOR PROCESSING. Next: send the "for presentation" image',
    ),
    "DICOM raw detector data by class": (
        tag("SOPClassUID", "1.2.840.10008.5.1.4.1.1.1.1.1"),
        "SOP Class UID (0008,0016) 1.2.840.10008.5.1.4.1.1.1.1.1 (Digital X-Ray Image Storage - For Processing)",
    ),
    "DICOM CT by class": (tag("SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"), "SOP Class UID (0008,0016) 1.2.840.10008.5.1.4.1.1.2 (CT Image"),
    "DICOM mammography": (tag("SOPClassUID", "1.2.840.10008.5.1.4.1.1.1.2"), "Digital Mammography X-Ray Image"),
    "DICOM MR by modality": (tag("Modality", "MR"), "Modality (0008,0060) MR"),
    "DICOM modality of no known term": (tag("Modality", "ADA"), "Modality (0008,0060) of no known term"),
    "DICOM frames": (lambda: written(dicom(ramp(4095), multi_frame)), "Number of Frames (0028,0008) 2"),
    "DICOM scout view": (tag("ImageType", ["DERIVED", "SECONDARY", "LOCALIZER"]), "Image Type (0008,0008) LOCALIZER"),
    "DICOM hand": (tag("BodyPartExamined", "HAND"), "Body Part Examined (0018,0015) HAND"),
    "DICOM hands, left": (lambda: misspelt(BodyPartExamined="Left hands"), "Body Part Examined (0018,0015) HAND"),
    "DICOM thoracic spine": (tag("BodyPartExamined", "THORACIC_SPINE"), "Body Part Examined (0018,0015) SPINE"),
    "DICOM abdomen, portable": (tag("BodyPartExamined", "PORT ABDOMEN"), "Body Part Examined (0018,0015) ABDOMEN"),
    "DICOM knee by code": (
        tag("AnatomicRegionSequence", view_code_item("SCT", "72696002", "Knee")),
        "Anatomic Region Sequence (0008,2218) 72696002 (SCT: knee)",
    ),
    "DICOM knee by older code": (tag("AnatomicRegionSequence", view_code_item("SNM3", "T-D9200", "Knee")), "T-D9200 (SRT: knee)"),
    "DICOM one bit": (tag("BitsAllocated", 1), "Bits Allocated (0028,0100) 1"),
    "DICOM more pixels than it says": (tag("Rows", 16), "holds more pixels than it says"),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_file_is_named_with_reason(name: str) -> None:
    make, words = BAD[name]
    with pytest.raises(ImageError) as caught:
        read_radiograph(make(), "film.xyz")
    message = str(caught.value)
    assert message.startswith("film.xyz")
    assert words in message
    assert caught.value.exit_code == 1


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read"):
        read_radiograph(tmp_path / "gone.png")


@given(st.binary(max_size=600))
def test_any_bytes_give_an_image_or_an_image_error(data: bytes) -> None:
    try:
        read_radiograph(data)
    except ImageError:
        pass


@given(st.binary(max_size=300))
def test_damaged_dicom_headers_give_an_image_error(tail: bytes) -> None:
    with pytest.raises(ImageError):
        read_radiograph(b"\0" * 128 + b"DICM" + tail)


# ------------------------------------------------------------------------------------------------------ letterbox


@given(st.integers(1, 700), st.integers(1, 700))
def test_letterbox_keeps_aspect_and_centres(height: int, width: int) -> None:
    square, box = letterbox(np.full((height, width), 200, np.uint8))
    assert square.shape == (256, 256)
    assert max(box.width, box.height) == 256
    assert abs(box.width - width * box.scale) <= 0.5 + 1e-9 or box.width == 1
    assert abs(box.height - height * box.scale) <= 0.5 + 1e-9 or box.height == 1
    assert abs((256 - box.width) - 2 * box.left) <= 1
    assert abs((256 - box.height) - 2 * box.top) <= 1


@given(st.integers(64, 400), st.integers(64, 400))
def test_letterbox_round_trip(height: int, width: int) -> None:
    """What the box cuts out is the picture and nothing else; outside it the square is black."""
    square, box = letterbox(np.full((height, width), 200, np.uint8))
    assert (box.crop(square) == 200).all()
    assert square.astype(int).sum() == 200 * box.width * box.height


def test_letterbox_is_the_identity_on_its_own_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8)
    square, box = letterbox(pixels)
    assert (square == pixels).all()
    assert (box.left, box.top, box.scale) == (0, 0, 1.0)


def test_letterbox_averages_when_it_shrinks() -> None:
    """A fine chessboard becomes grey, not a moiré of black and white."""
    board = (np.indices((1024, 1024)).sum(axis=0) % 2 * 255).astype(np.uint8)
    square, _ = letterbox(board)
    assert square[8:-8, 8:-8].min() >= 120
    assert square[8:-8, 8:-8].max() <= 135


def test_limit_allows_every_detector_in_use() -> None:
    assert MAX_PIXELS > 5_000 * 6_000
