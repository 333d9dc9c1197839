"""From manifest rows to embeddings in bulk: read in worker processes, embed in batches, and let a bad file harm nobody else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.contract import IMAGE_SIZE
from cxr_retrieval.errors import CxrError, ImageError, InputError, UnusableOutputError
from cxr_retrieval.gallery.store import Entry, Held, Store, make_entry
from cxr_retrieval.inference.triton import BATCH_SIZE, TritonClient
from cxr_retrieval.radiograph.decoding import Film, FilmReader

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
    """What became of every row: newly embedded, only its facts corrected, found unchanged, or failed."""

    stored: int
    corrected: int
    unchanged: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Embedded:
    """Rows with their embeddings `[n, 64]` and the digests of their pictures, those that failed, and how many the store already had."""

    entries: tuple[Entry, ...]
    embeddings: NDArray[np.float32]
    pixels: tuple[str, ...]
    problems: tuple[Problem, ...]
    from_store: int


@dataclass(frozen=True)
class _Vectors:
    """What came of embedding entries: those that could be, each with the digest of its picture and its embedding."""

    entries: list[Entry]
    pixels: list[str]
    embeddings: list[NDArray[np.float32]]
    problems: list[Problem]


def ingest(rows: Sequence[ManifestRow], reader: FilmReader, triton: TritonClient, store: Store, advance: Advance) -> IngestReport:
    """Embeds and upserts every row whose file is new or has changed; safe to interrupt and to repeat.

    A row whose file is the one stored, but not its facts (a corrected label, a folder that moved), keeps its embedding.

    Args:
        advance: Told how many rows have been dealt with.
    """
    stored = corrected = unchanged = 0
    problems: list[Problem] = []
    with ThreadPoolExecutor() as pool:
        for chunk in _chunks(rows, CHUNK):
            entries, failed = _typed(chunk, pool)
            problems += failed
            held = store.held([entry.key for entry in entries])
            new = [entry for entry in entries if entry.key not in held or held[entry.key].file != entry.file]
            same = [entry for entry in entries if entry.key in held and held[entry.key].file == entry.file]
            other_facts = [entry for entry in same if held[entry.key].facts != entry.facts]
            found = _embed_entries(new, reader, triton, held)
            problems += found.problems
            vectors = store.embeddings([entry.key for entry in other_facts])
            store.upsert(
                [*found.entries, *other_facts],
                [*found.pixels, *(held[entry.key].pixels for entry in other_facts)],
                [*found.embeddings, *(vectors[entry.key] for entry in other_facts)],
            )
            stored += len(found.entries)
            corrected += len(other_facts)
            unchanged += len(same) - len(other_facts)
            advance(len(chunk))
    if stored or corrected or unchanged:
        store.publish()
    return IngestReport(stored, corrected, unchanged, tuple(problems))


def embed_rows(rows: Sequence[ManifestRow], reader: FilmReader, triton: TritonClient, store: Store | None, advance: Advance) -> Embedded:
    """Embeddings of rows for evaluation: taken from the store where it holds the same file, else computed now."""
    known: dict[str, tuple[str, NDArray[np.float32]]] = {}
    if store is not None:
        cases, stored = store.vectors()
        known = {case.file: (case.pixels, vector) for case, vector in zip(cases, stored, strict=True)}
    entries: list[Entry] = []
    pixels: list[str] = []
    embeddings: list[NDArray[np.float32]] = []
    problems: list[Problem] = []
    from_store = 0
    with ThreadPoolExecutor() as pool:
        for chunk in _chunks(rows, CHUNK):
            typed, failed = _typed(chunk, pool)
            have = [entry for entry in typed if entry.file in known]
            found = _embed_entries([entry for entry in typed if entry.file not in known], reader, triton, {})
            problems += [*failed, *found.problems]
            from_store += len(have)
            entries += [*have, *found.entries]
            pixels += [*(known[entry.file][0] for entry in have), *found.pixels]
            embeddings += [*(known[entry.file][1] for entry in have), *found.embeddings]
            advance(len(chunk))
    return Embedded(tuple(entries), np.array(embeddings, np.float32), tuple(pixels), tuple(problems), from_store)


def _typed(rows: Sequence[ManifestRow], pool: ThreadPoolExecutor) -> tuple[list[Entry], list[Problem]]:
    def typed(row: ManifestRow) -> Entry | Problem:
        try:
            return make_entry(row, _digest(row))
        except InputError as error:
            return Problem(row.image_id, error)

    results = list(pool.map(typed, rows))
    return [r for r in results if isinstance(r, Entry)], [r for r in results if isinstance(r, Problem)]


def _embed_entries(entries: Sequence[Entry], reader: FilmReader, triton: TritonClient, held: dict[str, Held]) -> _Vectors:
    films: list[tuple[Entry, Film]] = []
    out = _Vectors([], [], [], [])
    for entry, future in [(entry, reader.submit(entry.row.path)) for entry in entries]:
        try:
            film = future.result()
            _refuse_another_film(entry, film, held.get(entry.key))
            films.append((replace(entry, file=film.file), film))  # of the bytes embedded, should the file have changed meanwhile
        except InputError as error:
            out.problems.append(Problem(entry.row.image_id, error))
    batches = list(_chunks(films, BATCH_SIZE))
    stream = triton.embed_stream(_stack([film.square for _, film in batch]) for batch in batches)
    for batch, future in zip(batches, stream, strict=True):
        try:
            vectors = list(future.result())
        except UnusableOutputError:  # find the image to blame
            vectors = [_alone(entry, film, triton, out.problems) for entry, film in batch]
        for (entry, film), vector in zip(batch, vectors, strict=True):
            if vector is not None:
                out.entries.append(entry)
                out.pixels.append(film.pixels)
                out.embeddings.append(vector)
    return out


def _alone(entry: Entry, film: Film, triton: TritonClient, problems: list[Problem]) -> NDArray[np.float32] | None:
    try:
        return triton.embed(_stack([film.square]))[0]
    except UnusableOutputError as error:
        problems.append(Problem(entry.row.image_id, error))
        return None


def _refuse_another_film(entry: Entry, film: Film, held: Held | None) -> None:
    """Two sources may number their films alike; the second must not replace the first without a word."""
    if held is not None and held.pixels != film.pixels and held.source != entry.row.source and held.source and entry.row.source:
        raise InputError(
            f"image_id {entry.row.image_id} is taken by another film",
            expected="one image_id for one film, whatever its source",
            got=f"a film of {held.source} in the gallery, one of {entry.row.source} here",
            next_step="rename it in the manifest, or take the other out with `cxr gallery remove --image`",
        )


def _digest(row: ManifestRow) -> str:
    """SHA-256 of a row's file."""
    digest = hashlib.sha256()
    try:
        if not row.path.is_file():  # a pipe would wait for ever
            raise FileNotFoundError(2, "no such file")
        with row.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ImageError(
            f"{row.path.name}: cannot be read",
            expected=f"a file at {row.path}",
            got=error.strerror or str(error),
            next_step="correct the path in the manifest (it is relative to the manifest's folder)",
        ) from error
    return digest.hexdigest()


def _stack(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.stack(images).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)


def _chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
