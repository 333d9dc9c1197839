"""`cxr train outcome`: films looked at, learners compared on patients they have not seen, and what is served fitted on all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from cxr_retrieval.cases.manifest import Manifest
from cxr_retrieval.contract import OUTCOME_PARTS
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval_training.checkpoints import load_checkpoint, save_checkpoint, understood_as
from cxr_retrieval_training.config import OutcomeConfig
from cxr_retrieval_training.outcome.cases import Cases, choose, look_at
from cxr_retrieval_training.outcome.crossvalidation import cross_validate, figures, folds_of, steps
from cxr_retrieval_training.outcome.learners import Given, fit_predictor
from cxr_retrieval_training.outcome.network import OutcomeNetwork, empty_network
from cxr_retrieval_training.outcome.page import draw_calibration, draw_curves, markdown

CHECKPOINT = "outcome.pt"


@dataclass(frozen=True)
class Progress:
    """Who is told how far it is: of `films` and of `fits` first how many there are, then of each that is done."""

    begin: Callable[[str, int], None] = lambda *_: None
    advance: Callable[[str, int], None] = lambda *_: None


def train_outcome(
    config: OutcomeConfig,
    manifest: Manifest,
    triton: TritonClient,
    out: Path,
    outcomes: Sequence[str],
    within_h: float | None = None,
    progress: Progress = Progress(),
) -> Path:
    """Writes outcome.pt, outcome.json, outcome.md and its pictures into `out`; returns the page.

    Raises:
        ManifestError: A column or a label is missing, or a film cannot be used.
        UsageError: Too few patients for the folds.
        InferenceError: Triton cannot serve.
    """
    rows, facts, became = choose(manifest, config.labels, config.facts, outcomes, within_h)
    patients = np.array([row.patient for row in rows], np.str_)
    for name, came in became.items():  # refused before the films are looked at
        known = np.isfinite(came)
        folds_of(name, came[known], patients[known], config)
    progress.begin("films", len(rows))
    features = look_at(rows, triton, out, lambda count: progress.advance("films", count))
    cases = Cases(patients, features, facts, became)
    progress.begin("fits", steps(config) * len(became))
    found: dict[str, dict[str, Any]] = {}
    predictors = []
    with threadpool_limits(1):  # of two threads each waits for the other longer than such small sums take
        for name in became:
            held, known = cross_validate(cases, name, config, lambda: progress.advance("fits", 1))
            found[name] = figures(held)
            draw_curves(held, out / f"roc-{name}.png")
            draw_calibration(held, out / f"calibration-{name}.png")
            calibrations = [held.calibration(held.served(part)) for part in OUTCOME_PARTS]
            predictors.append(fit_predictor(Given.of(cases)[known], held.came, config, calibrations))
    about = {
        "config": config.model_dump(mode="json"),
        "labels": list(config.labels),
        "facts": list(config.facts),
        "known": np.isfinite(facts).mean(axis=0).round(3).tolist(),
        "outcomes": list(became),
        "within_h": within_h,
        "model_version": triton.model_version,
        "data_sha256": manifest.sha256,
        "sources": sorted({row.source or "" for row in rows}),
        "date": datetime.now(tz=timezone.utc).date().isoformat(),
    }
    save_checkpoint(out / CHECKPOINT, {**about, "figures": found, "state": OutcomeNetwork(predictors).state_dict()})
    (out / "outcome.json").write_text(json.dumps({**about, "figures": found}, indent=2) + "\n", "utf-8")
    page = out / "outcome.md"
    page.write_text(markdown(about, found), "utf-8")
    return page


def load_outcome(path: Path) -> tuple[OutcomeNetwork, dict[str, Any]]:
    """The network of a checkpoint, in evaluation mode, and what else the checkpoint says.

    Raises:
        UsageError: Absent, damaged, or of another command.
    """
    checkpoint = load_checkpoint(path)
    with understood_as(path, "an outcome", f"{CHECKPOINT} of `cxr train outcome`"):
        network = empty_network(checkpoint)
        network.load_state_dict(checkpoint.pop("state"))
    return network.eval(), checkpoint
