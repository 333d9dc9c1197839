"""Films with what is known of them for a multimodal training: features, labels, and a report, where there is one; and reports alone."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.labels import findings_of
from cxr_retrieval.cases.manifest import Manifest, ManifestRow
from cxr_retrieval.errors import ManifestError
from cxr_retrieval_training.multilabel.cases import text_of

_REPORT_COLUMNS: Final = ("findings", "impression")
_TERM_COLUMN: Final = "Problems"
_LEAST_REPORTS: Final = 20
"""With a term, for it to be learnt."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Cases:
    """n films.

    Attributes:
        features: FINDING_FEATURES `[n, 1024]`.
        labels: `[n, l]` of what is trained on, 1 or 0. truth: `[n, t]` of what retrieval is judged by.
        texts: A report each; "" where there is none.
    """

    rows: tuple[ManifestRow, ...]
    features: Floats
    labels: Floats
    truth: NDArray[np.bool_]
    texts: tuple[str, ...]

    @property
    def patients(self) -> NDArray[np.generic]:
        """Keys that are equal where two films are of one patient."""
        return np.array([row.patient for row in self.rows])

    def __getitem__(self, chosen: NDArray[np.bool_]) -> Cases:
        index = np.flatnonzero(chosen).tolist()
        return Cases(
            tuple(self.rows[i] for i in index),
            self.features[chosen],
            self.labels[chosen],
            self.truth[chosen],
            tuple(self.texts[i] for i in index),
        )

    def with_share(self, share: float, seed: int) -> Cases:
        """The same with the reports of a share of those that have one, by chance; greater shares hold the smaller ones."""
        drawn = np.random.default_rng([seed, 21]).random(len(self.rows))
        return Cases(
            self.rows,
            self.features,
            self.labels,
            self.truth,
            tuple(text if one < share else "" for text, one in zip(self.texts, drawn, strict=True)),
        )


@dataclass(frozen=True)
class Reports:
    """Reports without films: texts, and which terms were given to each `[n, terms]`."""

    texts: tuple[str, ...]
    terms: tuple[str, ...]
    given: Floats


def names_in(manifest: Manifest, column: str) -> tuple[str, ...]:
    """Every label that a train film has in a column, in order.

    Raises:
        ManifestError: There is none.
    """
    names = sorted({name for row in manifest.require(split="train") for name in findings_of(text_of(row, column))})
    if len(names) > 1:
        return tuple(names)
    raise ManifestError(
        f"{manifest.path.name}: nothing to tell apart in column {column}",
        expected="two labels or more",
        got=", ".join(names) or "nothing",
        next_step="correct --column or --judged-by",
    )


def held(rows: Sequence[ManifestRow], column: str, names: Sequence[str]) -> NDArray[np.bool_]:
    """Which film has which of these labels `[n, names]`."""
    return np.array([[name in findings_of(text_of(row, column)) for name in names] for row in rows], np.bool_).reshape(
        len(rows), len(names)
    )


def texts_in(rows: Sequence[ManifestRow], column: str, hidden: Sequence[str]) -> tuple[str, ...]:
    """The reports of films, "" where there is none, without the words that are hidden."""
    return tuple(without(row.fields.get(column, ""), hidden) for row in rows)


def without(text: str, hidden: Sequence[str]) -> str:
    """A text without words that begin so, whatever their case: those that name what is to be found."""
    if not hidden:
        return text
    words = re.compile(rf"\b(?:{'|'.join(map(re.escape, hidden))})[\w-]*", re.IGNORECASE)
    return " ".join(words.sub(" ", text).split())


def read_reports(path: Path, hidden: Sequence[str]) -> Reports:
    """A CSV of reports alone, as Indiana University's collection (Demner-Fushman et al. 2016) has them: `findings`, `impression`, and
    `Problems`, terms with ; between. Rows of any split but `val`.

    Raises:
        ManifestError: It cannot be read, or lacks these columns.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("split") != "val"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: cannot be read", expected="a CSV of reports", got=str(error), next_step="check the path") from error
    if missing := [name for name in (*_REPORT_COLUMNS, _TERM_COLUMN) if not rows or name not in rows[0]]:
        raise ManifestError(f"{path.name}: no column {', '.join(missing)}", expected="reports with terms", next_step="correct --reports")
    texts = [without(" ".join(row[name] for name in _REPORT_COLUMNS if row[name]), hidden) for row in rows]
    given = [{one.strip() for one in row[_TERM_COLUMN].split(";") if one.strip()} - {"normal"} for row in rows]
    counted = Counter(term for terms in given for term in terms)
    terms = tuple(sorted(term for term, count in counted.items() if count >= _LEAST_REPORTS))
    kept = [(text, some) for text, some in zip(texts, given, strict=True) if text]
    return Reports(
        tuple(text for text, _ in kept),
        terms,
        np.array([[term in some for term in terms] for _, some in kept], np.float32).reshape(len(kept), -1),
    )
