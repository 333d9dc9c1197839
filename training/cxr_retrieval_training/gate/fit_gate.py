"""`cxr train gate`: the coefficients of `cxr_retrieval.retrieval.gate`, from films of a manifest and the networks as they are served.

What each kind looks like is learnt on the split train, and where to draw the line is read off val; nothing else is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from cxr_retrieval.cases.manifest import Manifest, ManifestRow
from cxr_retrieval.contract import LUNG_AGREEMENT, LUNG_MASK
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, PARTS, comparable, side_by_side
from cxr_retrieval.inference.triton import BATCH_SIZE, TritonClient
from cxr_retrieval.radiograph.letterbox import Letterbox, letterbox
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom
from cxr_retrieval.radiograph.reading import MAX_ASPECT
from cxr_retrieval.retrieval.gate import KINDS, Gate, Vector, described
from cxr_retrieval_training.data.datasets import pixels_of
from cxr_retrieval_training.gate.outliers import (
    DRAWN,
    SPOILT,
    Picture,
    Spoil,
    inverted,
    still_a_film,
    turned_left,
    turned_right,
    upside_down,
)

_SEED: Final = 7
_PHANTOM_SEED: Final = 5000
_KIND_OF: Final[dict[Spoil, str]] = {turned_left: "sideways", turned_right: "sideways", upside_down: "upside down", inverted: "inverted"}
_TURNED: Final = tuple(_KIND_OF)
_COMPONENTS: Final = 24
_STRENGTH: Final = 0.003
"""Inverse of the softmax's L2 penalty."""
_REFUSED_ON_VAL: Final = 0.005
"""Share of val whose probability of being a film may lie under the line."""
_FAR_ON_VAL: Final = 0.001
"""The same for the similarity of the nearest case. The line of distances is val's greatest, for other hospitals' films lie farther out."""
_LEAST_SPREAD: Final = 0.01


@dataclass(frozen=True)
class Lessons:
    """How much is learnt from.

    Attributes:
        per_source: Films of train, whole patients: more of one source would teach what that source looks like.
        phantoms: Synthetic films.
        no_films: Pictures that never were films.
    """

    per_source: int = 420
    phantoms: int = 120
    no_films: int = 600


@dataclass(frozen=True)
class _Example:
    kind: str
    pixels: Picture


@dataclass(frozen=True)
class _Described:
    """`[n, d]` features, mirrored ones, n kinds, `[n, 120]` by which they are compared at the default balance."""

    features: Vector
    mirrored: Vector
    kinds: list[str]
    embeddings: Vector


def fit_gate(
    manifest: Manifest,
    triton: TritonClient,
    out: Path,
    lessons: Lessons = Lessons(),
    advance: Callable[[str, int], None] = lambda *_: None,
) -> str:
    """Fits and writes the gate; returns what it refuses of val, in words.

    Args:
        advance: Told of the part and how many of its pictures the networks have seen.
    """
    films = _some(manifest.require(split="train"), lessons.per_source)
    val = manifest.require(split="val")
    seen = {
        name: _describe(examples, triton, lambda count, name=name: advance(name, count))
        for name, examples in (("train", _lessons(films, lessons)), ("val", (_Example("film", pixels_of(row)) for row in val)))
    }
    train, held = seen["train"], seen["val"]
    features, kinds = np.concatenate([train.features, train.mirrored]), train.kinds * 2
    about: dict[str, Any] = {
        "made_by": "cxr train gate",
        "manifest_sha256": manifest.sha256,
        "model_version": triton.model_version,
        "train_films": len(films),
        "train_pictures": len(train.kinds),
        "val_films": len(val),
    }
    fitted = _fit(features, kinds, about)
    probabilities, distances = fitted.probabilities(held.features)[:, 0], fitted.distance(held.features)
    nearest = (held.embeddings @ train.embeddings[: len(films)].T).max(1)
    gate = replace(
        fitted,
        least_probability=float(np.quantile(probabilities, _REFUSED_ON_VAL)),
        greatest_distance=float(distances.max()),
        least_similarity=float(np.quantile(nearest, _FAR_ON_VAL)),
        similarity_from=len(films),
    )
    gate.save(out)
    refused = (probabilities < gate.least_probability) | (distances > gate.greatest_distance)
    return (
        f"{out}: {out.stat().st_size} bytes; of {len(val)} films of val {int(refused.sum())} refused "
        f"(probability under {gate.least_probability:.3f}, distance above {gate.greatest_distance:.2f}); "
        f"nearest case suspicious under {gate.least_similarity:.3f} from {gate.similarity_from} cases on"
    )


