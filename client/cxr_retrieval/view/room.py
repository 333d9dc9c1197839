"""What the page asks for: answers, films, pictures, cases, rows. Nothing here knows HTTP.

A film is named `film-<digits>` if it was dropped, `case-<pseudonym>` if it is in the gallery, and `line-<list>-<number>` if a line of a
batch's results leads to it. No name says whose it is.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from cxr_retrieval.archive.audit import audited, film_pseudonym
from cxr_retrieval.archive.inputs import INSIDE
from cxr_retrieval.archive.pairs import MARK
from cxr_retrieval.cases.pseudonyms import SHOWN_DIGITS
from cxr_retrieval.contract import ATTENTION_MAP, LUNG_MASK
from cxr_retrieval.errors import ClauseError, GoneError, ImageError, UsageError
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE
from cxr_retrieval.gallery.clause_parser import conditions, parse_text
from cxr_retrieval.gallery.store import FILTER_FIELDS, MAX_HITS, Case, Neighbour
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.greys import Greys
from cxr_retrieval.retrieval.calibration import DEFAULT_ERROR_RATE
from cxr_retrieval.retrieval.feedback import Mark
from cxr_retrieval.retrieval.picture import DISCLAIMER, html_page, named_facts
from cxr_retrieval.retrieval.query import QueryResult, query_film
from cxr_retrieval.retrieval.reports import query_text
from cxr_retrieval.retrieval.voting import DEFAULT_K
from cxr_retrieval.settings import DEFAULT_MAPS, ThumbnailKind
from cxr_retrieval.view.atlas import MOST_CORNERS, MapRoom
from cxr_retrieval.view.census import Census
from cxr_retrieval.view.kept import Kept, Uploads
from cxr_retrieval.view.marks import came_and_went, changed, shown_keys
from cxr_retrieval.view.pictures import Explained, png
from cxr_retrieval.view.servers import Reached, Servers
from cxr_retrieval.view.shelf import Shelf
from cxr_retrieval.view.worklist import MOST_ROWS, SORTS, Page, Results, sorted_page

COLLECTIONS: Final = "collections.sqlite"
"""What their file is called."""
MOST_NEIGHBOURS: Final = 100
"""That a page shows."""
_ANSWERS: Final = 500
_RESULTS: Final = 100
"""Answers that can be marked and saved: each holds its film's pictures, 0.4 MB."""
_EXPLAINED: Final = 256
_THUMBNAILS: Final = 2048
_CLAUSE: Final = 8192
"""Characters of a clause, at most."""
_FILM: Final = re.compile(r"film-[0-9a-f]{16}|case-(?P<key>[0-9a-f]{32})|line-(?P<list>\d{1,4})-(?P<number>\d{1,9})")
_CALLED: Final = "this file"
"""What messages call a film: its name may say whose it is, and the page knows it anyway."""


