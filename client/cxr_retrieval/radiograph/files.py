"""What is told of a file without decoding it: what it is by its first bytes, what it may be called, and that it can be opened.

Imports no decoder, so that the process that asks workers (`decoding.py`) loads none.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Final, Literal
from urllib.parse import quote, unquote

from cxr_retrieval.errors import ImageError

SUFFIXES: Final = frozenset({".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff"})
"""File name endings that a folder scan picks up (content, not name, decides how a file is read)."""
MAX_FILE_BYTES: Final = 2**30
"""Bytes; five times what `grey.MAX_PIXELS` of 16 bits need."""
MAX_NAME: Final = 4096
"""Characters of a name; Linux' PATH_MAX."""
HEAD_BYTES: Final = 512
"""Of a file, by which `is_zip`, `is_dicom` and `is_dicomdir` know it."""
OBJECT_SCHEME: Final = "s3://"
_OBJECTS: Final = Path("/s3:")
_DIRECTORY_CLASS: Final = b"\x02\x00\x02\x00UI\x14\x001.2.840.10008.1.3.10"
"""(0002,0002) Media Storage SOP Class UID as a DICOMDIR has it; the file meta group is always explicit VR little endian (PS3.10 7.1)."""
_SYSTEM_FOLDERS: Final = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})
"""Made by macOS, Synology and Windows; the second holds a thumbnail of every picture."""


@dataclass(frozen=True)
class Contents:
    """A page of what a container holds.

    Attributes:
        kind: What it is.
        names: Members that can be radiographs, as the ZIP is to be asked for them; or Referenced File IDs, their components joined by "/";
            or numbers of rows.
        problems: Of those that cannot be used, name and reason.
        rest: Where the next page begins; None after the last.
        told: Of each name of a Parquet file, column → what stands there.
    """

    kind: Literal["ZIP", "DICOMDIR", "Parquet"]
    names: tuple[str, ...]
    problems: tuple[tuple[str, ImageError], ...]
    rest: int | None
    told: tuple[dict[str, str], ...] = ()


def object_path(uri: str) -> Path:
    """An object of S3-compatible storage, `s3://bucket/key`, as a path that no file has; its key may be what no path of a file can be.

    Raises:
        ImageError: It names no object.
    """
    bucket, _, key = uri.removeprefix(OBJECT_SCHEME).partition("/")
    parts = key.split("/")
    if not bucket or not all(parts) or "\0" in uri:
        raise ImageError(
            f"{printable(uri)}: names no object that can be read",
            expected="s3://BUCKET/KEY, with something between the strokes",
            next_step="correct it, or copy the object to another key",
        )
    return _OBJECTS.joinpath(bucket, *("%2E" * len(part) if part in (".", "..") else quote(part, safe=" ") for part in parts))


def is_object(path: Path) -> bool:
    """Whether it is one of `object_path`."""
    return path.parts[:2] == _OBJECTS.parts


def object_key(path: Path) -> str:
    """Bucket and key of an `object_path`, as the storage knows them."""
    return "/".join(map(unquote, path.parts[2:]))


def is_zip(head: bytes) -> bool:
    """By its first bytes; an empty one counts, too."""
    return head[:4] in (b"PK\x03\x04", b"PK\x05\x06")


def is_parquet(head: bytes) -> bool:
    """By its first bytes."""
    return head[:4] == b"PAR1"


def is_dicom(head: bytes) -> bool:
    """By the prefix after the preamble (PS3.10 7.1)."""
    return head[128:132] == b"DICM"


def is_dicomdir(head: bytes) -> bool:
    """By its SOP class."""
    return is_dicom(head) and _DIRECTORY_CLASS in head


def is_left_out(name: str) -> bool:
    """Files and folders that no search takes up: hidden ones, among them macOS' `._` twins, and what systems keep for themselves."""
    return (name.startswith(".") and name not in (".", "..")) or name in _SYSTEM_FOLDERS


def printable(name: str) -> str:
    """A name that can be written anywhere: bytes that are no text, controls and marks of direction appear escaped, as in Python."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c).startswith("C") else c for c in name)


def opened(path: Path) -> BinaryIO:
    """A regular file, open for reading; a FIFO is not waited for.

    Raises:
        ImageError: It is none, or cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
            kind = next((name for test, name in kinds if test(mode)), "a device")
            raise ImageError(f"{path.name}: is no file", expected="a regular file", got=kind, next_step="give the path of an image")
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # no wait, if it is a FIFO by now
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> ImageError:
    """What to say where the system refuses a file."""
    return ImageError(
        f"{path.name}: cannot be read",
        expected="a readable file",
        got=error.strerror or str(error),
        next_step="check path and permissions",
    )


def base_name(member: str) -> str:
    """What to call a member in a message."""
    return printable(shortened(re.split(r"[/\\]", member)[-1]))


def shortened(name: str) -> str:
    """A name that is too long for a file, cut; told from others by its hash."""
    return name if len(name) <= MAX_NAME else f"{name[:100]}… ({sha256(name.encode(errors='replace')).hexdigest()[:16]})"
