"""What a user points at → one input for each radiograph, one at a time, whatever their number.

A PATH is a file, a folder, a pattern that the shell has left alone, a ZIP, a DICOMDIR, a Parquet file of films, a manifest, an object or
`s3://bucket/folder/` of S3-compatible storage, or `-`: names on stdin. Named files are
taken as they are. A search (folder, pattern) takes what can be a radiograph: by its suffix, or because it begins as DICOM does, as PACS
export it without one; and the ZIPs that it finds. It leaves out hidden files and what systems put between them, and DICOMDIRs, whose files
it finds anyway: give a DICOMDIR itself to be told what it names and is not there. It never leaves its folder: links that lead outside are
named as unusable, those within count where they lead to. What structure files have (ZIP, DICOMDIR) is read in worker processes.
"""

from __future__ import annotations

import fnmatch
import os
import re
import select
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from types import MappingProxyType
from typing import Final

from cxr_retrieval.archive.objects import ObjectReader
from cxr_retrieval.cases.manifest import EXTRA_SPLIT, ManifestRow, read_manifest, row_of
from cxr_retrieval.errors import ImageError, InputError, ManifestError, UsageError
from cxr_retrieval.radiograph.decoding import FilmReader, Identity
from cxr_retrieval.radiograph.files import (
    HEAD_BYTES,
    OBJECT_SCHEME,
    SUFFIXES,
    is_dicom,
    is_dicomdir,
    is_left_out,
    is_object,
    is_parquet,
    is_zip,
    object_key,
    opened,
    printable,
)

STDIN: Final = "-"
INSIDE: Final = "!/"
"""Between the name of a ZIP and that of its member."""
_MAX_PATH: Final = 4096
"""Bytes; Linux' PATH_MAX, and so the longest name that a list can hold."""
_BLOCK: Final = 65_536
_POLL_S: Final = 0.5
_UNTOLD: Final[Mapping[str, str]] = MappingProxyType({})
_MAGIC: Final = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Input:
    """One radiograph. `name` is what the user calls it; `member` is set if `path` is a ZIP or Parquet file that holds it. Which film it is,
    and whether two are one, `place` tells: names of members come from others, and two may look alike.
    """

    name: str
    path: Path
    member: str | None = None
    row: ManifestRow | None = None

    @property
    def place(self) -> bytes:
        """Equal for one file, however it was reached."""
        place = os.fsencode(os.path.realpath(self.path))
        return place if self.member is None else place + b"\0" + self.member.encode()


@dataclass(frozen=True)
class Unusable:
    """An input that has a name and no film."""

    name: str
    error: InputError

    @property
    def place(self) -> bytes:
        """That of the film, should there be one under this name later."""
        return os.fsencode(os.path.realpath(self.name))


@dataclass(frozen=True)
class Unlisted:
    """A film for the gallery that no manifest lists."""

    input: Input
    label: str
    source: str | None
    split: str | None

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.input.name

    def row(self, identity: Identity) -> ManifestRow:
        """As a manifest would list it: called after its bytes, so that no name of a file leaves here; its patient is DICOM's."""
        path = self.input.path
        return ManifestRow(
            folder=path.parent,
            image_id=f"film-{identity.file[:16]}",
            path=path,
            label=self.label,
            patient_id=identity.patient_id,
            source=self.source,
            split=self.split,
            fields=MappingProxyType({}),
            member=self.input.member,
        )


def find_inputs(
    paths: Sequence[str],
    reader: FilmReader,
    *,
    split: str | None = None,
    left_out: Path | None = None,
    stop: threading.Event | None = None,
    stdin: int = 0,
) -> Iterator[Input | Unusable]:
    """The inputs behind these PATHs, in the order of the PATHs, each folder in order of name. A file that two of them reach comes twice.

    Args:
        reader: Asks a worker what a ZIP or DICOMDIR holds.
        split: Of manifests only rows of this split; without it all but `extra`.
        left_out: A folder of ours, such as that for overlays, in which no film is looked for.
        stop: Ends the search early, once it is set.
        stdin: File descriptor that `-` stands for.
    """
    search = _Search(reader, split, left_out, stop or threading.Event())
    for name in paths:
        yield from search.names_on(stdin) if name == STDIN else search.path(name)


