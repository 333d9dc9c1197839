"""One query, on one page: read → Triton → Milvus → gate → vote."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.contract import ATTENTION_MAP, FEATURES, IMAGE_VECTOR, LUNG_AGREEMENT, LUNG_MASK
from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, PARTS, checked
from cxr_retrieval.gallery.spaces import FILM, Space
from cxr_retrieval.gallery.store import MAX_HITS, Case, Clause, Neighbour, Store, within
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import Film, FilmReader
from cxr_retrieval.radiograph.letterbox import Letterbox
from cxr_retrieval.retrieval.calibration import DEFAULT_ERROR_RATE, Trust, ballot_of, percent, sentence, site_sentence, trust
from cxr_retrieval.retrieval.clusters import CONFINED, Clustering, Search, grown, hits_wanted, require
from cxr_retrieval.retrieval.feedback import MOVED, Led, Mark, Marked, led
from cxr_retrieval.retrieval.gate import Ood, judge, too_far
from cxr_retrieval.retrieval.outcome import Outcome, OutcomeModel
from cxr_retrieval.retrieval.own import OWN_EXPECTED, nearest_others, nobodys, own_cases
from cxr_retrieval.retrieval.reports import Wording
from cxr_retrieval.retrieval.site import Site, evidence_of, read_sites
from cxr_retrieval.retrieval.summary import Summary, summarise
from cxr_retrieval.retrieval.voting import DEFAULT_K, NoVote, Vote, weighted_vote
from cxr_retrieval.settings import Match, Method, SpaceName

if TYPE_CHECKING:
    import pandas as pd

MIN_LUNG_SHARE: Final = 0.05
"""Of the radiograph's area; an adult's lungs cover a quarter to a half of a frontal film."""
MIN_LUNG_AGREEMENT: Final = 0.9
"""Mean Dice coefficient of the five networks with their ensemble (LUNG_AGREEMENT)."""


SHOWN: Final = (ATTENTION_MAP, LUNG_MASK, LUNG_AGREEMENT)
"""What Triton is asked for beside what is compared."""
WANTED: Final = (*PARTS, *SHOWN)
"""All of it, in the space of films."""


@dataclass(frozen=True)
class Asked:
    """A film with what the networks say of it: `outputs` of WANTED, by name, without the batch dimension; attention may be left out.

    `image_id` as a manifest gives it; None: the film's own name, `Film.film_id`. `marks`: what a reader said of earlier answers' cases.
    """

    image_id: str | None
    film: Film
    outputs: Mapping[str, NDArray[np.generic]]
    patient: str | None
    timings_ms: Mapping[str, float]
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class Explanation:
    """What the pictures need, all on the 256×256 square: radiograph and mask uint8, attention in [0, 1] if it was asked for."""

    square: NDArray[np.uint8]
    box: Letterbox
    lung_mask: NDArray[np.uint8]
    attention: NDArray[np.float32] | None


@dataclass(frozen=True, repr=False)
class QueryResult:
    """The answer to one radiograph.

    Attributes:
        image_id: As a manifest gives it, else the film's own name, which is the same whatever its file is called.
        prediction: `NoVote` if the film was refused (`ood`).
        neighbours: The cases that voted, nearest first (of method cluster as they were added); of a refused film those that would have, for
            information.
        own: Films of the query's own patient, and the query's own picture, that are as near; left out of the vote unless asked for.
        trust: How far to trust the prediction.
        balance: Of what was learnt against what lungs look like, by which neighbours were found (`gallery/balance.py`).
        marked: Cases that a reader marked, which moved the question; those that are not relevant are none of the neighbours.
        site: The profile of the film's hospital, by which the prediction was made (`retrieval/site.py`); `evidence` for its labels.
        clustering: The clusters in which the neighbours were found; None: they are the nearest of all.
        outcomes: What an outcome model says, if it was asked (`retrieval/outcome.py`); of a refused film nothing.
        space: By which vectors cases were compared (`gallery/spaces.py`).
    """

    image_id: str
    model_version: str
    prediction: Vote | NoVote
    neighbours: tuple[Neighbour, ...]
    own: tuple[Neighbour, ...]
    timings_ms: dict[str, float]
    warnings: tuple[str, ...]
    ood: Ood
    explanation: Explanation
    trust: Trust
    balance: float
    marked: tuple[Marked, ...] = ()
    site: Site | None = None
    evidence: Mapping[str, float] = field(default_factory=dict)
    clustering: Clustering | None = None
    outcomes: tuple[Outcome, ...] = ()
    space: SpaceName = SpaceName.film

    @property
    def sentence(self) -> str:
        """The vote and how far to trust it, in plain words; why there is none of a film that was refused."""
        if self.prediction.label is None:
            return self.ood.reason or "refused"
        labels = [hit.case.label for hit in self.neighbours]
        if self.site is not None:
            return site_sentence(labels, self.prediction, self.site.name)
        said = [sentence(labels, self.prediction, self.trust), *([MOVED] if self.marked else ()), *([CONFINED] if self.clustering else ())]
        return "; ".join(said)

    @property
    def voter(self) -> str:
        """Whose vote the prediction is."""
        count = len(self.neighbours)
        return f"distance-weighted vote of {count} cases" if self.site is None else f"vote of the profile of {self.site.name}"

    @property
    def summary(self) -> Summary:
        """What is known of the neighbours."""
        return summarise(hit.case for hit in self.neighbours)

    def to_arrow(self) -> Any:
        """A `pyarrow.Table` with a row for each case (`table.as_table`)."""
        from cxr_retrieval.retrieval.table import as_table

        return as_table(self)

    def to_pandas(self) -> pd.DataFrame:
        """The same for pandas; what is not known is null there, too (Arrow's types)."""
        import pandas as pd

        return self.to_arrow().to_pandas(types_mapper=pd.ArrowDtype)

    def __repr__(self) -> str:
        """In short, and without ids and paths of cases: a notebook keeps it."""
        said = "no label" if self.prediction.label is None else f"{self.prediction.label}, share {self.prediction.confidence:.2f}"
        return f"<QueryResult {self.image_id}: {said}, {len(self.neighbours)} neighbours, model {self.model_version}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from cxr_retrieval.retrieval.picture import fragment

        return fragment(self)

    def as_json(self) -> dict[str, Any]:
        """The published JSON form of a query result. `prediction.findings` is there where labels hold several findings, `marked` where a
        reader marked something, `site` where a profile voted, `method`, and `cluster` beside each neighbour, where these were not the
        nearest of all, `outcomes` where an outcome model was asked, `space` where it is not that of films, and then no `balance`.
        """
        marked = [{**one.hit.as_json(), "relevant": one.relevant} for one in self.marked]
        return {
            "image_id": self.image_id,
            "model_version": self.model_version,
            **({"balance": self.balance} if self.space is SpaceName.film else {"space": self.space.value}),
            "prediction": {
                "label": self.prediction.label,
                "confidence": self.prediction.confidence,
                "scores": dict(self.prediction.scores),
                **({"findings": dict(self.prediction.findings)} if self.prediction.findings else {}),
                **self.trust.as_json(),
            },
            "neighbours": [{"rank": rank, **hit.as_json(), **self._cluster_json(hit)} for rank, hit in enumerate(self.neighbours, start=1)],
            "earlier_films": [hit.as_json() for hit in self.own],
            "summary": self.summary.as_json(),
            "timings_ms": {name: round(value, 2) for name, value in self.timings_ms.items()},
            "warnings": list(self.warnings),
            "ood": self.ood.as_json(),
            **({"marked": marked} if marked else {}),
            **({"site": {"name": self.site.name, "evidence": dict(self.evidence)}} if self.site else {}),
            **({"method": Method.cluster.value} if self.clustering else {}),
            **({"outcomes": {one.name: one.as_json() for one in self.outcomes}} if self.outcomes else {}),
        }

    def _cluster_json(self, hit: Neighbour) -> dict[str, Any]:
        number = self.clustering.number(hit.case.cluster) if self.clustering else None
        return {} if self.clustering is None or number is None else {"cluster": self.clustering.clusters[number].as_json(number)}


def query(
    image: Path,
    reader: FilmReader,
    triton: TritonClient,
    store: Store,
    *,
    top_k: int = DEFAULT_K,
    where: str = "",
    text: str = "",
    patient: str | None = None,
    include_own: bool = False,
    gate: bool = True,
    error_rate: float = DEFAULT_ERROR_RATE,
    balance: float = DEFAULT_BALANCE,
    marks: Sequence[Mark] = (),
    source: str | None = None,
    method: Method = Method.nearest,
    outcome: OutcomeModel | None = None,
    facts: Mapping[str, float] = MappingProxyType({}),
    wording: Wording | None = None,
    match: Match = Match.film,
) -> QueryResult:
    """Retrieves the `top_k` most similar confirmed cases and lets them vote.

    Films of the query's own patient, and the query's own picture under whatever name, do not vote: one of them would decide, being
    nearer than anything else, and what one wants to know is what others had. `cxr evaluate` measures just that.

    Args:
        where: Milvus boolean expression that cases must meet, such as `age > 60` (docs/asking.md).
        text: Words that their clinical notes must hold.
        patient: The `patient_id` of this patient as the gallery's manifest had it; by default DICOM's Patient ID (0010,0020). Its pseudonym
            is compared here; nothing of it is sent anywhere.
        include_own: Let them vote like any other case.
        gate: Give no label to what is no upright frontal chest film (`retrieval/gate.py`); False: say so, and let the cases vote.
        error_rate: Of the set of labels (`retrieval/calibration.py`), 0.01 to 0.5.
        balance: 0: neighbours are alike in what was learnt from labels; 1: in what lungs look like; between: in both, so weighed.
        marks: What a reader said of cases that an earlier answer showed; they move the question (`retrieval/feedback.py`), and those that
            are not relevant do not come again.
        source: The hospital that the film comes from. If it has a profile (`cxr adapt`), that votes, unless a clause or marks say which
            cases count, or the method is another.
        method: cluster: the cases of the clusters that the film is closest to (`retrieval/clusters.py`).
        outcome: Also say what it does of this film (`OutcomeModel.served_by`).
        facts: What is known of the patient, for it (`OutcomeModel.read`).
        wording: A text that is part of the question, in a gallery of the space `reports` (`ReportReader.worded`).
        match: What of the cases is compared, there.

    Raises:
        ImageError: The file is unusable.
        UsageError: No case meets the expression, no set can be given for that error rate, the balance is none, there are too many marks, or
            no clusters.
        ClauseError: It cannot be meant.
        InferenceError, StoreError: Triton or Milvus cannot serve.
    """
    clause = store.clause(where, text)
    started = time.perf_counter()
    film = reader.read(image)
    read_ms = 1000 * (time.perf_counter() - started)
    return query_film(
        film,
        triton,
        store,
        top_k=top_k,
        where=clause,
        patient=patient,
        include_own=include_own,
        gate=gate,
        error_rate=error_rate,
        balance=balance,
        marks=marks,
        source=source,
        method=method,
        outcome=outcome,
        facts=facts,
        wording=wording,
        match=match,
        timings_ms={"read": read_ms},
    )


def query_film(
    film: Film,
    triton: TritonClient,
    store: Store,
    *,
    top_k: int = DEFAULT_K,
    where: Clause | None = None,
    patient: str | None = None,
    include_own: bool = False,
    gate: bool = True,
    error_rate: float = DEFAULT_ERROR_RATE,
    balance: float = DEFAULT_BALANCE,
    marks: Sequence[Mark] = (),
    source: str | None = None,
    method: Method = Method.nearest,
    outcome: OutcomeModel | None = None,
    facts: Mapping[str, float] = MappingProxyType({}),
    wording: Wording | None = None,
    match: Match = Match.film,
    timings_ms: Mapping[str, float] = MappingProxyType({}),
) -> QueryResult:
    """As `query`, of a film that has been read; `timings_ms`: what that took."""
    checked(balance)
    timings = dict(timings_ms)
    with _timed(timings, "infer"):
        wanted = (*store.space.outputs, *SHOWN)
        outputs = triton.infer(film.square[None, None], wanted if outcome is None else (*wanted, FEATURES))
    likely = None
    if outcome is not None:
        with _timed(timings, "outcome"):
            likely = outcome.predict(triton, np.asarray(outputs[FEATURES.name][0], np.float32), facts)
    if wording is not None:
        _refuse_elsewhere(store.space, "a text beside the film")
        outputs[IMAGE_VECTOR.name] = wording.joined(outputs[IMAGE_VECTOR.name])
    if match is not Match.film:
        _refuse_elsewhere(store.space, "the cases' reports")
    asked = Asked(None, film, {name: values[0] for name, values in outputs.items()}, patient, timings, marks)
    (result,) = answer(
        [asked],
        store,
        store.model_version,
        top_k=top_k,
        where=where,
        include_own=include_own,
        gate=gate,
        error_rate=error_rate,
        balance=balance,
        source=source,
        method=method,
        match=match,
    )
    if isinstance(result, UsageError):
        raise result
    if likely is None or outcome is None or result.ood.refused:
        return result
    return replace(result, outcomes=outcome.told(likely, result.neighbours, known=bool(facts)))


def answer(
    asked: Sequence[Asked],
    store: Store,
    model_version: str,
    *,
    top_k: int = DEFAULT_K,
    where: Clause | None = None,
    include_own: bool = False,
    gate: bool = True,
    error_rate: float = DEFAULT_ERROR_RATE,
    balance: float = DEFAULT_BALANCE,
    source: str | None = None,
    method: Method = Method.nearest,
    match: Match = Match.film,
) -> list[QueryResult | UsageError]:
    """What `query` does once the networks have answered, for several films with one search; UsageError where no case was left to compare.

    Raises:
        StoreError: Milvus cannot serve.
        UsageError: No set can be given for that error rate, the balance is none, there are too many marks, or no clusters.
        SetupError: The gallery's own calibration, or its clusters, cannot be read.
    """
    percent(error_rate)
    clustering = require(store.clusters, balance) if method is Method.cluster else None
    clause = where or Clause("", "")
    space = store.space
    vectors = np.stack([space.question(one.outputs, match) for one in asked])
    started = time.perf_counter()
    moved = [led(vector, one.marks, store, balance) for one, vector in zip(asked, vectors, strict=True)]
    limit = min(top_k + OWN_EXPECTED, MAX_HITS) if clustering is None else hits_wanted(clustering, top_k)
    first = store.search_many(np.stack([one.vector for one in moved]), limit, clause, balance)
    is_own = [nobodys if include_own else own_cases(one.film, one.patient, store.pseudonyms) for one in asked]
    found = [
        _neighbours(hits, way, top_k, own, clustering, partial(_search, store, way.vector, clause, balance))
        for way, hits, own in zip(moved, first, is_own, strict=True)
    ]
    site = None if source is None or space is not FILM else read_sites(store.sites).get(source)
    heard = site is not None and not clause.given and not any(way.marked for way in moved) and clustering is None
    evidence = evidence_of(vectors, list(site.shares), store, is_own) if site and heard else [{} for _ in asked]
    search_ms = 1000 * (time.perf_counter() - started)
    measured = not clause.asked and balance == DEFAULT_BALANCE and space is FILM
    far = [
        too_far(_unmoved(hits, way, own, store), store.count, model_version) if hits and measured else None
        for hits, way, own in zip(first, moved, vectors, strict=True)
    ]
    rules = _Rules(
        model_version, top_k, clause.given, include_own, error_rate, balance, store.calibration, store.size, site, clustering, space.name
    )
    unknown = [] if site or source is None or space is not FILM else _stranger(store, source)
    return [
        _result(
            one,
            way,
            others,
            theirs,
            seen,
            search_ms,
            rules,
            assessed(one.film, one.outputs, gate=gate, far=distance),
            [*unknown, *_unplaced(hits, rules)],
        )
        for one, way, (others, theirs), hits, seen, distance in zip(asked, moved, found, first, evidence, far, strict=True)
    ]


def assessed(film: Film, outputs: Mapping[str, NDArray[np.generic]], *, gate: bool = True, far: float | None = None) -> Ood:
    """The gate's verdict on a film and what the networks say of it; `far` as in `judge`; `gate` False: it reports and refuses nothing."""
    mask, agreement = np.asarray(outputs[LUNG_MASK.name][0], np.uint8), float(outputs[LUNG_AGREEMENT.name][0])
    return judge(film.square, film.box, mask, agreement, far=far, enforced=gate)


def doubts(film: Film, outputs: Mapping[str, NDArray[np.generic]], ood: Ood) -> list[str]:
    """What to look at before trusting an answer: what the gate would have refused, else lungs that were not found reliably."""
    if ood.reason:
        return [] if ood.refused else [f"the gate was overridden: {ood.reason}"]
    mask, agreement = np.asarray(outputs[LUNG_MASK.name][0], np.uint8), float(outputs[LUNG_AGREEMENT.name][0])
    return lung_warnings(mask, film.box, agreement)


@dataclass(frozen=True)
class _Rules:
    """How several films are answered; `calibration`: the gallery's own, `gallery`: how many cases it holds, `site`: whose profile votes,
    `clustering`: in whose clusters cases are sought.
    """

    model_version: str
    top_k: int
    where: str
    include_own: bool
    error_rate: float
    balance: float
    calibration: str
    gallery: int
    site: Site | None
    clustering: Clustering | None
    space: SpaceName

    @property
    def unusual(self) -> str | None:
        """Why such answers are not of the kind whose reliability is measured; None if they are."""
        if self.space is not SpaceName.film:
            return f"cases were compared in the space {self.space.value}"
        if self.where:
            return "only cases that meet a clause were compared"
        if self.clustering is not None:
            return CONFINED
        if self.balance != DEFAULT_BALANCE:
            return f"it was measured at a balance of {DEFAULT_BALANCE:g}, and this is {self.balance:g}"
        return "films of the query's own patient may have voted" if self.include_own else None


def _refuse_elsewhere(space: Space, what: str) -> None:
    if space.name is not SpaceName.reports:
        raise UsageError(
            f"{what} cannot be compared here",
            expected=f"a gallery of the space {SpaceName.reports.value}",
            got=space.name.value,
            next_step="give --space reports, on a server with a multimodal network",
        )


def _unmoved(hits: Sequence[Neighbour], way: Led, own: NDArray[np.float32], store: Store) -> float:
    """Similarity of the case nearest to the film itself, wherever marks have moved the question."""
    return (store.search(own, 1) if way.marked else hits)[0].similarity


def _search(
    store: Store, vector: NDArray[np.float32], clause: Clause, balance: float, limit: int, among: str | None = None
) -> list[Neighbour]:
    return store.search(vector, limit, clause if among is None else within(clause, among), balance)


def _neighbours(
    hits: Sequence[Neighbour], way: Led, top_k: int, is_own: Callable[[Case], bool], clustering: Clustering | None, search: Search
) -> tuple[list[Neighbour], list[Neighbour]]:
    """`nearest_others`, or the region `grown` in clusters, where cases marked as not relevant are neither."""
    aside = way.set_aside

    def apart(case: Case) -> bool:
        return case.key in aside or is_own(case)

    if clustering is None:
        others, passed_over = nearest_others(hits, search, top_k, apart)
    else:
        others, passed_over = grown(hits, search, clustering, top_k, apart)
    return others, [hit for hit in passed_over if is_own(hit.case)]


def _result(
    asked: Asked,
    way: Led,
    neighbours: list[Neighbour],
    own: list[Neighbour],
    evidence: Mapping[str, float],
    search_ms: float,
    rules: _Rules,
    ood: Ood,
    said: Sequence[str],
) -> QueryResult | UsageError:
    if not neighbours:
        return UsageError(
            "no case to compare with",
            expected="at least one gallery image of another patient" + (f" that meets {rules.where!r}" if rules.where else ""),
            got=f"none, but {len(own)} of this patient" if own else "none",
            next_step="relax --where, ingest cases" + (", or count this patient's with --include-own" if own else ""),
        )
    timings = {**asked.timings_ms, "search": search_ms}
    site, doubt = (None, []) if ood.refused else _voting_site(rules, evidence, way)
    with _timed(timings, "vote"):
        prediction = NoVote() if ood.refused else weighted_vote([(hit.case.label, hit.similarity) for hit in neighbours])
        if site:
            prediction = site.vote(evidence)
        known = _trusted(prediction, neighbours, rules, ood, way, site)
    timings["total"] = sum(timings.values())
    film, outputs = asked.film, asked.outputs
    mask = np.asarray(outputs[LUNG_MASK.name][0], np.uint8)
    warnings = [*film.warnings, *doubts(film, outputs, ood), *([known.unmeasured] if known.unmeasured else ()), *doubt]
    if len(neighbours) < rules.top_k:
        warnings.append(f"only {len(neighbours)} of {rules.top_k} neighbours: the gallery holds no more that qualify")
    if way.gone:
        warnings.append(f"{way.gone} marked case(s) are no longer in the gallery, and do not count")
    if own:
        warnings.append(f"{len(own)} film(s) of this patient, or this very picture, are in the gallery; they do not vote")
    warnings += said
    attention = np.asarray(outputs[ATTENTION_MAP.name][0], np.float32) if ATTENTION_MAP.name in outputs else None
    explanation = Explanation(film.square, film.box, mask, attention)
    return QueryResult(
        asked.image_id or film.film_id,
        rules.model_version,
        prediction,
        tuple(neighbours),
        tuple(own),
        timings,
        tuple(warnings),
        ood,
        explanation,
        known,
        rules.balance,
        way.marked,
        site,
        evidence,
        rules.clustering,
        space=rules.space,
    )


def _voting_site(rules: _Rules, evidence: Mapping[str, float], way: Led) -> tuple[Site | None, list[str]]:
    """Whose profile votes, if one does; and why it does not, or whether to doubt it."""
    site = rules.site
    if site is None:
        return None, []
    if rules.where or way.marked:
        return None, [f"the profile of {site.name} did not vote: {'a clause says' if rules.where else 'marks say'} which cases count"]
    if rules.clustering is not None:
        return None, [f"the profile of {site.name} did not vote: {CONFINED}"]
    if gone := sorted(set(site.shares) - set(evidence)):
        return None, [f"the profile of {site.name} did not vote: no case of {', '.join(gone)} is left to compare with"]
    doubt = site.doubt(rules.gallery)
    return site, [doubt] if doubt else []


def _unplaced(hits: Sequence[Neighbour], rules: _Rules) -> list[str]:
    """What to say of cases that are near and in no cluster."""
    clustering = rules.clustering
    new = 0 if clustering is None else sum(clustering.number(hit.case.cluster) is None for hit in hits)
    return [f"{new} of the {len(hits)} nearest cases are in no cluster, and not found so: `cxr cluster --new`"] if new else []


def _stranger(store: Store, source: str) -> list[str]:
    """What to say of a hospital without a profile: nothing if the gallery holds films of it."""
    if store.browse(f"source == {json.dumps(source)}", 1):
        return []
    return [
        f"the gallery holds no film of {source}: between hospitals, answers have been far less reliable (docs/results.md); "
        "`cxr adapt` learns from its films without labels"
    ]


def _trusted(vote: Vote | NoVote, neighbours: Sequence[Neighbour], rules: _Rules, ood: Ood, way: Led, site: Site | None) -> Trust:
    if vote.label is None:
        return Trust(None, (), ood.reason)
    if site is not None:
        why = f"how often such an answer is right is not known: the profile of {site.name} voted, which rests on films without labels"
        return Trust(None, None, None, why, rules.error_rate)
    return trust(
        vote,
        ballot_of([(hit.case.label, hit.similarity, hit.case.source or "") for hit in neighbours]),
        rules.model_version,
        rules.calibration,
        gallery=rules.gallery,
        error_rate=rules.error_rate,
        otherwise_asked="the gate was overridden" if ood.reason else MOVED if way.marked else rules.unusual,
    )


def lung_warnings(mask: NDArray[np.uint8], box: Letterbox, agreement: float) -> list[str]:
    """Says so when hardly any lung was found, or the networks disagree about it; the vote then rests on shaky ground."""
    share = float(box.crop(mask).astype(np.bool_).mean())
    if share < MIN_LUNG_SHARE:
        return [f"lungs not found reliably: they cover {share:.0%} of the picture; is this a frontal chest radiograph?"]
    if agreement < MIN_LUNG_AGREEMENT:
        return [
            f"lungs not found reliably: the networks agree to {agreement:.2f} only (usually above {MIN_LUNG_AGREEMENT:.2f}); "
            "look at the outline before you trust the vote"
        ]
    return []


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Generator[None]:
    started = time.perf_counter()
    yield
    timings[name] = 1000 * (time.perf_counter() - started)
