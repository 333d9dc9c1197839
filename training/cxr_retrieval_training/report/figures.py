"""Pictures of a report: curves, reliability, retrieval montage. Montages show patients' images: keep them to yourself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cxr_retrieval.cases.manifest import Manifest
from cxr_retrieval.contract import LABELS
from cxr_retrieval.evaluation.metrics import LabelledSet, Ranking
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.reading import read_radiograph

mpl.use("Agg")

_DPI: Final = 110
_NEIGHBOURS: Final = 4
"""As in Fig. 2 of the paper."""


def draw_k(sweep: Mapping[str, Sequence[float]], path: Path) -> None:
    """Accuracy of the vote over k (section 3.3.3)."""
    figure, axes = _figure()
    for name, values in sweep.items():
        axes.plot(range(1, len(values) + 1), values, label=name.replace("_", " "))
    axes.set_xlabel("k, neighbours that vote")
    axes.set_ylabel("val")
    axes.legend(frameon=False)
    _save(figure, path)


def draw_reliability(calibration: Mapping[str, Any], path: Path) -> None:
    """Accuracy over the vote's confidence, and over the calibrated probability if there is one; the diagonal is perfect calibration."""
    figure, axes = _figure()
    filled = [entry for entry in calibration["bins"] if entry["n"]]
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    axes.plot([entry["confidence"] for entry in filled], [entry["accuracy"] for entry in filled], marker="o")
    for entry in filled:
        axes.annotate(str(entry["n"]), (entry["confidence"], entry["accuracy"]), textcoords="offset points", xytext=(6, -10), fontsize=8)
    if fitted := calibration["cross_fitted"]:
        points = [(entry["calibrated"], entry["accuracy"]) for entry in fitted["bins"]]
        label = f"calibrated, cross-fitted, a tenth of the queries each: ECE {fitted['ece']:.3f}"
        axes.plot(*zip(*points, strict=True), marker="s", markersize=4, label=label)
        axes.legend(frameon=False, loc="upper left", fontsize=8)
    axes.set_xlabel("share of the vote; calibrated probability")
    axes.set_ylabel("accuracy (number of queries beside)")
    axes.set_title(f"ECE {calibration['ece']:.3f}", fontsize=10)
    _save(figure, path)


def draw_sizes(runs: Mapping[str, Any], path: Path) -> bool:
    """Balanced accuracy and its 95 % interval, where it has one, over embedding size (section 3.3.4), of the runs that differ in nothing
    else; False if under two.
    """
    groups: dict[str, list[tuple[int, float, float, float]]] = {}
    for run in runs.values():
        size = run["config"]["learned_size"]
        rest = json.dumps({**run["config"], "learned_size": None}, sort_keys=True)
        overall = run["evaluation"]["overall"]
        low, high = overall["balanced_accuracy_ci"] or (np.nan, np.nan)  # matplotlib draws no bar of NaN
        groups.setdefault(rest, []).append((size, overall["balanced_accuracy"], low, high))
    points = sorted(max(groups.values(), key=len))
    if len(points) < 2:
        return False
    sizes, value, low, high = np.array(points).T
    figure, axes = _figure()
    axes.errorbar(sizes, value, yerr=(value - low, high - value), marker="o", capsize=3)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
    axes.set_xlabel("numbers that each member learns")
    axes.set_ylabel("val balanced accuracy, k = 10")
    _save(figure, path)
    return True


