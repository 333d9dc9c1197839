"""How far to trust a vote: the probability that its label is right, and the labels that cannot be excluded at a chosen error rate.

The share of the vote is no probability: most votes are unanimous, and unanimous ones are wrong, too, the more often the farther the nearest
case lies. So each label's logit is the logarithm of its share, times a factor that grows with D = −log(1 − similarity of the nearest case):
a temperature (Guo et al. 2017) that rises with distance. Two numbers are fitted, whatever the labels are.

Sets of labels are conformal (Vovk et al. 2005; Sadinle et al. 2019), Mondrian by label and neighbourhood: a label is left out of the set
if, among the calibrated cases of that label in that neighbourhood, fewer than the error rate had as low a probability for it. The
neighbourhood is the source whose cases are over-represented among the neighbours; the query's own source is not asked for, it may be
unknown.

What was fitted, by `evaluation/confidence.py`, belongs to one model version and one gallery: for the weights that ship and the public films
it lies beside this module in `calibration.json`; a gallery of one's own keeps its own (`cxr calibrate`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Final

from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.gallery.kept_text import compact, read_back
from cxr_retrieval.retrieval.voting import Vote, neighbour_weight

FILE: Final = Path(__file__).with_name("calibration.json")

DEFAULT_ERROR_RATE: Final = 0.1
PERCENTS: Final = range(1, 51)
"""Error rates that thresholds are kept for, in percent."""
LEAST_SHARE: Final = 0.01
"""Added to each share, so that a label without votes is improbable and not impossible."""
_CLOSEST: Final = 1e-3
"""Cosine distances below it count as it: the same picture, or noise."""
_MOST: Final = 99
"""Of a hundred, at most, that words promise to be right."""
_LAYOUT: Final = 1


@dataclass(frozen=True)
class Ballot:
    """What is looked at of a vote.

    Attributes:
        shares: Label → share of the weight (`Vote.scores`).
        nearest: Similarity of the nearest case.
        sources: Source ("" where unknown) → share of the same weight.
        count: Cases that voted.
    """

    shares: Mapping[str, float]
    nearest: float
    sources: Mapping[str, float]
    count: int

    @property
    def depth(self) -> float:
        """D = −log(1 − nearest), in [−0.7, 6.9]."""
        return depth_of(self.nearest)


@dataclass(frozen=True)
class Trust:
    """What is known of a vote's reliability.

    Attributes:
        calibrated: Probability that the vote's label is right; None where it was not measured.
        labels: The set at the error rate, most probable first: with it, so many answers of a hundred hold the right label. Empty: none is
            sure enough, or the film was refused. None where it was not measured.
        abstained: Why the label should not be used, or why there is none; None if nothing speaks against it.
        unmeasured: Why nothing was measured, and what to do; None if it was.
        error_rate: Of the set.
    """

    calibrated: float | None
    labels: tuple[str, ...] | None
    abstained: str | None
    unmeasured: str | None = None
    error_rate: float = DEFAULT_ERROR_RATE

    def as_json(self) -> dict[str, Any]:
        """What `prediction` gains."""
        return {
            "calibrated": None if self.calibrated is None else round(self.calibrated, 4),
            "set": None if self.labels is None else list(self.labels),
            "abstained": self.abstained,
        }


@dataclass(frozen=True)
class Calibration:
    """Fitted on cases whose label is known, none of which was in the gallery when it was asked about.

    Attributes:
        top_k: Neighbours that voted.
        gallery: Cases that the gallery held; in one of less than half or more than twice as many, near is something else.
        labels: That the gallery held; an answer with another one among its neighbours has not been measured.
        offset, slope: A label's logit is max(0, `offset` + `slope` × D) × log(share + LEAST_SHARE): beyond some distance a vote says
            nothing.
        sources: Source of neighbours → its mean share of the weight. Another one has not been measured.
        neighbourhoods: Those of them that are told apart, each with enough cases.
        thresholds: Neighbourhood ("" for any other) → label → the least probability with which the label is in the set, one number for
            each of PERCENTS.
        farthest: Similarity of the nearest case that 99 % of the calibrated cases reached.
        about: Who made it, when, on how many cases.
    """

    model_version: str
    top_k: int
    gallery: int
    labels: tuple[str, ...]
    offset: float
    slope: float
    sources: Mapping[str, float]
    neighbourhoods: tuple[str, ...]
    thresholds: Mapping[str, Mapping[str, tuple[float, ...]]]
    farthest: float
    about: Mapping[str, Any]

    def probabilities(self, ballot: Ballot) -> dict[str, float]:
        """Label → probability; they sum to 1."""
        factor = max(0.0, self.offset + self.slope * ballot.depth)
        powers = {label: (ballot.shares.get(label, 0.0) + LEAST_SHARE) ** factor for label in self.labels}
        total = sum(powers.values())
        return {label: power / total for label, power in powers.items()}

    def neighbourhood(self, ballot: Ballot) -> str:
        """Of `neighbourhoods` the one whose share exceeds its mean by most; "" if none has any."""
        lifts = {source: ballot.sources.get(source, 0.0) / self.sources[source] for source in self.neighbourhoods}
        found = max(lifts, key=lambda source: lifts[source], default="")
        return found if lifts.get(found) else ""

    def allowed(self, ballot: Ballot, error_rate: float = DEFAULT_ERROR_RATE) -> tuple[str, ...]:
        """The set of labels at an error rate of 0.01 to 0.5, most probable first; a fraction of a percent counts as the percent below."""
        column = percent(error_rate) - PERCENTS.start
        probabilities, thresholds = self.probabilities(ballot), self.thresholds[self.neighbourhood(ballot)]
        kept = [label for label, probability in probabilities.items() if probability >= thresholds[label][column]]
        return tuple(sorted(kept, key=lambda label: (-probabilities[label], label)))

    def unmeasured(self, ballot: Ballot, gallery: int) -> str | None:
        """Why it says nothing of such a vote, in a gallery of so many cases; None if it does."""
        if ballot.count != self.top_k:
            return f"it was measured with {self.top_k} voting cases, and {ballot.count} voted here"
        if others := sorted(set(ballot.shares) - set(self.labels)):
            return f"labels it was not measured on are among the nearest cases: {', '.join(others)}"
        if not self.gallery / 2 <= gallery <= 2 * self.gallery:
            return f"it was measured in a gallery of {self.gallery} cases, and this one holds {gallery}"
        strange = {source or "unknown": share for source, share in ballot.sources.items() if source not in self.sources}
        if sum(strange.values()) > 0.5:
            return f"most of the nearest cases are of sources it was not measured on: {', '.join(sorted(strange))}"
        return None

    def as_json(self) -> dict[str, Any]:
        """The form of the file and of the gallery's property."""
        return {
            "layout": _LAYOUT,
            "model_version": self.model_version,
            "top_k": self.top_k,
            "gallery": self.gallery,
            "labels": list(self.labels),
            "offset": self.offset,
            "slope": self.slope,
            "sources": dict(self.sources),
            "neighbourhoods": list(self.neighbourhoods),
            "thresholds": {name: {label: list(row) for label, row in rows.items()} for name, rows in self.thresholds.items()},
            "farthest": self.farthest,
            "about": dict(self.about),
        }

    def as_text(self) -> str:
        """The same as compact JSON, always the same for the same calibration."""
        return compact(self.as_json())


