"""Films as rows of an Apache Parquet file. For worker processes: its structure comes from anyone, and its decoder is native.

A column `image` holds each film as the bytes of its file, or as Hugging Face's data sets have it, a struct with a field `bytes`; the others
are what a manifest tells of a film, as text. Rows are read one group at a time, some films at once, so that memory does not grow with the
file; a row costs the decoding of those before it in its group, so groups of up to a thousand rows are best.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.files import MAX_FILE_BYTES, Contents, opened

IMAGE: Final = "image"
_PAGE: Final = 500
_AT_ONCE: Final = 16
"""Films in memory."""
_MAX_COLUMNS: Final = 200
_MAX_TEXT: Final = 32_768


class ParquetShelf:
    """Keeps the last file open, and the place in it that was read last: whoever reads row after row reads each once."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._file: _OpenedParquet | None = None

    def file(self, path: Path) -> _OpenedParquet:
        """The file at this path, as it is now.

        Raises:
            ImageError: It is none of films, or damaged.
        """
        with opened(path) as file:
            status = os.fstat(file.fileno())
        key = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._file is None or key != self._key:
            self._file, self._key = _OpenedParquet(path), key
        return self._file


class _OpenedParquet:
    def __init__(self, path: Path) -> None:
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # others reserve more address space than a worker has
        from pyarrow import parquet

        self._path = path
        try:
            self._file: Any = parquet.ParquetFile(path)
            schema = self._file.schema_arrow
            metadata = self._file.metadata
        except Exception as error:  # Arrow raises several kinds, OSError among them
            raise self._damaged(error) from error
        columns = list(schema.names)
        if IMAGE not in columns or len(columns) > _MAX_COLUMNS:
            raise ImageError(
                f"{path.name}: holds no films",
                expected=f"a column {IMAGE} with the bytes of a file in each row, and at most {_MAX_COLUMNS} columns",
                got=", ".join(columns[:10]) or "no columns",
                next_step="write it with such a column",
            )
        self._told = [name for name in columns if name != IMAGE]
        self._starts = [0]
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._batches: tuple[int, int, Iterator[Any]] | None = None
        self._held: tuple[int, Any] = (0, ())

    def page(self, start: int) -> Contents:
        """Rows from `start` on, at most one group's: their numbers, and what is told of each."""
        if start >= self._starts[-1]:
            return Contents("Parquet", (), (), None)
        group = self._group(start)
        end = min(start + _PAGE, self._starts[group + 1])
        try:
            rows = self._file.read_row_group(group, columns=self._told).slice(start - self._starts[group], end - start).to_pylist()
        except Exception as error:
            raise self._damaged(error) from error
        told = tuple(
            {name: str(value)[:_MAX_TEXT] for name, value in row.items() if isinstance(value, (str, int, float, bool)) and value == value}
            for row in (rows or [{}] * (end - start))
        )
        return Contents("Parquet", tuple(map(str, range(start, end))), (), end if end < self._starts[-1] else None, told)

    def read(self, member: str) -> bytes:
        """The film of a row.

        Raises:
            ImageError: There is no such row, or nothing in it.
        """
        row = int(member) if member.isdecimal() else -1
        if not 0 <= row < self._starts[-1]:
            raise self._unusable(member, f"{self._starts[-1]} rows")
        try:
            value = self._film(row)
        except Exception as error:
            raise self._damaged(error) from error
        if not isinstance(value, bytes) or not value:
            raise self._unusable(member, "nothing" if not value else type(value).__name__)
        if len(value) > MAX_FILE_BYTES:
            raise self._unusable(member, f"{len(value)} bytes")
        return value

    def _film(self, row: int) -> object:
        first, batch = self._held
        if not first <= row < first + len(batch):
            first, batch = self._held = self._batch_with(row)
        value = batch.column(0)[row - first].as_py()
        return value.get("bytes") if isinstance(value, dict) else value

    def _batch_with(self, row: int) -> tuple[int, Any]:
        """Some films of a group, and the row of the first: read on from where the last ended, unless this one lies before."""
        group = self._group(row)
        if self._batches is None or self._batches[0] != group or self._batches[1] > row:
            batches = self._file.iter_batches(_AT_ONCE, row_groups=[group], columns=[IMAGE], use_threads=False)
            self._batches = (group, self._starts[group], iter(batches))
        _, first, batches = self._batches
        for batch in batches:
            self._batches = (group, first + len(batch), batches)
            if row < first + len(batch):
                return first, batch
            first += len(batch)
        raise EOFError("a group with fewer rows than it says")

    def _group(self, row: int) -> int:
        return next(group for group, start in enumerate(self._starts[1:]) if row < start)

    def _damaged(self, error: Exception) -> ImageError:
        return ImageError(
            f"{self._path.name}: cannot be read as Parquet",
            expected="an undamaged file",
            got=" ".join(f"{type(error).__name__} {error}".split())[:200],
            next_step="write it again",
        )

    def _unusable(self, member: str, got: str) -> ImageError:
        return ImageError(
            f"row {member} of {self._path.name}: no film",
            expected=f"the bytes of a file in column {IMAGE}",
            got=got,
            next_step="write that row again, or leave it out",
        )
