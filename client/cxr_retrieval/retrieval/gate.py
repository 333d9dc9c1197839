"""Is this an upright frontal chest radiograph at all? Judged from the picture, the lungs that were found in it, and the gallery.

Networks answer whatever they are shown, and the nearest cases of a letter are cases, too. So three questions are asked:

- Which of five kinds does it look like: a film as it should be, one on its side, one upside down, one inverted, or none (softmax over
  `described`)?
- Is it unlike all films, in whatever way? (The Mahalanobis distance under probabilistic principal components, Tipping & Bishop 1999.)
- Is the nearest case of a large gallery farther away than films are from strangers?

Coefficients lie beside this module in `gate.npz`, with what they were made of; `cxr train gate` makes them again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.radiograph.letterbox import Letterbox

COEFFICIENTS: Final = Path(__file__).with_name("gate.npz")

KINDS: Final = ("film", "sideways", "upside down", "inverted", "none")
"""Order of the softmax's outputs."""
_LOOKS: Final = {
    "sideways": "it seems to lie on its side",
    "upside down": "it seems to be upside down",
    "inverted": "it seems to be inverted, bone dark and air bright",
}
_NONE: Final = "it does not look like one whole frontal chest film"
_HARDLY_ANY: Final = 0.05
"""Of the picture's area: less lung than this is named as the reason."""

_FINE, _GRID, _CELLS, _DIRECTIONS = 64, 8, 6, 8
_EVEN: Final = 4.0
"""Grey values of deviation that are added to a picture's own, so that grain on an even picture is not taken for a drawing."""

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Ood:
    """How far out of distribution a picture is.

    Attributes:
        score: In [0, 1]; above 0.5 the gate refuses.
        refused: The gate refused, and was not overridden.
        reason: In plain words why it refuses; None if it does not. Given beside `refused` False, it was overridden.
    """

    score: float
    refused: bool
    reason: str | None

    def as_json(self) -> dict[str, Any]:
        """The published form."""
        return {"score": round(self.score, 4), "refused": self.refused, "reason": self.reason}


@dataclass(frozen=True)
class Gate:
    """The coefficients; sizes: d of `described`, k of `KINDS`, q principal components.

    Attributes:
        offset: `[k]`. weights: `[k, d]`, of the softmax.
        mean: `[d]`, of films. axes: `[q, d]`, principal components of films, each divided by its deviation.
        rest: Variance of what the axes leave, of one number.
        spread: `[d]`, deviations of films, by which both parts scale.
        least_probability: Of the kind "film".
        greatest_distance: Mean square, in deviations.
        least_similarity: Of the nearest case, in a gallery of `similarity_from` cases or more, of the weights `about["model_version"]`.
        about: What the coefficients were made of.
    """

    offset: Vector
    weights: Vector
    mean: Vector
    spread: Vector
    axes: Vector
    rest: float
    least_probability: float
    greatest_distance: float
    least_similarity: float
    similarity_from: int
    about: dict[str, Any]

    def probabilities(self, features: Vector) -> Vector:
        """`[…, d]` → `[…, k]`, of each kind."""
        logits = (features - self.mean) / self.spread @ self.weights.T + self.offset
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    def distance(self, features: Vector) -> Vector:
        """`[…, d]` → `[…]`: mean square of deviations from films, about 1 for a film."""
        centred = (features - self.mean) / self.spread
        along = centred @ self.axes.T
        lengths = 1 / (self.axes**2).sum(1)  # an axis over its deviation: the variance along it
        left = (centred**2).sum(-1) - (along**2 * lengths).sum(-1)
        return ((along**2).sum(-1) + left / self.rest) / len(self.mean)

    def save(self, path: Path) -> None:
        """Writes what `load` reads; the same coefficients give the same bytes."""
        numbers = (self.rest, self.least_probability, self.greatest_distance, self.least_similarity, self.similarity_from)
        np.savez_compressed(
            path,
            offset=self.offset,
            weights=self.weights.astype(np.float16),
            mean=self.mean,
            spread=self.spread,
            axes=self.axes.astype(np.float16),
            numbers=np.array(numbers, np.float64),
            about=np.array(json.dumps(self.about, sort_keys=True)),
        )

    @staticmethod
    def load(path: Path) -> Gate:
        """From a file of `save`."""
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: np.asarray(held[name], np.float32) for name in ("offset", "weights", "mean", "spread", "axes")}
            rest, probability, distance, similarity, count = map(float, held["numbers"])
            about: dict[str, Any] = json.loads(str(held["about"]))
        return Gate(**arrays, rest=rest, least_probability=probability, greatest_distance=distance, least_similarity=similarity,
                    similarity_from=int(count), about=about)  # fmt: skip


@cache
def shipped() -> Gate:
    """The gate of the weights that ship."""
    return Gate.load(COEFFICIENTS)


