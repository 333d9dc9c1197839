"""Every transfer syntax in use: known pixels, encoded by another library wherever there is one, come back; the rest is refused by name."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gdcm
import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph import syntaxes
from cxr_retrieval.radiograph.grey import MAX_PIXELS
from cxr_retrieval.radiograph.letterbox import letterbox, pixel_digest
from cxr_retrieval.radiograph.reading import read_radiograph
from cxr_retrieval.radiograph.syntaxes import DECODERS, ENCAPSULATED_UNCOMPRESSED, stored_values, transfer_syntax

PAGE = Path(__file__).parents[2] / "docs" / "dicom.md"
SHAPE = (67, 71)
Pixels = NDArray[Any]


def picture(kind: str) -> Pixels:
    """Smooth, with both ends of its range: "u12" are 12 unsigned bits in 16, "s16" 16 signed ones."""
    bits, signed = int(kind[1:]), kind[0] == "s"
    rows, columns = np.indices(SHAPE) / 11
    waves = np.cos(rows) + np.sin(1.3 * columns + rows)
    levels = np.rint((waves - waves.min()) / np.ptp(waves) * (2**bits - 1)) - (2 ** (bits - 1) if signed else 0)
    return levels.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


def dicom(stored: Pixels, bits: int, syntax: str = uid.ExplicitVRLittleEndian, photometric: str = "MONOCHROME2") -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.UID(syntax)
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3.4"
    dataset.Modality, dataset.ViewPosition = "DX", "PA"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * stored.dtype.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    return dataset


def written(dataset: pydicom.Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def encapsulated(frame: bytes, stored: Pixels, bits: int, syntax: str, photometric: str = "MONOCHROME2") -> bytes:
    dataset = dicom(stored, bits, syntax, photometric)
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    return written(dataset)


def by_gdcm(term: str, stored: Pixels, bits: int, syntax: str, photometric: str) -> bytes:
    """A whole file as GDCM writes it, in the syntax that it calls `term`."""
    source, target = Path(f"/dev/shm/cxr-{id(stored)}-in.dcm"), Path(f"/dev/shm/cxr-{id(stored)}-out.dcm")
    try:
        source.write_bytes(written(dicom(stored, bits, photometric=photometric)))
        reader = gdcm.ImageReader()
        reader.SetFileName(str(source))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, term)))
        change.SetForce(True)
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetImage(change.GetOutput())
        writer.SetFile(reader.GetFile())
        writer.SetFileName(str(target))
        assert writer.Write()
        data = target.read_bytes()
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    assert pydicom.dcmread(io.BytesIO(data)).file_meta.TransferSyntaxUID == syntax
    return data


def by_imagecodecs(encode: Callable[..., bytes], stored: Pixels, bits: int, syntax: str, photometric: str, **options: Any) -> bytes:
    return encapsulated(encode(stored, **options), stored, bits, syntax, photometric)


def by_openjpeg(stored: Pixels, bits: int, syntax: str, photometric: str) -> bytes:
    dataset = dicom(stored, bits, photometric=photometric)
    dataset.compress(syntax, j2k_cr=[4], encoding_plugin="pylibjpeg", generate_instance_uid=False)
    return written(dataset)


def by_hand(stored: Pixels, bits: int, syntax: str, photometric: str) -> bytes:
    return encapsulated(stored.tobytes(), stored, bits, syntax, photometric)


def by_pydicom(stored: Pixels, bits: int, syntax: str, photometric: str) -> bytes:
    return written(dicom(stored, bits, syntax, photometric))


@dataclass(frozen=True)
class Case:
    """Who writes which pixels, and how far from them the values may be that are read."""

    encoder: str
    write: Callable[[Pixels, int, str, str], bytes]
    kinds: tuple[str, ...]
    tolerance: int = 0


GREY = ("u8", "u12", "u16", "s12", "s16")
ic = partial(partial, by_imagecodecs)
CASES: dict[str, tuple[Case, ...]] = {
    uid.ImplicitVRLittleEndian: (Case("GDCM", partial(by_gdcm, "ImplicitVRLittleEndian"), GREY),),
    uid.ExplicitVRLittleEndian: (Case("pydicom", by_pydicom, GREY),),
    ENCAPSULATED_UNCOMPRESSED: (Case("hand", by_hand, GREY),),
    uid.DeflatedExplicitVRLittleEndian: (Case("GDCM", partial(by_gdcm, "DeflatedExplicitVRLittleEndian"), GREY),),
    uid.ExplicitVRBigEndian: (Case("GDCM", partial(by_gdcm, "ExplicitVRBigEndian"), GREY),),
    uid.JPEGBaseline8Bit: (Case("GDCM", partial(by_gdcm, "JPEGBaselineProcess1"), ("u8",), 2),),
    uid.JPEGExtended12Bit: (
        Case("GDCM", partial(by_gdcm, "JPEGExtendedProcess2_4"), ("u8",), 2),
        Case("imagecodecs", ic(imagecodecs.jpeg8_encode, level=98, bitspersample=12), ("u12",), 8),
    ),
    uid.JPEGLossless: (
        Case("GDCM", partial(by_gdcm, "JPEGLosslessProcess14"), GREY),
        Case("imagecodecs", ic(imagecodecs.jpeg8_encode, lossless=True, predictor=4), ("u8", "u16")),
    ),
    uid.JPEGLosslessSV1: (
        Case("GDCM", partial(by_gdcm, "JPEGLosslessProcess14_1"), GREY),
        Case("imagecodecs", ic(imagecodecs.jpeg8_encode, lossless=True, predictor=1), ("u8", "u16")),
    ),
    uid.JPEGLSLossless: (
        Case("GDCM", partial(by_gdcm, "JPEGLSLossless"), GREY),
        Case("imagecodecs", ic(imagecodecs.jpegls_encode), ("u8", "u16")),
    ),
    uid.JPEGLSNearLossless: (Case("imagecodecs", ic(imagecodecs.jpegls_encode, level=3), ("u8", "u16"), 3),),
    uid.JPEG2000Lossless: (Case("GDCM", partial(by_gdcm, "JPEG2000Lossless"), GREY),),
    uid.JPEG2000: (Case("pylibjpeg", by_openjpeg, GREY, 40), Case("GDCM", partial(by_gdcm, "JPEG2000"), GREY, 40)),
    uid.HTJ2KLossless: (Case("imagecodecs", ic(imagecodecs.htj2k_encode, reversible=True), GREY),),
    uid.HTJ2KLosslessRPCL: (Case("imagecodecs", ic(imagecodecs.htj2k_encode, reversible=True), GREY),),
    uid.HTJ2K: (Case("imagecodecs", ic(imagecodecs.htj2k_encode, reversible=False), GREY, 8),),
    uid.RLELossless: (Case("GDCM", partial(by_gdcm, "RLELossless"), GREY),),
}
REFUSED = (
    *(f"1.2.840.10008.1.2.4.{number}" for number in (52, 53, 54, 55, 56, 58, 59, 60, 61, 62, 63, 64, 65, 66)),
    *(f"1.2.840.10008.1.2.4.{number}" for number in (92, 93, 94, 95, 100, 101, 102, 103, 104, 105, 106, 107, 108, 110, 111, 112, 204, 205)),
    "1.2.840.10008.1.2.8.1",
)


def read(data: bytes) -> Pixels:
    dataset = pydicom.dcmread(io.BytesIO(syntaxes.inflated(data, "film")))
    return stored_values(dataset, transfer_syntax(dataset, "film"), "film")


def cases() -> Iterator[Any]:
    for syntax, several in CASES.items():
        for case in several:
            for kind in case.kinds:
                yield pytest.param(syntax, case, kind, id=f"{uid.UID(syntax).name} {kind} by {case.encoder}")


@pytest.mark.parametrize(("syntax", "case", "kind"), [*cases()])
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_known_pixels_come_back(syntax: str, case: Case, kind: str) -> None:
    """As stored; and in grey as the uncompressed file has them, which MONOCHROME1 turns."""
    stored, bits = picture(kind), int(kind[1:])
    found = read(case.write(stored, bits, syntax, "MONOCHROME2"))
    assert found.shape == SHAPE
    assert np.abs(found.astype(int) - stored.astype(int)).max() <= case.tolerance
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        grey = read_radiograph(case.write(stored, bits, syntax, photometric)).pixels
        plain = read_radiograph(written(dicom(stored, bits, photometric=photometric))).pixels
        assert np.abs(grey.astype(int) - plain.astype(int)).max() <= max(case.tolerance, case.tolerance and 3)
        assert np.ptp(plain) > 200


def test_the_page_tells_what_the_code_reads() -> None:
    """Every row of `docs/dicom.md`: syntax, decoder, and which bits were tested with which encoder."""
    names = {"numpy": "none needed", "pillow": "Pillow (libjpeg-turbo)", "gdcm": "GDCM", "pylibjpeg": "pylibjpeg"}
    rows = dict[str, tuple[str, str]]()
    for line in PAGE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and re.fullmatch(r"`1\.2\.840\.10008\.1\.2[.0-9]*`", cells[1]):
            rows[cells[1].strip("`")] = (cells[2], cells[3])
    assert rows.keys() == DECODERS.keys() == CASES.keys()
    for syntax, (decoder, tested) in rows.items():
        assert decoder.startswith(names[DECODERS[uid.UID(syntax)]]), syntax
        expected = "; ".join(f"{', '.join(case.kinds)} by {case.encoder}" + " (lossy)" * bool(case.tolerance) for case in CASES[syntax])
        assert tested == expected, syntax


@pytest.mark.parametrize("syntax", DECODERS)
def test_every_decoder_is_installed(syntax: str) -> None:
    decoder = get_decoder(uid.ExplicitVRLittleEndian if syntax == ENCAPSULATED_UNCOMPRESSED else uid.UID(syntax))
    assert DECODERS[syntax] == "numpy" or DECODERS[syntax] in decoder.available_plugins


@pytest.mark.parametrize("syntax", [*REFUSED, "1.2.840.113619.5.2", "1.3.6.1.4.1.5962.300.1"])
def test_any_other_syntax_is_refused_by_name(syntax: str) -> None:
    longest = uid.MPEG2MPMLF  # pydicom writes no syntax that it does not know
    data = encapsulated(bytes(100), picture("u8"), 8, longest).replace(longest.encode(), syntax.encode().ljust(len(longest), b"\0"))
    with pytest.raises(ImageError, match=re.escape(f"got Transfer Syntax UID (0002,0010) {syntax} (")) as caught:
        read_radiograph(data, "film")
    assert ("private or unknown" in str(caught.value)) == (syntax not in REFUSED)


def test_the_page_names_what_is_refused() -> None:
    page = PAGE.read_text("utf-8")
    for syntax in REFUSED:
        assert syntax.removeprefix("1.2.840.10008.1.2") in page


@pytest.mark.parametrize("implicit", [True, False])
def test_a_file_that_states_no_syntax_is_read_as_it_is_written(implicit: bool) -> None:
    """As files before 1995 and some exports: no preamble, no file meta information."""
    stored = picture("u12")
    buffer = io.BytesIO()
    dataset = dicom(stored, 12)
    del dataset.file_meta
    pydicom.dcmwrite(buffer, dataset, implicit_vr=implicit, little_endian=True)
    assert buffer.getvalue()[:2] == b"\x08\x00"
    plain = read_radiograph(written(dicom(stored, 12))).pixels
    assert (read_radiograph(buffer.getvalue()).pixels == plain).all()


def test_a_deflated_data_set_is_unpacked_as_far_as_a_film_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = CASES[uid.DeflatedExplicitVRLittleEndian][0].write(picture("u16"), 16, uid.DeflatedExplicitVRLittleEndian, "MONOCHROME2")
    assert read_radiograph(data).format == "DICOM"
    assert syntaxes._MOST_INFLATED > 2 * MAX_PIXELS  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(syntaxes, "_MOST_INFLATED", 5000)
    with pytest.raises(ImageError, match=r"film: too large; .* got a deflated data set of more than"):
        read_radiograph(data, "film")


@pytest.mark.parametrize("syntax", [syntax for syntax in DECODERS if DECODERS[syntax] != "numpy" and syntax != uid.RLELossless])
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_codestream_of_another_shape_is_refused(syntax: str) -> None:
    """Rows and columns changed places: as many pixels, and a sheared film."""
    case = CASES[syntax][0]
    dataset = pydicom.dcmread(io.BytesIO(case.write(picture("u8"), 8, syntax, "MONOCHROME2")))
    dataset.Rows, dataset.Columns = dataset.Columns, dataset.Rows
    with pytest.raises(ImageError, match=r"another shape than it says; .* got a codestream of 67 rows and 71 columns"):
        read_radiograph(written(dataset))


# ---------------------------------------------------------------------------------------------------- unused bits

OVERLAY = np.indices(SHAPE).sum(axis=0) % 5 == 0


def beside(stored: Pixels, low: int = 0) -> Pixels:
    """The picture with an overlay of three bits above its 12, or with `low` bits below them."""
    if low:
        return ((stored.astype(np.int32) << low) | (7 * OVERLAY)).astype(stored.dtype)
    return (stored.view(np.uint16) & 0x0FFF | (0x7000 * OVERLAY).astype(np.uint16)).view(stored.dtype)


def overlaid(dataset: pydicom.Dataset, high: int) -> pydicom.Dataset:
    """PS3.3 C.9.2 as it was until 2004: a plane whose bits lie in Pixel Data."""
    dataset.BitsStored, dataset.HighBit = 12, high
    dataset.add_new(0x60000010, "US", SHAPE[0])
    dataset.add_new(0x60000011, "US", SHAPE[1])
    dataset.add_new(0x60000040, "CS", "G")
    dataset.add_new(0x60000050, "SS", [1, 1])
    dataset.add_new(0x60000100, "US", 16)
    dataset.add_new(0x60000102, "US", 12 if high == 11 else 0)
    return dataset


LOSSLESS = [syntax for syntax, several in CASES.items() if not several[0].tolerance]


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize("kind", ["u12", "s12"])
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_an_overlay_in_the_unused_bits_is_left_out(syntax: str, kind: str) -> None:
    stored = picture(kind)
    dataset = pydicom.dcmread(io.BytesIO(CASES[syntax][0].write(beside(stored), 16, syntax, "MONOCHROME2")))
    data = written(overlaid(dataset, 11))
    assert (read(data) == stored).all()
    assert (read_radiograph(data).pixels == read_radiograph(written(dicom(stored, 12))).pixels).all()


@pytest.mark.parametrize("kind", ["u12", "s12"])
def test_bits_below_the_stored_ones_are_left_out(kind: str) -> None:
    stored = picture(kind)
    assert (read(written(overlaid(dicom(beside(stored, 4), 16), 15))) == stored).all()
    for nonsense in (3, 99):
        assert (read(written(overlaid(dicom(beside(stored), 16), nonsense))) == stored).all()


def test_an_overlay_of_its_own_is_left_out() -> None:
    dataset = overlaid(dicom(picture("u12"), 12), 11)
    dataset[0x60000100].value, dataset[0x60000102].value = 1, 0
    dataset.add_new(0x60003000, "OW", np.packbits(OVERLAY).tobytes() + b"\0")
    assert (read_radiograph(written(dataset)).pixels == read_radiograph(written(dicom(picture("u12"), 12))).pixels).all()


def test_what_a_lossy_codec_adds_beyond_the_range_is_its_end() -> None:
    stored = picture("u12")
    beyond = np.where(stored == 4095, stored + 3, stored).astype(np.uint16)
    data = encapsulated(bytes(imagecodecs.jpegls_encode(beyond)), beyond, 12, uid.JPEGLSNearLossless)
    assert (read(data) == stored).all()


# ------------------------------------------------------------------------------------------ one film, many copies


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_film_is_the_same_in_every_lossless_syntax() -> None:
    """By the digest of its square, by which the journal counts copies; a lossy copy is another film."""
    stored = picture("u12")
    digests = {
        pixel_digest(letterbox(read_radiograph(CASES[syntax][0].write(stored, 12, syntax, "MONOCHROME2")).pixels)[0]) for syntax in LOSSLESS
    }
    assert len(digests) == 1
    extended = CASES[uid.JPEGExtended12Bit][1].write(stored, 12, uid.JPEGExtended12Bit, "MONOCHROME2")
    assert pixel_digest(letterbox(read_radiograph(extended).pixels)[0]) not in digests
