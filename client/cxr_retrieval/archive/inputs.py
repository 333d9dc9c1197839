"""What a user points at (files, folders, rows of a manifest) → one input for each radiograph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.errors import ImageError, InputError
from cxr_retrieval.radiograph.reading import SUFFIXES


@dataclass(frozen=True)
class Input:
    """One radiograph. `name` is what the user calls it, and unique; `member` is set if `path` is a ZIP that holds it."""

    name: str
    path: Path
    member: str | None = None
    row: ManifestRow | None = None


@dataclass(frozen=True)
class Unusable:
    """An input that has a name and no film."""

    name: str
    error: InputError


def find_inputs(paths: Sequence[str]) -> Iterator[Input | Unusable]:
    """Files as they are, and every file of a folder that can be a radiograph, in order of name; one at a time, whatever their number."""
    for name in paths:
        path = Path(name)
        if path.is_dir():
            found = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file())
            yield from (Input(str(file), file) for file in found)
        elif path.exists():
            yield Input(name, path)
        else:
            missing = ImageError(f"{name}: is not there", expected="a file or a folder", next_step="correct the path")
            yield Unusable(name, missing)
