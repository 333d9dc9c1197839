"""One query, on one page: read → Triton → Milvus → gate → vote."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import ATTENTION_MAP, LUNG_AGREEMENT, LUNG_MASK
from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, PARTS, checked, side_by_side
from cxr_retrieval.gallery.store import MAX_HITS, Case, Clause, Neighbour, Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import Film, FilmReader
from cxr_retrieval.radiograph.letterbox import Letterbox
from cxr_retrieval.retrieval.calibration import DEFAULT_ERROR_RATE, Trust, ballot_of, percent, sentence, trust
from cxr_retrieval.retrieval.feedback import MOVED, Led, Mark, Marked, led
from cxr_retrieval.retrieval.gate import Ood, judge, too_far
from cxr_retrieval.retrieval.summary import Summary, summarise
from cxr_retrieval.retrieval.voting import DEFAULT_K, NoVote, Vote, weighted_vote

if TYPE_CHECKING:
    import pandas as pd

MIN_LUNG_SHARE: Final = 0.05
"""Of the radiograph's area; an adult's lungs cover a quarter to a half of a frontal film."""
MIN_LUNG_AGREEMENT: Final = 0.9
"""Mean Dice coefficient of the five networks with their ensemble (LUNG_AGREEMENT)."""
OWN_EXPECTED: Final = 2
"""Hits asked for beyond `top_k`, so that a patient's own films seldom need a second search."""


WANTED: Final = (*PARTS, ATTENTION_MAP, LUNG_MASK, LUNG_AGREEMENT)
"""What Triton is asked for."""


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
        neighbours: The cases that voted, nearest first; of a refused film those that would have, for information.
        own: Films of the query's own patient, and the query's own picture, that are as near; left out of the vote unless asked for.
        trust: How far to trust the prediction.
        balance: Of what was learnt against what lungs look like, by which neighbours were found (`gallery/balance.py`).
        marked: Cases that a reader marked, which moved the question; those that are not relevant are none of the neighbours.
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

    @property
    def sentence(self) -> str:
        """The vote and how far to trust it, in plain words; why there is none of a film that was refused."""
        if self.prediction.label is None:
            return self.ood.reason or "refused"
        said = sentence([hit.case.label for hit in self.neighbours], self.prediction, self.trust)
        return f"{said}; {MOVED}" if self.marked else said

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
        """The published JSON form of a query result; `marked` is there where a reader marked something."""
        marked = [{**_hit_json(one.hit), "relevant": one.relevant} for one in self.marked]
        return {
            "image_id": self.image_id,
            "model_version": self.model_version,
            "balance": self.balance,
            "prediction": {
                "label": self.prediction.label,
                "confidence": self.prediction.confidence,
                "scores": dict(self.prediction.scores),
                **self.trust.as_json(),
            },
            "neighbours": [{"rank": rank, **_hit_json(hit)} for rank, hit in enumerate(self.neighbours, start=1)],
            "earlier_films": [_hit_json(hit) for hit in self.own],
            "summary": self.summary.as_json(),
            "timings_ms": {name: round(value, 2) for name, value in self.timings_ms.items()},
            "warnings": list(self.warnings),
            "ood": self.ood.as_json(),
            **({"marked": marked} if marked else {}),
        }


