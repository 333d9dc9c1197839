"""Files that mean harm, or were harmed: made from seeds, the same each time."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate

LONG = ("OB", "OW", "SQ", "UN", "UT")
UNDEFINED = 0xFFFFFFFF


@cache
def film() -> NDArray[np.uint16]:
    """A 12-bit picture of 96×112 with texture, so that damage anywhere in its codestream matters."""
    chance = np.random.default_rng(18)
    rows, columns = np.indices((96, 112)) / 9
    values = 2048 + 1500 * np.cos(rows) * np.sin(columns) + chance.normal(0, 60, (96, 112))
    return np.clip(np.rint(values), 0, 4095).astype(np.uint16)


def film8() -> NDArray[np.uint8]:
    """The same in 8 bits."""
    return (film() >> 4).astype(np.uint8)


def dataset(stored: NDArray[np.generic], bits: int, **elements: object) -> pydicom.Dataset:
    """A frontal chest film of these pixels; `elements` by keyword."""
    made = pydicom.Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3.4"
    made.Modality, made.ViewPosition, made.PatientID = "DX", "PA", "SYNTHETIC"
    made.Rows, made.Columns = stored.shape[:2]
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 8 * stored.dtype.itemsize, bits, bits - 1, 0
    made.PixelData = stored.tobytes()
    made["PixelData"].VR = "OW"
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def written(made: pydicom.Dataset) -> bytes:
    """The file."""
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, made, enforce_file_format=True)
    return buffer.getvalue()


def framed(frame: bytes, syntax: str, stored: NDArray[np.generic], bits: int, **elements: object) -> bytes:
    """A film whose pixels are this codestream, or claim to be."""
    made = dataset(stored, bits, **elements)
    made.file_meta.TransferSyntaxUID = uid.UID(syntax)
    made.PixelData = encapsulate([frame])
    made["PixelData"].VR = "OB"
    return written(made)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """What Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def compressed(syntax: str) -> bytes:
    """The film in a syntax that pydicom writes."""
    made = dataset(film(), 12)
    made.compress(syntax, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    return written(made)


@cache
def valid() -> dict[str, bytes]:
    """Undamaged files, from which most others are made."""
    import imagecodecs

    lossless = bytes(imagecodecs.jpeg8_encode(film8(), lossless=True))
    grey, deep = Image.fromarray(film8()), Image.fromarray(film())
    made: dict[str, bytes] = {
        "explicit.dcm": written(dataset(film(), 12, WindowCenter=2048, WindowWidth=4096)),
        "rle.dcm": compressed(uid.RLELossless),
        "j2k.dcm": compressed(uid.JPEG2000Lossless),
        "htj2k.dcm": framed(bytes(imagecodecs.htj2k_encode(film(), reversible=True)), uid.HTJ2KLossless, film(), 12),
        "jpegls.dcm": framed(bytes(imagecodecs.jpegls_encode(film8())), uid.JPEGLSLossless, film8(), 8),
        "lossless.dcm": framed(lossless, uid.JPEGLosslessSV1, film8(), 8),
        "extended.dcm": framed(bytes(imagecodecs.jpeg8_encode(film(), bitspersample=12)), uid.JPEGExtended12Bit, film(), 12),
        "baseline.dcm": framed(saved(grey, "JPEG", quality=95), uid.JPEGBaseline8Bit, film8(), 8),
        "grey.png": saved(grey, "PNG"),
        "deep.png": saved(deep, "PNG"),
        "grey.jpg": saved(grey, "JPEG", quality=90),
        "progressive.jpg": saved(grey, "JPEG", quality=90, progressive=True),
        "plain.tif": saved(grey, "TIFF"),
        "lzw.tif": saved(deep, "TIFF", compression="tiff_lzw"),
        "packed.tif": saved(grey, "TIFF", compression="tiff_adobe_deflate"),
    }
    for name, syntax, implicit in (("implicit.dcm", uid.ImplicitVRLittleEndian, True), ("big.dcm", uid.ExplicitVRBigEndian, False)):
        other = dataset(film(), 12)
        other.file_meta.TransferSyntaxUID = syntax
        if not implicit:
            other.PixelData = film().byteswap().tobytes()
        made[name] = written(other)
    deflated = dataset(film(), 12)
    deflated.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    made["deflated.dcm"] = written(deflated)
    return made


# ---------------------------------------------------------------------------------------------- damage by chance


def cut(data: bytes, chance: random.Random, _: bytes) -> bytes:
    """Ends anywhere."""
    return data[: chance.randrange(len(data))]


def flipped(data: bytes, chance: random.Random, _: bytes) -> bytes:
    """1 to 64 bits are other ones, half of the time in the first 600 bytes, where headers lie."""
    harmed, top = bytearray(data), len(data) if chance.random() < 0.5 else min(600, len(data))
    for _bit in range(chance.choice((1, 4, 16, 64))):
        harmed[chance.randrange(top)] ^= 1 << chance.randrange(8)
    return bytes(harmed)


def spliced(data: bytes, chance: random.Random, other: bytes) -> bytes:
    """A piece is another file's, removed, doubled, zero or all ones."""
    start = chance.randrange(len(data))
    length = chance.choice((1, 7, 64, 1000))
    from_there = chance.randrange(len(other))
    piece = chance.choice((other[from_there : from_there + length], b"", 2 * data[start : start + length], bytes(length), b"\xff" * length))
    return data[:start] + piece + data[start + length :]


def counted(data: bytes, chance: random.Random, _: bytes) -> bytes:
    """Two or four bytes, likely a length or a count, are extreme."""
    start, size = chance.randrange(min(len(data), 1500)), chance.choice((2, 4))
    extreme = chance.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1, 0x10000 - 1))
    return data[:start] + extreme.to_bytes(size, chance.choice(("little", "big"))) + data[start + size :]


