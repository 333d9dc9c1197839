"""Files that hold or name other films: a ZIP's members, a DICOMDIR's records. For worker processes: their structure comes from anyone.

Nothing is unpacked to disk, and no name found inside is opened as a path here. A ZIP is read by its central directory, whose lies cost
nothing more: a member is decompressed up to the size that the directory admits to, entries that share bytes condemn the whole file, and a
ZIP within a ZIP stays shut. A DICOMDIR's records (PS3.3 F.3) are read in the order in which they stand; the offsets by which they point at
each other, perhaps in circles, are not followed.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue
from pydicom.uid import MediaStorageDirectoryStorage

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.files import (
    HEAD_BYTES,
    MAX_FILE_BYTES,
    MAX_NAME,
    SUFFIXES,
    Contents,
    base_name,
    is_dicom,
    is_dicomdir,
    is_left_out,
    opened,
    printable,
    shortened,
)

MAX_MEMBERS: Final = 100_000
"""Entries of a ZIP, records of a DICOMDIR."""
MAX_RATIO: Final = 200
"""Bytes out of one compressed byte; radiographs give up to ten, and deflate can make a thousand."""

_FREE_BYTES: Final = 2**20
"""What may come out whatever the ratio: costs nothing."""
_PAGE: Final = 500
_LOCAL_HEADER_BYTES: Final = 30
_ENCRYPTED: Final = 0x1
_UTF8: Final = 0x800
_UNDEFINED_LENGTH: Final = 0xFFFFFFFF


def contents_of(path: Path, start: int, shelf: ZipShelf) -> Contents:
    """A page of what a ZIP or DICOMDIR holds.

    Raises:
        ImageError: It is neither, or damaged, or hostile as a whole.
    """
    with opened(path) as file:
        head = file.read(HEAD_BYTES)
        if is_dicom(head):
            return _referenced(head + file.read(min(os.fstat(file.fileno()).st_size, MAX_FILE_BYTES)), path.name)
    return shelf.zip(path).page(start)


class ZipShelf:
    """Keeps the last ZIP open: its directory, of perhaps 100,000 entries, is not read again for each member."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._zip: _OpenedZip | None = None

    def zip(self, path: Path) -> _OpenedZip:
        """The ZIP at this path, as it is now.

        Raises:
            ImageError: It is none, or damaged, or hostile as a whole.
        """
        file = opened(path)
        status = os.fstat(file.fileno())
        key = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._zip is not None and key == self._key:
            file.close()
            return self._zip
        if self._zip is not None:
            self._zip.close()
        self._zip = None
        try:
            self._zip, self._key = _OpenedZip(path, file), key
        except BaseException:
            file.close()
            raise
        return self._zip


