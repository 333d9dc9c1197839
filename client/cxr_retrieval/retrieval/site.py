"""A hospital that the networks have never seen: what a few hundred of its films, without labels, tell of how its films must be asked about.

To networks trained elsewhere all films of such a hospital look more like the cases of one label than like those of another, whatever they
show, because those cases were taken as it takes its films. Nearest neighbours then vote for that label alone. What is left within the
hospital is a difference: some of its films look more so than others. So every label is asked for by itself, and compared with what is usual
there. With s_c the mean similarity of a film's NEAREST nearest cases of label c (its evidence),

    P(c | film) = softmax((s_c + o_c) / τ)

where the offsets o_c are such that the mean of P over the hospital's films is the share π_c of each label there, and τ is the deviation of
the labels' evidence over these films. Saerens et al. 2002 (eq. 2.4) start from probabilities that are right and estimate the
shares; here the shares are said, and the evidence is what is wrong.

No vector changes: galleries of several hospitals stay comparable, and to forget a profile undoes it. How far it carries, and what else was
tried: docs/sites.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.kept_text import compact, read_back
from cxr_retrieval.gallery.store import Case, Clause, Neighbour, Store, of_label
from cxr_retrieval.retrieval.own import OWN_EXPECTED, nearest_others
from cxr_retrieval.retrieval.voting import Vote

NEAREST: Final = 10
"""Cases of a label whose mean similarity is its evidence; all of them where the gallery holds fewer."""
BALANCE: Final = 0.9
"""At which they are nearest (`gallery/balance.py`), whatever the dial says: what lungs look like carries further than what was learnt. The
greatest at which hospitals that were in training lose less than half a point (docs/sites.md).
"""
LEAST_FILMS: Final = 50
"""Of fewer, the offsets are mostly chance."""
GROWN: Final = 1.1
"""A gallery of so many times the cases is another one: its nearest cases are nearer."""
_DOUBT: Final = 0.25
"""A share may be so much larger or smaller than it is said to be, when it is told what would come of it."""
UNSTEADY: Final = 0.1
"""Share of the films that then get another label, beyond which that is unsafe."""
_FEW: Final = 10
"""Films of a label that the site should have lent, by its share."""
_STEPS: Final = 500
_EXACT: Final = 1e-6
_LAYOUT: Final = 1

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Site:
    """A site's profile.

    Attributes:
        name: As its cases have it under `source`.
        model_version: Whose vectors it was learnt from.
        gallery: Cases that were compared with.
        films: Of the site, that it was learnt from.
        shares: Label → share of the site's films, each above 0; they sum to 1. Another label is never voted for.
        offsets: Label → what is added to its evidence.
        deviation: τ.
        about: When it was made, and by which version of this system.
    """

    name: str
    model_version: str
    gallery: int
    films: int
    shares: Mapping[str, float]
    offsets: Mapping[str, float]
    deviation: float
    about: Mapping[str, Any]

    def vote(self, evidence: Mapping[str, float]) -> Vote:
        """The vote on a film, from the evidence for each label of `shares`; the most probable first."""
        labels = sorted(self.shares)
        found = probabilities(
            np.array([[evidence[label] for label in labels]]), np.array([self.offsets[label] for label in labels]), self.deviation
        )
        scores = dict(sorted(zip(labels, found[0].tolist(), strict=True), key=lambda one: (-one[1], one[0])))
        winner = next(iter(scores))
        return Vote(winner, scores[winner], scores)

    def doubt(self, gallery: int) -> str | None:
        """Why it may no longer hold in a gallery of so many cases; None if nothing speaks against it."""
        if self.gallery / GROWN <= gallery <= self.gallery * GROWN:
            return None
        return f"the profile of {self.name} was learnt when the gallery held {self.gallery} cases, not {gallery}: `cxr adapt` it again"


@dataclass(frozen=True)
class Adapted:
    """A profile, and what it changes on the films that it was learnt from.

    Attributes:
        before: Label → how many films the nearest cases voted for. after: The same of the profile.
        changed: Films whose label changes.
        unsteady: Of the films, the greatest share whose label would be another if one label's share were a quarter larger or smaller.
        warnings: Why it may be unsafe.
    """

    site: Site
    before: Mapping[str, int]
    after: Mapping[str, int]
    changed: int
    unsteady: float
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """What `cxr adapt --json` tells."""
        told = asdict(self)
        return {**told.pop("site"), **told, "warnings": list(self.warnings)}


def evidence_of(
    vectors: NDArray[np.float32], labels: Sequence[str], store: Store, is_own: Sequence[Callable[[Case], bool]]
) -> list[dict[str, float]]:
    """Of each film `[n, 120]` the evidence for these labels, without cases of its own; none for a label of which no case is left.

    Raises:
        StoreError: Milvus cannot serve.
    """
    found: list[dict[str, float]] = [{} for _ in vectors]
    for label in labels:
        alone = of_label(label)
        first = store.search_many(vectors, NEAREST + OWN_EXPECTED, alone, BALANCE)
        for mine, vector, hits, own in zip(found, vectors, first, is_own, strict=True):
            others, _ = nearest_others(hits, partial(_nearest, store, vector, alone), NEAREST, own)
            if others:
                mine[label] = float(np.mean([hit.similarity for hit in others]))
    return found


def _nearest(store: Store, vector: NDArray[np.float32], alone: Clause, limit: int) -> list[Neighbour]:
    return store.search(vector, limit, alone, BALANCE)


def adapted(
    name: str,
    evidence: Sequence[Mapping[str, float]],
    voted: Sequence[str],
    shares: Mapping[str, float],
    *,
    model_version: str,
    gallery: int,
    about: Mapping[str, Any],
    assumed: bool = False,
) -> Adapted:
    """The profile of a site, from films without labels.

    Args:
        evidence: Of each film, for each label of `shares`.
        voted: What the nearest cases of each film voted for.
        shares: Label → share, or any number in proportion to it.
        assumed: Nobody has said the shares.

    Raises:
        UsageError: Too few films; under two labels; a share that is none.
    """
    if len(evidence) < LEAST_FILMS:
        raise UsageError(
            f"too few films of {name} to learn from",
            expected=f"{LEAST_FILMS} usable ones, better 200, drawn from all that it takes",
            got=str(len(evidence)),
            next_step="point it at more",
        )
    labels, wanted = sorted(shares), normalised(shares)
    seen = np.array([[one[label] for label in labels] for one in evidence])
    deviation = deviation_of(seen)
    offsets = fitted(seen, np.array([wanted[label] for label in labels]), deviation)
    site = Site(name, model_version, gallery, len(evidence), wanted, dict(zip(labels, offsets.tolist(), strict=True)), deviation, about)
    given = [labels[i] for i in (seen + offsets).argmax(axis=1)]
    unsteady = _unsteady(seen, labels, wanted, deviation, given)
    return Adapted(
        site,
        _counted(voted),
        _counted(given),
        sum(a != b for a, b in zip(voted, given, strict=True)),
        unsteady,
        tuple(_warnings(site, unsteady, assumed=assumed)),
    )


def normalised(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares that sum to 1, in order of label.

    Raises:
        UsageError: Under two labels, or a share that is none.
    """
    wrong = {label: share for label, share in shares.items() if not (math.isfinite(share) and share > 0)}
    if wrong or len(shares) < 2:
        raise UsageError(
            "shares of labels that cannot be meant",
            expected="--share LABEL[=NUMBER] for two labels or more, each above 0; leave out a label that the hospital never sees",
            got=", ".join(f"{label}={share:g}" for label, share in (wrong or shares).items()) or "none",
            next_step="correct --share",
        )
    total = sum(shares.values())
    return {label: shares[label] / total for label in sorted(shares)}