def as_cases(
    found: Iterable[Input | Unusable], label: str | None, source: str | None, split: str | None
) -> Iterator[ManifestRow | Unlisted | Unusable]:
    """What an ingest takes: rows of manifests as they are, every other film with this label, without one not at all."""
    for one in found:
        if isinstance(one, Unusable):
            yield one
        elif one.row:
            yield one.row
        elif label:
            yield Unlisted(one, label, source, split)
        else:
            yield Unusable(one.name, UsageError(f"{one.name}: has no label", expected="a row of a manifest", next_step="give --label"))


class _Search:
    def __init__(self, reader: FilmReader, split: str | None, left_out: Path | None, stop: threading.Event) -> None:
        self._reader, self._split, self._stop = reader, split, stop
        self._left_out = None if left_out is None else os.path.realpath(left_out)

    def path(self, name: str) -> Iterator[Input | Unusable]:
        """What one argument stands for; a pattern only where nothing is called so."""
        if name.startswith(OBJECT_SCHEME):
            yield from self._objects(name)
        elif not os.path.lexists(name) and _MAGIC.search(name):
            yield from self._pattern(name)
        else:
            yield from self._named(name)

    def names_on(self, descriptor: int) -> Iterator[Input | Unusable]:
        """What stands in a list: a name on each line, or each ended by a NUL (`find -print0`) if there is any."""
        for name in self._listed(descriptor):
            yield from self._objects(name) if name.startswith(OBJECT_SCHEME) else self._named(name)

    def _named(self, name: str) -> Iterator[Input | Unusable]:
        path, mode = Path(name), _mode(name)
        if stat.S_ISDIR(mode):
            yield from self._folder(name)
        elif path.suffix.lower() == ".csv":
            yield from self._manifest(name, path)
        elif mode:
            yield from self._file(name, path)
        else:
            shown = printable(name)
            yield Unusable(shown, ImageError(f"{shown}: is not there", expected="a file or a folder", next_step="correct the path"))

    def _file(self, name: str, path: Path) -> Iterator[Input | Unusable]:
        head = _head(path)
        if is_zip(head) or path.suffix.lower() == ".zip" or is_parquet(head):
            yield from self._members(name, path)
        elif is_dicomdir(head) or path.name.casefold() == "dicomdir":
            yield from self._dicomdir(name, path)
        else:
            yield Input(printable(name), path)

    def _objects(self, uri: str) -> Iterator[Input | Unusable]:
        """Of a storage, if the reader has one."""
        if not isinstance(self._reader, ObjectReader):
            error = UsageError(
                f"{printable(uri)}: not read here", expected="a file or a folder", next_step="use `cxr batch` or `cxr ingest`"
            )
            yield Unusable(printable(uri), error)
            return
        for name, found in self._reader.storage.find(uri, self._stop):
            yield Unusable(name, found) if isinstance(found, ImageError) else Input(name, found)

    # ------------------------------------------------------------------------------------------------ containers

    def _members(self, name: str, path: Path) -> Iterator[Input | Unusable]:
        """Of a ZIP; or of a Parquet file, whose rows are those of a manifest where they have an id and a label."""
        start: int | None = 0
        while start is not None and not self._stop.is_set():
            try:
                page = self._reader.contents(path, start)
            except InputError as error:
                yield Unusable(printable(name), error)
                return
            for member, cells in zip(page.names, page.told or repeat(_UNTOLD), strict=False):
                row = row_of(cells, path.parent, path, member) if cells.get("image_id") and cells.get("label") else None
                if row is None or (row.split == self._split if self._split else row.split != EXTRA_SPLIT):
                    yield Input(printable(name + INSIDE + member), path, member, row)
            for member, error in page.problems:
                yield Unusable(printable(name + INSIDE + member), error)
            start = page.rest

    def _dicomdir(self, name: str, path: Path) -> Iterator[Input | Unusable]:
        try:
            contents = self._reader.contents(path)
        except InputError as error:
            yield Unusable(printable(name), error)
            return
        for record, error in contents.problems:
            yield Unusable(printable(f"{name} {record}"), error)
        listed: dict[Path, dict[str, str]] = {}
        for file_id in contents.names:
            if self._stop.is_set():
                return
            yield _referenced(path, file_id, listed)

    def _manifest(self, name: str, path: Path) -> Iterator[Input | Unusable]:
        """Its rows; a file that is not there is its row's own trouble, and told when it is read."""
        try:
            rows = read_manifest(path).require(split=self._split)
        except ManifestError as error:
            yield Unusable(printable(name), error)
            return
        for row in rows:
            if is_object(row.path):
                yield Input(printable(OBJECT_SCHEME + object_key(row.path)), row.path, row=row)
            elif "\0" in str(row.path):
                error = ManifestError(f"{printable(row.image_id)}: a path that no file can have", next_step="correct that cell")
                yield Unusable(printable(str(row.path)), error)
            else:
                yield Input(printable(str(row.path)), row.path, row=row)

    # -------------------------------------------------------------------------------------------------- searches

    def _folder(self, folder: str) -> Iterator[Input | Unusable]:
        """Every film below a folder. Only one folder on each level is listed at a time, and depth costs no stack."""
        home = os.path.realpath(folder)
        levels = [self._entries(folder, home)]
        while levels and not self._stop.is_set():
            found = next(levels[-1], None)
            if found is None:
                levels.pop()
            elif isinstance(found, Unusable):
                yield found
            elif found.is_folder:
                levels.append(self._entries(found.path, home))
            else:
                yield from self._searched(found.path)

    def _searched(self, name: str) -> Iterator[Input | Unusable]:
        """A file that nobody named, if it can be one or more radiographs."""
        path = Path(name)
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            yield Input(printable(name), path)
        elif suffix in (".zip", ".parquet"):
            yield from self._members(name, path)
        elif path.name.casefold() != "dicomdir":
            head = _head(path)
            if is_dicom(head) and not is_dicomdir(head):
                yield Input(printable(name), path)

    def _pattern(self, pattern: str) -> Iterator[Input | Unusable]:
        """As shells expand it, `**` being any number of folders; what matches is taken as if it were named."""
        parts = [part for part in re.sub(r"(\*\*/)+", "**/", pattern).split("/") if part not in ("", ".")]
        fixed = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
        start = "/" * pattern.startswith("/") + "/".join(parts[:fixed])
        matches = 0
        for found in self._matching(start, parts[fixed:], os.path.realpath(start or ".")):
            matches += 1
            if isinstance(found, Unusable):
                yield found
            elif not found.is_folder:
                yield from self._named(found.path)
            elif "**" not in parts:  # where it is, the files match by themselves
                yield from self._folder(found.path)
        if not matches and not self._stop.is_set():
            name = printable(pattern)
            nothing = UsageError(f"{name}: matches nothing", expected="a pattern for files or folders", next_step="correct the pattern")
            yield Unusable(name, nothing)

    def _matching(self, folder: str, parts: Sequence[str], home: str) -> Iterator[_Entry | Unusable]:
        first, *rest = parts
        if first == "**":
            for below in self._folders(folder, home):
                yield from self._matching(below, rest or ["*"], home)
            return
        for found in self._entries(folder, home, first):
            if isinstance(found, Unusable) or not rest:
                yield found
            elif found.is_folder:
                yield from self._matching(found.path, rest, home)

    def _folders(self, folder: str, home: str) -> Iterator[str]:
        """A folder and all below it."""
        yield folder
        levels = [self._entries(folder, home)]
        while levels:
            found = next(levels[-1], None)
            if found is None:
                levels.pop()
            elif isinstance(found, _Entry) and found.is_folder:
                yield found.path
                levels.append(self._entries(found.path, home))

    def _entries(self, folder: str, home: str, pattern: str = "*") -> Iterator[_Entry | Unusable]:
        """Files and folders in one folder, in order of name, without what no search takes up. A folder that cannot be read is named, and so
        is a link that leads out of `home`; one to a folder within is left out, which is found where it lies.
        """
        if self._left_out is not None and os.path.realpath(folder) == self._left_out:
            return
        try:
            with os.scandir(folder or ".") as listing:
                wanted = (one for one in listing if fnmatch.fnmatchcase(one.name, pattern))
                entries = sorted((one for one in wanted if pattern[0] == "." or not is_left_out(one.name)), key=lambda one: one.name)
        except OSError as error:
            name = printable(folder or ".")
            yield Unusable(
                name,
                ImageError(
                    f"{name}: cannot be read",
                    expected="a folder that may be listed",
                    got=error.strerror or str(error),
                    next_step="check its permissions",
                ),
            )
            return
        for one in entries:
            if self._stop.is_set():
                return
            path = os.path.join(folder, one.name)  # noqa: PTH118 (a Path costs ten times as much)
            if one.is_symlink():
                target = os.path.realpath(path)
                mode = _mode(target) if _lies_in(target, home) else 0
                if not mode:
                    yield Unusable(printable(path), _leads_astray(path))
            else:
                mode = _mode_in(one)
            if stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and not one.is_symlink()):
                yield _Entry(path, stat.S_ISDIR(mode))

    # ------------------------------------------------------------------------------------------------------ stdin

    def _listed(self, descriptor: int) -> Iterator[str]:
        rest = b""
        while b"\0" not in rest and len(rest) <= 2 * _MAX_PATH and (block := self._block(descriptor)):
            rest += block
        end = b"\0" if b"\0" in rest else b"\n"
        while True:
            *whole, rest = rest.split(end)
            yield from (os.fsdecode(name.rstrip(b"\r") if end == b"\n" else name) for name in whole if name.strip())
            if len(rest) > _BLOCK:
                raise UsageError(
                    "stdin holds no list of names",
                    expected="a name on each line, or each ended by a NUL",
                    got=f"{len(rest)} bytes without an end of line",
                    next_step="for example `find ARCHIVE -name '*.dcm' | cxr batch - --out results.jsonl`",
                )
            block = self._block(descriptor)
            if not block:
                break
            rest += block
        if rest.strip() and not self._stop.is_set():
            yield os.fsdecode(rest.rstrip(b"\r\n") if end == b"\n" else rest)

    def _block(self, descriptor: int) -> bytes:
        """What is there next; nothing at its end, or once the search is to stop."""
        while not self._stop.is_set():
            if select.select([descriptor], [], [], _POLL_S)[0]:
                return os.read(descriptor, _BLOCK)
        return b""


