"""The Markdown page of `cxr train outcome`, and its pictures: curves as in Fig. 6 of the paper, and how often what was said came true."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from cxr_retrieval.evaluation.intervals import in_brackets
from cxr_retrieval_training.outcome.crossvalidation import GRID, Held, served_rows

mpl.use("Agg")

_COLOURS: Final = {"both": "black", "image": "tab:blue", "facts": "tab:red"}
"""As in Fig. 6."""
_SAID: Final = {"both": "film and facts", "image": "film alone", "facts": "facts alone"}
_BINS: Final = 5
_FEW: Final = 100
"""Patients with the outcome, and as many without: of fewer, an area of 0.8 has an interval wider than a tenth."""


def markdown(about: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page.

    Args:
        about: What the checkpoint says of itself. found: Outcome → `figures`.
    """
    within = "" if about["within_h"] is None else f" within {about['within_h']:g} hours of the film"
    parts = [
        "# Outcome",
        f"Research use only, not for diagnosis. Films labelled {', '.join(about['labels'])}, features of model version "
        f"{about['model_version']} (frozen), facts: {', '.join(about['facts'])}. Each area is the mean of "
        f"{about['config']['folds']} folds, whole patients each; "
        "in brackets: 95 % by bootstrap over patients, – of fewer than ten.",
    ]
    for name, one in found.items():
        parts += [
            f"## {name}{within}",
            f"{one['with']} of {one['n']} films came to it, {one['patients_with']} of {one['patients']} patients. {_few(one)}",
            _table(one),
            f"What the film adds to the facts, as an area: {one['features_add']['auc']:+.3f}{in_brackets(one['features_add']['auc_ci'])}. "
            f"Brier score of saying {one['with'] / one['n']:.2f} of everybody: {one['brier_of_the_share']:.3f}.",
            f"![Curves of {name}](roc-{name}.png)",
            f"![Calibration of {name}](calibration-{name}.png)",
        ]
    return "\n\n".join(parts) + "\n"


def draw_curves(held: Held, path: Path) -> None:
    """Mean curve of what is served for each part, ± one standard deviation over the folds."""
    figure = Figure((5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    for part, colour in _COLOURS.items():
        learner = held.served(part)
        curves = held.curves(learner)
        mean, spread = curves.mean(axis=0), curves.std(axis=0)
        areas = held.areas(learner)[:, 0]
        label = f"{_SAID[part]} ({learner.name}): {areas.mean():.3f} ± {areas.std(ddof=1):.3f}"
        axes.plot(GRID, mean, color=colour, label=label)
        axes.fill_between(GRID, np.clip(mean - spread, 0, 1), np.clip(mean + spread, 0, 1), color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=f"{held.outcome}: mean of {held.folds} folds ± 1 SD")
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def draw_calibration(held: Held, path: Path) -> None:
    """How often the outcome came where it was said to come so often: a fifth of the films at each point."""
    figure = Figure((5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    for part, colour in _COLOURS.items():
        said = held.probabilities(held.served(part))
        groups = np.array_split(np.argsort(said, kind="stable"), _BINS)
        points = [(said[group].mean(), held.came[group].mean()) for group in groups if len(group)]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=_SAID[part])
    axes.set(xlabel="probability said", ylabel="share to which it came", xlim=(0, 1), ylim=(0, 1), title=f"{held.outcome}: calibration")
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _table(one: Mapping[str, Any]) -> str:
    lines = ["| seen | learner | area under the curve | SD of folds | Brier | calibration error | |", "|---|---|---|---|---|---|---|"]
    rows_served = served_rows(one)
    for row in one["learners"]:
        served = "served" if row in rows_served else ""
        lines.append(
            f"| {_SAID[row['part']]} | {row['learner']} | {row['auc']:.3f}{in_brackets(row['auc_ci'])} | {row['auc_sd']:.3f} "
            f"| {row['brier']:.3f} | {row['ece']:.3f} | {served} |"
        )
    return "\n".join(lines)


def _few(one: Mapping[str, Any]) -> str:
    fewest = min(one["patients_with"], one["patients"] - one["patients_with"])
    if fewest >= _FEW:
        return ""
    return (
        f"**So few patients ({fewest} of the rarer kind) show whether there is a large effect and nothing finer:** differences within the "
        "brackets are chance, and the best of ten learners is the luckiest of them."
    )
