"""Another model version's gallery, filled from the present one: the same cases and facts, embedded anew from their pictures.

While it runs the former gallery answers, takes in cases and loses some; the new one is marked as being filled and answers nobody. A run
compares the two and does what is missing, as often as that is something: so one that was killed goes on where it was, and cases that
were added, corrected or removed meanwhile are caught up before it ends. Nothing about a case is asked of Milvus but what stands in its
row, and the row is carried over whole, whatever fields it has.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.archive import pipeline
from cxr_retrieval.archive.embedding import Advance, Problem, Tell, embed_rows
from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.archive.pipeline import Seen
from cxr_retrieval.archive.watching import Expected, Failed, Settled, Watch, unwatched
from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import IMAGE_SIZE
from cxr_retrieval.errors import CxrError, ImageError, InputError, UsageError
from cxr_retrieval.evaluation.metrics import LabelledSet, comparable_patients
from cxr_retrieval.evaluation.versions import compare
from cxr_retrieval.gallery.aliases import PREFIX, collection_of
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, PARTS, comparable, side_by_side
from cxr_retrieval.gallery.store import FORMER_SIZE, NO_CLUSTER, Held, Store
from cxr_retrieval.gallery.thumbnails import Thumbnail
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import Film, FilmReader
from cxr_retrieval.radiograph.letterbox import Letterbox
from cxr_retrieval.settings import ThumbnailKind

_AT_ONCE: Final = 500
"""Rows that the new gallery is asked about at once."""
_FETCHED: Final = 64
"""Rows that are fetched whole at once, to be embedded."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ReindexReport:
    """What became of the former gallery's cases.

    Attributes:
        cases: In the former gallery at the end.
        embedded: Embedded anew.
        corrected: Only their facts had changed.
        kept: Found done by an earlier run.
        removed: Taken out again, as they left the former gallery meanwhile.
        problems: Cases that cannot be embedded again, and why; by key.
        interrupted: Stopped before the end.
    """

    cases: int
    embedded: int
    corrected: int
    kept: int
    removed: int
    problems: tuple[Problem, ...]
    interrupted: bool

    @property
    def is_whole(self) -> bool:
        """Whether the new gallery holds every case of the former."""
        return not self.problems and not self.interrupted


@dataclass(frozen=True)
class _Again:
    """A case to be embedded anew, and where its picture is: its file, or the key under which a `_Pictures` has it."""

    row: Row
    path: Path
    member: str | None


class _Pictures:
    """A reader that knows the pictures of some cases already: those stored whole as thumbnails."""

    def __init__(self, reader: FilmReader) -> None:
        self._reader = reader
        self._films: dict[Path, Film] = {}

    def know(self, thumbnail: Thumbnail) -> Path:
        """Keeps a picture until it is read; returns by what."""
        square = np.ascontiguousarray(thumbnail.square)
        pixels = hashlib.sha256(square.tobytes()).hexdigest()
        path = Path(thumbnail.key)
        self._films[path] = Film(square, Letterbox(1.0, 0, 0, IMAGE_SIZE, IMAGE_SIZE), "thumbnail", (), None, pixels, pixels, 0.0)
        return path

    def submit(self, path: Path, member: str | None = None) -> Future[Film]:
        """As `FilmReader.submit`; a known picture at once."""
        if path not in self._films:
            return self._reader.submit(path, member)
        known: Future[Film] = Future()
        known.set_result(self._films.pop(path))
        return known


