"""Queries in bulk: every input of a journal gets its answer, written once."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cxr_retrieval.archive import pipeline
from cxr_retrieval.archive.audit import Noted
from cxr_retrieval.archive.inputs import Input, Unusable
from cxr_retrieval.archive.journal import ANSWERED, FAILED, PENDING, REFUSED, Answer, Asked, Journal
from cxr_retrieval.archive.pipeline import Engine, Seen
from cxr_retrieval.archive.watching import Expected, Failed, Settled, Watch, unwatched
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import ATTENTION_MAP, LUNG_AGREEMENT, LUNG_MASK, TensorSpec
from cxr_retrieval.errors import CxrError, UsageError
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, PARTS
from cxr_retrieval.gallery.store import Clause, Store
from cxr_retrieval.retrieval import query
from cxr_retrieval.retrieval.calibration import DEFAULT_ERROR_RATE
from cxr_retrieval.retrieval.picture import overlay, write_png
from cxr_retrieval.retrieval.query import QueryResult
from cxr_retrieval.settings import MilvusSettings

_FAILURES_AT_ONCE = 256
_SEARCH_SLICE_S = 0.2


@dataclass(frozen=True)
class BatchOptions:
    """What is asked of each film; `store` None: embedding and appearance alone. `attention`: folder for overlays. `gate`: refuse what is no
    film. `error_rate`: of the sets of labels. `balance`, `source`: as in `query.query`.
    """

    store: Store | None
    top_k: int
    where: Clause | None
    include_own: bool
    attention: Path | None
    gate: bool = True
    error_rate: float = DEFAULT_ERROR_RATE
    balance: float = DEFAULT_BALANCE
    source: str | None = None


def run_batch(
    journal: Journal,
    engine: Engine,
    model_version: str,
    options: BatchOptions,
    *,
    stop: threading.Event,
    advance: Callable[[int], None],
    tell: Callable[[str], None],
    inputs: Iterable[Input | Unusable] = (),
    found: Callable[[int, bool], None] = lambda looked_at, all_found: None,
    watch: Watch = unwatched,
    noted: Noted = lambda _: None,
    patience_s: float = pipeline.PATIENCE_S,
) -> bool:
    """Answers what the journal holds as pending, and what is added to it meanwhile. Ends early, with nothing lost, once `stop` is set.

    Args:
        engine: Takes films through to their answers; one on a cluster makes these there, by an `Answering` of the same options.
        stop: Set by this, too, when it fails, so that the search for inputs ends.
        inputs: Added to the journal in a thread of their own; the first are answered while others are still looked for.
        found: Told, in that thread, how many inputs have been looked at so far, and whether these are all.
        noted: Told which films are answered or have failed, just before that is recorded. A film that could not be read has no
            pseudonym: it is `input-<its number in the journal>`.
        watch: Told everything.

    Returns:
        Whether all inputs were found, and none is pending.

    Raises:
        ServiceError: As `pipeline.run`, and where the results cannot be written.
    """
    sink = _Answers(journal, model_version, options, advance, watch, noted)
    settled = sum(journal.counts().values()) - journal.counts()[PENDING]

    def told(looked_at: int, all_found: bool) -> None:
        """Also expects what is new."""
        found(looked_at, all_found)
        watch(Expected(sum(journal.counts().values()) - settled))

    with ThreadPoolExecutor(1, "cxr-search") as pool:
        search = pool.submit(_add, journal, _watched(inputs, watch), told, stop)
        try:
            works = _asked(journal, search, stop)
            engine(works, sink, probe_store=sink.probe, stop=stop, tell=tell, watch=watch, patience_s=patience_s)
        except BaseException:
            stop.set()
            raise
        finally:
            sink.flush()
    return search.result() and not journal.counts()[PENDING]


def _watched(inputs: Iterable[Input | Unusable], watch: Watch) -> Iterator[Input | Unusable]:
    """Those that are no film fail here; they never come to the pipeline."""
    for found in inputs:
        if isinstance(found, Unusable):
            watch(Failed(found.error))
            watch(Settled({FAILED: 1}))
        yield found


def _add(journal: Journal, inputs: Iterable[Input | Unusable], found: Callable[[int, bool], None], stop: threading.Event) -> bool:
    """Whether it came to the end of the inputs."""
    looked_at = 0
    for count in journal.add(inputs):
        looked_at += count
        found(looked_at, False)
        if stop.is_set():
            return False
    found(looked_at, True)
    return True


def _asked(journal: Journal, search: Future[bool], stop: threading.Event) -> Iterator[Asked]:
    """What is pending, and what the search still adds."""
    last = 0
    while True:
        all_found = search.done()
        for asked in journal.pending(after=last):
            last = asked.id
            yield asked
        if all_found or stop.is_set():
            return
        wait([search], timeout=_SEARCH_SLICE_S)


class Answering:
    """Searches for many films at once; what becomes of the answers is another's."""

    def __init__(self, model_version: str, options: BatchOptions, watch: Watch) -> None:
        wanted = query.WANTED if options.store else (*PARTS, LUNG_MASK, LUNG_AGREEMENT)
        self.outputs: Sequence[TensorSpec] = tuple(output for output in wanted if options.attention or output is not ATTENTION_MAP)
        self._model_version, self._options, self._watch = model_version, options, watch

    def probe(self) -> None:
        """Raises StoreDownError while Milvus is away."""
        if self._options.store is not None:
            self._options.store.probe()

    def keep(self, seen: Sequence[Seen[Asked]]) -> list[Answer]:
        """One search for all of them."""
        if self._options.store is None:
            return [self._embedded(one) for one in seen]
        asked = [query.Asked(one.work.image_id, one.film, one.outputs, one.work.patient_id, {"infer": 1000 * one.seconds}) for one in seen]
        options = self._options
        results = query.answer(
            asked,
            self._options.store,
            self._model_version,
            top_k=options.top_k,
            where=options.where,
            include_own=options.include_own,
            gate=options.gate,
            error_rate=options.error_rate,
            balance=options.balance,
            source=options.source,
        )
        return [self._answer(one, result) for one, result in zip(seen, results, strict=True)]

    def _answer(self, seen: Seen[Asked], result: QueryResult | UsageError) -> Answer:
        if isinstance(result, UsageError):
            self._watch(Failed(result, seen.work.id))
            return Answer(seen.work, FAILED, error=str(result), film=seen.film.film_id)
        line = {**result.as_json(), "trace_id": seen.trace.trace_id}
        if self._options.attention is not None:
            line["attention"] = str(self._drawn(seen, result, self._options.attention))
        return Answer(seen.work, REFUSED if result.ood.refused else ANSWERED, line, seen.film.pixels, film=seen.film.film_id)

    def _embedded(self, seen: Seen[Asked]) -> Answer:
        ood = query.assessed(seen.film, seen.outputs, gate=self._options.gate)
        line: dict[str, Any] = {
            "image_id": seen.work.image_id or seen.film.film_id,
            "model_version": self._model_version,
            **{part.name.lower(): [round(float(value), 7) for value in seen.outputs[part.name]] for part in PARTS},
            "warnings": [*seen.film.warnings, *query.doubts(seen.film, seen.outputs, ood)],
            "ood": ood.as_json(),
            "trace_id": seen.trace.trace_id,
        }
        return Answer(seen.work, REFUSED if ood.refused else ANSWERED, line, seen.film.pixels, film=seen.film.film_id)

    @staticmethod
    def _drawn(seen: Seen[Asked], result: QueryResult, folder: Path) -> Path:
        """The overlay; named after the input's place in the journal and a digest of its name, never after what a file is called."""
        shown = result.explanation
        path = folder / f"{seen.work.id:07d}-{hashlib.sha256(seen.work.name.encode()).hexdigest()[:8]}.png"
        picture = overlay(shown.square, shown.lung_mask, shown.attention)
        box = shown.box
        write_png(picture[box.top : box.top + box.height, box.left : box.left + box.width], path)
        return path


