"""What was received is answered: the way of `cxr batch`, fed by a node, its answers going to the results, to other archives, or both."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, Final, Protocol, TypeVar

from cxr_retrieval.archive.audit import Noted
from cxr_retrieval.archive.pipeline import Seen
from cxr_retrieval.archive.watching import Failed, Settled, Watch
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import TensorSpec
from cxr_retrieval.errors import CxrError, ImageError, SetupError, UsageError
from cxr_retrieval.gallery.store import Clause, Store
from cxr_retrieval.pacs.arrivals import ANSWERED, FAILED, REFUSED, Arrival, Arrivals, Outcome, Outgoing
from cxr_retrieval.pacs.report import Reporter
from cxr_retrieval.pacs.rules import Keep, Rule, Rules
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.retained import Deidentification
from cxr_retrieval.retrieval import query
from cxr_retrieval.retrieval.query import QueryResult
from cxr_retrieval.settings import MilvusSettings

T = TypeVar("T")

_AGAIN_S: Final = 5.0
"""Between two tries to write to a full disk."""


@dataclass(frozen=True)
class Gallery:
    """Where a rule's cases are, and which of them count."""

    store: Store
    clause: Clause


class Contact(Protocol):
    """Calls what connects, until it has."""

    def __call__(self, call: Callable[[], T], /) -> T:
        """What the call returns."""
        ...


class Galleries(ExitStack):
    """Every rule's, one connection for each that several share. Use as a context manager.

    Args:
        settings: Of the node's own gallery; the others differ by their URI.
    """

    def __init__(self, settings: MilvusSettings, model_version: str, keys: Pseudonyms, rules: Rules, contact: Contact) -> None:
        super().__init__()
        stores: dict[str, Store] = {}
        self._of: dict[str, Gallery] = {}
        with ExitStack() as undo:
            for rule in rules.rules:
                uri = rule.gallery or settings.uri
                if uri not in stores:
                    at = replace(settings, uri=uri)
                    stores[uri] = undo.enter_context(contact(lambda at=at: Store(at, model_version, keys)))
                store = stores[uri]
                self._of[rule.name] = Gallery(store, contact(lambda store=store, rule=rule: store.clause(rule.where, rule.text)))
            self.push(undo.pop_all())
        self._stores = list(stores.values())

    def __getitem__(self, rule: str) -> Gallery:
        return self._of[rule]

    def probe(self) -> None:
        """Raises StoreDownError while one of them is away."""
        for store in self._stores:
            store.probe()


@dataclass(frozen=True)
class _Made:
    """An outcome, and what the audit log calls its film."""

    outcome: Outcome
    film: str