def reindex(
    former: Store,
    new: Store,
    reader: FilmReader,
    triton: TritonClient,
    *,
    begun: Callable[[int], None] = lambda _: None,
    advance: Advance = lambda _: None,
    stop: threading.Event | None = None,
    tell: Tell = lambda _: None,
    watch: Watch = unwatched,
    patience_s: float = pipeline.PATIENCE_S,
) -> ReindexReport:
    """Fills the new gallery with the cases of the former; safe to interrupt and to repeat.

    A picture comes from its thumbnail, where one of kind `full` is stored, else from the file that the local table leads to.

    Args:
        former: Whose rows are carried over, opened with `outdated`; may be queried and filled meanwhile.
        new: Of the version that `triton` announces; opened with `fill`.
        begun: Told how many cases the former gallery holds.
        advance: Told how many of them have been dealt with.
        stop: Ends it early, once it is set, with what Triton has; nothing is lost.
        tell: Told what is waited for, in words.
        watch: Told everything.
        patience_s: How long a server that went away is waited for.

    Raises:
        UsageError: Both galleries are of one version.
    """
    if former.collection == new.collection:
        raise UsageError(
            f"{former.collection} cannot be filled from itself",
            expected="a Triton that serves another model version than the gallery's",
            next_step="start one with the new weights, and give it by --triton",
        )
    stop = stop or threading.Event()
    patience = Patience(stop, patience_s, tell, watch)
    pictures = _Pictures(reader)
    sink = _NewGallery(former, new, pictures, patience, advance)
    total = former.count()
    begun(total)
    watch(Expected(total))
    while not stop.is_set() and (todo := patience.until("milvus", sink.missing, probe=sink.probe)):
        works = sink.works(todo)
        pipeline.run(works, pictures, triton, sink, probe_store=sink.probe, stop=stop, tell=tell, watch=watch, patience_s=patience_s)
    removed = 0 if stop.is_set() else patience.until("milvus", sink.remove_what_has_gone, probe=sink.probe)
    return ReindexReport(
        former.count(), sink.embedded, sink.corrected, sink.kept_before, removed, tuple(sink.problems.values()), stop.is_set()
    )


class _NewGallery:
    """The sink, and what is missing from the new gallery."""

    outputs = PARTS

    def __init__(self, former: Store, new: Store, pictures: _Pictures, patience: Patience, advance: Advance) -> None:
        self._former, self._new, self._pictures, self._patience, self._advance = former, new, pictures, patience, advance
        self._watch = patience.watch
        self._written: set[str] = set()
        self._looked_first = True
        self.embedded = self.corrected = self.kept_before = 0
        self.problems: dict[str, Problem] = {}

    def probe(self) -> None:
        """Asks whether Milvus is there, and has both galleries loaded again."""
        self._former.probe()
        self._new.probe()

    def missing(self) -> list[str]:
        """Keys of the former gallery's cases that must be embedded; those whose facts alone have changed are corrected on the way."""
        todo: list[str] = []
        unchanged = 0
        rows = self._former.rows(["key", "file", "facts", "pixels"])
        while some := list(islice(rows, _AT_ONCE)):
            held = self._new.held([row["key"] for row in some])
            same_picture = [row for row in some if row["key"] in held and held[row["key"]].pixels == row["pixels"]]
            other_facts = [row["key"] for row in same_picture if _says_otherwise(held[row["key"]], row)]
            self._correct(other_facts)
            unchanged += len(same_picture) - len(other_facts)
            settled = {row["key"] for row in same_picture} | self.problems.keys()
            todo += [row["key"] for row in some if row["key"] not in settled]
        if self._looked_first:
            self._looked_first = False
            self.kept_before = unchanged
            self._advance(unchanged + self.corrected)
        return todo

    def _correct(self, keys: Sequence[str]) -> None:
        """An embedding is carried over only where both rows, as they are by now, are of one picture."""
        ours, rows = self._new.rows_of(keys), self._former.rows_of(keys)
        same = {key for key in ours.keys() & rows.keys() if ours[key]["pixels"] == rows[key]["pixels"]}
        self._put([(rows[key], np.array(ours[key]["embedding"], np.float32)) for key in sorted(same)])
        self.corrected += len(same)

    def works(self, keys: Sequence[str]) -> Iterator[_Again]:
        """Rows as they are by now, with their pictures; those that have none are problems."""
        for start in range(0, len(keys), _FETCHED):
            some = keys[start : start + _FETCHED]
            rows, thumbnails = self._patience.until("milvus", lambda some=some: self._fetched(some), probe=self.probe)
            originals = self._former.pseudonyms.originals(rows.keys() - thumbnails.keys())
            for key, row in rows.items():
                if key in thumbnails:
                    yield _Again(row, self._pictures.know(thumbnails[key]), None)
                elif key in originals:
                    yield _Again(row, originals[key].path, originals[key].member)
                else:
                    unknown = ImageError(
                        f"{key}: no picture of it is known here",
                        expected="its file, by the local table of pseudonyms, or a thumbnail of kind full",
                        next_step="reindex where it was ingested, or ingest it again",
                    )
                    self.failed_key(key, unknown)

    def _fetched(self, keys: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Thumbnail]]:
        """Rows, and the thumbnails that show what these say they do."""
        rows, thumbnails = self._former.rows_of(keys), self._former.thumbnails(keys)
        usable = {
            key: one
            for key, one in thumbnails.items()
            if key in rows and one.kind is ThumbnailKind.full and one.pixels == rows[key]["pixels"]
        }
        return rows, usable

    def keep(self, seen: Sequence[Seen[_Again]]) -> list[Problem]:
        problems: list[Problem] = []
        rows: list[tuple[Row, NDArray[np.float32]]] = []
        for one in seen:
            if self._former.pseudonyms.digest(one.film.pixels) == one.work.row["pixels"]:
                rows.append((one.work.row, side_by_side(one.outputs)))
            else:
                other = InputError(
                    f"{one.work.row['key']}: its file shows another picture than when it was ingested", next_step="ingest it again"
                )
                problems.append(Problem(str(one.work.row["key"]), other))
        self._put(rows)
        self.embedded += len(rows)
        self._watch(Settled({"embedded": len(rows)}))
        self._advance(len(seen))
        return problems

    def kept(self, result: list[Problem]) -> None:
        self.problems |= {problem.image_id: problem for problem in result}
        for problem in result:
            self._watch(Failed(problem.error, pseudonym=problem.image_id))

    def failed(self, work: _Again, error: CxrError) -> None:
        self.failed_key(str(work.row["key"]), error)

    def failed_key(self, key: str, error: CxrError) -> None:
        """This case cannot be embedded again."""
        self.problems[key] = Problem(key, error)
        self._watch(Failed(error, pseudonym=key))
        self._advance(1)

    def _put(self, rows: Sequence[tuple[Row, NDArray[np.float32]]]) -> None:
        self._written |= {str(row["key"]) for row, _ in rows}
        self._new.put([{**row, "embedding": vector.tolist(), **NO_CLUSTER} for row, vector in rows])

    def remove_what_has_gone(self) -> int:
        """A case that left the former gallery must not stay here because it was read before that; nor is it missing here.

        While the gallery is being filled it holds the former's cases and no others; afterwards, others may have been ingested into it.
        """
        candidates = (row["key"] for row in self._new.rows(["key"])) if self._new.filling else iter(sorted(self._written))
        gone: list[str] = []
        while some := list(islice(candidates, _AT_ONCE)):
            there = self._former.held(some)
            gone += [key for key in some if key not in there]
        self._new.remove(gone)
        there = self._former.held(list(self.problems))
        self.problems = {key: problem for key, problem in self.problems.items() if key in there}
        return len(gone)


