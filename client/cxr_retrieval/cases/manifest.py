"""The manifest: one CSV row per radiograph, read the same way by ingest, evaluate and training.

Columns `image_id,path,label` are required; `patient_id,source,split` and any clinical columns are optional; `path` is
relative to the manifest's folder. An empty cell means unknown.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from cxr_retrieval.errors import ImageError, ManifestError
from cxr_retrieval.radiograph.files import OBJECT_SCHEME, object_path

REQUIRED_COLUMNS: Final = ("image_id", "path", "label")
EXTRA_SPLIT: Final = "extra"
"""Rows of this split take no part unless asked for (they hold labels outside the protocol)."""

_EXAMPLE: Final = "begin the file with a header such as image_id,path,label,patient_id"


@dataclass(frozen=True)
class ManifestRow:
    """One radiograph. `fields` holds every further column that has a value, as text; paths are relative to `folder`. `member` is set if
    `path` is a ZIP or Parquet file that holds it.
    """

    folder: Path
    image_id: str
    path: Path
    label: str
    patient_id: str | None
    source: str | None
    split: str | None
    fields: Mapping[str, str]
    member: str | None = None

    @property
    def patient(self) -> str:
        """The patient's key for grouping."""
        return patient_key(self.source, self.patient_id, self.image_id)


def patient_key(source: str | None, patient_id: str | None, image_id: str) -> str:
    """Groups images of one patient within one source; an image without patient_id counts as a patient of its own."""
    return f"{source or ''}/{patient_id}" if patient_id else f"image:{source or ''}/{image_id}"


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest and the SHA-256 of its bytes."""

    path: Path
    rows: tuple[ManifestRow, ...]
    sha256: str

    def select(self, *, split: str | None = None, labels: Sequence[str] | None = None) -> tuple[ManifestRow, ...]:
        """Rows of one split (None: all but `extra`), optionally of some labels only."""
        chosen = (row for row in self.rows if (row.split == split if split else row.split != EXTRA_SPLIT))
        return tuple(row for row in chosen if labels is None or row.label in labels)

    def require(self, *, split: str | None = None, labels: Sequence[str] | None = None) -> tuple[ManifestRow, ...]:
        """Like `select`, but an empty choice is an error that names what the manifest does hold."""
        rows = self.select(split=split, labels=labels)
        if not rows:
            present = sorted({row.split or "(none)" for row in self.rows})
            raise ManifestError(
                f"{self.path.name}: no rows to work on",
                expected=f"rows with split {split!r}" if split else "rows outside the split 'extra'",
                got=f"splits {', '.join(present)}",
                next_step="choose one of these splits",
            )
        return rows


def read_manifest(path: Path) -> Manifest:
    """Parses a manifest (UTF-8, with or without BOM; comma-separated, RFC 4180).

    Files named in `path` need not exist here: a missing one is the problem of its own row, reported when it is read.

    Raises:
        ManifestError: Unreadable, no header, missing columns, empty required cell, duplicate image_id, no rows.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ManifestError(
            f"{path}: cannot be read", expected="a CSV manifest", got=error.strerror or str(error), next_step="check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path.name}: not a text file", expected="CSV in UTF-8", got=f"byte {error.start} is not UTF-8", next_step=_EXAMPLE
        ) from error
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        missing = [name for name in REQUIRED_COLUMNS if name not in header]
        if missing:
            raise ManifestError(
                f"{path.name}: column {', '.join(missing)} missing",
                expected=f"columns {', '.join(REQUIRED_COLUMNS)}",
                got=", ".join(header[:12]) or "an empty file",
                next_step=_EXAMPLE,
            )
        if len(set(header)) != len(header):
            twice = sorted({name for name in header if header.count(name) > 1})
            raise ManifestError(f"{path.name}: column {', '.join(twice)} occurs twice", expected="distinct columns", next_step="rename one")
        rows = [_row(path, reader.line_num, record) for record in reader]
    except csv.Error as error:
        raise ManifestError(
            f"{path.name}, line {reader.line_num}: not valid CSV", expected="RFC 4180", got=str(error), next_step="export it again"
        ) from error
    if not rows:
        raise ManifestError(
            f"{path.name}: no rows", expected="at least one radiograph", got="only a header", next_step="add one row per image"
        )
    _refuse_duplicates(path, rows)
    return Manifest(path, tuple(rows), hashlib.sha256(data).hexdigest())


def _row(manifest: Path, line: int, record: Mapping[str | None, str | list[str] | None]) -> ManifestRow:
    if None in record or None in record.values():
        raise ManifestError(
            f"{manifest.name}, line {line}: wrong number of cells",
            expected="as many as the header",
            next_step="quote cells that hold commas",
        )
    cells = {name: value.strip() for name, value in record.items() if isinstance(name, str) and isinstance(value, str)}
    for name in REQUIRED_COLUMNS:
        if not cells[name]:
            raise ManifestError(
                f"{manifest.name}, line {line}: {name} is empty", expected="a value in every required cell", next_step="fill it in"
            )
    return row_of(cells, manifest.parent, _path(manifest.parent, cells["path"]))


def row_of(cells: Mapping[str, str], folder: Path, path: Path, member: str | None = None) -> ManifestRow:
    """What these cells, by column, tell of a film; `image_id` and `label` are among them."""
    named = {"image_id", "path", "label", "patient_id", "source", "split"}
    return ManifestRow(
        folder=folder,
        image_id=cells["image_id"],
        path=path,
        label=cells["label"],
        patient_id=cells.get("patient_id") or None,
        source=cells.get("source") or None,
        split=cells.get("split") or None,
        fields=MappingProxyType({name: value for name, value in cells.items() if value and name not in named}),
        member=member,
    )


def _path(folder: Path, cell: str) -> Path:
    """A file, or an object of a storage; one that cannot be is the problem of its row, reported when it is read."""
    with suppress(ImageError):
        if cell.startswith(OBJECT_SCHEME):
            return object_path(cell)
    return folder / cell


def _refuse_duplicates(path: Path, rows: Sequence[ManifestRow]) -> None:
    seen: set[str] = set()
    twice = sorted({row.image_id for row in rows if row.image_id in seen or seen.add(row.image_id)})
    if twice:
        shown = ", ".join(twice[:5]) + (f" and {len(twice) - 5} more" if len(twice) > 5 else "")
        raise ManifestError(
            f"{path.name}: image_id occurs more than once",
            expected="one row per image_id",
            got=shown,
            next_step="remove or rename the repetitions",
        )