def deviation_of(evidence: Floats) -> float:
    """τ of films `[n, labels]`: root mean square of the evidence, less each film's mean, less what is then usual for each label."""
    apart = evidence - evidence.mean(axis=1, keepdims=True)
    apart = apart - apart.mean(axis=0)
    return max(float(np.sqrt((apart**2).sum(axis=1).mean() / (evidence.shape[1] - 1))), _EXACT)


def fitted(evidence: Floats, shares: Floats, deviation: float) -> Floats:
    """Offsets `[labels]`, of mean 0, with which the mean probability over the films `[n, labels]` is each label's share."""
    offsets = -evidence.mean(axis=0)
    for _ in range(_STEPS):
        now = probabilities(evidence, offsets, deviation).mean(axis=0)
        step = deviation * np.log(shares / np.maximum(now, _EXACT))
        offsets = offsets + step
        if np.abs(step).max() < _EXACT * deviation:
            break
    return offsets - offsets.mean()


def probabilities(evidence: Floats, offsets: Floats, deviation: float) -> Floats:
    """P(c | film) of films `[n, labels]`."""
    logits = (evidence + offsets) / deviation
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _unsteady(evidence: Floats, labels: Sequence[str], shares: Mapping[str, float], deviation: float, given: Sequence[str]) -> float:
    worst = 0.0
    for label in labels:
        for factor in (1.0 - _DOUBT, 1.0 + _DOUBT):
            other = normalised({**shares, label: shares[label] * factor})
            offsets = fitted(evidence, np.array([other[one] for one in labels]), deviation)
            now = [labels[i] for i in (evidence + offsets).argmax(axis=1)]
            worst = max(worst, float(np.mean([a != b for a, b in zip(given, now, strict=True)])))
    return worst


def _warnings(site: Site, unsteady: float, *, assumed: bool) -> list[str]:
    told: list[str] = []
    if assumed:
        told.append(
            "nobody said how often the hospital sees which of these labels, so all count as equally frequent; where that is wrong, so are "
            "the answers. Say it: --share LABEL=NUMBER"
        )
    rare = [label for label, share in site.shares.items() if share * site.films < _FEW]
    if rare:
        told.append(f"of {', '.join(rare)} the films can hold a few only: what is usual there rests on chance. Point it at more films")
    if unsteady > UNSTEADY:
        told.append(
            f"were one share a quarter larger or smaller than said, {unsteady:.0%} of the films would get another label: be sure of them"
        )
    return told


def _counted(labels: Sequence[str]) -> dict[str, int]:
    return {label: labels.count(label) for label in sorted(set(labels))}


@lru_cache(maxsize=16)
def read_sites(text: str) -> Mapping[str, Site]:
    """Name → profile, from what a gallery keeps; "" keeps none.

    Raises:
        SetupError: It is none, or of another layout.
    """
    if not text:
        return {}
    with read_back(text, "the profiles of sites", _LAYOUT, "`cxr adapt` each site again") as held:
        return {
            name: Site(
                name,
                str(one["model_version"]),
                int(one["gallery"]),
                int(one["films"]),
                {label: float(one["shares"][label]) for label in sorted(one["shares"])},
                {label: float(one["offsets"][label]) for label in sorted(one["shares"])},
                float(one["deviation"]),
                dict(one["about"]),
            )
            for name, one in held["sites"].items()
        }


def sites_as_text(sites: Mapping[str, Site]) -> str:
    """What a gallery keeps: compact JSON, always the same for the same profiles; "" for none."""
    if not sites:
        return ""
    return compact({"layout": _LAYOUT, "sites": {name: asdict(site) for name, site in sites.items()}})
