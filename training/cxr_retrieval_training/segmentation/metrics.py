"""Measures of training's own: overlap of lung masks, attention against lesions, what an embedding knows of the source."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import ConstantInputWarning, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from cxr_retrieval.evaluation.intervals import interval, weights_of

Mask = NDArray[np.bool_]


def dice_coefficient(found: Mask, truth: Mask) -> float:
    """2·|A∩B| / (|A| + |B|); 1 where both are empty."""
    total = int(found.sum()) + int(truth.sum())
    return 2.0 * int((found & truth).sum()) / total if total else 1.0


def hausdorff_95(found: Mask, truth: Mask) -> float:
    """The larger of the two 95th percentiles of distances from one outline to the other, in pixels.

    Where one of the masks is empty: the picture's diagonal, the worst that could be.
    """
    if not found.any() or not truth.any():
        return 0.0 if found.any() == truth.any() else float(np.hypot(truth.shape[0], truth.shape[1]))
    outlines = [mask & ~cast("Mask", ndimage.binary_erosion(mask)) for mask in (found, truth)]
    distances = [cast("NDArray[np.float64]", ndimage.distance_transform_edt(~outline)) for outline in outlines]
    return max(float(np.percentile(distances[1 - i][outlines[i]], 95)) for i in range(2))


def pointing_hit(attention: NDArray[np.floating[Any]], lesions: Mask) -> float:
    """Pointing game (Zhang et al. 2016): 1 if the map's maximum lies on a lesion, the mean over ties."""
    return float(lesions[attention == attention.max()].mean())


def pixel_auroc(attention: NDArray[np.floating[Any]], lesions: Mask, inside: Mask) -> float | None:
    """How well attention tells lesion from other lung, pixel by pixel; None where the lungs hold only one of them."""
    truth = lesions[inside]
    return float(roc_auc_score(truth, attention[inside])) if truth.any() and not truth.all() else None


def extent_correlation(attention: NDArray[np.floating[Any]], lesions: Mask, inside: Mask, patients: NDArray[np.generic]) -> dict[str, Any]:
    """Whether attention covers more where disease does (Zhong et al. 2020, Fig. 3): over films, Spearman's correlation of the lesions'
    share of the lungs with the mean attention inside them; −1 to 1, NaN where either is the same in all.

    Args:
        attention: `[n, h, w]`, as are `lesions` and `inside`, the lungs.
        patients: Of each film, for the interval over patients.
    """
    area = inside.sum(axis=(1, 2))
    extent, attended = (lesions & inside).sum(axis=(1, 2)) / area, (attention * inside).sum(axis=(1, 2)) / area

    def correlation(which: NDArray[np.int64]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConstantInputWarning)
            found: Any = spearmanr(extent[which], attended[which])  # untyped
        return float(found.statistic)

    weights, films = weights_of(patients), np.arange(len(area))
    drawn = [] if weights is None else [correlation(np.repeat(films, weight)) for weight in weights.astype(np.int64)]
    return {"correlation": correlation(films), "ci": interval(np.array(drawn)) if drawn else None}


def centre_prior(inside: Mask) -> NDArray[np.float64]:
    """What no learning gives: closeness to the middle of the lungs' box, inside the lungs."""
    rows, columns = np.nonzero(inside)
    if not len(rows):
        return np.zeros(inside.shape)
    middle = [(int(axis.min()) + int(axis.max())) / 2 for axis in (rows, columns)]
    extent = [max(1, int(axis.max()) - int(axis.min())) for axis in (rows, columns)]
    y, x = np.indices(inside.shape)
    return np.exp(-2.0 * (((y - middle[0]) / extent[0]) ** 2 + ((x - middle[1]) / extent[1]) ** 2)) * inside


def source_probe(
    train: tuple[NDArray[np.float32], Sequence[str], Sequence[str]],
    test: tuple[NDArray[np.float32], Sequence[str], Sequence[str]],
    least: int = 20,
) -> dict[str, Any]:
    """How well a logistic regression tells the source from the vectors: balanced accuracy per label.

    Only within a label, among its sources with at least `least` images in train and in test: across labels, knowing the
    label would be knowing the source. Vectors, labels and sources of train and test.

    Returns:
        label → {sources, balanced_accuracy, chance}.
    """
    out: dict[str, Any] = {}
    for label in sorted(set(train[1])):
        parts = []
        for vectors, labels, sources in (train, test):
            mine = np.array([one == label for one in labels])
            parts.append((vectors[mine], np.array(sources)[mine]))
        usable = [str(source) for source in sorted(set(parts[0][1])) if all(int((part[1] == source).sum()) >= least for part in parts)]
        if len(usable) < 2:
            continue
        (x, y), (x_test, y_test) = ((vectors[np.isin(sources, usable)], sources[np.isin(sources, usable)]) for vectors, sources in parts)
        scaler = StandardScaler().fit(x)
        probe = LogisticRegression(max_iter=2000, class_weight="balanced").fit(scaler.transform(x), y)
        score = balanced_accuracy_score(y_test, probe.predict(scaler.transform(x_test)))
        out[label] = {"sources": usable, "balanced_accuracy": float(score), "chance": 1 / len(usable)}
    return out
