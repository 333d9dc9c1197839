"""Confirmed cases in bulk, through the one pipeline: an ingest into a gallery, and embeddings for an evaluation."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.archive import pipeline
from cxr_retrieval.archive.inputs import Unlisted, Unusable
from cxr_retrieval.archive.pipeline import Seen
from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.contract import EMBEDDING, LUNG_AGREEMENT, LUNG_MASK, TensorSpec
from cxr_retrieval.errors import CxrError, ImageError, InputError
from cxr_retrieval.gallery.store import Entry, Held, Store, make_entry
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.retrieval.query import assessed

_LOOKED_UP: Final = 128
"""Rows that the gallery is asked about at once."""

Advance = Callable[[int], None]
Tell = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One row that could not be used, and why. `image_id`: of a film that no manifest lists, what the user calls it."""

    image_id: str
    error: CxrError


@dataclass(frozen=True)
class IngestReport:
    """What became of every row: newly embedded, only its facts corrected, found unchanged, failed, or (`pending`) not reached; of rows
    without a known number, `pending` is how many at least.
    """

    stored: int
    corrected: int
    unchanged: int
    problems: tuple[Problem, ...]
    pending: int = 0


@dataclass(frozen=True)
class Embedded:
    """Rows with their embeddings `[n, 64]` and the digests of their pictures, those that failed, and how many the store already had."""

    entries: tuple[Entry, ...]
    embeddings: NDArray[np.float32]
    pixels: tuple[str, ...]
    problems: tuple[Problem, ...]
    from_store: int


@dataclass(frozen=True)
class _NewCase:
    """A row that must be embedded, what messages call it, and what the gallery holds under its key."""

    entry: Entry
    name: str
    held: Held | None = None
    unlisted: bool = False

    @property
    def path(self) -> Path:
        return self.entry.row.path

    @property
    def member(self) -> str | None:
        return self.entry.row.member


def ingest(
    rows: Iterable[ManifestRow | Unlisted | Unusable],
    reader: FilmReader,
    triton: TritonClient,
    store: Store,
    advance: Advance,
    *,
    stop: threading.Event | None = None,
    tell: Tell = lambda _: None,
    patience_s: float = pipeline.PATIENCE_S,
    gate: bool = True,
) -> IngestReport:
    """Embeds and upserts every row whose file is new or has changed; safe to interrupt and to repeat.

    A row whose file is the one stored, but not its facts (a corrected label, a folder that moved), keeps its embedding. Of films that no
    manifest lists, the first of several equal files stands for all; the others count as unchanged.

    Args:
        rows: Drawn as far as there is room; what is held does not grow with their number.
        advance: Told how many rows have been dealt with.
        stop: Ends it early, once it is set, with what Triton has; nothing is lost.
        tell: Told what is waited for.
        patience_s: How long a server that went away is waited for.
        gate: Store nothing that is no upright frontal chest film; such a row is a problem.
    """
    stop = stop or threading.Event()
    sink = _Gallery(store, reader, advance, gate=gate)

    def patiently(call: Callable[[], None]) -> None:
        for attempt in pipeline.patiently(stop, patience_s):
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    store.probe()  # which also has the gallery loaded again
                call()

    with ThreadPoolExecutor() as hashing:
        new = sink.new_cases(rows, hashing, patiently)
        pipeline.run(new, reader, triton, sink, probe_store=store.probe, stop=stop, tell=tell, patience_s=patience_s)
    done = sink.stored + sink.corrected + sink.unchanged
    if done:
        patiently(store.publish)
    known = len(rows) if isinstance(rows, Sized) else sink.drawn + (not sink.all_drawn or stop.is_set())
    return IngestReport(sink.stored, sink.corrected, sink.unchanged, tuple(sink.problems), known - done - len(sink.problems))


class _Gallery:
    """The sink of an ingest."""

    def __init__(self, store: Store, reader: FilmReader, advance: Advance, *, gate: bool) -> None:
        self.outputs: Sequence[TensorSpec] = (EMBEDDING, LUNG_MASK, LUNG_AGREEMENT) if gate else (EMBEDDING,)
        self._store, self._reader, self._advance, self._gate = store, reader, advance, gate
        self._unlisted: set[int] = set()
        self.stored = self.corrected = self.unchanged = self.drawn = 0
        self.all_drawn = False
        self.problems: list[Problem] = []

    def new_cases(
        self,
        rows: Iterable[ManifestRow | Unlisted | Unusable],
        hashing: ThreadPoolExecutor,
        patiently: Callable[[Callable[[], None]], None],
    ) -> Iterator[_NewCase]:
        """Rows that must be embedded; those whose facts alone have changed are corrected on the way."""
        for chunk in _chunks(rows, _LOOKED_UP):
            self.drawn += len(chunk)
            cases, failed = _typed(chunk, self._reader, hashing)
            self.problems += failed
            cases, copies = self._without_copies(cases)
            held: dict[str, Held] = {}
            patiently(lambda cases=cases, held=held: held.update(self._store.held([case.entry.key for case in cases])))
            same = [case.entry for case in cases if case.entry.key in held and held[case.entry.key].file == case.entry.file]
            other_facts = [entry for entry in same if held[entry.key].facts != entry.facts]
            patiently(lambda other_facts=other_facts, held=held: self._correct(other_facts, held))
            self.corrected += len(other_facts)
            self.unchanged += len(same) - len(other_facts) + copies
            self._advance(len(same) + len(failed) + copies)
            settled = {entry.key for entry in same}
            yield from (replace(case, held=held.get(case.entry.key)) for case in cases if case.entry.key not in settled)
        self.all_drawn = True

    def _without_copies(self, cases: Sequence[_NewCase]) -> tuple[list[_NewCase], int]:
        """Films that no manifest lists are called after their bytes: of equal ones only the first is a case, with its path."""
        kept: list[_NewCase] = []
        for case in cases:
            number = int(case.entry.key, 16)
            if case.unlisted and number in self._unlisted:
                continue
            if case.unlisted:
                self._unlisted.add(number)
            kept.append(case)
        return kept, len(cases) - len(kept)

    def _correct(self, entries: Sequence[Entry], held: Mapping[str, Held]) -> None:
        vectors = self._store.embeddings([entry.key for entry in entries])
        self._store.upsert(entries, [held[entry.key].pixels for entry in entries], [vectors[entry.key] for entry in entries])

    def keep(self, seen: Sequence[Seen[_NewCase]]) -> tuple[int, list[Problem]]:
        problems: list[Problem] = []
        kept: list[tuple[Entry, Seen[_NewCase]]] = []
        for one in seen:
            try:
                _refuse_another_film(one)
                if self._gate:
                    _refuse_no_film(one)
                kept.append((replace(one.work.entry, file=one.film.file), one))  # of the bytes embedded, should the file have changed
            except InputError as error:
                problems.append(Problem(one.work.name, error))
        self._store.upsert([entry for entry, _ in kept], [one.film.pixels for _, one in kept], [_embedding(one) for _, one in kept])
        return len(kept), problems

    def kept(self, result: tuple[int, list[Problem]]) -> None:
        stored, problems = result
        self.stored += stored
        self.problems += problems
        self._advance(stored + len(problems))

    def failed(self, work: _NewCase, error: CxrError) -> None:
        self.problems.append(Problem(work.name, error))
        self._advance(1)


