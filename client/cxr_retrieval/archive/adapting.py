"""A hospital's films without labels → its profile: `cxr adapt`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np

from cxr_retrieval import __version__
from cxr_retrieval.archive import pipeline
from cxr_retrieval.archive.embedding import Problem
from cxr_retrieval.archive.inputs import Input, Unusable
from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.archive.pipeline import Seen
from cxr_retrieval.archive.watching import Failed, Settled, Watch, unwatched
from cxr_retrieval.contract import LUNG_AGREEMENT, LUNG_MASK
from cxr_retrieval.errors import CxrError, ImageError, UsageError
from cxr_retrieval.gallery.balance import PARTS, side_by_side
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.retrieval.own import own_cases
from cxr_retrieval.retrieval.query import Asked, answer, assessed
from cxr_retrieval.retrieval.site import Adapted, adapted, evidence_of


@dataclass(frozen=True)
class AdaptReport:
    """What was learnt, and of which films nothing was: those that cannot be used, and pictures that had come before.

    Attributes:
        found: None if it was stopped before the end.
    """

    found: Adapted | None
    problems: tuple[Problem, ...]
    copies: int


def adapt(
    name: str,
    inputs: Iterable[Input | Unusable],
    shares: Mapping[str, float],
    reader: FilmReader,
    triton: TritonClient,
    store: Store,
    *,
    assumed: bool = False,
    gate: bool = True,
    advance: Callable[[int], None] = lambda _: None,
    stop: threading.Event | None = None,
    tell: Callable[[str], None] = lambda _: None,
    watch: Watch = unwatched,
    patience_s: float = pipeline.PATIENCE_S,
) -> AdaptReport:
    """Learns the profile of a site; keeps nothing (`Store.keep`), neither films nor their vectors.

    Args:
        name: The site's, as its cases have it under `source`.
        inputs: Films that it has taken. A label that a manifest gives is not looked at.
        shares: Label that the site sees → how often.
        assumed: Nobody said how often.
        gate: Use nothing that is no upright frontal chest film; such a film is a problem.
        advance: Told how many films have been dealt with.
        stop: Ends it early, once it is set.
        tell, watch, patience_s: As of `embedding.ingest`.

    Raises:
        UsageError: Too few films, shares that cannot be meant, a label that no case has.
        ServiceError: As `pipeline.run`.
    """
    stop = stop or threading.Event()
    patience = Patience(stop, patience_s, tell, watch)
    held = patience.until("milvus", lambda: store.counts("label"), probe=store.probe)
    if unknown := sorted(set(shares) - set(held)):
        raise UsageError(
            f"no case has the label {', '.join(unknown)}",
            expected=", ".join(sorted(map(str, held))) or "a label of the gallery, which is empty",
            next_step="correct --share, or ingest cases of it",
        )
    sink = _Evidence(sorted(shares), store, triton.model_version, advance, watch, gate=gate)
    works = _usable(inputs, sink)
    pipeline.run(works, reader, triton, sink, probe_store=store.probe, stop=stop, tell=tell, watch=watch, patience_s=patience_s)
    if stop.is_set():
        return AdaptReport(None, tuple(sink.problems), sink.copies)
    found = adapted(
        name,
        sink.evidence,
        sink.voted,
        shares,
        model_version=triton.model_version,
        gallery=sum(held.values()),
        about={"version": __version__, "made": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")},
        assumed=assumed,
    )
    return AdaptReport(found, tuple(sink.problems), sink.copies)


def _usable(inputs: Iterable[Input | Unusable], sink: _Evidence) -> Iterator[Input]:
    for one in inputs:
        if isinstance(one, Unusable):
            sink.take_problem(Problem(one.name, one.error))
        else:
            yield one


class _Evidence:
    """The sink: for each film that is one, and has not come before, the evidence for every label and what its nearest cases vote for."""

    outputs = (*PARTS, LUNG_MASK, LUNG_AGREEMENT)

    def __init__(
        self, labels: Sequence[str], store: Store, model_version: str, advance: Callable[[int], None], watch: Watch, *, gate: bool
    ) -> None:
        self._gate = gate
        self._labels, self._store, self._version, self._advance, self._watch = labels, store, model_version, advance, watch
        self._known: set[str] = set()
        self.evidence: list[Mapping[str, float]] = []
        self.voted: list[str] = []
        self.problems: list[Problem] = []
        self.copies = 0

    def keep(self, seen: Sequence[Seen[Input]]) -> tuple[list[Problem], int, list[tuple[str, Mapping[str, float], str]]]:
        problems: list[Problem] = []
        fresh: dict[str, Seen[Input]] = {}
        copies = 0
        for one in seen:
            reason = assessed(one.film, one.outputs).reason if self._gate else None
            if reason is not None:
                problems.append(Problem(one.work.name, _refused(one.work.name, reason)))
            elif one.film.pixels in self._known or one.film.pixels in fresh:
                copies += 1
            else:
                fresh[one.film.pixels] = one
        if not fresh:
            return problems, copies, []
        films = list(fresh.values())
        own = [own_cases(one.film, _patient(one.work), self._store.pseudonyms) for one in films]
        vectors = np.stack([side_by_side(one.outputs) for one in films])
        evidence = evidence_of(vectors, self._labels, self._store, own)
        asked = [Asked(None, one.film, one.outputs, _patient(one.work), {}) for one in films]
        answers = answer(asked, self._store, self._version, gate=False)
        found: list[tuple[str, Mapping[str, float], str]] = []
        for one, mine, result in zip(films, evidence, answers, strict=True):
            if isinstance(result, UsageError) or result.prediction.label is None or len(mine) < len(self._labels):
                error = UsageError(f"{one.work.name}: no case of another patient left to compare with", next_step="ingest more cases")
                problems.append(Problem(one.work.name, error))
            else:
                found.append((one.film.pixels, mine, result.prediction.label))
        return problems, copies, found

    def kept(self, result: tuple[list[Problem], int, list[tuple[str, Mapping[str, float], str]]]) -> None:
        problems, copies, found = result
        for problem in problems:
            self.take_problem(problem)
        self.copies += copies
        for pixels, evidence, label in found:
            self._known.add(pixels)
            self.evidence.append(evidence)
            self.voted.append(label)
        self._advance(copies + len(found))
        self._watch(Settled({"used": len(found), "copies": copies}))

    def failed(self, work: Input, error: CxrError) -> None:
        self.take_problem(Problem(work.name, error))

    def take_problem(self, problem: Problem) -> None:
        """One that cannot be used."""
        self.problems.append(problem)
        self._watch(Failed(problem.error))
        self._advance(1)


def _patient(work: Input) -> str | None:
    return work.row.patient_id if work.row else None


def _refused(name: str, reason: str) -> ImageError:
    return ImageError(
        f"{name}: not used", expected="an upright frontal chest radiograph", got=reason, next_step="take it out of what is learnt from"
    )