@contextmanager
def asker(
    milvus: MilvusSettings, model_version: str, where: str, text: str, options: BatchOptions, keys: Pseudonyms, watch: Watch
) -> Generator[Answering]:
    """The same on a worker of a cluster, with a connection of its own; `options` without a store, and so without a clause.

    Raises:
        StoreError: As `Store`.
    """
    with Store(milvus, model_version, keys) as store:
        yield Answering(model_version, replace(options, store=store, where=store.clause(where, text)), watch)


class _Answers(Answering):
    """The sink: records answers."""

    def __init__(
        self, journal: Journal, model_version: str, options: BatchOptions, advance: Callable[[int], None], watch: Watch, noted: Noted
    ) -> None:
        super().__init__(model_version, options, watch)
        self._journal, self._advance, self._noted = journal, advance, noted
        self._failures: list[Answer] = []
        self._flushed = time.monotonic()

    def kept(self, result: list[Answer]) -> None:
        answers = [*result, *self._failures]
        self._noted({answer.film or f"input-{answer.asked.id}": answer.state for answer in answers})
        self._journal.record(answers)
        self._advance(len(answers))
        self._watch(Settled(Counter(answer.state for answer in answers)))
        self._failures = []
        self._flushed = time.monotonic()

    def failed(self, work: Asked, error: CxrError) -> None:
        self._watch(Failed(error, work.id))
        self._failures.append(Answer(work, FAILED, error=str(error)))
        if len(self._failures) >= _FAILURES_AT_ONCE or time.monotonic() > self._flushed + 1:
            self.flush()

    def flush(self) -> None:
        """Records what has failed and could not be recorded beside answers."""
        if self._failures:
            self.kept([])