class Answers:
    """The sink: a search for all films of a rule at once, then what goes back for each.

    Args:
        secret: For the UIDs and pseudonyms of instances that lose their identities.
        stop: Ends the waiting for a disk that is full.
    """

    outputs: Sequence[TensorSpec] = query.WANTED

    def __init__(
        self,
        arrivals: Arrivals,
        rules: Rules,
        galleries: Galleries,
        reader: FilmReader,
        reporter: Reporter,
        secret: bytes,
        model_version: str,
        *,
        stop: threading.Event,
        tell: Callable[[str], None],
        watch: Watch,
        noted: Noted,
    ) -> None:
        self._arrivals, self._rules, self._galleries, self._reader = arrivals, rules, galleries, reader
        self._reporter, self._secret, self._model_version = reporter, secret, model_version
        self._stop, self._tell, self._watch, self._noted = stop, tell, watch, noted

    def keep(self, seen: Sequence[Seen[Arrival]]) -> list[_Made]:
        """Asks the galleries, and makes what goes out."""
        made: list[_Made] = []
        by_rule: dict[Rule, list[Seen[Arrival]]] = {}
        for one in seen:
            by_rule.setdefault(self._rule(one.work), []).append(one)
        for rule, some in by_rule.items():
            gallery = self._galleries[rule.name]
            asked = [query.Asked(None, one.film, one.outputs, None, {"infer": 1000 * one.seconds}) for one in some]
            results = query.answer(
                asked,
                gallery.store,
                self._model_version,
                top_k=rule.top_k,
                where=gallery.clause,
                include_own=rule.include_own,
                gate=rule.gate,
                error_rate=rule.error_rate,
                balance=rule.balance,
                source=rule.source,
            )
            made += [self._made(one, rule, result) for one, result in zip(some, results, strict=True)]
        return made

    def kept(self, result: Sequence[_Made]) -> None:
        """Notes, then records; a disk that is full is waited for."""
        self._noted({made.film: made.outcome.state for made in result})
        self._record([made.outcome for made in result])

    def failed(self, work: Arrival, error: CxrError) -> None:
        """A film that cannot be answered has its line, too."""
        self._watch(Failed(error, work.id))
        self._noted({f"arrival-{work.id}": FAILED})
        self._record([Outcome(work, FAILED, {**_about(work, FAILED), "error": str(error)}, keep=self._rule(work).keep is Keep.received)])

    def _record(self, outcomes: Sequence[Outcome]) -> None:
        while True:
            try:
                self._arrivals.record(outcomes)
            except SetupError as error:
                self._tell(f"answers cannot be written: {error}. Waiting")
                if self._stop.wait(_AGAIN_S):  # they wait in the spool
                    return
            else:
                self._watch(Settled(Counter(outcome.state for outcome in outcomes)))
                return

    def _rule(self, work: Arrival) -> Rule:
        """As it was when the instance came; where the rules have changed since, the one that fits now, or the first."""
        return self._rules.named(work.rule) or self._rules.match(work.caller, work.header) or self._rules.rules[0]

    def _made(self, seen: Seen[Arrival], rule: Rule, result: QueryResult | UsageError) -> _Made:
        work = seen.work
        plain, unkept = self._deidentified(work, rule)
        to = self._rules.addressees(rule.forward, work.caller)
        outgoing = [Outgoing(name, "instance", plain) for name in to] if plain is not None else []
        kept = plain if rule.keep is Keep.deidentified else None
        asis = rule.keep is Keep.received
        if isinstance(result, UsageError):
            self._watch(Failed(result, work.id))
            line = {**_about(work, FAILED), "error": str(result)}
            return _Made(Outcome(work, FAILED, line, outgoing, kept, asis), seen.film.film_id)
        state = REFUSED if result.ood.refused else ANSWERED
        line = {**_about(work, state), **result.as_json(), "trace_id": seen.trace.trace_id}
        to = self._rules.addressees(rule.to, work.caller)
        objects, unmade = self._objects(result, work, rule) if to else ({}, [])
        outgoing += [Outgoing(name, kind, data) for name in to for kind, data in objects.items()]
        line["warnings"] = [*line["warnings"], *unkept, *unmade]
        return _Made(Outcome(work, state, line, outgoing, kept, asis), seen.film.film_id)

    def _objects(self, result: QueryResult, work: Arrival, rule: Rule) -> tuple[dict[str, bytes], list[str]]:
        """What is sent for this film, by kind; and what could not be made, for one film must not hold up all others."""
        made: dict[str, bytes] = {}
        unmade: list[str] = []
        now = datetime.now().astimezone()  # the zone of the archive, which is that of this machine
        for kind in rule.send:
            make = self._reporter.report if kind == "report" else self._reporter.picture
            try:
                made[kind] = make(result, work.header, now)
            except Exception as error:  # whatever a library raises at what a header says
                unmade.append(f"no {kind} could be made for other archives ({type(error).__name__})")
        return made, unmade

    def _deidentified(self, work: Arrival, rule: Rule) -> tuple[bytes | None, list[str]]:
        """The instance without identities, where it is kept or forwarded so; else why it is not."""
        if not (rule.forward or rule.keep is Keep.deidentified):
            return None, []
        try:
            rules = Deidentification(self._secret, rule.retain)
            return self._reader.deidentified(work.path, rules, "the instance").result(), []
        except ImageError as error:
            return None, [f"not kept or forwarded, for identities may remain: {error}"]


def _about(work: Arrival, state: str) -> dict[str, Any]:
    received = datetime.fromtimestamp(work.received, timezone.utc).isoformat(timespec="milliseconds")
    about = {"caller": work.caller, "rule": work.rule, "received": received, "seconds": round(time.time() - work.received, 3)}
    return {"input": work.header.instance, "status": state, **about}