DAMAGE: tuple[Callable[[bytes, random.Random, bytes], bytes], ...] = (cut, flipped, spliced, counted)


def damaged(seed: int, number: int) -> Iterator[tuple[str, bytes]]:
    """So many harmed files; every kind of damage to every kind of file in turn."""
    chance = random.Random(seed)
    sources = list(valid().items())
    for index in range(number):
        name, data = sources[index % len(sources)]
        harm = DAMAGE[index // len(sources) % len(DAMAGE)]
        yield f"{seed}-{index:05d}-{harm.__name__}-{name}", harm(data, chance, chance.choice(sources)[1])


# ------------------------------------------------------------------------------------------------- harm by intent


def element(tag: int, vr: str, value: bytes, length: int | None = None) -> bytes:
    """One element in Explicit VR Little Endian; `length` as it claims."""
    stated = len(value) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode()
    return head + (struct.pack("<HI", 0, stated) if vr in LONG else struct.pack("<H", stated & 0xFFFF)) + value


def with_elements(*elements: bytes, syntax: bytes = b"1.2.840.10008.1.2.1\0") -> bytes:
    """A film that begins with these; whole, but for what they do."""
    plain = valid()["explicit.dcm"]
    start = plain.index(b"\x08\x00\x16\x00UI")
    return plain[:start].replace(b"1.2.840.10008.1.2.1\0", syntax) + b"".join(elements) + plain[start:]


def nested(depth: int, *, defined: bool) -> bytes:
    """A sequence in a sequence in a sequence."""
    if not defined:
        opening = element(0x00081140, "SQ", b"", UNDEFINED) + struct.pack("<HHI", 0xFFFE, 0xE000, UNDEFINED)
        closing = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        return with_elements(opening * depth + closing * depth)
    inner = b""
    for _ in range(depth):
        inner = element(0x00081140, "SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(inner)) + inner)
    return with_elements(inner)


def misspelt(keyword_vr: tuple[int, str], value: bytes) -> bytes:
    """The element holds what its VR does not allow."""
    tag, vr = keyword_vr
    plain = valid()["explicit.dcm"]
    key = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    at = plain.find(key + vr.encode(), 132)
    new = element(tag, vr, value + b" " * (len(value) % 2))
    if at < 0:
        return with_elements(new)
    (length,) = struct.unpack("<H", plain[at + 6 : at + 8])
    return plain[:at] + new + plain[at + 8 + length :]


def lut(descriptor: list[int], data: bytes, sequence: str = "VOILUTSequence") -> bytes:
    """A LUT whose descriptor lies."""
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", descriptor)
    item.add_new("LUTData", "OW", data)
    return written(dataset(film(), 12, **{sequence: [item]}))


def chunk(kind: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body) if length is None else length) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int = 8, colour: int = 0, *more: bytes, data: bytes | None = None) -> bytes:
    """A PNG that claims a size."""
    pixels = zlib.compress(bytes(2000)) if data is None else data
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND")