@lru_cache(maxsize=16)
def read_calibration(text: str) -> Calibration:
    """From the JSON of `as_text`.

    Raises:
        SetupError: It is none, or of another layout.
    """
    with read_back(text, "a calibration", _LAYOUT, "`cxr calibrate --reset`, then `cxr calibrate`") as held:
        found = Calibration(
            str(held["model_version"]),
            int(held["top_k"]),
            int(held["gallery"]),
            tuple(map(str, held["labels"])),
            float(held["offset"]),
            float(held["slope"]),
            {str(source): float(share) for source, share in held["sources"].items()},
            tuple(map(str, held["neighbourhoods"])),
            {str(name): {str(label): tuple(map(float, row)) for label, row in rows.items()} for name, rows in held["thresholds"].items()},
            float(held["farthest"]),
            dict(held["about"]),
        )
        rows = [found.thresholds[place][label] for place in ("", *found.neighbourhoods) for label in found.labels]
        if any(len(row) != len(PERCENTS) for row in rows) or set(found.neighbourhoods) - set(found.sources):
            raise ValueError("incomplete")
        return found


@cache
def shipped() -> Mapping[str, Calibration]:
    """Model version → its calibration on the public films."""
    held: list[dict[str, Any]] = json.loads(FILE.read_text("utf-8"))
    found = [read_calibration(json.dumps(one)) for one in held]
    return {one.model_version: one for one in found}


def put_calibration(calibration: Calibration, path: Path) -> None:
    """Puts it into a file of calibrations, one line each, in the place of the one of its model version.

    Raises:
        SetupError: The file holds something else, or cannot be written.
    """
    try:
        lines = json.loads(path.read_text("utf-8")) if path.exists() else []
        held = {one["model_version"]: one for one in lines} | {calibration.model_version: calibration.as_json()}
        rows = [compact(held[version]) for version in sorted(held)]
        path.write_text("[\n" + ",\n".join(rows) + "\n]\n", "utf-8")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SetupError(f"{path}: no file of calibrations", got=str(error), next_step="give another file") from error


