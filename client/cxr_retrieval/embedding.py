"""From manifest rows to embeddings in bulk: decode in threads, embed in batches, and let a bad file harm nobody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.contract import IMAGE_SIZE
from cxr_retrieval.errors import CxrError, ImageError, InputError, UnusableOutputError
from cxr_retrieval.image import letterbox, read_radiograph
from cxr_retrieval.manifest import ManifestRow
from cxr_retrieval.store import Entry, Store, make_entry
from cxr_retrieval.triton import BATCH_SIZE, TritonClient

CHUNK: Final = 64
"""Rows between two writes; what an interrupted ingest repeats."""

Advance = Callable[[int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One row that could not be used, and why."""

    image_id: str
    error: CxrError


@dataclass(frozen=True)
class IngestReport:
    """What became of every row: newly stored, found unchanged, or failed."""

    stored: int
    unchanged: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Embedded:
    """Rows with their embeddings `[n, 64]`, those that failed, and how many vectors the store already had."""

    entries: tuple[Entry, ...]
    embeddings: NDArray[np.float32]
    problems: tuple[Problem, ...]
    from_store: int


def ingest(rows: Sequence[ManifestRow], triton: TritonClient, store: Store, advance: Advance) -> IngestReport:
    """Embeds and upserts every row that is new or has changed; safe to interrupt and to repeat.

    Args:
        advance: Told how many rows have been dealt with.
    """
    stored = unchanged = 0
    problems: list[Problem] = []
    with ThreadPoolExecutor() as pool:
        for chunk in _chunks(rows, CHUNK):
            entries, failed = _read_entries(chunk, pool)
            problems += failed
            present = store.fingerprints([entry.key for entry in entries])
            new = [entry for entry in entries if present.get(entry.key) != entry.fingerprint]
            unchanged += len(entries) - len(new)
            good, vectors, failed = _embed_entries(new, triton, pool)
            problems += failed
            if good:
                store.upsert(good, vectors)
            stored += len(good)
            advance(len(chunk))
    if stored or unchanged:
        store.publish()
    return IngestReport(stored, unchanged, tuple(problems))


def embed_rows(rows: Sequence[ManifestRow], triton: TritonClient, store: Store | None, advance: Advance) -> Embedded:
    """Embeddings of rows for evaluation: taken from the store where it holds the same file and facts, else computed now."""
    known = {}
    if store is not None:
        cases, vectors = store.vectors()
        known = {(case.key, case.fingerprint): vector for case, vector in zip(cases, vectors, strict=True)}
    entries: list[Entry] = []
    embeddings: list[NDArray[np.float32]] = []
    problems: list[Problem] = []
    from_store = 0
    with ThreadPoolExecutor() as pool:
        for chunk in _chunks(rows, CHUNK):
            read, failed = _read_entries(chunk, pool)
            problems += failed
            have = [entry for entry in read if (entry.key, entry.fingerprint) in known]
            new = [entry for entry in read if (entry.key, entry.fingerprint) not in known]
            good, vectors, failed = _embed_entries(new, triton, pool)
            problems += failed
            from_store += len(have)
            entries += [*have, *good]
            embeddings += [*(known[entry.key, entry.fingerprint] for entry in have), *vectors]
            advance(len(chunk))
    return Embedded(tuple(entries), np.array(embeddings, np.float32), tuple(problems), from_store)


def _read_entries(rows: Sequence[ManifestRow], pool: ThreadPoolExecutor) -> tuple[list[Entry], list[Problem]]:
    def read(row: ManifestRow) -> Entry | Problem:
        try:
            return make_entry(row, _bytes(row))
        except InputError as error:
            return Problem(row.image_id, error)

    results = list(pool.map(read, rows))
    return [r for r in results if isinstance(r, Entry)], [r for r in results if isinstance(r, Problem)]


def _embed_entries(
    entries: Sequence[Entry], triton: TritonClient, pool: ThreadPoolExecutor
) -> tuple[list[Entry], NDArray[np.float32], list[Problem]]:
    def decode(entry: Entry) -> NDArray[np.uint8] | Problem:
        try:
            return letterbox(read_radiograph(_bytes(entry.row), entry.row.path.name).pixels)[0]
        except InputError as error:
            return Problem(entry.row.image_id, error)

    decoded = list(pool.map(decode, entries))
    problems = [item for item in decoded if isinstance(item, Problem)]
    usable = [(entry, pixels) for entry, pixels in zip(entries, decoded, strict=True) if not isinstance(pixels, Problem)]
    batches = list(_chunks(usable, BATCH_SIZE))
    good: list[Entry] = []
    vectors: list[NDArray[np.float32]] = []
    stream = triton.embed_stream(_stack([pixels for _, pixels in batch]) for batch in batches)
    for batch, future in zip(batches, stream, strict=True):
        try:
            embedded = future.result()
            good += [entry for entry, _ in batch]
            vectors += list(embedded)
        except UnusableOutputError:  # find the image to blame
            for entry, pixels in batch:
                try:
                    vectors.append(triton.embed(_stack([pixels]))[0])
                    good.append(entry)
                except UnusableOutputError as error:
                    problems.append(Problem(entry.row.image_id, error))
    return good, np.array(vectors, np.float32), problems


def _bytes(row: ManifestRow) -> bytes:
    try:
        return row.path.read_bytes()
    except OSError as error:
        raise ImageError(
            f"{row.path.name}: cannot be read",
            expected=f"a file at {row.path}",
            got=error.strerror or str(error),
            next_step="correct the path in the manifest (it is relative to the manifest's folder)",
        ) from error


def _stack(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.stack(images).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)


def _chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