class _OpenedZip:
    """One ZIP. Its members are known by their names, decoded the same way whenever it is opened."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        try:
            self._zip = zipfile.ZipFile(file)
        except (OSError, ValueError, NotImplementedError, EOFError, zipfile.BadZipFile) as error:
            raise ImageError(
                f"{path.name}: cannot be read as a ZIP",
                expected="an undamaged ZIP in one part",
                got=" ".join(str(error).split())[:200],
                next_step="pack it again, or unpack it",
            ) from error
        self._entries = self._zip.infolist()
        if len(self._entries) > MAX_MEMBERS:
            raise ImageError(
                f"{path.name}: holds too many files", expected=f"at most {MAX_MEMBERS}", got=str(len(self._entries)), next_step="unpack it"
            )
        self._refuse_overlaps()
        self._times = Counter(map(_name, self._entries))
        self._by_name = {_name(entry): entry for entry in self._entries}

    def close(self) -> None:
        self._zip.close()
        self._file.close()

    def page(self, start: int) -> Contents:
        """Of its members, those that can be radiographs: by their suffix, or because they begin as DICOM does."""
        names: list[str] = []
        problems: list[tuple[str, ImageError]] = []
        end = start + _PAGE
        for entry in self._entries[start:end]:
            try:
                if self._can_be_film(entry):
                    names.append(_name(entry))
            except ImageError as error:
                problems.append((shortened(_name(entry)), error))
        return Contents("ZIP", tuple(names), tuple(problems), end if end < len(self._entries) else None)

    def read(self, member: str) -> bytes:
        """The bytes of a member.

        Raises:
            ImageError: It is not there, cannot be read, or is no film by its size alone.
        """
        entry = self._by_name.get(member)
        if entry is None:
            raise self._unreadable(member, "no member of that name")
        self._check(entry)
        return self._unpacked(entry, MAX_FILE_BYTES + 1)

    def _can_be_film(self, entry: zipfile.ZipInfo) -> bool:
        parts = re.split(r"[/\\]", _name(entry))
        if entry.is_dir() or any(map(is_left_out, parts)) or parts[-1].casefold() == "dicomdir":
            return False
        suffix = PurePosixPath(parts[-1]).suffix.lower()
        if suffix == ".zip":
            raise ImageError(
                f"{printable(parts[-1])}: a ZIP within {self._path.name}", expected="films, not packed again", next_step="unpack it"
            )
        self._check(entry)
        if suffix in SUFFIXES:
            return True
        head = self._unpacked(entry, HEAD_BYTES)
        return is_dicom(head) and not is_dicomdir(head)

    def _check(self, entry: zipfile.ZipInfo) -> None:
        """Raises ImageError where a member's own entry tells that it cannot be used."""
        name, at_most = _name(entry), max(MAX_RATIO * entry.compress_size, _FREE_BYTES)
        if self._times[name] > 1:
            raise self._unreadable(name, "several members of that name, of which each program reads another")
        if "\0" in name or len(name) > MAX_NAME:
            raise self._unreadable(name, "a name that no file can have")
        if entry.flag_bits & _ENCRYPTED:
            raise self._unreadable(name, "a password is needed")
        if entry.file_size > MAX_FILE_BYTES:
            raise _too_large(name, f"{entry.file_size / 2**30:.3g} GiB")
        if entry.file_size > at_most:
            raise self._unreadable(name, f"{entry.file_size} bytes packed into {entry.compress_size}, as no radiograph can be")

    def _unpacked(self, entry: zipfile.ZipInfo, at_most: int) -> bytes:
        """Not more than its entry admits to, either: the library stops there, and compares the checksum."""
        try:
            with self._zip.open(entry) as file:
                return file.read(at_most)
        except (OSError, RuntimeError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:  # NotImplementedError among them
            raise self._unreadable(_name(entry), " ".join(str(error).split())[:200]) from error

    def _refuse_overlaps(self) -> None:
        end = 0
        for entry in sorted(self._entries, key=lambda entry: entry.header_offset):
            if entry.header_offset < end:
                raise self._hostile("entries that share their bytes")
            end = entry.header_offset + _LOCAL_HEADER_BYTES + len(entry.orig_filename) + entry.compress_size
        if end > self._zip.start_dir:
            raise self._hostile("an entry that reaches into the directory")

    def _hostile(self, got: str) -> ImageError:
        return ImageError(
            f"{self._path.name}: made to deceive, or damaged",
            expected="a ZIP of files one after the other",
            got=got,
            next_step="pack it again, or unpack it",
        )

    def _unreadable(self, member: str, got: str) -> ImageError:
        return ImageError(
            f"{base_name(member)}: cannot be read from {self._path.name}",
            expected="a file in an undamaged ZIP without password",
            got=got,
            next_step="pack it again, or unpack it",
        )


def _too_large(name: str, got: str) -> ImageError:
    return ImageError(
        f"{base_name(name)}: the file is too large",
        expected=f"at most {MAX_FILE_BYTES // 2**30} GiB",
        got=got,
        next_step="give a single radiograph",
    )


def _name(entry: zipfile.ZipInfo) -> str:
    """As it stands in the directory, before the library cuts it at a NUL: UTF-8 where it is that, declared or not, else code page 437."""
    if entry.flag_bits & _UTF8:
        return entry.orig_filename
    try:
        return entry.orig_filename.encode("cp437").decode()
    except UnicodeError:
        return entry.orig_filename


def _referenced(data: bytes, name: str) -> Contents:
    """The image files that a DICOMDIR names: those of its records that are in use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(io.BytesIO(data))
            _refuse_cut_off(dataset.get_item("DirectoryRecordSequence"))
            kind, records = dataset.file_meta.MediaStorageSOPClassUID, list(dataset.DirectoryRecordSequence)
        except Exception as error:  # pydicom raises anything on a damaged file
            raise _no_directory(name, " ".join(f"{type(error).__name__} {error}".split())[:200]) from error
        if kind != MediaStorageDirectoryStorage:
            raise _no_directory(name, f"SOP class {printable(str(kind))[:64]}")
        if len(records) > MAX_MEMBERS:
            raise _no_directory(name, f"{len(records)} records; at most {MAX_MEMBERS} are read")
        names: list[str] = []
        problems: list[tuple[str, ImageError]] = []
        for number, record in enumerate(records, start=1):
            try:
                components = _file_id(record)
            except Exception as error:  # as above; the next record may be whole
                problems.append((f"record {number}", _no_file_id(number, name, type(error).__name__)))
                continue
            if components is None:
                continue
            if all(part.strip() and part not in (".", "..") and not re.search(r"[/\0]", part) for part in components):
                names.append("/".join(components))
            else:
                problems.append((f"record {number}", _no_file_id(number, name, printable("\\".join(components))[:100])))
    return Contents("DICOMDIR", tuple(names), tuple(problems), None)


def _refuse_cut_off(records: Any) -> None:
    """Pydicom takes a sequence that the file's end cuts short for a shorter one; films would be missing without a word."""
    if isinstance(records, RawDataElement) and records.value is not None and len(records.value) < records.length != _UNDEFINED_LENGTH:
        raise EOFError("the file ends within its records")


def _file_id(record: pydicom.Dataset) -> list[str] | None:
    """Components of (0004,1500) Referenced File ID; None of a record that names no image or is no longer in use."""
    if record.get("DirectoryRecordType") != "IMAGE" or record.get("RecordInUseFlag") == 0:
        return None
    value: Any = record.get("ReferencedFileID") or ""
    return [str(part) for part in value] if isinstance(value, MultiValue) else [str(value)]


def _no_directory(name: str, got: str) -> ImageError:
    return ImageError(
        f"{name}: cannot be read as a DICOMDIR",
        expected="a Media Storage Directory (PS3.10 8.6), undamaged",
        got=got,
        next_step="give the folder instead: its files are looked for",
    )


def _no_file_id(number: int, name: str, got: str) -> ImageError:
    return ImageError(
        f"{name}: record {number} names no file below its folder",
        expected="a Referenced File ID (0004,1500) of up to 8 plain components",
        got=got or "an empty one",
        next_step="give the folder instead: its files are looked for",
    )