def tiff(entries: list[tuple[int, int, int, int]], following: int = 0, tail: bytes = b"") -> bytes:
    """A TIFF of one directory: (tag, type, count, value)."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + table + struct.pack("<I", following) + tail


def tiff_film(width: int = 96, height: int = 96, compression: int = 1, following: int = 0, bits: int = 8, **other: int) -> bytes:
    """The usual directory, with its pixels after it."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, compression), (262, 3, 1, 1)]
    entries += [(273, 4, 1, other.get("offset", 200)), (277, 3, 1, other.get("samples", 1)), (278, 4, 1, other.get("rows", height))]
    entries += [(279, 4, 1, other.get("bytes", 96 * 96))]
    made = tiff(entries, following)
    return made.ljust(200, b"\0") + film8().tobytes()[: 96 * 96]


def many_directories(number: int) -> bytes:
    """A chain of as many pages, each the first one over again."""
    page = tiff_film()
    made = bytearray(page.ljust(len(page) + len(page) % 2, b"\0"))
    size, start = 2 + 9 * 12 + 4, len(made)
    body = page[8 : 8 + size - 4]
    struct.pack_into("<I", made, 8 + size - 4, start)
    for index in range(number):
        made += body + struct.pack("<I", start + (index + 1) * size if index + 1 < number else 0)
    return bytes(made)


def j2k_that_claims(width: int, height: int) -> bytes:
    """A codestream whose SIZ lies about its size."""
    import imagecodecs

    stream = bytearray(imagecodecs.jpeg2k_encode(film(), codecformat="j2k", reversible=True))
    at = stream.index(b"\xff\x51")
    struct.pack_into(">II", stream, at + 6, width, height)
    struct.pack_into(">II", stream, at + 22, width, height)
    return bytes(stream)


def jpeg_that_claims(width: int, height: int, frame: bytes) -> bytes:
    """A codestream whose SOF lies about its size."""
    stream = bytearray(frame)
    at = next(index for index in range(len(stream)) if stream[index] == 0xFF and stream[index + 1] in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7))
    struct.pack_into(">HH", stream, at + 5, height, width)
    return bytes(stream)


def rle_of(segments: list[int], body: bytes) -> bytes:
    """A frame with these segment offsets."""
    return struct.pack("<16I", len(segments), *segments, *([0] * (15 - len(segments)))) + body


def deflated_zeros(megabytes: int) -> bytes:
    """A deflated data set that unpacks to so much."""
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    body = b"".join(
        [packer.compress(element(0x00091010, "OB", b"", megabytes << 20)), *(packer.compress(bytes(1 << 20)) for _ in range(megabytes))]
    )
    plain = valid()["deflated.dcm"]
    meta_end = 132 + 12 + struct.unpack("<I", plain[140:144])[0]
    return plain[:meta_end] + body + packer.flush()