@dataclass(frozen=True)
class _Twice:
    """Images with what both versions say of them: vectors `[n, 120]`, the former's `[n, 64]` where its gallery is of the former layout."""

    rows: Sequence[ManifestRow]
    pixels: Sequence[str]
    former: NDArray[np.float32]
    latter: NDArray[np.float32]

    def sets(self, patients: Sequence[str]) -> tuple[LabelledSet, LabelledSet]:
        """As the former version has them, and as the latter."""
        ids, labels, sources = [r.image_id for r in self.rows], [r.label for r in self.rows], [r.source or "" for r in self.rows]
        former, latter = (
            LabelledSet(ids, _compared_by(vectors), labels, patients, sources, self.pixels) for vectors in (self.former, self.latter)
        )
        return former, latter


def compare_on_gallery(former: Store, new: Store, *, sample: int, k: int) -> dict[str, Any]:
    """Both versions (`versions.compare`) asked about so many cases of the gallery itself, each without its own patient's."""
    gallery = _in_both(former, new)
    patients = comparable_patients(gallery.rows, gallery.rows)[0]
    some = slice(sample)  # they lie in the order of their keys, which is as good as chance
    queries = _Twice(gallery.rows[some], gallery.pixels[some], gallery.former[some], gallery.latter[some])
    return _compared(gallery.sets(patients), queries.sets(patients[some]), k)