T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What is asked of a film; as the options of `cxr query`. `source`: the hospital it comes from, where somebody said so."""

    film: str
    top_k: int = DEFAULT_K
    where: str = ""
    text: str = ""
    patient: str | None = None
    include_own: bool = False
    gate: bool = True
    error_rate: float = DEFAULT_ERROR_RATE
    balance: float = DEFAULT_BALANCE
    source: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MOST_NEIGHBOURS:
            raise UsageError(
                "the number of cases is out of range",
                expected=f"1 to {MOST_NEIGHBOURS}",
                got=str(self.top_k),
                next_step="ask for as many; `cxr query` shows more",
            )
        longest = max(len(self.where), len(self.text))
        if longest > _CLAUSE:
            raise UsageError("the filter is too long", expected=f"at most {_CLAUSE} characters", got=str(longest))


@dataclass(frozen=True)
class _Given:
    """An answer as it was given: to what, after how many rounds of which marks; and what the page was told."""

    question: Question
    result: QueryResult
    told: dict[str, Any]
    round: int
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class _Found:
    """Where a film lies. `original`: whose case it is; `lungs_only`: all outside them is black."""

    path: Path
    member: str | None = None
    patient: str | None = None
    source: str | None = None
    lungs_only: bool = False


class ReadingRoom:
    """One for all who look. Use as a context manager; safe for threads.

    Attributes:
        shelf: Collections of cases.
        map: The gallery at a glance.

    Args:
        audit: Log of who asked and marked what.
        source: The hospital that dropped films come from.
        collections: File that they are kept in; None: beside the log.
        maps: Folder in which the gallery's map is kept; None: beside the log.
    """

    def __init__(
        self,
        servers: Servers,
        results: Sequence[Results],
        audit: Path,
        source: str | None = None,
        collections: Path | None = None,
        maps: Path | None = None,
    ) -> None:
        self._servers, self._results, self._audit, self._source = servers, results, audit, source
        self._answers = Kept[int, dict[str, Any]](_ANSWERS)
        self._given = Kept[int, _Given](_RESULTS)
        self._explained = Kept[str, Explained](_EXPLAINED)
        self._thumbnails = Kept[str, bytes](_THUMBNAILS)
        self._lock = threading.Lock()
        self._asked: list[int] = []
        with ExitStack() as opened:
            self._reader = opened.enter_context(FilmReader())
            opened.callback(servers.close)
            self._census = Census(servers)
            opened.callback(self._census.close)
            self.map = MapRoom(servers, self._census, maps or audit.with_name(DEFAULT_MAPS.name), source)
            opened.callback(self.map.close)
            self._uploads = Uploads()
            opened.callback(self._uploads.close)
            self.shelf = Shelf(collections or audit.with_name(COLLECTIONS), servers, audit, _case_json)
            opened.callback(self.shelf.close)
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Ends the workers, closes the connections, forgets all films."""
        self._opened.close()

    def status(self) -> dict[str, Any]:
        """What answers.

        Raises:
            ServiceError: It does not.
        """
        with self._servers.reached() as reached:
            count = reached.store.count()
            return {
                "model_version": reached.triton.model_version,
                "gallery": {"name": reached.store.collection, "cases": count},
                "source": self._source,
                "top_k": DEFAULT_K,
                "most_neighbours": MOST_NEIGHBOURS,
                "balance": DEFAULT_BALANCE,
                "words": reached.reports is not None,
                "disclaimer": DISCLAIMER,
            }

    def keep(self, data: bytes) -> str:
        """Takes a file in; returns the film's name."""
        if not data:
            raise ImageError(f"{_CALLED}: the file is empty", expected="an image", got="0 bytes", next_step="export it again")
        return self._uploads.put(data)

    def ask(self, question: Question) -> dict[str, Any]:
        """The answer, kept under its `id`: the published form of a query result, and more.

        That is `film`, `source` and what was `asked`; `status` as a line of a batch has it; the vote as a `sentence`, the summary in words
        (`told`); in each neighbour and earlier film its `key`, `film`, `source`, both cosines (`semantic`, `visual`), and `facts` as a
        reader knows them (name → text).

        After marks (`mark`) also: how many `round`s of them, 0 without any; the `marked` cases, each with `relevant`. After these, or
        another balance (`turn`): `came`, keys of neighbours that the answer before had not, and `went`, its neighbours that are neither
        here nor marked.

        Raises:
            ImageError, UsageError, ServiceError: As of `cxr query`.
        """
        return self._asked_about(question)

    def mark(self, number: int, marks: Sequence[Mark]) -> dict[str, Any]:
        """The same question as of an earlier answer, moved by marks: all that hold now, those of earlier rounds among them.

        Before the answer is given the audit log has which marks are new, changed or taken back.

        Raises:
            GoneError: That answer, or its film, is no longer here.
            UsageError, ServiceError: As of `ask`; or a mark is of a case that it did not show.
        """
        before = self._given_as(number)
        if {mark.key for mark in marks} - shown_keys(before.told) - {mark.key for mark in before.marks}:
            raise UsageError("a mark is of a case that was not shown", expected="cases of the answer", next_step="reload the page")
        return self._asked_about(before.question, before, tuple(marks))

    def turn(self, number: int, balance: float) -> dict[str, Any]:
        """The same question as of an earlier answer, its marks included, at another balance; `came` and `went` as of `ask`.

        Raises:
            GoneError: That answer, or its film, is no longer here.
            UsageError, ServiceError: As of `ask`.
        """
        before = self._given_as(number)
        return self._asked_about(replace(before.question, balance=balance), before, before.marks)

    def page(self, number: int) -> str:
        """An answer as one HTML page that needs no other file and no network.

        Raises:
            GoneError: It is no longer here.
        """
        given = self._given_as(number)
        about = {"model_version": given.result.model_version, "film": given.result.image_id}
        with self._servers.reached() as reached, audited(self._audit, "page save", about):
            return html_page(given.result, self._reader, reached.store.thumbnails)

    def _given_as(self, number: int) -> _Given:
        found = self._given.get(number)
        if found is None:
            raise GoneError(
                "this answer is no longer in memory",
                expected=f"one of the last {_RESULTS} since the page's server was started",
                next_step="ask again",
            )
        return found

    def _asked_about(self, question: Question, before: _Given | None = None, marks: tuple[Mark, ...] = ()) -> dict[str, Any]:
        with ExitStack() as stack:
            reached = stack.enter_context(self._servers.reached())
            found = stack.enter_context(self._lent(question.film, reached))
            if found.lungs_only:
                raise ImageError(
                    "of this case only the lungs are kept",
                    expected="the whole film, to ask with",
                    next_step="ask where the case's own file is, or ingest with --thumbnails full",
                )
            about: dict[str, Any] = {
                "model_version": reached.triton.model_version,
                "film": film_pseudonym(found.path) if found.member is None else None,
            }
            action = "query"
            if before is not None and marks != before.marks:
                action = MARK
                about |= {"film": before.result.image_id, "asked": _key_of(question.film), "round": before.round + 1}
            operation = stack.enter_context(audited(self._audit, action, about))
            operation.note(changed(before.marks if before is not None else (), marks))
            source = question.source or found.source or self._source
            started = time.perf_counter()
            film = self._reader.submit(found.path, found.member, _CALLED).result()
            result = query_film(
                film,
                reached.triton,
                reached.store,
                top_k=question.top_k,
                where=reached.store.clause(question.where, question.text),
                patient=question.patient or found.patient,
                include_own=question.include_own,
                gate=question.gate,
                error_rate=question.error_rate,
                balance=question.balance,
                marks=marks,
                source=source,
                outcome=reached.outcome,
                timings_ms={"read": 1000 * (time.perf_counter() - started)},
            )
            operation.outcome["answer"] = "refused" if result.ood.refused else "answered"
        seen = result.explanation
        if seen.attention is not None:
            self._explained.put(question.film, Explained.of(seen.lung_mask, seen.attention, seen.box))
        self._thumbnails.put(question.film, png(np.asarray(seen.box.crop(seen.square), np.uint8)))
        return self._remembered(question, result, source, before, marks)

    def answer(self, number: int) -> dict[str, Any]:
        """One that was given before.

        Raises:
            GoneError: It is no longer here.
        """
        found = self._answers.get(number)
        if found is None:
            raise GoneError(
                "this answer is no longer in memory",
                expected=f"one of the last {_ANSWERS} since the page's server was started",
                next_step="ask again",
            )
        return found

    def greys(self, name: str) -> Greys:
        """A film's own grey values."""
        with self._servers.reached() if _is_case(name) else _nothing() as reached, self._lent(name, reached) as found:
            return self._reader.greys(found.path, found.member, _CALLED).result()

    def thumbnail(self, name: str) -> bytes:
        """A film as the networks see it, without the bars of its letterbox; PNG.

        Raises:
            ImageError: There is no picture of it on this machine or in the gallery.
        """
        return self._thumbnails.get_or(name, lambda: self._made_thumbnail(name))

    def explanation(self, name: str) -> bytes:
        """Lungs and attention (`Explained.png`): asked from Triton, unless they were before."""
        return self._explained.get_or(name, lambda: self._made_explanation(name)).png()

    def cases(self, where: str, text: str, limit: int, offset: int) -> list[dict[str, Any]]:
        """Cases of the gallery that meet a clause, and whose notes hold words."""
        if not (0 < limit <= MOST_ROWS and offset >= 0 and offset + limit <= MAX_HITS):
            raise UsageError("the page of cases is out of range", expected=f"at most {MOST_ROWS} of the first {MAX_HITS}")
        with self._servers.reached() as reached:
            return [_case_json(case) for case in reached.store.browse(reached.store.clause(where, text), limit, offset)]

    def alike(self, text: str, where: str, limit: int) -> dict[str, Any]:
        """Cases of the gallery of reports whose films are most like a text, each with its `similarity`; `shares` of their labels, by weight
        of it. What was asked is not written into the audit log.

        Raises:
            UsageError: There is no such gallery here, no case is left, or it is no question.
            ServiceError: A server cannot serve.
        """
        if not 0 < limit <= MOST_NEIGHBOURS:
            raise UsageError("the number of cases is out of range", expected=f"1 to {MOST_NEIGHBOURS}", got=str(limit))
        with self._servers.reached() as reached:
            if reached.reports is None:
                raise UsageError(
                    "nothing here understands words",
                    expected="a server with a multimodal network, and a gallery of the space reports",
                    next_step="`cxr serve --multimodal`, `cxr ingest --space reports`",
                )
            reader, store = reached.reports
            with audited(self._audit, "query", {"model_version": store.model_version, "film": None}) as operation:
                found = query_text(text, reader, reached.triton, store, top_k=limit, where=store.clause(where))
                operation.outcome["answer"] = "answered"
        cases = [{**_case_json(hit.case), "similarity": hit.similarity} for hit in found.neighbours]
        return {"cases": cases, "shares": dict(found.prediction.findings or found.prediction.scores)}

    def brushed(self, number: int, corners: Sequence[Sequence[float]], limit: int, offset: int) -> dict[str, Any]:
        """What the map of this number has in a region: how many cases, some of them, and what is known of them all.

        Raises:
            UsageError: It is no region.
        """
        if not (0 < limit <= MOST_ROWS and offset >= 0):
            raise UsageError("the page of cases is out of range", expected=f"at most {MOST_ROWS}")
        if not 3 <= len(corners) <= MOST_CORNERS:
            raise UsageError("this is no region of the map", expected=f"3 to {MOST_CORNERS} corners", got=str(len(corners)))
        sheet = self.map.sheet(number)
        keys = sheet.inside(corners)
        shown, summary = keys[offset : offset + limit], sheet.summary(keys)
        with self._servers.reached() as reached:
            held = reached.store.cases(shown)
        cases = [_case_json(held[key]) for key in shown if key in held]
        return {"total": len(keys), "cases": cases, "summary": summary.as_json(), "told": summary.lines()}

    def marked(self, number: int, answer: int) -> dict[str, Any]:
        """Where the map of this number has an answer's film and its neighbours (`Sheet.marks`)."""
        return self.map.sheet(number).marks([(hit["key"], hit["similarity"]) for hit in self.answer(answer)["neighbours"]])

    def clause(self, where: str, text: str, typed: str, at: int) -> dict[str, Any]:
        """What a filter says, and what may be written next.

        Args:
            where: Conditions that stand.
            text: Words to look for in notes.
            typed: One more condition, unfinished maybe.
            at: The place in it that is being typed at.

        Returns:
            `standing`: the conditions of `where`, one by one; `conditions`: these and those of `typed`. None where they cannot be meant,
            and `wrong` says why: of which of the three (`of`), the `message`, and the characters (`span`). `cases` of the gallery, of
            which `meet` meet what can be meant of it; None while the gallery is read. `completion` {start, end, suggestions} of `typed`.
        """
        if max(map(len, (where, text, typed))) > _CLAUSE:
            raise UsageError("the filter is too long", expected=f"at most {_CLAUSE} characters")
        wrong: list[dict[str, Any]] = []

        def read(name: str, given: str, reader: Callable[[str], T]) -> T | None:
            try:
                return reader(given)
            except ClauseError as error:
                wrong.append({"of": name, "message": str(error), "span": error.span})
                return None

        standing, more = (read(name, given, _conditions) for name, given in (("where", where), ("typed", typed)))
        words = read("text", text, lambda given: parse_text(given) and given) or ""
        meant = [*(standing or ()), *(more or ())]
        held = self._census.now()
        return {
            "standing": standing,
            "conditions": None if wrong else meant,
            "wrong": wrong[0] if wrong else None,
            "cases": None if held is None else len(held),
            "meet": None if held is None else len(held.meeting(" and ".join(meant), words)),
            "completion": None if held is None else asdict(held.complete(typed, at)),
        }

    def worklist(self, name: str, by: str, *, descending: bool, offset: int, limit: int) -> dict[str, Any]:
        """Rows of a list: `recent`, or the number of a results file.

        Raises:
            UsageError: No such list or order.
        """
        if by not in SORTS or not 0 < limit <= MOST_ROWS or offset < 0:
            raise UsageError("the worklist cannot be shown so", expected=f"an order of {', '.join(SORTS)}, and at most {MOST_ROWS} rows")
        if name == "recent":
            with self._lock:
                asked = list(self._asked)
            answers = [found for number in asked if (found := self._answers.get(number)) is not None]
            page = sorted_page(answers, by, descending=descending, offset=offset, limit=limit)
            rows = [_row(line, answer=line["id"], film=line["film"]) for _, line in page.rows]
        else:
            page = self._results_of(name).page(by, descending=descending, offset=offset, limit=limit)
            rows = [_row(line, film=f"line-{name}-{number}", name=_last_part(line)) for number, line in page.rows]
        return {"lists": self._lists(), "rows": rows, **_about(page)}

    def read_results(self) -> None:
        """Looks at all lines of the results files; to be called in a thread of its own, ahead of whoever wants to see them."""
        for results in self._results:
            results.read_on()

    # ------------------------------------------------------------------------------------------------ where films are

    @contextmanager
    def _lent(self, name: str, reached: Reached | None) -> Generator[_Found]:
        """Where a film can be read while the block lasts; `reached` is needed for cases alone."""
        parts = _FILM.fullmatch(name)
        if parts is None:
            raise UsageError("no film has such a name", expected="film-…, case-… or line-…, as an answer gives it")
        if parts["key"] is not None and reached is not None:
            with self._case(parts["key"], reached) as found:
                yield found
        elif parts["list"] is not None:
            yield self._line(parts["list"], int(parts["number"]))
        else:
            with self._uploads.lent(name) as path:
                yield _Found(path)

    @contextmanager
    def _case(self, key: str, reached: Reached) -> Generator[_Found]:
        """A case's own file if the local table leads to it and it is still what was ingested, else the picture kept in the gallery."""
        case = reached.store.cases([key]).get(key)
        if case is None:
            raise GoneError("the gallery no longer holds this case", next_step="ask again")
        original = reached.store.pseudonyms.originals([key]).get(key)
        patient = original.patient_id if original is not None else None
        why = self._unusable(case, reached)
        if why is None and case.path is not None:
            yield _Found(case.path, case.member, patient, case.source)
            return
        kept = reached.store.thumbnails([key]).get(key)
        if kept is None:
            raise ImageError(
                f"no picture of this case: {why}",
                expected="its file on this machine, or one kept in the gallery",
                next_step="`cxr ingest --thumbnails full` keeps them",
            )
        name = self._uploads.put(png(kept.square), f"case-{key}-{kept.pixels[:SHOWN_DIGITS]}")
        with self._uploads.lent(name) as path:
            yield _Found(path, None, patient, case.source, lungs_only=kept.kind is ThumbnailKind.lungs)

    def _unusable(self, case: Case, reached: Reached) -> str | None:
        """Why a case's own file cannot be shown; None if it can."""
        if case.path is None:
            return "its file was ingested on another machine"
        try:
            identity = self._reader.identity(case.path, case.member).result()
        except ImageError:
            return "its file is no longer where it was"
        if reached.store.pseudonyms.digest(identity.file) != case.file:
            return "its file has changed since it was ingested"
        return None

    def _line(self, name: str, number: int) -> _Found:
        line = self._results_of(name).line(number)
        path, inside, member = str(line.get("input", "")).partition(INSIDE)
        patient, source = line.get("patient_id"), line.get("source")
        return _Found(
            Path(path).absolute(),
            member if inside else None,
            patient if isinstance(patient, str) else None,
            source if isinstance(source, str) else None,
        )

    def _results_of(self, name: str) -> Results:
        if not name.isascii() or not name.isdigit() or int(name) >= len(self._results):
            raise UsageError("no such list", expected="recent, or the number of a --results file", got=name[:20])
        return self._results[int(name)]

    # ----------------------------------------------------------------------------------------------- what is made

    def _made_thumbnail(self, name: str) -> bytes:
        with self._servers.reached() if _is_case(name) else _nothing() as reached, self._lent(name, reached) as found:
            film = self._reader.submit(found.path, found.member, _CALLED).result()
        return png(np.asarray(film.box.crop(film.square), np.uint8))

    def _made_explanation(self, name: str) -> Explained:
        with self._servers.reached() as reached, self._lent(name, reached) as found:
            if found.lungs_only:
                raise ImageError(
                    "no attention for this case: only its lungs are kept",
                    expected="the whole film",
                    next_step="`cxr ingest --thumbnails full` keeps it",
                )
            film = self._reader.submit(found.path, found.member, _CALLED).result()
            outputs = reached.triton.infer(film.square[None, None], (LUNG_MASK, ATTENTION_MAP))
        mask, attention = outputs[LUNG_MASK.name][0, 0], outputs[ATTENTION_MAP.name][0, 0]
        return Explained.of(np.asarray(mask, np.uint8), np.asarray(attention, np.float32), film.box)

    def _remembered(
        self,
        question: Question,
        result: QueryResult,
        source: str | None,
        before: _Given | None,
        marks: tuple[Mark, ...],
    ) -> dict[str, Any]:
        answer = {"marked": [], **result.as_json()}
        marked = [one.hit for one in result.marked]
        for name, hits in (("neighbours", result.neighbours), ("earlier_films", result.own), ("marked", marked)):
            answer[name] = [{**shown, **_beside(hit)} for shown, hit in zip(answer[name], hits, strict=True)]
        answer |= {"came": [], "went": []} if before is None else came_and_went(answer, before.told)
        answer["round"] = before.round + (marks != before.marks) if before is not None and marks else 0
        answer["status"] = "refused" if result.ood.refused else "answered"
        answer["film"], answer["source"] = question.film, source
        answer["sentence"] = result.sentence
        answer["told"] = [*result.summary.lines(), *(one.words() for one in result.outcomes)]
        answer["asked"] = {
            "top_k": question.top_k,
            "where": question.where,
            "text": question.text,
            "error_rate": question.error_rate,
            "include_own": question.include_own,
            "gate": question.gate,
            "patient": question.patient is not None,
        }
        with self._lock:
            answer["id"] = self._asked[-1] + 1 if self._asked else 1
            self._asked.append(answer["id"])
            del self._asked[:-_ANSWERS]
        self._given.put(answer["id"], _Given(question, result, answer, answer["round"], marks))
        return self._answers.put(answer["id"], answer)

    def _lists(self) -> list[dict[str, str]]:
        files = [{"id": str(number), "name": results.path.name} for number, results in enumerate(self._results)]
        return [{"id": "recent", "name": "Recent queries"}, *files]