def draw_balance(dial: Mapping[str, Any], path: Path) -> None:
    """What each balance gives, with 95 % intervals; the default is the dotted line."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    balances = [row["balance"] for row in dial["rows"]]
    shown = (
        (left, "balanced_accuracy", "balanced accuracy of the vote"),
        (left, "recall_at_1", "first neighbour of the label"),
        (left, "added_recall_at_1", f"{' and '.join(dial.get('added', ()))} added, not trained on: the same"),
        (right, "own_source", "first neighbour from the own source"),
        (right, "structure", "structural similarity of the lungs"),
    )
    for axes, name, label in shown:
        if name not in dial["rows"][0]:
            continue
        line = axes.plot(balances, [row[name] for row in dial["rows"]], label=label)[0]
        if all(row[f"{name}_ci"] for row in dial["rows"]):
            low, high = zip(*(row[f"{name}_ci"] for row in dial["rows"]), strict=True)
            axes.fill_between(balances, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    right.axhline(dial["structure_at_random"], color="0.6", linestyle="--", linewidth=0.8, label="the same, of a film drawn at random")
    for axes in (left, right):
        axes.axvline(DEFAULT_BALANCE, color="0.4", linestyle=":", linewidth=1)
        axes.set_xlabel("balance: 0 what was learnt, 1 what lungs look like")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    left.set_ylabel("val")
    _save(figure, path)


def draw_unseen(found: Mapping[str, Any], path: Path) -> None:
    """Balanced accuracy over the films of its own that a hospital has in the gallery, a panel for each, with 95 % intervals."""
    figure = Figure(figsize=(3.4 * len(found["sources"]), 3.4), layout="constrained")
    panels = figure.subplots(1, len(found["sources"]), sharey=True, squeeze=False)[0]
    ways = {"as_it_is": "nearest cases vote", "adapted": "adapted", "adapted_to_labels": "adapted, shares not told"}
    for axes, (source, one) in zip(panels, found["sources"].items(), strict=True):
        place = range(len(one["own"]))
        for way, label in ways.items():
            line = axes.plot(place, [row[way] for row in one["own"]], marker=".", label=label)[0]
            bounds = [row[f"{way}_ci"] or (np.nan, np.nan) for row in one["own"]]
            axes.fill_between(place, *zip(*bounds, strict=True), color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xticks(place, [str(row["own"]) for row in one["own"]])
        axes.set_xlabel("own labelled films, of each label")
        axes.set_title(f"{source}: {len(one['labels'])} labels", fontsize=9)
        axes.axhline(1 / len(one["labels"]), color="0.6", linestyle="--", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("balanced accuracy; dashed: chance")
    panels[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def draw_training(log: Path, path: Path) -> None:
    """Loss, and what was watched on val, over the steps of one run's log.jsonl (segmentation: over epochs), a line a member."""
    records = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    step, watched = ("iteration", "val_recall_at_1") if "iteration" in records[-1] else ("epoch", "val_dice")
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for member in sorted({record["member"] for record in records}):
        mine = [record for record in records if record["member"] == member]
        left.plot([record[step] for record in mine], [record["loss"] for record in mine], label=f"member {member}", linewidth=0.8)
        seen = [record for record in mine if watched in record]
        right.plot([record[step] for record in seen], [record[watched] for record in seen], marker=".")
    for axes, name in ((left, "loss"), (right, watched.replace("_", " "))):
        axes.set_xlabel(step)
        axes.set_ylabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    _save(figure, path)


def draw_montage(manifest: Manifest, gallery: LabelledSet, queries: LabelledSet, path: Path, per_label: int = 2) -> None:
    """Queries of each label with their nearest neighbours, right ones framed green and wrong ones red (Fig. 2 of the paper)."""
    rows = {row.image_id: row for row in manifest.rows}
    random = np.random.default_rng(0)
    chosen: list[int] = []
    for label in LABELS:
        mine = np.flatnonzero(np.array(queries.labels) == label)
        chosen += random.choice(mine, min(per_label, len(mine)), replace=False).tolist()
    ranking = Ranking(gallery, queries)
    figure = Figure(figsize=(2 * (_NEIGHBOURS + 1), 2.3 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), _NEIGHBOURS + 1, squeeze=False)
    for line, query in zip(grid, chosen, strict=True):
        order, similarity = ranking.of(query)
        truth = queries.labels[query]
        _film(line[0], rows[queries.image_ids[query]].path, f"query: {truth}\n{queries.sources[query]}", "black")
        for axes, index, value in zip(line[1:], order, similarity, strict=False):
            found = gallery.labels[int(index)]
            title = f"{found}\n{gallery.sources[int(index)]}, {value:.3f}"
            _film(axes, rows[gallery.image_ids[int(index)]].path, title, "tab:green" if found == truth else "tab:red")
    _save(figure, path)


def _film(axes: Axes, path: Path, title: str, colour: str) -> None:
    axes.imshow(letterbox(read_radiograph(path).pixels)[0], cmap="gray", vmin=0, vmax=255)
    axes.set_title(title, fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(3)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
