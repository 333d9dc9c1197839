"""Two model versions side by side, over the same gallery and the same queries: what changes for those who ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cxr_retrieval.errors import InputError
from cxr_retrieval.evaluation.metrics import RECALL_AT, LabelledSet, Ranking
from cxr_retrieval.retrieval.voting import weighted_vote


@dataclass(frozen=True)
class _Answer:
    """To one query: the k nearest cases, nearest first; their vote; whether the first of each of RECALL_AT have one of its label."""

    nearest: tuple[int, ...]
    label: str
    hits: tuple[bool, ...]


def compare(former: tuple[LabelledSet, LabelledSet], latter: tuple[LabelledSet, LabelledSet], *, k: int) -> dict[str, Any]:
    """Gallery and queries of the former version against the same images' of the latter; exact neighbours, own patients left out.

    Args:
        former: Gallery and queries.
        latter: The same images in the same order, embedded by the other version.
        k: Neighbours that vote.

    Returns:
        `former` and `latter`, each `recall_at` and `accuracy`; `votes`: how many labels change, and how many of those become right, or
        were; `kept`: the mean share of the former's k neighbours that are among the latter's, and the share of queries whose nearest
        case stays the same.

    Raises:
        InputError: No queries, or one that is left without any neighbour.
    """
    truth = former[1].labels
    if not truth:
        raise InputError(
            "nothing to compare",
            expected="queries of which both versions have embeddings",
            got="none",
            next_step="compare on other films, or give the former version's server",
        )
    old, new = _answers(*former, k), _answers(*latter, k)
    changed = [
        (before.label, after.label, label) for before, after, label in zip(old, new, truth, strict=True) if before.label != after.label
    ]
    return {
        "k": k,
        "gallery": len(former[0].labels),
        "queries": len(truth),
        "former": _quality(old, truth),
        "latter": _quality(new, truth),
        "votes": {
            "changed": len(changed),
            "become_right": sum(after == label for _, after, label in changed),
            "were_right": sum(before == label for before, _, label in changed),
        },
        "kept": {
            "neighbours": float(np.mean([len({*a.nearest} & {*b.nearest}) / len(a.nearest) for a, b in zip(old, new, strict=True)])),
            "nearest": float(np.mean([a.nearest[0] == b.nearest[0] for a, b in zip(old, new, strict=True)])),
        },
    }


def _answers(gallery: LabelledSet, queries: LabelledSet, k: int) -> list[_Answer]:
    ranking = Ranking(gallery, queries)
    answers: list[_Answer] = []
    for number in range(len(queries.labels)):
        order, similarity = ranking.of(number)
        if not len(order):
            raise InputError(f"{queries.image_ids[number]}: no gallery image of another patient", next_step="use a larger gallery")
        nearest: list[int] = order[:k].tolist()
        vote = weighted_vote([(gallery.labels[i], float(value)) for i, value in zip(nearest, similarity[:k], strict=True)])
        relevant = ranking.labels[0][order] == ranking.labels[1][number]
        answers.append(_Answer(tuple(nearest), vote.label, tuple(bool(relevant[:at].any()) for at in RECALL_AT)))
    return answers


def _quality(answers: Sequence[_Answer], truth: Sequence[str]) -> dict[str, Any]:
    hits = np.array([answer.hits for answer in answers], np.float64).mean(axis=0)
    return {
        "recall_at": {str(at): float(value) for at, value in zip(RECALL_AT, hits, strict=True)},
        "accuracy": float(np.mean([answer.label == label for answer, label in zip(answers, truth, strict=True)])),
    }