def _hit_json(hit: Neighbour) -> dict[str, Any]:
    known = {"patient_id": hit.case.patient_id, "source": hit.case.source}
    return {
        "image_id": hit.case.image_id,
        "similarity": hit.similarity,
        "label": hit.case.label,
        "metadata": {**{name: value for name, value in known.items() if value is not None}, **hit.case.metadata},
    }


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

    Raises:
        ImageError: The file is unusable.
        UsageError: No case meets the expression, no set can be given for that error rate, the balance is none, or there are too many marks.
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
    timings_ms: Mapping[str, float] = MappingProxyType({}),
) -> QueryResult:
    """As `query`, of a film that has been read; `timings_ms`: what that took."""
    checked(balance)
    timings = dict(timings_ms)
    with _timed(timings, "infer"):
        outputs = triton.infer(film.square[None, None], WANTED)
    asked = Asked(None, film, {name: values[0] for name, values in outputs.items()}, patient, timings, marks)
    (result,) = answer(
        [asked],
        store,
        triton.model_version,
        top_k=top_k,
        where=where,
        include_own=include_own,
        gate=gate,
        error_rate=error_rate,
        balance=balance,
    )
    if isinstance(result, UsageError):
        raise result
    return result


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
) -> list[QueryResult | UsageError]:
    """What `query` does once the networks have answered, for several films with one search; UsageError where no case was left to compare.

    Raises:
        StoreError: Milvus cannot serve.
        UsageError: No set can be given for that error rate, the balance is none, or there are too many marks.
        SetupError: The gallery's own calibration cannot be read.
    """
    percent(error_rate)
    where = where or Clause("", "")
    vectors = np.stack([side_by_side(one.outputs) for one in asked])
    started = time.perf_counter()
    moved = [led(vector, one.marks, store, balance) for one, vector in zip(asked, vectors, strict=True)]
    first = store.search_many(np.stack([one.vector for one in moved]), min(top_k + OWN_EXPECTED, MAX_HITS), where, balance)
    found: list[tuple[list[Neighbour], list[Neighbour]]] = []
    for one, way, hits in zip(asked, moved, first, strict=True):
        is_own = _nobodys if include_own else _own_cases(one.film, one.patient, store.pseudonyms)
        found.append(_neighbours(hits, way, top_k, is_own, lambda limit, way=way: store.search(way.vector, limit, where, balance)))
    search_ms = 1000 * (time.perf_counter() - started)
    measured = not where.asked and balance == DEFAULT_BALANCE
    far = [
        too_far(_unmoved(hits, way, own, store), store.count, model_version) if hits and measured else None
        for hits, way, own in zip(first, moved, vectors, strict=True)
    ]
    rules = _Rules(model_version, top_k, where.given, include_own, error_rate, balance, store.calibration, store.size)
    return [
        _result(one, way, *hits, search_ms, rules, assessed(one.film, one.outputs, gate=gate, far=distance))
        for one, way, hits, distance in zip(asked, moved, found, far, strict=True)
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
    """How several films are answered; `calibration`: the gallery's own, `gallery`: how many cases it holds."""

    model_version: str
    top_k: int
    where: str
    include_own: bool
    error_rate: float
    balance: float
    calibration: str
    gallery: int

    @property
    def unusual(self) -> str | None:
        """Why such answers are not of the kind whose reliability is measured; None if they are."""
        if self.where:
            return "only cases that meet a clause were compared"
        if self.balance != DEFAULT_BALANCE:
            return f"it was measured at a balance of {DEFAULT_BALANCE:g}, and this is {self.balance:g}"
        return "films of the query's own patient may have voted" if self.include_own else None


def _unmoved(hits: Sequence[Neighbour], way: Led, own: NDArray[np.float32], store: Store) -> float:
    """Similarity of the case nearest to the film itself, wherever marks have moved the question."""
    return (store.search(own, 1) if way.marked else hits)[0].similarity


def _neighbours(
    hits: Sequence[Neighbour], way: Led, top_k: int, is_own: Callable[[Case], bool], search: Callable[[int], Sequence[Neighbour]]
) -> tuple[list[Neighbour], list[Neighbour]]:
    """`nearest_others`, where cases marked as not relevant are neither."""
    aside = way.set_aside
    others, passed_over = nearest_others(hits, search, top_k, lambda case: case.key in aside or is_own(case))
    return others, [hit for hit in passed_over if is_own(hit.case)]


def _result(
    asked: Asked, way: Led, neighbours: list[Neighbour], own: list[Neighbour], search_ms: float, rules: _Rules, ood: Ood
) -> QueryResult | UsageError:
    if not neighbours:
        return UsageError(
            "no case to compare with",
            expected="at least one gallery image of another patient" + (f" that meets {rules.where!r}" if rules.where else ""),
            got=f"none, but {len(own)} of this patient" if own else "none",
            next_step="relax --where, ingest cases" + (", or count this patient's with --include-own" if own else ""),
        )
    timings = {**asked.timings_ms, "search": search_ms}
    with _timed(timings, "vote"):
        prediction = NoVote() if ood.refused else weighted_vote([(hit.case.label, hit.similarity) for hit in neighbours])
        known = _trusted(prediction, neighbours, rules, ood, way)
    timings["total"] = sum(timings.values())
    film, outputs = asked.film, asked.outputs
    mask = np.asarray(outputs[LUNG_MASK.name][0], np.uint8)
    warnings = [*film.warnings, *doubts(film, outputs, ood), *([known.unmeasured] if known.unmeasured else ())]
    if len(neighbours) < rules.top_k:
        warnings.append(f"only {len(neighbours)} of {rules.top_k} neighbours: the gallery holds no more that qualify")
    if way.gone:
        warnings.append(f"{way.gone} marked case(s) are no longer in the gallery, and do not count")
    if own:
        warnings.append(f"{len(own)} film(s) of this patient, or this very picture, are in the gallery; they do not vote")
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
    )


def _trusted(vote: Vote | NoVote, neighbours: Sequence[Neighbour], rules: _Rules, ood: Ood, way: Led) -> Trust:
    if vote.label is None:
        return Trust(None, (), ood.reason)
    return trust(
        vote,
        ballot_of([(hit.case.label, hit.similarity, hit.case.source or "") for hit in neighbours]),
        rules.model_version,
        rules.calibration,
        gallery=rules.gallery,
        error_rate=rules.error_rate,
        otherwise_asked="the gate was overridden" if ood.reason else MOVED if way.marked else rules.unusual,
    )


def _nobodys(case: Case) -> bool:
    return False


def _own_cases(film: Film, patient_id: str | None, pseudonyms: Pseudonyms) -> Callable[[Case], bool]:
    """Which cases are the query's own: the same 256×256 picture, or the same patient (of whatever source, to be on the safe side)."""
    patient_id = patient_id or film.patient_id
    patient = pseudonyms.patient(patient_id) if patient_id else None
    pixels = pseudonyms.digest(film.pixels)
    return lambda case: case.pixels == pixels or (patient is not None and case.patient_id == patient)


def nearest_others(
    hits: Sequence[Neighbour], search: Callable[[int], Sequence[Neighbour]], top_k: int, is_own: Callable[[Case], bool]
) -> tuple[list[Neighbour], list[Neighbour]]:
    """The nearest `top_k` cases that are not the query's own, and those of its own that are as near as the last of them.

    Own ones are told apart here and not by a clause: a clause would tell Milvus whose film is asked about, drop cases whose patient is
    unknown, and cost the index recall.

    Args:
        hits: The nearest `top_k + OWN_EXPECTED`, nearest first.
        search: Number of hits → the nearest; asked for more where too many of the first are own.
    """
    limit = min(top_k + OWN_EXPECTED, MAX_HITS)
    while True:
        others = [hit for hit in hits if not is_own(hit.case)][:top_k]
        if len(others) == top_k or len(hits) < limit or limit == MAX_HITS:
            least = others[-1].similarity if len(others) == top_k else -1.0
            return others, [hit for hit in hits if is_own(hit.case) and hit.similarity >= least]
        limit = min(2 * limit, MAX_HITS)
        hits = search(limit)


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