def compare_on_manifest(
    rows: Sequence[ManifestRow],
    former: Store,
    new: Store,
    reader: FilmReader,
    triton: TritonClient,
    former_triton: TritonClient | None,
    advance: Advance = lambda _: None,
    *,
    k: int,
) -> tuple[dict[str, Any], tuple[Problem, ...]]:
    """As `compare_on_gallery`, asked about the films of a manifest; and those that could not be asked about.

    Args:
        former_triton: Serves the former version; without it only films that its gallery holds can be compared.

    Raises:
        UsageError: `former_triton` serves another version than the former gallery's, or one of before there was a balance.
    """
    if former_triton is not None and former.outdated:
        raise UsageError(
            "the former version's server cannot be asked by this version of the system",
            expected=f"outputs {', '.join(part.name for part in PARTS)}",
            got="weights made before there was a balance",
            next_step="leave --former-triton out: films that the former gallery holds are compared",
        )
    if former_triton is not None and collection_of(former_triton.model_version) != former.collection:
        raise UsageError(
            "this is not the server of the former version",
            expected=f"one that serves {former.collection.removeprefix(PREFIX)}",
            got=former_triton.model_version,
            next_step="correct --former-triton, or --from",
        )
    latter = embed_rows(rows, reader, triton, new, advance)
    if former_triton is None:
        known = {str(row["pixels"]): np.array(row["embedding"], np.float32) for row in former.rows(["pixels", "embedding"])}
        vectors = [known.get(pixels) for pixels in latter.pixels]
    else:
        asked = embed_rows(rows, reader, former_triton, former, lambda _: None)
        found = {row.image_id: vector for row, vector in zip(asked.rows, asked.vectors, strict=True)}
        vectors = [found.get(row.image_id) for row in latter.rows]
    both = [number for number, vector in enumerate(vectors) if vector is not None]
    left_out = InputError("the former gallery does not hold it", next_step="give the former version's server by --former-triton")
    problems = [Problem(row.image_id, left_out) for row, vector in zip(latter.rows, vectors, strict=True) if vector is None]
    queries = _Twice(
        [_as_stored(latter.rows[number], former.pseudonyms) for number in both],
        [latter.pixels[number] for number in both],
        np.array([vectors[number] for number in both], np.float32).reshape(-1, former.vector_size),
        latter.vectors[both],
    )
    gallery = _in_both(former, new)
    patients = comparable_patients(gallery.rows, queries.rows)
    return _compared(gallery.sets(patients[0]), queries.sets(patients[1]), k), (*latter.problems, *problems)


def _as_stored(row: ManifestRow, pseudonyms: Pseudonyms) -> ManifestRow:
    """With the patient's pseudonym, as the gallery has it."""
    return row if row.patient_id is None else replace(row, patient_id=pseudonyms.patient(row.patient_id))


def _compared(gallery: tuple[LabelledSet, LabelledSet], queries: tuple[LabelledSet, LabelledSet], k: int) -> dict[str, Any]:
    return compare((gallery[0], queries[0]), (gallery[1], queries[1]), k=k)


def _in_both(former: Store, new: Store) -> _Twice:
    """The cases that both galleries hold, in the order of their keys."""
    fields = ["key", "label", "patient_id", "source", "pixels", "embedding"]
    ours, theirs = ({str(row["key"]): row for row in store.rows(fields)} for store in (former, new))
    keys = sorted(ours.keys() & theirs.keys())
    rows = [
        ManifestRow(Path(), key, Path(), str(row["label"]), row.get("patient_id"), row.get("source"), None, {})
        for key, row in ((key, ours[key]) for key in keys)
    ]
    former_vectors, latter_vectors = (
        np.array([found[key]["embedding"] for key in keys], np.float32).reshape(-1, store.vector_size)
        for found, store in ((ours, former), (theirs, new))
    )
    return _Twice(rows, [str(ours[key]["pixels"]) for key in keys], former_vectors, latter_vectors)


def _compared_by(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """What inner products are similarities of; the former layout's vectors mix both parts already."""
    return vectors if vectors.shape[1] == FORMER_SIZE else comparable(vectors, DEFAULT_BALANCE)


def _says_otherwise(held: Held, row: Row) -> bool:
    return (held.file, held.facts) != (row["file"], row["facts"])