def embed_rows(rows: Sequence[ManifestRow], reader: FilmReader, triton: TritonClient, store: Store | None, advance: Advance) -> Embedded:
    """Embeddings of rows for evaluation, in their order: taken from the store where it holds the same file, else computed now."""
    sink = _Collected(advance)
    from_store = 0
    with ThreadPoolExecutor() as hashing:
        read, failed = _typed(rows, reader, hashing)
    typed = [case.entry for case in read]
    sink.problems += failed
    advance(len(failed))
    if store is not None:
        cases, stored = store.vectors()
        known = {case.file: (case.pixels, vector) for case, vector in zip(cases, stored, strict=True)}
        sink.found |= {entry.key: (entry, *known[entry.file]) for entry in typed if entry.file in known}
        from_store = len(sink.found)
        advance(from_store)
    pipeline.run((case for case in read if case.entry.key not in sink.found), reader, triton, sink)
    ordered = [sink.found[entry.key] for entry in typed if entry.key in sink.found]
    return Embedded(
        tuple(entry for entry, _, _ in ordered),
        np.array([vector for _, _, vector in ordered], np.float32),
        tuple(pixels for _, pixels, _ in ordered),
        tuple(sink.problems),
        from_store,
    )


class _Collected:
    """The sink of an evaluation: key → entry, digest of its picture, embedding."""

    outputs = (EMBEDDING,)

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self.found: dict[str, tuple[Entry, str, NDArray[np.float32]]] = {}
        self.problems: list[Problem] = []

    def keep(self, seen: Sequence[Seen[_NewCase]]) -> Sequence[Seen[_NewCase]]:
        return seen

    def kept(self, result: Sequence[Seen[_NewCase]]) -> None:
        for one in result:
            self.found[one.work.entry.key] = (replace(one.work.entry, file=one.film.file), one.film.pixels, _embedding(one))
        self._advance(len(result))

    def failed(self, work: _NewCase, error: CxrError) -> None:
        self.problems.append(Problem(work.name, error))
        self._advance(1)


def _embedding(seen: Seen[_NewCase]) -> NDArray[np.float32]:
    return np.asarray(seen.outputs[EMBEDDING.name], np.float32)


def _typed(
    rows: Sequence[ManifestRow | Unlisted | Unusable], reader: FilmReader, pool: ThreadPoolExecutor
) -> tuple[list[_NewCase], list[Problem]]:
    def typed(row: ManifestRow | Unlisted | Unusable) -> _NewCase | Problem:
        name = row.image_id if isinstance(row, ManifestRow) else row.name
        try:
            if isinstance(row, Unusable):
                return Problem(name, row.error)
            if isinstance(row, Unlisted):
                identity = reader.identity(row.input.path, row.input.member).result()
                return _NewCase(make_entry(row.row(identity), identity.file), name, unlisted=True)
            return _NewCase(make_entry(row, _digest(row)), name)
        except InputError as error:
            return Problem(name, error)

    results = list(pool.map(typed, rows))
    return [r for r in results if isinstance(r, _NewCase)], [r for r in results if isinstance(r, Problem)]


def _refuse_another_film(seen: Seen[_NewCase]) -> None:
    """Two sources may number their films alike; the second must not replace the first without a word."""
    held, row = seen.work.held, seen.work.entry.row
    if held is not None and held.pixels != seen.film.pixels and held.source != row.source and held.source and row.source:
        raise InputError(
            f"image_id {row.image_id} is taken by another film",
            expected="one image_id for one film, whatever its source",
            got=f"a film of {held.source} in the gallery, one of {row.source} here",
            next_step="rename it in the manifest, or take the other out with `cxr gallery remove --image`",
        )


def _refuse_no_film(seen: Seen[_NewCase]) -> None:
    """What is no upright frontal chest film would be the nearest case of the next such picture."""
    reason = assessed(seen.film, seen.outputs).reason
    if reason is not None:
        raise ImageError(
            f"{seen.work.name}: refused",
            expected="an upright frontal chest radiograph",
            got=reason,
            next_step="take the row out of the manifest; if it is one, ingest it with --no-gate",
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


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
