"""Films and the findings stated of each: present, absent, or uncertain, which is not trained on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.labels import findings_of
from cxr_retrieval.cases.manifest import Manifest, ManifestRow
from cxr_retrieval.errors import ManifestError, UsageError
from cxr_retrieval_training.config import MultilabelConfig

UNCERTAIN: Final = "uncertain"
"""Column with those of a film's findings that are neither stated nor excluded (`cxr manifest --findings`)."""
_WATCHED: Final = 10
"""Of so many parts of the training patients one is held out: what tells when to learn more slowly, and which epoch to keep."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Films:
    """n films with what is stated of each.

    Attributes:
        stated: `[n, findings]`: 1 present, 0 absent, NaN uncertain.
    """

    rows: tuple[ManifestRow, ...]
    stated: Floats

    def __getitem__(self, chosen: NDArray[np.bool_]) -> Films:
        return Films(tuple(row for row, keep in zip(self.rows, chosen.tolist(), strict=True) if keep), self.stated[chosen])


def findings_in(manifest: Manifest, column: str, config: MultilabelConfig, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The findings to learn: those wanted, or all that enough train films have, in order; with `softmax` the labels that mean none, too.

    Raises:
        ManifestError: Nothing in that column, a finding wanted that no train film has, or none that enough have.
    """
    rows = manifest.require(split="train")
    present: Counter[str] = Counter()
    for row in rows:
        sure = set(findings_of(text_of(row, column))) - set(findings_of(row.fields.get(UNCERTAIN, "")))
        present.update(name for name in sure if config.loss == "softmax" or name.lower().replace(" ", "_") not in config.none)
    if not any(text_of(row, column) for row in rows):
        filled = {name for row in rows for name in row.fields}
        raise ManifestError(
            f"{manifest.path.name}: nothing in column {column}",
            expected="findings, with | between several of one film",
            got=f"columns with something in them: {', '.join(sorted(filled | {'label'}))}"[:300],
            next_step="correct --column",
        )
    if unknown := [name for name in wanted if not present[name]]:
        raise ManifestError(
            f"{manifest.path.name}: no train film has {', '.join(unknown)}",
            expected=", ".join(f"{name} ({count})" for name, count in present.most_common(40)) or "at least one film with a finding",
            next_step="correct --finding, or add such films",
        )
    chosen = tuple(wanted) or tuple(sorted(name for name, count in present.items() if count >= config.least_films))
    if chosen and len(rows) > max(present[name] for name in chosen if present[name]):
        return chosen
    raise ManifestError(
        f"{manifest.path.name}: nothing to tell apart in column {column}",
        expected=f"findings that {config.least_films} train films have, and others have not",
        got=", ".join(f"{name} ({count})" for name, count in present.most_common(10)) or "no finding at all",
        next_step="add films, or lower least_films in the config",
    )


def films_of(manifest: Manifest, split: str, column: str, findings: Sequence[str]) -> Films:
    """All films of a split of which that column says something.

    Raises:
        ManifestError: There are none.
    """
    rows = tuple(row for row in manifest.require(split=split) if text_of(row, column))
    if not rows:
        raise ManifestError(f"{manifest.path.name}: no {split} film with something in column {column}", next_step="correct --column")
    stated = np.zeros((len(rows), len(findings)), np.float32)
    for number, row in enumerate(rows):
        sure, unsure = set(findings_of(text_of(row, column))), set(findings_of(row.fields.get(UNCERTAIN, "")))
        stated[number] = [np.nan if name in unsure else float(name in sure) for name in findings]
    return Films(rows, stated)


def held_out(films: Films) -> NDArray[np.bool_]:
    """`[n]`: those of a tenth of the patients, by their keys, whatever else is in the manifest.

    Raises:
        UsageError: All or none.
    """
    watched = np.array([int(hashlib.sha256(row.patient.encode()).hexdigest(), 16) % _WATCHED == 0 for row in films.rows])
    if watched.all() or not watched.any():
        raise UsageError("too few patients to watch a training by", expected="some dozens of train films", got=str(len(watched)))
    return watched


def text_of(row: ManifestRow, column: str) -> str:
    """What a column says of a film; "" if nothing."""
    return row.label if column == "label" else row.fields.get(column, "")