def judge(
    square: NDArray[np.uint8],
    box: Letterbox,
    mask: NDArray[np.uint8],
    agreement: float,
    *,
    far: float | None = None,
    enforced: bool = True,
    gate: Gate | None = None,
) -> Ood:
    """The verdict on one picture; under half a millisecond.

    Args:
        square: `[256, 256]` uint8, the film in its letterbox. mask: LUNG_MASK of it.
        agreement: LUNG_AGREEMENT.
        far: What `too_far` returned, where a gallery was searched.
        enforced: False reports and does not refuse.
    """
    gate = gate or shipped()
    features = described(square, box, mask, agreement)
    probabilities, distance = gate.probabilities(features), float(gate.distance(features))
    scores = [_odds_score(float(probabilities[0]), gate.least_probability), distance**2 / (distance**2 + gate.greatest_distance**2)]
    if far is not None:
        scores.append((1 - far) / (2 - far - gate.least_similarity))
    score = max(scores)
    if score <= 0.5:
        return Ood(score, refused=False, reason=None)
    share = float(box.crop(mask).astype(np.bool_).mean())
    kind = KINDS[int(probabilities.argmax())]
    if far is not None and max(scores[:2]) <= 0.5:
        reason = f"no case in the gallery is like it: the nearest has similarity {far:.2f} (usually above {gate.least_similarity:.2f})"
    elif kind in _LOOKS:
        reason = _LOOKS[kind]
    else:
        reason = f"hardly any lung was found: it covers {share:.0%} of the picture" if share < _HARDLY_ANY else _NONE
    return Ood(score, refused=enforced, reason=reason)


def too_far(nearest: float, count: Callable[[], int], model_version: str, gate: Gate | None = None) -> float | None:
    """The similarity of the nearest case of the whole gallery where it is suspiciously low, else None.

    In a small gallery the nearest is far from everything, and other weights have similarities of their own: both say nothing.

    Args:
        count: How many cases the gallery holds; called only if it matters.
    """
    gate = gate or shipped()
    suspicious = nearest < gate.least_similarity and model_version == gate.about["model_version"]
    return nearest if suspicious and count() >= gate.similarity_from else None


def described(square: NDArray[np.uint8], box: Letterbox, mask: NDArray[np.uint8], agreement: float) -> Vector:
    """What is looked at, `[422]`, of the picture inside its letterbox stretched to a square, so that shape counts once.

    8×8 means of its standardised grey and of its lungs; in 6×6 cells, how strong edges of each of eight directions are (after Dalal &
    Triggs 2005, directions over the whole circle, since a rib is bright and air is dark); how much lung lies left and right, how far the
    networks agree, how bright lungs are against the rest, the picture's shape and its contrast.
    """
    grey, lungs = _means(square, box), _means((mask > 0).view(np.uint8), box)
    deviation = float(grey.std())
    grey = (grey - grey.mean()) / (deviation + _EVEN)
    down, right = np.zeros_like(grey), np.zeros_like(grey)
    down[1:-1] = grey[2:] - grey[:-2]
    right[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    direction = ((np.arctan2(down, right) / (2 * np.pi) + 0.5) * _DIRECTIONS).astype(np.intp) % _DIRECTIONS
    cell = np.arange(_FINE) * _CELLS // _FINE
    place = (cell[:, None] * _CELLS + cell) * _DIRECTIONS + direction
    edges = np.bincount(place.ravel(), np.hypot(down, right).ravel(), _CELLS**2 * _DIRECTIONS) * (_CELLS / _FINE) ** 2
    within = float((grey * lungs).sum() / (lungs.sum() + 1))
    facts = (
        lungs[:, : _FINE // 2].mean(),
        lungs[:, _FINE // 2 :].mean(),
        agreement,
        within,
        np.log(box.width / box.height),
        np.log(deviation + 1),
    )
    return np.concatenate([_coarse(grey), _coarse(lungs), np.sqrt(edges), facts]).astype(np.float32)


def _means(square: NDArray[np.uint8], box: Letterbox) -> Vector:
    """`[64, 64]` means of what lies in the box."""
    rows, columns = np.arange(_FINE) * box.height // _FINE, np.arange(_FINE) * box.width // _FINE
    inside = np.asarray(box.crop(square), np.float32)
    sums = np.add.reduceat(np.add.reduceat(inside, rows, axis=0), columns, axis=1)
    heights, widths = np.diff(rows, append=box.height), np.diff(columns, append=box.width)
    return sums / np.maximum(np.outer(heights, widths), 1).astype(np.float32)  # a box of fewer pixels repeats some


def _coarse(fine: Vector) -> Vector:
    step = _FINE // _GRID
    return fine.reshape(_GRID, step, _GRID, step).mean((1, 3)).ravel()


def _odds_score(probability: float, least: float) -> float:
    """0.5 where the probability is the least that passes, towards 1 as it falls to 0."""
    against, towards = (1 - probability) * least, probability * (1 - least)
    return against / (against + towards)