def meant() -> Iterator[tuple[str, bytes]]:
    """Files made to harm, one by one."""
    import imagecodecs

    plain, grey = valid()["explicit.dcm"], valid()["grey.png"]
    yield "empty.dcm", b""
    for size in (1, 4, 127, 131, 132, 133, 144, 200):
        yield f"first-{size}.dcm", plain[:size]
    for depth in (100, 1000, 20_000):
        yield f"nested-{depth}.dcm", nested(depth, defined=False)
    for depth in (100, 2000):
        yield f"nested-defined-{depth}.dcm", nested(depth, defined=True)
    for name, stated in (("undefined", UNDEFINED), ("beyond", 0x7FFFFFF0), ("odd", 33), ("negative", 0x80000000), ("one-more", 5)):
        for vr in LONG:
            yield f"length-{name}-{vr}.dcm", with_elements(element(0x00091010, vr, b"abcd", stated))
        at = plain.index(b"\xe0\x7f\x10\x00OW") + 8
        yield f"pixels-{name}.dcm", plain[:at] + struct.pack("<I", stated) + plain[at + 4 :]
    for vr in ("XX", "\0\0", "ob", "FD", "SQ", "AT", "  "):
        yield f"vr-{vr.encode().hex()}.dcm", plain.replace(b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00" + vr.encode())
        yield f"vr-pixels-{vr.encode().hex()}.dcm", plain.replace(b"\xe0\x7f\x10\x00OW", b"\xe0\x7f\x10\x00" + vr.encode())
    for rows, columns in ((0, 112), (96, 0), (65535, 65535), (65535, 1), (97, 112), (48, 112), (9600, 9600), (1, 1)):
        yield f"rows-{rows}x{columns}.dcm", written(dataset(film(), 12, Rows=rows, Columns=columns))
        for name, syntax in (("j2k", uid.JPEG2000Lossless), ("rle", uid.RLELossless)):
            made = pydicom.dcmread(io.BytesIO(valid()[f"{name}.dcm"]))
            made.Rows, made.Columns = rows, columns
            assert made.file_meta.TransferSyntaxUID == syntax
            yield f"rows-{rows}x{columns}-{name}.dcm", written(made)
    for bits in (0, 1, 2, 7, 12, 24, 32, 64, 65535):
        yield f"bits-allocated-{bits}.dcm", written(dataset(film(), 12, BitsAllocated=bits))
        yield f"bits-stored-{bits}.dcm", written(dataset(film(), 12, BitsStored=bits))
        yield f"high-bit-{bits}.dcm", written(dataset(film(), 12, HighBit=bits))
    for keyword in (
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "SamplesPerPixel",
        "PixelRepresentation",
        "PhotometricInterpretation",
    ):
        made = dataset(film(), 12)
        delattr(made, keyword)
        yield f"without-{keyword}.dcm", written(made)
        yield f"empty-{keyword}.dcm", written(dataset(film(), 12, **{keyword: None}))
    for samples in (0, 2, 3, 4, 65535):
        yield f"samples-{samples}.dcm", written(dataset(film(), 12, SamplesPerPixel=samples, PlanarConfiguration=0))
    for photometric in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "PALETTE COLOR", "CMYK", "XXX"):
        yield f"photometric-{photometric.replace(' ', '-')}.dcm", written(dataset(film(), 12, PhotometricInterpretation=photometric))
    for frames in (b"0", b"-1", b"2147483647", b"99999999999999999999", b"1e30", b"1.5", b"x", b"nan"):
        yield f"frames-{frames.decode()}.dcm", misspelt((0x00280008, "IS"), frames)
    for keyword, tag in (
        ("centre", 0x00281050),
        ("width", 0x00281051),
        ("slope", 0x00281053),
        ("intercept", 0x00281052),
        ("spacing", 0x00280030),
    ):
        for value in (b"nan", b"inf", b"-inf", b"1e308", b"-1e308", b"1e-320", b"0", b"", b"0\\0", b"1e308\\1e-308", b"\\" * 500, b"1,5"):
            yield f"{keyword}-{value[:8].decode().replace(chr(92), '_')}-{len(value)}.dcm", misspelt((tag, "DS"), value)
    for padding in (0, 4095, 65535):
        yield f"padding-{padding}.dcm", written(dataset(film(), 12, PixelPaddingValue=padding, PixelPaddingRangeLimit=65535 - padding))
    for sequence in ("VOILUTSequence", "ModalityLUTSequence"):
        for descriptor in ([65535, 0, 16], [0, 0, 0], [4096, 65535, 16], [1, 1, 65535], [4096, 0, 255], [4096], []):
            for size in (0, 1, 2, 100, 8192):
                name = "-".join(map(str, descriptor))
                yield (
                    f"lut-{sequence[0]}-{name}-{size}.dcm",
                    lut(descriptor, bytes(range(256)) * (size // 256) + bytes(size % 256), sequence),
                )
    for charset in (b"ISO_IR 999", b"ISO 2022 IR 87\\" * 300, b"\\" * 1000, b"\xff" * 64, b"utf-16", b"rot13\\zlib_codec\\bz2", b"idna"):
        text = element(0x00080005, "CS", charset + b" " * (len(charset) % 2)) + element(0x0008103E, "LO", b"\x1b$B\x1b(J" * 5000)
        yield f"charset-{charset[:6].hex()}-{len(charset)}.dcm", with_elements(text)
    yield "million-elements.dcm", with_elements(element(0x00091010, "CS", b"") * 300_000)
    yield "million-values.dcm", misspelt((0x00181164, "DS"), b"1\\" * 30_000)
    yield "long-text.dcm", with_elements(element(0x0008103E, "UT", b"LAT " * 2_000_000))
    yield "long-description.dcm", with_elements(element(0x00181030, "UN", b"A" * 5_000_000))
    yield "private-creator-flood.dcm", with_elements(*(element(0x00090010 + n % 0xEF, "LO", b"X" * 64) for n in range(5000)))
    yield (
        "fragments.dcm",
        valid()["rle.dcm"].replace(struct.pack("<HHI", 0xFFFE, 0xE000, 0), struct.pack("<HHI", 0xFFFE, 0xE000, 0) * 200_000),
    )
    for megabytes in (64, 420):
        yield f"deflated-{megabytes}.dcm", deflated_zeros(megabytes)
    for width, height in ((2**31 - 1, 2**31 - 1), (65535, 65535), (60_000, 1), (97, 113), (0, 0)):
        yield f"siz-{width}.dcm", framed(j2k_that_claims(width, height), uid.JPEG2000Lossless, film(), 12)
        yield f"siz-{width}-big.dcm", framed(j2k_that_claims(width, height), uid.JPEG2000Lossless, film(), 12, Rows=9_000, Columns=9_000)
    codecs = (
        (uid.JPEGBaseline8Bit, saved(Image.fromarray(film8()), "JPEG")),
        (uid.JPEGLosslessSV1, bytes(imagecodecs.jpeg8_encode(film8(), lossless=True))),
        (uid.JPEGLSLossless, bytes(imagecodecs.jpegls_encode(film8()))),
    )
    for syntax, frame in codecs:
        for width, height in ((65535, 65535), (65535, 1), (0, 0), (112, 97), (10_000, 10_000)):
            yield f"sof-{syntax[-2:]}-{width}x{height}.dcm", framed(jpeg_that_claims(width, height, frame), syntax, film8(), 8)
        for other, wrong in codecs:
            if other != syntax:
                yield f"sof-{syntax[-2:]}-is-{other[-2:]}.dcm", framed(wrong, syntax, film8(), 8)
        yield f"sof-{syntax[-2:]}-nothing.dcm", framed(b"\xff\xd8", syntax, film8(), 8)
    for segments in ([64], [64, 64], [64, 2**32 - 1], [0, 0], [2**31, 64], [64] * 15, []):
        yield f"rle-{len(segments)}-{max(segments, default=0)}.dcm", framed(rle_of(segments, b"\x81\0" * 5000), uid.RLELossless, film(), 12)
        yield (
            f"rle-{len(segments)}-{max(segments, default=0)}-big.dcm",
            framed(rle_of(segments, b"\x81\0" * 5000), uid.RLELossless, film(), 12, Rows=9_999, Columns=9_999),
        )
    for width, height in ((2**31 - 1, 2**31 - 1), (100_000, 100_000), (9_999, 9_999), (0, 10), (2**31, 1), (64, 64)):
        for depth, colour in ((8, 0), (16, 0), (8, 6), (1, 3)):
            yield f"claims-{width}-{depth}-{colour}.png", png(width, height, depth, colour)
    bomb = zlib.compress(bytes(100 << 20), 9)
    for kind, head in ((b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"zTXt", b""), (b"iCCP", b"k")):
        yield f"text-{kind.decode()}-{len(head)}.png", png(99, 99, 8, 0, chunk(kind, head + bomb))
        yield f"text-{kind.decode()}-{len(head)}-flood.png", png(99, 99, 8, 0, chunk(kind, head + zlib.compress(bytes(900_000))) * 300)
    yield "idat-bomb.png", png(99, 99, data=bomb)
    yield "chunk-flood.png", png(99, 99, 8, 0, chunk(b"aBCd") * 100_000)
    for length in (2**31 - 1, 2**32 - 1, 0, 1):
        yield f"chunk-{length}.png", png(99, 99, 8, 0, chunk(b"tEXt", b"k\0v", length))
    yield "animated.png", png(99, 99, 8, 0, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)))
    for following in (8, 4, 0xFFFFFFF0, 100, 1):
        yield f"following-{following}.tif", tiff_film(following=following)
    yield "directories.tif", many_directories(200_000)
    for width, height in ((2**31, 2**31), (100_000, 100_000), (9_999, 9_999), (0, 0), (96, 97)):
        for compression in (1, 5, 7, 8, 32773, 34712, 50000, 65535):
            yield f"claims-{width}-{height}-{compression}.tif", tiff_film(width, height, compression)
    for options in (
        {"offset": 0},
        {"offset": 2**32 - 1},
        {"samples": 65535},
        {"rows": 0},
        {"rows": 2**32 - 1},
        {"bytes": 2**32 - 1},
        {"bytes": 0},
    ):
        yield f"{'-'.join(f'{key}-{value}' for key, value in options.items())}.tif", tiff_film(**options)
    for bits in (0, 1, 16, 32, 64, 65535):
        yield f"bits-{bits}.tif", tiff_film(bits=bits)
    for kind, count in ((2, 2**32 - 1), (5, 2**31), (13, 1), (99, 1), (12, 2**29)):
        yield f"entry-{kind}.tif", tiff([(256, 4, 1, 96), (257, 4, 1, 96), (0x8769, kind, count, 8), (258, kind, count, 8)])
    yield "entries.tif", tiff([(number, 4, 1, 8) for number in range(65_535)])
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", 0x0112, 3, 2**31, 7) + struct.pack("<I", 8)
    yield "exif.jpg", saved(Image.fromarray(film8()), "JPEG", exif=exif)
    yield "exif-turn.jpg", saved(Image.fromarray(film8()), "JPEG", exif=exif.replace(struct.pack("<I", 2**31), struct.pack("<I", 1)))
    jpeg = valid()["grey.jpg"]
    for width, height in ((65535, 65535), (65535, 1), (0, 0)):
        yield f"claims-{width}x{height}.jpg", jpeg_that_claims(width, height, jpeg)
    yield "scans.jpg", valid()["progressive.jpg"][:-2] + valid()["progressive.jpg"][-400:-2] * 3000 + b"\xff\xd9"
    yield "markers.jpg", jpeg[:2] + (b"\xff\xe1\x00\x04ab" * 100_000) + jpeg[2:]
    yield "fill.jpg", jpeg[:2] + b"\xff" * 2_000_000 + jpeg[2:]
    yield "dicom-and-png.dcm", grey[:128].ljust(128, b"\0") + plain[128:]
    yield "png-and-zip.png", grey + b"PK\x03\x04" + bytes(500)
    yield "jpeg-in-dicom.jpg", jpeg + plain
    yield "tiff-and-dicom.tif", (b"II*\0" + struct.pack("<I", 200)).ljust(128, b"\0") + plain[128:]
    for magic in (
        b"%PDF-1.7",
        b"PK\x03\x04",
        b"\x1f\x8b\x08",
        b"GIF89a",
        b"BM",
        b"\x7fELF",
        b"MZ",
        b"<svg/>",
        b"#!/bin/sh\n",
        b"\xff\xd8\xff",
        b"II*\0",
        b"MM\0*",
    ):
        yield f"magic-{magic[:4].hex()}.png", magic + bytes(500)
    yield "zeros.dcm", bytes(1 << 20)
    yield "ones.dcm", b"\xff" * (1 << 20)


def hostile(seed: int = 18, number: int = 400) -> dict[str, bytes]:
    """All of them: those that are meant, and so many that chance makes from a seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about what it is made to write
        return dict(meant()) | dict(damaged(seed, number))
