"""Films whose outcome is known: FEATURES of each as Triton serves them, what is known of the patient, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.facts import fact_number, is_fact
from cxr_retrieval.cases.fields import Value, parse_clinical
from cxr_retrieval.cases.manifest import Manifest, ManifestRow
from cxr_retrieval.contract import FEATURE_SIZE, FEATURES
from cxr_retrieval.errors import CxrError, ManifestError
from cxr_retrieval.inference.triton import BATCH_SIZE, TritonClient
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval_training.data.datasets import pixels_of

OUTCOMES: Final = ("went_icu", "intubated")
"""What is asked about unless something else is said."""
_KEPT: Final = "features.npz"
_KEEP_EVERY: Final = 64
"""Batches, after which what was looked at is written."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cases:
    """n films of which some outcome is known.

    Attributes:
        patients: Keys that are equal where two films are of one patient.
        features: FEATURES `[n, 2048]` float32.
        facts: `[n, f]`; NaN: unknown.
        outcomes: Name → `[n]`: 1 it came, 0 it did not, NaN unknown.
    """

    patients: NDArray[np.generic]
    features: NDArray[np.float32]
    facts: Floats
    outcomes: dict[str, Floats]


def choose(
    manifest: Manifest, labels: Sequence[str], facts: Sequence[str], outcomes: Sequence[str], within_h: float | None = None
) -> tuple[list[ManifestRow], Floats, dict[str, Floats]]:
    """The rows that take part (of these labels, any split but `extra`, some outcome known), their facts and their outcomes, as in `Cases`.

    Args:
        within_h: Hours from the film within which an intervention must begin to count. The column `<outcome>_hours` says when it did; one
            that began before the film is no longer to be predicted, and one whose time is not known tells nothing: both count as unknown.

    Raises:
        ManifestError: A label that no row has, a column that is missing, a fact that is none, or a cell that is not understood.
    """
    wanted = [f"{name}_hours" for name in outcomes] if within_h is not None else []
    _require_columns(manifest, labels, [*facts, *outcomes, *wanted])
    rows: list[ManifestRow] = []
    known: list[list[float]] = []
    came: dict[str, list[float]] = {name: [] for name in outcomes}
    for row in manifest.require(labels=labels):
        try:
            clinical = parse_clinical(row.fields)
            values = {**clinical.extra, **clinical.known}
            became = {name: _came(name, values, within_h) for name in outcomes}
        except CxrError as error:
            raise ManifestError(
                f"{row.image_id}: {error.what}", expected=error.expected, got=error.got, next_step=error.next_step
            ) from error
        if all(np.isnan(one) for one in became.values()):
            continue
        rows.append(row)
        numbers = (fact_number(name, values.get(name)) for name in facts)
        known.append([np.nan if number is None else number for number in numbers])
        for name, one in became.items():
            came[name].append(one)
    return rows, np.array(known, np.float64).reshape(len(rows), len(facts)), {name: np.array(one) for name, one in came.items()}


def look_at(
    rows: Sequence[ManifestRow], triton: TritonClient, out: Path, advance: Callable[[int], None] = lambda _: None
) -> NDArray[np.float32]:
    """FEATURES of these films, `[n, 2048]`. Those that an interrupted run has looked at, with the same weights, are not looked at again.

    Raises:
        ManifestError: A film cannot be used.
        InferenceError: Triton cannot serve.
    """
    kept = out / _KEPT
    seen = _read(kept, triton.model_version)
    names = [f"{row.fields.get('sha256', '')} {row.image_id}" for row in rows]
    missing = [(name, row) for name, row in zip(names, rows, strict=True) if name not in seen]
    advance(len(rows) - len(missing))
    out.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(missing), BATCH_SIZE):
        batch = missing[start : start + BATCH_SIZE]
        squares = np.stack([letterbox(pixels_of(row))[0] for _, row in batch])
        found = np.asarray(triton.infer(squares[:, None], (FEATURES,))[FEATURES.name], np.float32)
        seen.update(zip((name for name, _ in batch), found, strict=True))
        advance(len(batch))
        if start // BATCH_SIZE % _KEEP_EVERY == _KEEP_EVERY - 1 or start + BATCH_SIZE >= len(missing):
            _write(kept, triton.model_version, seen)
    return np.stack([seen[name] for name in names])


def _require_columns(manifest: Manifest, labels: Sequence[str], columns: Sequence[str]) -> None:
    present = {row.label for row in manifest.rows}
    if unknown := [label for label in labels if label not in present]:
        raise ManifestError(
            f"{manifest.path.name}: no row has the label {', '.join(unknown)}",
            expected=", ".join(sorted(present)),
            next_step="correct --label, or `labels` of the config",
        )
    filled = {name.partition("[")[0].strip() for row in manifest.rows for name in row.fields}
    if missing := [name for name in columns if name not in filled]:
        raise ManifestError(
            f"{manifest.path.name}: nothing in column {', '.join(missing)}",
            expected="each fact and each outcome known of some film",
            got=f"columns with something in them: {', '.join(sorted(filled))}"[:300],
            next_step="add them, or choose others with --fact and --outcome",
        )
    if useless := [name for name in columns if not is_fact(name)]:
        raise ManifestError(
            f"{', '.join(useless)}: text that has no order", expected="numbers, Y or N, or sex", next_step="choose other columns"
        )


def _came(name: str, values: dict[str, Value], within_h: float | None) -> float:
    value = values.get(name)
    if value is None:
        return np.nan
    flag = fact_number(name, value)
    if flag not in (0.0, 1.0):
        raise ManifestError(
            f"column {name}: not understood", expected="Y or N, or empty for unknown", got=repr(value), next_step="correct it"
        )
    if within_h is None or flag == 0.0:
        return flag
    began = values.get(f"{name}_hours")
    if began is None or isinstance(began, str) or began < 0:
        return np.nan
    return float(began <= within_h)


def _read(path: Path, model_version: str) -> dict[str, NDArray[np.float32]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            if str(kept["model_version"]) != model_version:
                return {}
            features = np.asarray(kept["features"], np.float32).reshape(-1, FEATURE_SIZE)
            return dict(zip(kept["names"].tolist(), features, strict=True))
    except (OSError, ValueError, KeyError, BadZipFile):
        return {}


def _write(path: Path, model_version: str, seen: dict[str, NDArray[np.float32]]) -> None:
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, model_version=np.array(model_version), names=np.array(list(seen)), features=np.stack(list(seen.values())))
    partial.replace(path)
