"""The page of `cxr train multilabel`: how well each finding is told, and how much of a film's findings the films found for it have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from cxr_retrieval.cases.labels import findings_of
from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.errors import UsageError
from cxr_retrieval.evaluation.gains import Gains, gains_of_each
from cxr_retrieval.evaluation.intervals import in_brackets, interval, weighted_interval, weights_of
from cxr_retrieval.evaluation.metrics import area
from cxr_retrieval_training.multilabel.cases import UNCERTAIN, text_of

mpl.use("Agg")

TOP: Final = (10, 50)
"""So many films are retrieved for each; the paper's tables are of 50."""
_MEASURES: Final = {"acg": "ACG", "acg_p": "ACGp", "precision": "precision", "exact": "exact", "gain": "average gain"}

_FOUND: Final = (
    "The train films nearest by cosine similarity of the 1024 features, none of the film's own patient. ACG: of all findings, the share "
    "that both films have or both lack. ACGp: of those that either has, the share that both have. Precision: share of films with a finding "
    "in common. Exact: with the same findings. Gain: how many in common. Runs beside this one were trained on what their own pages say, "
    "and are judged here by this one's labels."
)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Run:
    """Features of films, by which they are found: of the split train, among which is sought, and of val, which are asked about.

    Attributes:
        train, val: Image ids (or their rows), and features `[n, d]` of unit length.
    """

    name: str
    train: tuple[Sequence[ManifestRow | str], Floats]
    val: tuple[Sequence[ManifestRow | str], Floats]

    def of(self, split: str, rows: Sequence[ManifestRow]) -> Floats:
        """The features of just these films.

        Raises:
            UsageError: It has not looked at one of them.
        """
        names, features = self.train if split == "train" else self.val
        place = {name if isinstance(name, str) else name.image_id: number for number, name in enumerate(names)}
        if missing := [row.image_id for row in rows if row.image_id not in place]:
            raise UsageError(
                f"the run {self.name} has not looked at {missing[0]}",
                expected=f"all {len(rows)} {split} films",
                got=f"{len(missing)} missing",
                next_step="give runs on the same manifest",
            )
        return features[[place[row.image_id] for row in rows]]


def read_run(folder: Path) -> Run:
    """What `cxr train multilabel` or `multimodal` left in a folder.

    Raises:
        UsageError: It holds no vectors.
    """
    parts = {}
    for split in ("train", "val"):
        path = folder / f"vectors-{split}.npz"
        try:
            with np.load(path, allow_pickle=False) as kept:
                parts[split] = kept["image_ids"].tolist(), np.asarray(kept["features"], np.float32)
        except (OSError, KeyError, ValueError) as error:
            raise UsageError(
                f"{path}: no vectors of a run", got=str(error)[:200], next_step="give the --out folder of a finished run"
            ) from error
    return Run(folder.name, parts["train"], parts["val"])


def figures(this: Run, others: Sequence[Run], findings: Sequence[str], said: Floats, stated: Floats, column: str) -> dict[str, Any]:
    """What the page says, of the val films; keys as in `multilabel.json`.

    Args:
        said, stated: `[n, findings]` probabilities, and what is known (NaN: uncertain).
    """
    rows = {
        split: [row for row in names if isinstance(row, ManifestRow)] for split, (names, _) in (("train", this.train), ("val", this.val))
    }
    patients = np.array([row.patient for row in rows["val"]])
    weights = weights_of(patients)
    areas = []
    for number, name in enumerate(findings):
        known = np.isfinite(stated[:, number])
        scores, there = said[known, number].astype(np.float64), stated[known, number] == 1
        drawn = None if weights is None else area(scores, there, weights[:, known])
        areas.append(
            {
                "finding": name,
                "with": int(there.sum()),
                "without": int((~there).sum()),
                "auc": float(area(scores, there, np.ones((1, len(there))))[0]),
                "auc_ci": None if drawn is None or np.isnan(drawn).all() else interval(drawn[np.isfinite(drawn)]),
            }
        )
    return {"areas": areas, "retrieval": retrieval(rows["train"], rows["val"], [this, *others], column, findings)}


