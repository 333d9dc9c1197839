"""The Markdown page of a report, and the report's folder as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from cxr_retrieval.cases.manifest import Manifest
from cxr_retrieval.contract import LABELS
from cxr_retrieval.evaluation.intervals import MIN_PATIENTS
from cxr_retrieval_training.report import figures
from cxr_retrieval_training.report.results import load_run, look_at, report, write_json

_HALVES: Final = ("recall_at_1", "sensitivity", "least_recall_at_1")
_ATTENTION: Final = {"hit_rate": "mean", "pixel_auroc": "mean", "extent": "correlation"}


def write_report(manifest: Manifest, segmenter: Path, folders: Sequence[Path], out: Path, device: torch.device) -> Path:
    """Writes report.json, report.md and the pictures into `out`; returns the page.

    `montage.png` shows patients' radiographs.
    """
    seen = look_at(manifest)
    found = report(manifest, seen, segmenter, folders, device)
    first = load_run(folders[0], manifest, seen)
    pictures = ["k.png", "reliability.png", "training.png", "montage.png"]
    figures.draw_k(found["closer"]["k"], out / "k.png")
    figures.draw_reliability(found["runs"][first.name]["evaluation"]["calibration"], out / "reliability.png")
    figures.draw_training(folders[0] / "log.jsonl", out / "training.png")
    figures.draw_montage(manifest, first.sets["train"], first.sets["val"], out / "montage.png")
    if figures.draw_sizes(found["runs"], out / "embedding-size.png"):
        pictures.append("embedding-size.png")
    if found["closer"]["balance"]:
        figures.draw_balance(found["closer"]["balance"], out / "balance.png")
        pictures.append("balance.png")
    lungs = segmenter.parent / "segmentation.json"
    if lungs.exists():
        found["segmentation"] = json.loads(lungs.read_text("utf-8"))
        figures.draw_training(segmenter.parent / "log.jsonl", out / "segmentation.png")
        pictures.append("segmentation.png")
    write_json(found, out / "report.json")
    page = out / "report.md"
    page.write_text(markdown(found, pictures), "utf-8")
    return page


def markdown(found: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The page: every run in one table, then the first by class and source, then what was looked at more closely."""
    first = found["closer"]["run"]
    parts = [
        f"# {first}",
        "Research use only. Gallery: train; queries: val; same patient and same picture left out. Brackets: 95 % bootstrap intervals over "
        f"patients, – of fewer than {MIN_PATIENTS}.",
        _runs_table(found["runs"]),
        f"## {first}, by source and class",
        _sources_table(found["runs"][first]["evaluation"]),
        _classes_table(found["runs"][first]["evaluation"]),
        "## A closer look",
        _closer(found["closer"], found["runs"][first]),
        *(["## Semantic against visual", balance_table(found["closer"]["balance"])] if found["closer"]["balance"] else []),
        *(["## Lungs", _lungs_table(found["segmentation"])] if "segmentation" in found else []),
        *(f"![{name}]({name})" for name in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def _runs_table(runs: Mapping[str, Any]) -> str:
    head = ["run", "balanced", *(f"recall@1 {label}" for label in LABELS), "mAP@R", "within source", "across sources"]
    head += ["own source nearest", "source probe", "source left out: balanced", "without its films", "added class recall@1"]
    lines = []
    for name, run in runs.items():
        whole = run["evaluation"]
        probe = [entry["balanced_accuracy"] for entry in run["source_probe"].values()]
        added, source = run.get("added_class"), run["config"]["leave_out_source"]
        left_out = [_number(_of_source(part, source)) for part in (whole, whole["cross_source"])]
        lines.append(
            [
                name,
                with_interval(whole["overall"], "balanced_accuracy"),
                *(_number(whole["per_class"].get(label, {}).get("recall_at", {}).get("1")) for label in LABELS),
                _number(whole["overall"]["map_at_r"]),
                *(_number(whole[part].get("overall", {}).get("balanced_accuracy")) for part in ("within_source", "cross_source")),
                _number(whole["nearest_from_own_source"]["share"]),
                _number(sum(probe) / len(probe) if probe else None),
                *(left_out if run["config"]["leave_out_fold"] is None else ["–", "–"]),
                "–" if added is None else _number(added["recall_at"]["1"]),
            ]
        )
    return table(head, lines)


def _of_source(evaluation: Mapping[str, Any], source: str | None) -> float | None:
    return evaluation.get("per_source", {}).get(source, {}).get("balanced_accuracy")


def _sources_table(evaluation: Mapping[str, Any]) -> str:
    head = [
        "source",
        "n",
        "accuracy",
        "balanced",
        "recall@1",
        "@4",
        "@10",
        "precision@10",
        "mAP@R",
        "only own source",
        "without own source",
    ]
    rows = {"all": evaluation["overall"], **evaluation["per_source"]}
    lines = []
    for name, part in rows.items():
        restricted = [
            (evaluation[kind].get("overall") if name == "all" else evaluation[kind].get("per_source", {}).get(name))
            for kind in ("within_source", "cross_source")
        ]
        lines.append(
            [
                name,
                str(part["n"]),
                with_interval(part, "accuracy"),
                with_interval(part, "balanced_accuracy"),
                *(_number(part["recall_at"][at]) for at in ("1", "4", "10")),
                _number(part["precision_at"]["10"]),
                _number(part["map_at_r"]),
                *("–" if one is None else with_interval(one, "balanced_accuracy") for one in restricted),
            ]
        )
    return table(head, lines)


def _classes_table(evaluation: Mapping[str, Any]) -> str:
    lines = [
        [
            label,
            str(row["n"]),
            *(_number(row[key]) for key in ("sensitivity", "ppv", "f1")),
            *(_number(row["recall_at"][at]) for at in ("1", "4", "10")),
        ]
        for label, row in evaluation["per_class"].items()
    ]
    return table(["label", "n", "sensitivity", "PPV", "F1", "recall@1", "@4", "@10"], lines)


def _closer(closer: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    calibration = run["evaluation"]["calibration"]
    lines = [
        ["expected calibration error of the vote", _number(calibration["ece"])],
        ["accuracy without the least confident tenth", with_interval(calibration["selective"], "accuracy")],
    ]
    if closer["style_only"]:
        for name in ("blanked", "shuffled"):
            figure = with_interval(closer["style_only"][name], "balanced_accuracy")
            lines.append([f"{closer['style_only']['source']}, lung pixels {name}: balanced accuracy", figure])
    if closer["attention"]:
        for name in ("trained", "untrained", "centre_prior"):
            part = closer["attention"][name]
            lines.append(
                [
                    f"attention on lesions ({closer['attention']['n']} images), {name.replace('_', ' ')}: hit rate; pixel AUROC; extent",
                    "; ".join(with_interval(part[figure], key, "ci") for figure, key in _ATTENTION.items()),
                ]
            )
    halves = run.get("added_class", {}).get("half_left_out")
    if halves:
        figures_ = "; ".join(f"{_number(halves[name])} ± {float(np.std(halves[f'{name}_draws'])):.3f}" for name in _HALVES)
        lines.append(["label added, half of its patients left out: recall@1; sensitivity; least recall@1 of the others", figures_])
    nearest = run["evaluation"]["nearest_from_own_source"]
    near = {"all": nearest, **{f"{one['source']}, {one['label']}": one for one in nearest["of"]}}
    for name, one in near.items():
        figure = f"{_number(one['share'])}; {_number(one['by_chance'])}"
        lines.append([f"nearest from the own source, where another holds the label; by chance: {name} ({one['n']} films)", figure])
    alike = closer["near_duplicates"]
    lines.append(
        [f"pairs across splits with thumbnail correlation > {alike['threshold']}", f"{alike['n']} ({alike['val_images']} val images)"]
    )
    if alike["overall_without_them"]:
        lines.append(["balanced accuracy without them", with_interval(alike["overall_without_them"], "balanced_accuracy")])
    return table(["", ""], lines)


def balance_table(dial: Mapping[str, Any]) -> str:
    """A line for each balance."""
    columns = {
        "balance": "",
        "balanced accuracy": "balanced_accuracy",
        "recall@1": "recall_at_1",
        "added class recall@1": "added_recall_at_1",
        "own source nearest": "own_source",
        "structure": "structure",
    }
    lines = [
        [f"{row['balance']:g}", *(with_interval(row, name) if name in row else "–" for name in columns.values() if name)]
        for row in dial["rows"]
    ]
    return table(list(columns), lines)


def _lungs_table(segmentation: Mapping[str, Any]) -> str:
    """Dice and 95th-percentile Hausdorff distance (pixels at 256×256) of each member, their mean, and the ensemble."""
    lines = []
    for reference, part in segmentation["by_reference"].items():
        ensemble, mean = part["ensemble"], part["members_mean"]
        for name, one in {**part["members"], "mean of the members": mean}.items():
            lines.append([reference, str(part["n"]), name, _number(one["dice"]), "", f"{one['hausdorff_95']:.1f}"])
        dice = f"**{with_interval(ensemble, 'dice')}**"
        lines.append([reference, str(part["n"]), "**ensemble**", dice, _number(ensemble["dice_least"]), f"{ensemble['hausdorff_95']:.1f}"])
    return table(["masks", "n", "network", "Dice", "least", "HD95"], lines)


def with_interval(part: Mapping[str, Any], key: str, interval: str | None = None) -> str:
    """Value and interval; "–" in its place where there are too few patients for one."""
    bounds: list[float] | None = part[interval or f"{key}_ci"]
    return f"{part[key]:.3f} " + ("–" if bounds is None else f"[{bounds[0]:.3f}, {bounds[1]:.3f}]")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))