@contextmanager
def _nothing() -> Generator[None]:
    yield None


def _conditions(where: str) -> tuple[str, ...]:
    return conditions(where, FILTER_FIELDS)


def _is_case(name: str) -> bool:
    return name.startswith("case-")


def _key_of(name: str) -> str | None:
    return name.removeprefix("case-") if _is_case(name) else None


def _beside(hit: Neighbour) -> dict[str, Any]:
    case = hit.case
    return {"key": case.key, "film": f"case-{case.key}", "source": case.source, "facts": named_facts(case.metadata)} | {
        "semantic": hit.semantic,
        "visual": hit.visual,
    }


def _case_json(case: Case) -> dict[str, Any]:
    return {
        "key": case.key,
        "film": f"case-{case.key}",
        "image_id": case.image_id,
        "label": case.label,
        "source": case.source,
        "metadata": dict(case.metadata),
        "facts": named_facts(case.metadata),
    }


def _row(line: Mapping[str, Any], *, film: str, answer: int | None = None, name: str = "") -> dict[str, Any]:
    prediction = line.get("prediction") or {}
    ood = line.get("ood") or {}
    return {
        "film": film,
        "answer": answer,
        "name": name,
        "image_id": line.get("image_id"),
        "status": line["status"],
        "label": prediction.get("label"),
        "confidence": prediction.get("confidence"),
        "calibrated": prediction.get("calibrated"),
        "abstained": prediction.get("abstained"),
        "warnings": line.get("warnings") or [],
        "reason": line.get("error") or ood.get("reason"),
    }


def _last_part(line: Mapping[str, Any]) -> str:
    return str(line.get("input", "")).rpartition("/")[2]


def _about(page: Page) -> dict[str, Any]:
    return {"total": page.total, "whole": page.whole}