def percent(error_rate: float) -> int:
    """The percent of PERCENTS that thresholds are kept for.

    Raises:
        UsageError: Not between 0.01 and 0.5.
    """
    found = int(100 * error_rate + 1e-9) if math.isfinite(error_rate) else 0
    if found not in PERCENTS or error_rate > PERCENTS[-1] / 100:
        raise UsageError(
            "an error rate that no set can be given for", expected="0.01 to 0.5", got=str(error_rate), next_step="correct --error-rate"
        )
    return found


def depth_of(similarity: float) -> float:
    """D = −log(1 − similarity), where distances below a thousandth count as a thousandth."""
    return -math.log(max(1.0 - similarity, _CLOSEST))


def ballot_of(neighbours: Sequence[tuple[str, float, str]]) -> Ballot:
    """Of (label, similarity, source) of the cases that voted; "" for a source that is not known."""
    shares: dict[str, float] = {}
    sources: dict[str, float] = {}
    weights = [neighbour_weight(similarity) for _, similarity, _ in neighbours]
    total = sum(weights)
    for (label, _, source), weight in zip(neighbours, weights, strict=True):
        shares[label] = shares.get(label, 0.0) + weight / total
        sources[source] = sources.get(source, 0.0) + weight / total
    return Ballot(shares, max(similarity for _, similarity, _ in neighbours), sources, len(neighbours))


def trust(
    vote: Vote,
    ballot: Ballot,
    model_version: str,
    own: str,
    *,
    gallery: int,
    error_rate: float = DEFAULT_ERROR_RATE,
    otherwise_asked: str | None = None,
) -> Trust:
    """What can be said of a vote; a few hundredths of a millisecond.

    Args:
        own: The gallery's own calibration as text; "": the one that ships, if it is of this model version.
        gallery: Cases that the gallery holds.
        otherwise_asked: Why this answer is not of the kind that was measured, such as a clause; None if it is.
    """
    calibration = read_calibration(own) if own else shipped().get(model_version)
    if calibration is None or calibration.model_version != model_version:
        why = f"no calibration of model version {model_version} is here"
    else:
        why = otherwise_asked or calibration.unmeasured(ballot, gallery)
    if why is not None or calibration is None:
        mend = "" if otherwise_asked else "; `cxr calibrate` measures it on cases of your own"
        return Trust(None, None, None, f"how often such an answer is right is not known: {why}{mend}", error_rate)
    allowed = calibration.allowed(ballot, error_rate)
    abstained = _doubt(vote, ballot, allowed, calibration, error_rate)
    return Trust(calibration.probabilities(ballot)[vote.label], allowed, abstained, None, error_rate)


def _doubt(vote: Vote, ballot: Ballot, allowed: Sequence[str], calibration: Calibration, error_rate: float) -> str | None:
    at = f"at an error rate of {percent(error_rate)} %"
    if ballot.nearest < calibration.farthest:
        usual = f"{calibration.farthest:.2f} or more in 99 % of the calibrated cases"
        return f"the nearest case is far away: its similarity is {ballot.nearest:.2f}, {usual}"
    if not allowed:
        return f"no label is sure enough {at}"
    others = ", ".join(spoken(label) for label in allowed if label != vote.label)
    if vote.label not in allowed:
        return f"not the vote's label but {others} is left {at}"
    return f"{others} cannot be excluded {at}" if others else None


def sentence(labels: Sequence[str], vote: Vote, known: Trust) -> str:
    """The vote in plain words, such as "7 of 10 nearest cases are COVID-19; weighted share 0.74; in 100 such answers about 69 are right".

    Args:
        labels: Of the cases that voted.
    """
    count = sum(label == vote.label for label in labels)
    cases = f"{count} of {len(labels)} nearest cases {'is' if count == 1 else 'are'} {spoken(vote.label)}"
    parts = [cases, f"weighted share {vote.confidence:.2f}"]
    if known.calibrated is not None:
        of_hundred = round(100 * known.calibrated)
        parts.append(f"in 100 such answers {'more than 99' if of_hundred > _MOST else f'about {of_hundred}'} are right")
    return "; ".join(parts)


def site_sentence(labels: Sequence[str], vote: Vote, site: str) -> str:
    """The same of a site's profile, such as "4 of 10 nearest cases are control; beside what is usual in st-mary, 0.62 for control"."""
    count = sum(label == vote.label for label in labels)
    cases = f"{count} of {len(labels)} nearest cases {'is' if count == 1 else 'are'} {spoken(vote.label)}"
    return f"{cases}; beside what is usual in {site}, {vote.confidence:.2f} for {spoken(vote.label)}"


def spoken(label: str) -> str:
    """A label as a reader says it."""
    return label.replace("_", " ").replace("non covid", "non-COVID").replace("covid19", "COVID-19")
