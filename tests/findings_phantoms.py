"""Phantoms with several independent findings, exactly known, and reports on them by a grammar.

    PYTHONPATH=tests python tests/findings_phantoms.py FOLDER --films 2000     writes films and manifest.csv, the last fifth as split val

Each of six findings is there with a probability of 0.3, whatever the others are. Columns beside those of any manifest: `main`, one of the
findings by chance, as a database has it that knows one label of a film; `clinical_notes`, a report that tells all of them and denies some
of the others; `partial_notes`, one that leaves out each finding with a probability of 0.3.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from cxr_retrieval.radiograph.phantoms import PHANTOM_FINDINGS, Shown, make_findings

PREVALENCE: Final = 0.3
LEFT_OUT: Final = 0.3
"""Of the findings in `partial_notes`."""
_DENIED: Final = 0.5
"""Of those that are not there."""
_SIZES: Final = {
    "small": ("small", "minor", "tiny", "subtle"),
    "moderate": ("moderate", "medium-sized", "moderately large"),
    "large": ("large", "extensive", "marked", "big"),
}
_SAID: Final = {
    "cardiomegaly": ("{Size} cardiomegaly.", "The heart is enlarged.", "Enlarged cardiac silhouette.", "Cardiac size is increased."),
    "consolidation": (
        "{Size} consolidation in the {side} {zone} zone.",
        "There is {size} airspace consolidation of the {side} {zone} lung.",
        "Dense {side} {zone} zone opacity, consistent with pneumonia.",
        "{Side} {zone} lobe consolidation.",
    ),
    "effusion": (
        "{Size} {side} pleural effusion.",
        "There is a {size} effusion on the {side}.",
        "Blunting of the {side} costophrenic angle by a {size} amount of fluid.",
        "Fluid in the {side} pleural space.",
    ),
    "ground_glass": (
        "{Size} bilateral ground glass opacities.",
        "Patchy ground-glass opacity in both lungs, mostly in the {zone} zones.",
        "Hazy bilateral opacities, {size}.",
        "Bilateral ground glass.",
    ),
    "nodule": (
        "A {size} nodule in the {side} {zone} zone.",
        "There is a {size} round nodular opacity of the {side} {zone} lung.",
        "{Side} lung nodule.",
        "Solitary pulmonary nodule projecting over the {side} {zone} zone.",
    ),
    "pneumothorax": (
        "{Size} {side} pneumothorax.",
        "There is a {size} pneumothorax on the {side}.",
        "A visceral pleural line is seen on the {side}, in keeping with {size} pneumothorax.",
    ),
}
_NAMED: Final = {
    "cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "consolidation": ("consolidation", "focal consolidation", "airspace consolidation"),
    "effusion": ("pleural effusion", "effusion"),
    "ground_glass": ("ground glass opacity", "ground-glass opacities"),
    "nodule": ("nodule", "pulmonary nodule"),
    "pneumothorax": ("pneumothorax",),
}
_DENIALS: Final = {
    "cardiomegaly": ("The heart is of normal size.", "Heart size is within normal limits."),
    "effusion": ("The costophrenic angles are sharp.",),
}
_FURTHER: Final = ("Frontal view of the chest.", "PA radiograph.", "The bones are unremarkable.", "No prior film for comparison.", "")


def report(shown: Sequence[Shown], random: np.random.Generator, left_out: float = 0.0) -> str:
    """What a radiologist might write of it: each finding but those left out, some of the others denied, in any order."""
    sentences = [_told(one, random) for one in shown if random.random() >= left_out]
    absent = [name for name in PHANTOM_FINDINGS if name not in {one.finding for one in shown} and random.random() < _DENIED]
    random.shuffle(absent)
    while absent:
        some, absent = absent[: (count := int(random.integers(1, 4)))], absent[count:]
        sentences.append(_denied(some, random))
    random.shuffle(sentences)
    return " ".join(filter(None, [_one(_FURTHER, random), *sentences])) or "Frontal view of the chest."


def _told(one: Shown, random: np.random.Generator) -> str:
    size = _one(_SIZES[one.extent], random)
    words = {"size": size, "side": one.side, "zone": {"middle": "mid"}.get(one.zone, one.zone)}
    return _one(_SAID[one.finding], random).format(**words, Size=size.capitalize(), Side=one.side.capitalize())


def _denied(names: Sequence[str], random: np.random.Generator) -> str:
    if len(names) == 1 and names[0] in _DENIALS and random.random() < 0.5:
        return _one(_DENIALS[names[0]], random)
    said = [_one(_NAMED[name], random) for name in names]
    listed = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} or {said[-1]}"
    return (
        _one(("No {}.", "There is no {}.", "No evidence of {}.", "Lungs without {}.", "{} is not seen."), random)
        .format(listed)
        .capitalize()
    )


def _one(some: Sequence[str], random: np.random.Generator) -> str:
    return some[int(random.integers(len(some)))]


def draw(folder: Path, seed: int, split: str) -> dict[str, str]:
    """One phantom, written; its row."""
    random = np.random.default_rng([seed, 12])
    phantom, shown = make_findings(seed, [name for name in PHANTOM_FINDINGS if random.random() < PREVALENCE])
    Image.fromarray(phantom.pixels).save(folder / f"{phantom.image_id}.png", compress_level=1)
    return {
        "image_id": phantom.image_id,
        "path": f"{phantom.image_id}.png",
        "label": phantom.label,
        "patient_id": f"synthetic-{seed}",
        "source": f"phantom-{phantom.site}",
        "split": split,
        "main": _one([one.finding for one in shown], random) if shown else "control",
        "clinical_notes": report(shown, random),
        "partial_notes": report(shown, random, LEFT_OUT),
    }


def write(folder: Path, films: int, seed: int = 60_000, workers: int = 2) -> Path:
    """Writes the phantoms, the last fifth of them as split val; returns the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = ["val" if number >= films - films // 5 else "train" for number in range(films)]
    with ProcessPoolExecutor(workers) as pool:
        rows = list(pool.map(draw, [folder] * films, range(seed, seed + films), splits, chunksize=8))
    path = folder / "manifest.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--films", type=int, default=2000)
    given = parser.parse_args()
    print(write(given.folder, given.films))