@dataclass(frozen=True)
class _Entry:
    path: str
    is_folder: bool


def _head(path: Path) -> bytes:
    """The first bytes of a file; none of one that cannot be read, of which its reader says more."""
    try:
        with opened(path) as file:
            return file.read(HEAD_BYTES)
    except (ImageError, OSError):
        return b""


def _mode(path: str) -> int:
    """What lies at a path; 0 if nothing does that may be seen."""
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError):  # ValueError: a NUL
        return 0


def _mode_in(entry: os.DirEntry[str]) -> int:
    """The same of a listed one, which mostly costs no further look at the disk; a file where that fails, so that its reader says why."""
    try:
        return stat.S_IFREG if entry.is_file() else stat.S_IFDIR if entry.is_dir() else stat.S_IFIFO
    except OSError:
        return stat.S_IFREG


def _lies_in(path: str, home: str) -> bool:
    """Of two paths without links."""
    return path == home or path.startswith(home.rstrip("/") + "/")


def _leads_astray(name: str) -> ImageError:
    return ImageError(
        f"{printable(name)}: a link that leads out of the folder, or nowhere",
        expected="a film within it",
        next_step="name the file itself, for example on stdin: `find -L FOLDER -type f | cxr batch -`",
    )


def _referenced(dicomdir: Path, file_id: str, listed: dict[Path, dict[str, str]]) -> Input | Unusable:
    """The file of a Referenced File ID, below the folder of its DICOMDIR; media mounted in small letters are understood.

    Args:
        listed: Of folders seen before, name in small letters → name.
    """
    path = dicomdir.parent
    for component in file_id.split("/"):
        folder, path = path, path / component
        if not os.path.lexists(path):
            if folder not in listed:
                try:
                    listed[folder] = {name.casefold(): name for name in os.listdir(folder)}  # noqa: PTH208 (names are wanted)
                except OSError:
                    listed[folder] = {}
            path = folder / listed[folder].get(component.casefold(), component)
    name = printable(str(path))
    if not _lies_in(os.path.realpath(path), os.path.realpath(dicomdir.parent)):
        return Unusable(name, _leads_astray(name))
    if not stat.S_ISREG(_mode(str(path))):
        return Unusable(
            name,
            ImageError(
                f"{name}: is not there",
                expected=f"the file that {dicomdir.name} names",
                next_step="copy it from the medium, or give the folder instead of the DICOMDIR",
            ),
        )
    return Input(name, path)
