"""Phantoms to whom intensive care comes by a known law of how much of their lungs is ill and what is known of them.

    PYTHONPATH=tests python tests/outcome_law.py FOLDER --films 1200     writes them and a manifest, and says how well the law itself tells

Log odds = −0.4 + 1.5 (share of the lungs − its mean) / its deviation + 1.0 (age − 54) / 18 − 1.0 (spo2 − 91) / 3. Temperature has no part in
it, and is not known of a third.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_retrieval.radiograph.phantoms import make_phantom

Floats = NDArray[np.float64]
PATCHES: Final = (1, 11)
"""In each lung: from hardly ill to hardly any air left. Every fourth phantom is a healthy one."""


class Drawn(NamedTuple):
    """One phantom's picture, the share of its lungs that is ill, and its facts."""

    name: str
    extent: float
    age: int
    spo2: int
    cells: dict[str, str]


def draw(folder: Path, seed: int) -> Drawn:
    """One phantom, written."""
    phantom = make_phantom(seed, "covid19" if seed % 4 else "control", PATCHES)
    random = np.random.default_rng([seed, 11])
    age, spo2 = int(random.integers(22, 86)), int(np.clip(random.normal(91, 3), 75, 99))
    Image.fromarray(phantom.pixels).save(folder / f"{phantom.image_id}.png", compress_level=1)
    cells = {
        "image_id": phantom.image_id,
        "path": f"{phantom.image_id}.png",
        "label": phantom.label,
        "patient_id": f"synthetic-{seed}",
        "source": f"phantom-{phantom.site}",
        "split": "train",
        "age": str(age),
        "sex": phantom.facts["sex"],
        "temperature": f"{random.normal(37.8, 0.7):.1f}" if random.random() < 2 / 3 else "",
        "spo2": str(spo2),
    }
    return Drawn(phantom.image_id, float((phantom.lesion_mask > 0).sum() / (phantom.lung_mask > 0).sum()), age, spo2, cells)


def log_odds(extents: Sequence[float], ages: Sequence[float], saturations: Sequence[float]) -> Floats:
    """The law."""
    extent = np.asarray(extents, float)
    ill = 1.5 * (extent - extent.mean()) / extent.std()
    return -0.4 + ill + (np.asarray(ages, float) - 54) / 18 - (np.asarray(saturations, float) - 91) / 3


def write(folder: Path, films: int, seed: int = 30_000) -> tuple[Path, Floats]:
    """Writes the phantoms; returns the manifest and the log odds of each."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2) as pool:
        drawn = list(pool.map(draw, [folder] * films, range(seed, seed + films), chunksize=8))
    odds = log_odds([one.extent for one in drawn], [one.age for one in drawn], [one.spo2 for one in drawn])
    came = np.random.default_rng(seed).random(films) < 1 / (1 + np.exp(-odds))
    path = folder / "manifest.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*drawn[0].cells, "went_icu"])
        writer.writeheader()
        writer.writerows({**one.cells, "went_icu": "Y" if yes else "N"} for one, yes in zip(drawn, came, strict=True))
    return path, odds


if __name__ == "__main__":
    from sklearn.metrics import roc_auc_score

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--films", type=int, default=1200)
    given = parser.parse_args()
    manifest, odds = write(given.folder, given.films)
    with manifest.open() as file:
        came = [row["went_icu"] == "Y" for row in csv.DictReader(file)]
    print(f"{manifest}: {sum(came)} of {len(came)} came to it; area of the law itself {roc_auc_score(came, odds):.3f}")