def retrieval(
    train: Sequence[ManifestRow], val: Sequence[ManifestRow], runs: Sequence[Run], column: str, findings: Sequence[str]
) -> list[dict[str, Any]]:
    """For each number of `TOP` that there is room for, and each run: the measures of `evaluation/gains.py`, with intervals over patients;
    and those of films drawn by chance. Uncertain findings count as present, as in the paper.
    """
    sets = {split: _sets(rows, column, findings) for split, rows in (("train", train), ("val", val))}
    own = np.equal.outer([row.patient for row in val], [row.patient for row in train])
    weights = weights_of(np.array([row.patient for row in val]))
    by_chance = np.random.default_rng(0).random((len(val), len(train)))
    similar = {run.name: run.of("val", val) @ run.of("train", train).T for run in runs}
    found = []
    for k in [k for k in TOP if k <= len(train)] or [len(train)]:
        for name, similarity in {**similar, "by chance": by_chance}.items():
            nearest = np.argsort(-np.where(own, -np.inf, similarity), axis=1, kind="stable")[:, :k]
            each = gains_of_each(sets["val"], [sets["train"][one] for one in nearest])
            means = asdict(Gains(*(float(mean) for mean in each.mean(axis=0))))
            ends = {measure: weighted_interval(each[:, number], weights) for number, measure in enumerate(means)}
            found.append({"run": name, "k": k, **means, **{f"{measure}_ci": one for measure, one in ends.items()}})
    return found


def _sets(rows: Sequence[ManifestRow], column: str, findings: Sequence[str]) -> NDArray[np.bool_]:
    held = [{*findings_of(text_of(row, column)), *findings_of(row.fields.get(UNCERTAIN, ""))} for row in rows]
    return np.array([[name in one for name in findings] for one in held], np.bool_)


def draw_curves(findings: Sequence[str], said: Floats, stated: Floats, path: Path) -> None:
    """A curve for each finding."""
    figure = Figure((5.4, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    for number, name in enumerate(findings):
        known = np.isfinite(stated[:, number])
        there = stated[known, number] == 1
        if 0 < there.sum() < len(there):
            false, true, _ = roc_curve(there, said[known, number])
            axes.plot(false, true, label=f"{name} ({int(there.sum())})")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title="val films")
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def markdown(about: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The page.

    Args:
        about: What the checkpoint says of itself. found: `figures`.
    """
    config, films = about["config"], about["films"]
    side = config["image_size"]
    areas = [
        f"| {one['finding']} | {one['with']} | {one['without']} | {one['auc']:.3f}{in_brackets(one['auc_ci'])} |" for one in found["areas"]
    ]
    return (
        "\n\n".join(
            [
                "# Findings",
                f"Research use only, not for diagnosis. DenseNet-121 at {side}×{side}, loss {config['loss']}, of {films['train']} "
                f"train films of {', '.join(about['sources']) or 'one source'}, column {about['column']}; epoch {about['epoch']} of "
                f"{config['epochs']} is kept, {about['seconds'] / 60:.0f} minutes of training. All figures are of the {films['val']} "
                "val films, asked about once; in brackets 95 % by bootstrap over patients.",
                "\n".join(["| finding | films with | without | area under the curve |", "|---|---|---|---|", *areas]),
                "![Curves](roc.png)",
                "## What is found for a film",
                _FOUND,
                retrieval_table(found["retrieval"]),
            ]
        )
        + "\n"
    )


def retrieval_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of `retrieval`."""
    lines = [f"| by | of | {' | '.join(_MEASURES.values())} |", f"|---|---|{'---|' * len(_MEASURES)}"]
    for row in rows:
        cells = [f"{row[name]:.3f}{in_brackets(row[f'{name}_ci'])}" for name in _MEASURES]
        lines.append(f"| {row['run']} | {row['k']} | {' | '.join(cells)} |")
    return "\n".join(lines)