def _fit(features: Vector, kinds: Sequence[str], about: dict[str, Any]) -> Gate:
    films = features[[kind == "film" for kind in kinds]]
    mean, spread = films.mean(0), films.std(0) + _LEAST_SPREAD
    softmax = LogisticRegression(C=_STRENGTH, max_iter=500).fit((features - mean) / spread, [KINDS.index(kind) for kind in kinds])
    components = PCA(_COMPONENTS, svd_solver="full").fit((films - mean) / spread)
    return Gate(
        offset=np.asarray(softmax.intercept_, np.float32),
        weights=np.asarray(softmax.coef_, np.float16).astype(np.float32),  # as they are stored
        mean=mean,
        spread=spread,
        axes=(components.components_ / np.sqrt(components.explained_variance_)[:, None]).astype(np.float16).astype(np.float32),
        rest=float(components.noise_variance_),
        least_probability=0.5,
        greatest_distance=1.0,
        least_similarity=-1.0,
        similarity_from=0,
        about=about,
    )


def _some(rows: Sequence[ManifestRow], per_source: int) -> list[ManifestRow]:
    """Of each source whole patients, until there are `per_source` films."""
    random = np.random.default_rng(_SEED)
    chosen: list[ManifestRow] = []
    for source in sorted({row.source or "" for row in rows}):
        of_source = [row for row in rows if (row.source or "") == source]
        patients = sorted({row.patient for row in of_source})
        taken = 0
        for place in random.permutation(len(patients)):
            films = [row for row in of_source if row.patient == patients[place]]
            if taken + len(films) <= per_source:
                chosen += films
                taken += len(films)
    return chosen


def _lessons(films: Sequence[ManifestRow], lessons: Lessons) -> Iterator[_Example]:
    """First every film as it is; then each spoilt in two ways, every other one varied; phantoms, whole and spoilt; what never was one."""
    random = np.random.default_rng(_SEED)
    yield from (_Example("film", pixels_of(row)) for row in films)
    for number, row in enumerate(films):
        pixels = pixels_of(row)
        turn, spoil = _TURNED[number // len(SPOILT) % len(_TURNED)], SPOILT[number % len(SPOILT)]
        yield _Example(_KIND_OF[turn], turn(pixels, random))
        yield _Example(_KIND_OF.get(spoil, "none"), spoil(pixels, random))
        if number % 2:
            yield _Example("film", still_a_film(pixels, random))
    for number in range(lessons.phantoms):
        pixels = make_phantom(_PHANTOM_SEED + number, PHANTOM_LABELS[number % len(PHANTOM_LABELS)]).pixels
        spoil = SPOILT[number % len(SPOILT)]
        yield _Example("film", pixels)
        yield _Example(_KIND_OF.get(spoil, "none"), spoil(pixels, random))
    for number in range(lessons.no_films):
        yield _Example("none", DRAWN[number % len(DRAWN)](random))


def _describe(examples: Iterator[_Example], triton: TritonClient, advance: Callable[[int], None]) -> _Described:
    features: list[Vector] = []
    mirrored: list[Vector] = []
    embeddings: list[Vector] = []
    kinds: list[str] = []
    usable = (one for one in examples if max(one.pixels.shape) <= MAX_ASPECT * min(one.pixels.shape))
    with ThreadPoolExecutor(1) as pool:
        chunk = list(islice(usable, BATCH_SIZE))
        while chunk:
            framed = [letterbox(np.ascontiguousarray(one.pixels)) for one in chunk]
            asked = pool.submit(triton.infer, np.stack([square for square, _ in framed])[:, None], (*PARTS, LUNG_MASK, LUNG_AGREEMENT))
            kinds += [one.kind for one in chunk]
            chunk = list(islice(usable, BATCH_SIZE))  # drawn while the networks look at the last
            outputs = asked.result()
            embeddings.append(comparable(side_by_side(outputs), DEFAULT_BALANCE))
            for (square, box), mask, agreement in zip(framed, outputs[LUNG_MASK.name], outputs[LUNG_AGREEMENT.name], strict=True):
                lungs = np.asarray(mask[0], np.uint8)
                features.append(described(square, box, lungs, float(agreement[0])))
                flipped = Letterbox(box.scale, square.shape[1] - box.left - box.width, box.top, box.width, box.height)
                mirrored.append(described(square[:, ::-1], flipped, lungs[:, ::-1], float(agreement[0])))
            advance(len(framed))
    return _Described(np.stack(features), np.stack(mirrored), kinds, np.concatenate(embeddings))
