"""Galleries of made-up vectors: as many cases as one wants, in clusters, with facts, and no file behind any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.gallery.balance import VECTOR_SIZE
from cxr_retrieval.gallery.store import Store, make_entry
from vectors import with_unit_parts

LABELS = ("control", "covid19", "non_covid_pneumonia")
SOURCES = ("north", "south", "east", "west")


@dataclass(frozen=True)
class Clusters:
    """Which cluster each case is of; `keys` in the order in which they were stored."""

    keys: list[str]
    of: NDArray[np.int64]


def fill(store: Store, count: int, *, clusters: int = 3, start: int = 0, patients_of: int = 2, seed: int = 3) -> Clusters:
    """Stores cases `start` to `start + count`, `patients_of` films of each patient; a cluster is mostly of one label and one source."""
    random = np.random.default_rng((seed, start))
    centres = np.random.default_rng(seed).normal(size=(clusters, VECTOR_SIZE))
    of = random.integers(clusters, size=count)
    keys: list[str] = []
    for first in range(0, count, 5000):
        some = range(first, min(first + 5000, count))
        vectors = centres[of[first : some.stop]] + 0.7 * random.normal(size=(len(some), VECTOR_SIZE))
        rows: list[ManifestRow] = []
        for number in some:
            name, stray = f"case-{start + number}", random.random() < 0.1
            label = LABELS[(of[number] + stray) % len(LABELS)]
            facts = {"age": f"{20 + 7 * of[number] % 60 + random.integers(10)}", "sex": "FM"[number % 2]} if number % 5 else {}
            facts |= {"went_icu": "Y" if label == "covid19" else "N", "ward": f"ward {of[number] % 4}"}
            patient, source = f"patient-{(start + number) // patients_of}", SOURCES[of[number] % len(SOURCES)]
            rows.append(ManifestRow(Path("/nowhere"), name, Path("/nowhere") / f"{name}.png", label, patient, source, None, facts))
        entries = [make_entry(row, "", store.pseudonyms) for row in rows]
        store.upsert(entries, [""] * len(entries), with_unit_parts(vectors))
        keys += [entry.key for entry in entries]
    store.publish()
    return Clusters(keys, of)
