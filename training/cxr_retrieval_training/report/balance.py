"""The dial between semantic and visual similarity turned from end to end, and how the default was chosen (docs/balance.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from cxr_retrieval.evaluation.intervals import mean_interval, patient_weights
from cxr_retrieval.evaluation.metrics import LabelledSet, Ranking, balanced_accuracy, balanced_interval
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, blended
from cxr_retrieval.progress import track
from cxr_retrieval.retrieval.voting import DEFAULT_K, weighted_vote
from cxr_retrieval_training.data.datasets import Images
from cxr_retrieval_training.embedding.normalisation import lung_box, sampling, standardised_lungs

BALANCES: Final = tuple(step / 20 for step in range(21))
AS_GOOD: Final = 0.005
"""Balanced accuracy within so much of the best along the dial counts as no worse."""
_SIDE: Final = 128
"""Of the squares that two films' lungs are brought to before their structure is compared."""
_GREYS: Final = 8.0
"""What standardised grey values lie within (`normalisation._CLIP` to both sides)."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Described:
    """Images (whatever vectors `known` has) with EMBEDDING `[n, e]`, APPEARANCE `[n, a]` and, where they are looked at, LUNGS."""

    known: LabelledSet
    embeddings: Vectors
    appearances: Vectors
    lungs: Images | None = None

    def at(self, balance: float) -> LabelledSet:
        """As they are compared at a balance."""
        return replace(self.known, embeddings=blended(self.embeddings, self.appearances, balance))

    def beside(self, other: Described) -> Described:
        """One set after the other, without lungs."""
        return Described(
            self.known.beside(other.known),
            np.concatenate([self.embeddings, other.embeddings]),
            np.concatenate([self.appearances, other.appearances]),
        )

    def __getitem__(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Described:
        """Some of them, by mask or by index, without lungs."""
        return Described(self.known[chosen], self.embeddings[chosen], self.appearances[chosen])


def along_the_dial(train: Described, val: Described, added: Described | None, balances: Sequence[float] = BALANCES) -> dict[str, Any]:
    """What each balance gives, val asked about in train.

    Args:
        added: Films of a label nobody was trained on; each is asked about in train and the others of them, its own patient's left out.

    Returns:
        `rows`, one a balance: `recall_at_1` and `balanced_accuracy` of the vote; `added_recall_at_1`; `own_source`, the share of first
        neighbours that come from the query's own source where others hold its label, too; `structure`, the mean structural similarity of
        the query's lungs with its first neighbour's; each with `_ci`, its 95 % interval over patients. `structure_at_random`: of lungs of
        a train film drawn at random. `chosen`: see `choose`.
    """
    held = set(zip(train.known.labels, train.known.sources, strict=True))
    choice = np.array(
        [
            (label, source) in held and any(one == label and other != source for one, other in held)
            for label, source in zip(val.known.labels, val.known.sources, strict=True)
        ]
    )
    patients, truth = np.array(val.known.patients), np.array(val.known.labels)
    gallery = None if added is None else train.beside(added)
    structure = _Structure(val, train)
    rows: list[dict[str, Any]] = []
    found: dict[float, NDArray[np.float64]] = {}
    for balance in track(balances, "balances"):
        ranking = Ranking(train.at(balance), val.at(balance))
        answers = [_answer(ranking, query) for query in range(len(truth))]
        first = np.array([answer[0] for answer in answers])
        right = np.array([float(answer[1] == label) for answer, label in zip(answers, truth, strict=True)])
        own = np.array([float(train.known.sources[i] == source) for i, source in zip(first, val.known.sources, strict=True)])
        row: dict[str, Any] = {"balance": balance}
        row |= _told(
            "recall_at_1", np.array([float(train.known.labels[i] == label) for i, label in zip(first, truth, strict=True)]), patients
        )
        row["balanced_accuracy"] = balanced_accuracy(right, truth)
        row["balanced_accuracy_ci"] = balanced_interval(right, truth, patients)[0]
        row |= _told("own_source", own[choice], patients[choice]) if choice.any() else {}
        row |= _told("structure", structure.of(first), patients)
        if added is not None and gallery is not None:
            ranking = Ranking(gallery.at(balance), added.at(balance))
            labels = gallery.known.labels
            hits = [float(labels[int(ranking.of(i)[0][0])] == label) for i, label in enumerate(added.known.labels)]
            found[balance] = np.array(hits)
            row |= _told("added_recall_at_1", found[balance], np.array(added.known.patients))
        rows.append(row)
    random = np.random.default_rng(0).integers(len(train.known.labels), size=len(truth))
    out: dict[str, Any] = {"rows": rows, "n": len(truth), **_told("structure_at_random", structure.of(random), patients)}
    if added is not None:
        out |= {"added": sorted(set(added.known.labels)), "chosen": choose(rows, found, np.array(added.known.patients))}
    return out


def choose(rows: Sequence[Mapping[str, Any]], hits: Mapping[float, NDArray[np.float64]], patients: NDArray[np.generic]) -> dict[str, Any]:
    """The balance with the greatest recall of the added label among those as good as the best on the labels that are known (`AS_GOOD`);
    of equals the one nearest to what was learnt. It takes the default's place only if its gain over it, film by film, is clear.

    Args:
        hits: Balance → whether each added film's first neighbour has its label, 0 or 1.

    Returns:
        `balance`, `gain` over the default with `gain_ci` (0 and null where the default was not among the balances), and `clear`: whether
        that interval lies above 0.
    """
    best = max(row["balanced_accuracy"] for row in rows)
    among = [row for row in rows if row["balanced_accuracy"] >= best - AS_GOOD]
    found = max(among, key=lambda row: (row["added_recall_at_1"], -row["balance"]))["balance"]
    if DEFAULT_BALANCE not in hits:
        return {"balance": found, "gain": 0.0, "gain_ci": None, "clear": False}
    gain = hits[found] - hits[DEFAULT_BALANCE]
    weights = patient_weights(patients)
    low, high = np.percentile(weights @ gain / weights.sum(axis=1), [2.5, 97.5])
    return {"balance": found, "gain": float(gain.mean()), "gain_ci": [float(low), float(high)], "clear": bool(low > 0)}


def _answer(ranking: Ranking, query: int) -> tuple[int, str]:
    """The first neighbour, and what ten vote for."""
    order, similarity = ranking.of(query)
    labels = ranking.gallery.labels
    nearest: list[int] = order[:DEFAULT_K].tolist()
    vote = weighted_vote([(labels[i], float(value)) for i, value in zip(nearest, similarity, strict=False)])
    return nearest[0], vote.label


def _told(name: str, values: NDArray[np.float64], patients: NDArray[np.generic]) -> dict[str, Any]:
    return {name: float(values.mean()), f"{name}_ci": mean_interval(values, patients)}


class _Structure:
    """Structural similarity (Wang et al. 2004, as in their section III.C: a Gaussian window of deviation 1.5) of the lungs of queries with
    those of gallery films, both brought to the box around them and standardised; mean over what is lung in both.
    """

    def __init__(self, queries: Described, gallery: Described) -> None:
        self._queries, self._gallery = queries, gallery
        self._cut: dict[tuple[bool, int], tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
        self._known: dict[tuple[int, int], float] = {}

    def of(self, nearest: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of each query with the gallery film of this number."""
        return np.array([self._pair(query, int(film)) for query, film in enumerate(nearest)])

    def _pair(self, query: int, film: int) -> float:
        if (query, film) not in self._known:
            (a, inside_a), (b, inside_b) = self._lungs(True, query), self._lungs(False, film)
            both = inside_a & inside_b
            found: Any = structural_similarity(
                a, b, data_range=_GREYS, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
            )
            self._known[query, film] = float(found[1][both].mean()) if both.any() else 0.0
        return self._known[query, film]

    def _lungs(self, of_query: bool, number: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        if (of_query, number) not in self._cut:
            lungs = (self._queries if of_query else self._gallery).lungs
            assert lungs is not None, "films whose structure is compared have lungs"
            self._cut[of_query, number] = _in_box(np.asarray(lungs[number]))
        return self._cut[of_query, number]


@torch.inference_mode()
def _in_box(lungs: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Standardised greys and what counts as lung, of LUNGS `[2, height, width]`."""
    values = torch.from_numpy(lungs[None].copy()).float()
    box = lung_box(values[:, 1:])
    greys = standardised_lungs(values, box, _SIDE)[0, 0]
    rows, columns = sampling(box[:, 0], box[:, 1], values.shape[2], _SIDE), sampling(box[:, 2], box[:, 3], values.shape[3], _SIDE)
    share = (rows @ values[:, 1] @ columns.transpose(1, 2))[0] / 255.0
    return greys.numpy(), (share >= 0.5).numpy()
