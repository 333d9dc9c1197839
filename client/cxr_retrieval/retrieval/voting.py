"""The distance-weighted vote over retrieved neighbours (Zhong et al. 2020, section 2.4.3).

"K-nearest Neighbor classifier with distance weighting (i.e. closer neighbors of a query point have larger weight)". The
paper gives no formula; we use the usual inverse distance, w = 1 / (d + ε), with the cosine distance d = 1 − similarity and
ε = 1e-4. ε is the size of numerical noise between runtimes (fp32 against bf16), so that a distance below it counts as
"the same picture" instead of dividing by noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cxr_retrieval.cases.labels import of_several, shares_of_findings

DEFAULT_K: Final = 10
"""Neighbours that vote (section 2.4.3; stable from 5 to 20, section 3.3.3)."""
EPSILON: Final = 1e-4


@dataclass(frozen=True)
class Vote:
    """The outcome: the winning label, its share of the weight, and every label's share (they sum to 1)."""

    label: str
    confidence: float
    scores: Mapping[str, float]

    @property
    def findings(self) -> dict[str, float]:
        """Where a label holds several findings (`cases/labels.py`): of each the share of the weight of cases that have it; else none."""
        return shares_of_findings(self.scores) if of_several(self.scores) else {}


@dataclass(frozen=True)
class NoVote:
    """What a film that was refused gets in its place."""

    label: None = None
    confidence: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)
    findings: Mapping[str, float] = field(default_factory=dict)


def neighbour_weight(similarity: float) -> float:
    """W = 1 / (1 − similarity + ε); grows as the cosine distance shrinks. Similarity in [−1, 1]."""
    return 1.0 / (max(0.0, 1.0 - similarity) + EPSILON)


def weighted_vote(neighbours: Sequence[tuple[str, float]]) -> Vote:
    """Majority of weights over (label, cosine similarity) pairs.

    An exact tie goes to the label whose nearest neighbour is closer, then to the alphabetically first one, so that the
    order of equal neighbours does not matter.

    Raises:
        ValueError: No neighbours.
    """
    if not neighbours:
        raise ValueError("a vote needs at least one neighbour; got none")
    weights: dict[str, float] = {}
    nearest: dict[str, float] = {}
    for label, similarity in sorted(neighbours):
        weights[label] = weights.get(label, 0.0) + neighbour_weight(similarity)
        nearest[label] = max(nearest.get(label, -1.0), similarity)
    total = sum(weights.values())
    winner = min(weights, key=lambda label: (-weights[label], -nearest[label], label))
    scores = {label: weights[label] / total for label in sorted(weights, key=lambda label: (-weights[label], label))}
    return Vote(winner, scores[winner], scores)
