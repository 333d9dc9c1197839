"""Percentile bootstrap intervals (95 %, 1000 resamples with a fixed seed) over patients, not images; none of too few. Wilson's, of shares
that may be 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

RESAMPLES: Final = 1000
MIN_PATIENTS: Final = 10
"""Of fewer independent patients no interval is given: it would say how few there are and nothing else."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def mean_interval(values: Floats, patients: NDArray[np.generic]) -> list[float] | None:
    """The interval of the mean over images; None of fewer than `MIN_PATIENTS` patients."""
    return weighted_interval(values, weights_of(patients))


def weights_of(patients: NDArray[np.generic]) -> Floats | None:
    """`patient_weights`; None of fewer than `MIN_PATIENTS` patients."""
    return patient_weights(patients) if len(np.unique(patients)) >= MIN_PATIENTS else None


def weighted_interval(values: Floats, weights: Floats | None) -> list[float] | None:
    """The interval of the mean, from `weights_of`."""
    return None if weights is None else interval(weights @ values / weights.sum(axis=1))


def patient_weights(patients: NDArray[np.generic]) -> Floats:
    """How often each image is drawn in each bootstrap resample of whole patients, `[resamples, n]`; the seed is fixed."""
    unique, position = np.unique(patients, return_inverse=True)
    return draw(np.random.default_rng(0), len(unique), RESAMPLES)[:, position].astype(np.float64)


def draw(random: np.random.Generator, patients: int, resamples: int) -> Integers:
    """How often each patient is drawn, `[resamples, patients]`."""
    return random.multinomial(patients, np.full(patients, 1 / patients), size=resamples)


def in_brackets(ends: Sequence[float] | None) -> str:
    """An interval as it stands behind its figure, after a space."""
    return " [–]" if ends is None else f" [{ends[0]:.3f}, {ends[1]:.3f}]"


def interval(values: Floats) -> list[float]:
    """The 95 % percentile interval of a metric's resampled values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def wilson(share: float, n: int) -> list[float]:
    """Wilson's 95 % interval of a share in [0, 1] that `n` independent trials gave; of means of values in [0, 1] it is too wide at most,
    and unlike a bootstrap it does not shrink to a point where all are 1.
    """
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [0.0 if share == 0 else centre - half, 1.0 if share == 1 else centre + half]
