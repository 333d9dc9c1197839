"""Confirmed cases in bulk, through the one pipeline: an ingest into a gallery, and embeddings for an evaluation."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.archive import pipeline
from cxr_retrieval.archive.audit import Noted
from cxr_retrieval.archive.inputs import Unlisted, Unusable
from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.archive.pipeline import Engine, Seen
from cxr_retrieval.archive.watching import Expected, Failed, Settled, Watch, unwatched
from cxr_retrieval.cases.features import heading, standard_name
from cxr_retrieval.cases.fhir import Chart, film_day
from cxr_retrieval.cases.fields import Doubt, identifies, parse_clinical
from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.contract import LUNG_AGREEMENT, LUNG_MASK, TEXT_VECTOR, TensorSpec
from cxr_retrieval.errors import CxrError, ImageError, InputError
from cxr_retrieval.gallery.spaces import FILM, REPORTS, Space
from cxr_retrieval.gallery.store import Entry, Held, Store, make_entry
from cxr_retrieval.gallery.thumbnails import Thumbnail
from cxr_retrieval.gallery.words import NOTES
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader, Identity
from cxr_retrieval.radiograph.files import is_object
from cxr_retrieval.retrieval.query import assessed
from cxr_retrieval.retrieval.reports import ReportReader
from cxr_retrieval.settings import ThumbnailKind

_DOUBTS_KEPT: Final = 1000
"""Doubts that are told one by one; of more, only the number is."""
_LOOKED_UP: Final = 128
"""Rows that the gallery is asked about at once."""
_ASKED_ABOUT: Final = 64
"""Files that others are asked about at once."""

Advance = Callable[[int], None]
Identify = Callable[[Path, str | None], Identity]
Tell = Callable[[str], None]
T = TypeVar("T")
R = TypeVar("R", bound=ManifestRow | Unlisted | Unusable)


@dataclass(frozen=True)
class Problem:
    """One row that could not be used, and why. `image_id`: of a film that no manifest lists, what the user calls it."""

    image_id: str
    error: CxrError
    pseudonym: str | None = None


@dataclass(frozen=True)
class IngestReport:
    """What became of every row: newly embedded, only its facts corrected, found unchanged, failed, or (`pending`) not reached; of rows
    without a known number, `pending` is how many at least.

    Attributes:
        left_out: Columns that were not stored, for they tell who somebody is.
        doubts: Values that are not plausible, the first thousand; `doubted`: how many there are.
        misnamed: Columns kept as the user's own that look like a standard feature → what that is called.
        charted: Rows whose patient the FHIR bundles know.
    """

    stored: int
    corrected: int
    unchanged: int
    problems: tuple[Problem, ...]
    pending: int = 0
    left_out: tuple[str, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    doubted: int = 0
    misnamed: Mapping[str, str] = field(default_factory=dict)
    charted: int = 0


@dataclass(frozen=True)
class Embedded:
    """Rows with their vectors `[n, size]` (`gallery/spaces.py`) and digests by which equal pictures are known (keyed if there was a store),
    those that failed, and how many the store already had.
    """

    rows: tuple[ManifestRow, ...]
    vectors: NDArray[np.float32]
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
    charted: bool = False

    @property
    def path(self) -> Path:
        return self.entry.row.path

    @property
    def member(self) -> str | None:
        return self.entry.row.member


@dataclass(frozen=True)
class _Measured:
    """A row to be evaluated, and the digest of its file as the store would have it."""

    row: ManifestRow
    file: str

    @property
    def path(self) -> Path:
        return self.row.path

    @property
    def member(self) -> str | None:
        return self.row.member


def ingest(
    rows: Iterable[ManifestRow | Unlisted | Unusable],
    reader: FilmReader,
    triton: TritonClient | None,
    store: Store,
    advance: Advance,
    *,
    thumbnails: ThumbnailKind = ThumbnailKind.none,
    stop: threading.Event | None = None,
    tell: Tell = lambda _: None,
    watch: Watch = unwatched,
    noted: Noted = lambda _: None,
    patience_s: float = pipeline.PATIENCE_S,
    gate: bool = True,
    chart: Chart | None = None,
    reports: ReportReader | None = None,
    engine: Engine | None = None,
    identify: Identify | None = None,
) -> IngestReport:
    """Embeds and upserts every row whose file is new or has changed; safe to interrupt and to repeat.

    A row whose file is the one stored, but not its facts (a corrected label), keeps its embedding. A folder that moved changes nothing but
    the local table that leads from pseudonyms back to files. Of films that no manifest lists, the first of several equal files stands for
    all; the others count as unchanged.

    Args:
        rows: Drawn as far as there is room; what is held does not grow with their number.
        advance: Told how many rows have been dealt with.
        thumbnails: What is kept of each picture; of cases stored before, too, that lack it. Those kept before stay, as long as they are of
            the film that the gallery holds.
        stop: Ends it early, once it is set, with what Triton has; nothing is lost.
        tell: Told what is waited for, in words.
        watch: Told everything.
        noted: Told which keys are about to be stored or corrected.
        patience_s: How long a server that went away is waited for.
        gate: Store nothing that is no upright frontal chest film; such a row is a problem.
        chart: Tells clinical facts of the rows' patients, where a row does not tell them itself.
        reports: Makes vectors of the rows' clinical notes, for a gallery of the space `reports`.
        engine: Embeds elsewhere, asking networks for `outputs_of` the gallery; None: this process does, by `reader` and `triton`.
        identify: Tells elsewhere which file lies at a place; None: this process does, by reading it.
    """
    stop = stop or threading.Event()
    describe = None if reports is None or triton is None else partial(reports.vectors, triton)
    sink = _Gallery(store, reader, advance, thumbnails, watch, noted, chart, describe, identify, gate=gate)
    patience = Patience(stop, patience_s, tell, watch)
    if isinstance(rows, Sized):
        watch(Expected(len(rows)))

    def patiently(call: Callable[[], None]) -> None:
        patience.until("milvus", call, probe=store.probe)  # which also has the gallery loaded again

    with ThreadPoolExecutor(None if identify is None else _ASKED_ABOUT) as hashing:
        new = sink.new_cases(rows, hashing, patiently)
        through = engine if engine is not None or triton is None else pipeline.here(reader, triton)
        if through is None:
            raise TypeError("neither Triton nor an engine to embed with")
        through(new, sink, probe_store=store.probe, stop=stop, tell=tell, watch=watch, patience_s=patience_s)
    done = sink.stored + sink.corrected + sink.unchanged
    if done:
        patiently(store.publish)
    known = len(rows) if isinstance(rows, Sized) else sink.drawn + (not sink.all_drawn or stop.is_set())
    return IngestReport(
        sink.stored,
        sink.corrected,
        sink.unchanged,
        tuple(sink.problems),
        known - done - len(sink.problems),
        sink.left_out(),
        tuple(sink.doubts),
        sink.doubted,
        sink.misnamed(),
        sink.charted,
    )


def outputs_of(space: Space, thumbnails: ThumbnailKind, *, gate: bool) -> Sequence[TensorSpec]:
    """What an ingest must know of a film."""
    return (*space.outputs, LUNG_MASK, LUNG_AGREEMENT) if gate or thumbnails is ThumbnailKind.lungs else space.outputs


class _Gallery:
    """The sink of an ingest."""

    def __init__(
        self,
        store: Store,
        reader: FilmReader,
        advance: Advance,
        thumbnails: ThumbnailKind,
        watch: Watch,
        noted: Noted,
        chart: Chart | None,
        describe: Callable[[Sequence[str]], NDArray[np.float32]] | None,
        identify: Identify | None,
        *,
        gate: bool,
    ) -> None:
        self._store, self._reader, self._advance, self._kind, self._gate = store, reader, advance, thumbnails, gate
        self._watch, self._noted, self._chart, self._describe, self._identify = watch, noted, chart, describe, identify
        self._stored_now: set[str] = set()
        self.outputs = outputs_of(store.space, thumbnails, gate=gate)
        self._columns: set[str] = set()
        self._unlisted: set[int] = set()
        self.stored = self.corrected = self.unchanged = self.drawn = self.doubted = self.charted = 0
        self.all_drawn = False
        self.problems: list[Problem] = []
        self.doubts: list[Doubt] = []

    def new_cases(
        self,
        rows: Iterable[ManifestRow | Unlisted | Unusable],
        hashing: ThreadPoolExecutor,
        patiently: Callable[[Callable[[], None]], None],
    ) -> Iterator[_NewCase]:
        """Rows that must be embedded; those whose facts alone have changed are corrected on the way."""
        for chunk in _chunks(rows, _LOOKED_UP):
            self.drawn += len(chunk)
            self._columns.update(*(row.fields for row in chunk if isinstance(row, ManifestRow)))
            cases, failed = _tried(chunk, self._new_case, hashing)
            self._take_problems(failed)
            cases, copies = self._without_copies(cases)
            self._take_doubts(cases)
            held: dict[str, Held] = {}
            kept: dict[str, ThumbnailKind] = {}
            patiently(lambda cases=cases, held=held, kept=kept: self._look_up([case.entry.key for case in cases], held, kept))
            same = [case.entry for case in cases if self._is_whole(case.entry, held, kept)]
            self._store.pseudonyms.remember([entry.original for entry in same])
            other_facts = [entry for entry in same if held[entry.key].facts != entry.facts]
            patiently(lambda other_facts=other_facts, held=held: self._correct(other_facts, held))
            self.corrected += len(other_facts)
            unchanged = len(same) - len(other_facts) + copies
            self.unchanged += unchanged
            self._advance(len(same) + len(failed) + copies)
            self._watch(Settled({"corrected": len(other_facts), "unchanged": unchanged}))
            settled = {entry.key for entry in same}
            yield from (replace(case, held=held.get(case.entry.key)) for case in cases if case.entry.key not in settled)
        self.all_drawn = True
        self._watch(Expected(self.drawn))

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

    def left_out(self) -> tuple[str, ...]:
        """Columns that were met and are never stored."""
        return tuple(sorted(filter(identifies, self._columns)))

    def misnamed(self) -> dict[str, str]:
        """Columns that were met and look like a standard feature under another name → its name."""
        named = {column: standard_name(column) for column in sorted(self._columns)}
        return {column: name for column, name in named.items() if name is not None and name not in self._columns}

    def _new_case(self, row: ManifestRow | Unlisted | Unusable) -> _NewCase:
        if isinstance(row, Unusable):
            raise row.error
        if isinstance(row, Unlisted):
            path, member = row.input.path, row.input.member
            identity = self._identify(path, member) if self._identify else self._reader.identity(path, member).result()
            listed, charted = self._with_facts(row.row(identity), identity.study_date)
            return _NewCase(make_entry(listed, identity.file, self._store.pseudonyms), row.name, unlisted=True, charted=charted)
        listed, charted = self._with_facts(row, row.fields.get("date"))
        file = self._identify(row.path, row.member).file if self._identify else _digest(row, self._reader)
        return _NewCase(make_entry(listed, file, self._store.pseudonyms), row.image_id, charted=charted)

    def _with_facts(self, row: ManifestRow, day: str | None) -> tuple[ManifestRow, bool]:
        """The row with what the chart tells of its patient and the row does not; and whether that knows the patient."""
        facts = None if self._chart is None else self._chart.facts(row.patient_id, film_day(day))
        if facts is None:
            return row, False
        told = {feature.name for feature, _ in map(heading, row.fields) if feature is not None}
        further = {name: text for name, text in facts.items() if name not in told}
        return replace(row, fields=MappingProxyType({**row.fields, **further})), True

    def _look_up(self, keys: Sequence[str], held: dict[str, Held], kept: dict[str, ThumbnailKind]) -> None:
        held.update(self._store.held(keys))
        if self._kind is not ThumbnailKind.none:
            kept.update(self._store.thumbnail_kinds(keys))

    def _is_whole(self, entry: Entry, held: Mapping[str, Held], kept: Mapping[str, ThumbnailKind]) -> bool:
        """Whether the gallery holds this film, with the picture that is wanted; where a report is part of the vector, also its facts."""
        key = entry.key
        if key not in held or (self._store.space is REPORTS and held[key].facts != entry.facts):
            return False
        return held[key].file == entry.file and self._kind in (ThumbnailKind.none, kept.get(key))

    def _correct(self, entries: Sequence[Entry], held: Mapping[str, Held]) -> None:
        self._noted({entry.key: "corrected" for entry in entries})
        self._store.correct(entries, [held[entry.key].pixels for entry in entries])

    def keep(self, seen: Sequence[Seen[_NewCase]]) -> tuple[int, list[Problem]]:
        problems: list[Problem] = []
        kept: list[tuple[Entry, str, Seen[_NewCase]]] = []
        for one in seen:
            try:
                pixels = self._store.pseudonyms.digest(one.film.pixels)
                _refuse_another_film(one.work, pixels)
                if self._gate:
                    _refuse_no_film(one)
                file = self._store.pseudonyms.digest(one.film.file)  # of the bytes embedded, should the file have changed
                kept.append((replace(one.work.entry, file=file), pixels, one))
            except InputError as error:
                problems.append(Problem(one.work.name, error, one.work.entry.key))
        keys = {entry.key for entry, _, _ in kept}
        self._noted(dict.fromkeys(sorted(keys - self._stored_now), "stored"))
        self._stored_now = keys  # should Milvus be away, they come again
        self._store.upsert([entry for entry, _, _ in kept], [pixels for _, pixels, _ in kept], self._vectors(kept))
        if self._kind is ThumbnailKind.none:
            replaced = [entry.key for entry, pixels, one in kept if one.work.held is not None and one.work.held.pixels != pixels]
            self._store.remove_thumbnails(replaced)
        else:
            self._store.keep_thumbnails([self._thumbnail(entry.key, pixels, one) for entry, pixels, one in kept])
        return len(kept), problems

    def _vectors(self, kept: Sequence[tuple[Entry, str, Seen[_NewCase]]]) -> list[NDArray[np.float32]]:
        notes = {number: str(text) for number, (entry, _, _) in enumerate(kept) if (text := entry.known.get(NOTES))}
        told = self._describe(list(notes.values())) if self._describe and notes else []
        texts = dict(zip(notes, told, strict=False))
        return [
            self._store.space.vector({**one.outputs, TEXT_VECTOR.name: texts[number]} if number in texts else one.outputs)
            for number, (_, _, one) in enumerate(kept)
        ]

    def _thumbnail(self, key: str, pixels: str, seen: Seen[_NewCase]) -> Thumbnail:
        square = seen.film.square
        if self._kind is ThumbnailKind.lungs:
            square = np.where(seen.outputs[LUNG_MASK.name][0] > 0, square, np.uint8(0))
        return Thumbnail(key, self._kind, pixels, square)

    def kept(self, result: tuple[int, list[Problem]]) -> None:
        stored, problems = result
        self.stored += stored
        self._watch(Settled({"stored": stored}))
        self._take_problems(problems)
        self._advance(stored + len(problems))

    def failed(self, work: _NewCase, error: CxrError) -> None:
        self._take_problems([Problem(work.name, error, work.entry.key)])
        self._advance(1)

    def _take_doubts(self, cases: Sequence[_NewCase]) -> None:
        doubts = [Doubt(case.name, words) for case in cases for words in case.entry.doubts]
        self.doubted += len(doubts)
        self.doubts += doubts[: _DOUBTS_KEPT - len(self.doubts)]
        self.charted += sum(case.charted for case in cases)

    def _take_problems(self, problems: Sequence[Problem]) -> None:
        self.problems += problems
        self._watch(Settled({"failed": len(problems)}))
        for problem in problems:
            self._watch(Failed(problem.error, pseudonym=problem.pseudonym))


def embed_rows(
    rows: Sequence[ManifestRow], reader: FilmReader, triton: TritonClient, store: Store | None, advance: Advance, space: Space = FILM
) -> Embedded:
    """Vectors of rows for evaluation, in their order: taken from the store where it holds the same file, else computed now."""
    keyed: Callable[[str], str] = store.pseudonyms.digest if store is not None else str
    sink = _Collected(advance, keyed, space)
    from_store = 0
    with ThreadPoolExecutor() as hashing:
        measured, failed = _tried(rows, lambda row: _measured(row, keyed, reader), hashing)
    sink.problems += failed
    advance(len(failed))
    if store is not None:
        cases, stored = store.vectors()
        known = {case.file: (case.pixels, vector) for case, vector in zip(cases, stored, strict=True)}
        sink.found |= {one.row.image_id: (one.row, *known[one.file]) for one in measured if one.file in known}
        from_store = len(sink.found)
        advance(from_store)
    pipeline.run((one for one in measured if one.row.image_id not in sink.found), reader, triton, sink)
    ordered = [sink.found[one.row.image_id] for one in measured if one.row.image_id in sink.found]
    return Embedded(
        tuple(row for row, _, _ in ordered),
        np.array([vector for _, _, vector in ordered], np.float32).reshape(-1, space.size),
        tuple(pixels for _, pixels, _ in ordered),
        tuple(sink.problems),
        from_store,
    )


class _Collected:
    """The sink of an evaluation: image_id → row, digest of its picture, vector."""

    def __init__(self, advance: Advance, keyed: Callable[[str], str], space: Space) -> None:
        self._advance, self._keyed, self._space = advance, keyed, space
        self.outputs = space.outputs
        self.found: dict[str, tuple[ManifestRow, str, NDArray[np.float32]]] = {}
        self.problems: list[Problem] = []

    def keep(self, seen: Sequence[Seen[_Measured]]) -> Sequence[Seen[_Measured]]:
        return seen

    def kept(self, result: Sequence[Seen[_Measured]]) -> None:
        for one in result:
            self.found[one.work.row.image_id] = (one.work.row, self._keyed(one.film.pixels), self._space.vector(one.outputs))
        self._advance(len(result))

    def failed(self, work: _Measured, error: CxrError) -> None:
        self.problems.append(Problem(work.row.image_id, error))
        self._advance(1)


def _measured(row: ManifestRow, keyed: Callable[[str], str], reader: FilmReader) -> _Measured:
    """Refuses a clinical value that an ingest would refuse, so that an evaluation is of what a gallery can hold."""
    parse_clinical(row.fields)
    return _Measured(row, keyed(_digest(row, reader)))


def _tried(rows: Sequence[R], make: Callable[[R], T], pool: ThreadPoolExecutor) -> tuple[list[T], list[Problem]]:
    """What `make` makes of each row, and those of which nothing can be made."""

    def tried(row: R) -> T | Problem:
        try:
            return make(row)
        except InputError as error:
            return Problem(row.image_id if isinstance(row, ManifestRow) else row.name, error)

    results = list(pool.map(tried, rows))
    return [r for r in results if not isinstance(r, Problem)], [r for r in results if isinstance(r, Problem)]


def _refuse_another_film(work: _NewCase, pixels: str) -> None:
    """Two sources may number their films alike; the second must not replace the first without a word. `pixels`: keyed digest."""
    held, row = work.held, work.entry.row
    if held is not None and held.pixels != pixels and held.source != row.source and held.source and row.source:
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


def _digest(row: ManifestRow, reader: FilmReader) -> str:
    """SHA-256 of a row's file."""
    if is_object(row.path) or row.member is not None:
        return reader.identity(row.path, row.member).result().file
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
