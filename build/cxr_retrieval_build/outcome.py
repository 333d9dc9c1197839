"""`cxr build outcome`: a trained outcome model → a folder that Triton serves: graph, configuration, card.

In production Triton's ONNX Runtime backend runs it on a CPU, where a film takes less than a millisecond; embedded, OpenVINO does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from cxr_retrieval.contract import (
    CARD_PARAMETER,
    FEATURE_SIZE,
    MODEL_VERSION_PARAMETER,
    LeafSpec,
    outcome_leaf,
)
from cxr_retrieval.serving.repository import write_config
from cxr_retrieval_build.further import further_config, new_folder, require_parity
from cxr_retrieval_build.onnx_export import save, traced
from cxr_retrieval_build.parity import Arrays
from cxr_retrieval_training.outcome.crossvalidation import served_rows
from cxr_retrieval_training.outcome.network import OutcomeNetwork
from cxr_retrieval_training.outcome.train_outcome import load_outcome

TOLERANCE: Final = 1e-4
"""Greatest difference of a probability from PyTorch's in any runtime."""
_INPUTS: Final = 256


def build_outcome(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Writes the folder, whole or not at all; returns how far each runtime is from PyTorch.

    Raises:
        UsageError: The checkpoint cannot be used.
        SetupError: `out` is there already, or a runtime misses the tolerance.
    """
    with new_folder(out) as fresh:
        network, about = load_outcome(checkpoint)
        leaf = outcome_leaf(len(about["facts"]), len(about["outcomes"]))
        save(traced(network, leaf), fresh / "1" / "model.onnx")
        parity = _parity(network, leaf, fresh / "1" / "model.onnx", about)
        write_config(fresh, _config(leaf, about))
        (fresh / "CARD.md").write_text(card(about, parity), "utf-8")
    return {"model": str(out), "model_version": about["model_version"], "parity": parity, "tolerance": TOLERANCE}


def _parity(network: OutcomeNetwork, leaf: LeafSpec, graph: Path, about: Mapping[str, Any]) -> dict[str, float]:
    """Runtime → greatest difference of a probability, on made-up features as large as those trained on, half of the facts known."""
    random = np.random.default_rng(0)
    usual = {name.rpartition("predictors.0.")[2]: values.numpy() for name, values in network.named_buffers()}
    features = usual["scaled_image.mean"] * random.normal(1, 1, (_INPUTS, FEATURE_SIZE))
    facts = random.normal(usual["facts.medians"], 10, (_INPUTS, len(about["facts"])))
    known = random.integers(0, 2, facts.shape)
    inputs: Arrays = {spec.name: np.asarray(part, np.float32) for spec, part in zip(leaf.inputs, (features, facts, known), strict=True)}
    return require_parity(network, leaf, graph, inputs, TOLERANCE)


def _config(leaf: LeafSpec, about: Mapping[str, Any]) -> Any:
    told = {MODEL_VERSION_PARAMETER: about["model_version"], CARD_PARAMETER: json.dumps(_told(about), sort_keys=True)}
    return further_config(leaf, told)


def _told(about: Mapping[str, Any]) -> dict[str, Any]:
    """What clients are told: the order of the tensors, and how well what is served does."""
    figures = {}
    for name, one in about["figures"].items():
        parts = {row["part"]: {key: row[key] for key in ("learner", "auc", "auc_ci")} for row in served_rows(one)}
        figures[name] = {"n": one["n"], "with": one["with"], "patients": one["patients"], "parts": parts}
    kept = ("facts", "outcomes", "within_h", "labels", "date", "data_sha256")
    return {**{key: about[key] for key in kept}, "figures": figures}


def card(about: Mapping[str, Any], parity: Mapping[str, float]) -> str:
    """CARD.md: data, figures, what is known to confound."""
    made = about["provenance"]
    within = "at any time of the stay" if about["within_h"] is None else f"within {about['within_h']:g} hours of the film"
    known = ", ".join(f"{name} ({share:.0%})" for name, share in zip(about["facts"], about["known"], strict=True))
    lines = [
        "# Outcome",
        "**Research use only. Not for diagnosis, not for decisions about a patient.**",
        f"Says how likely {', '.join(about['outcomes'])} is, {within}, for films labelled {', '.join(about['labels'])} "
        "(Zhong et al. 2020, 3.4): a random forest on the film's features, one on the facts, a Deep & Cross network on both. "
        "Log odds are calibrated on patients that each fold held out.",
        f"- Embedder: model version {about['model_version']}, frozen. Another one's features mean something else, and are refused.",
        f"- Data: manifest with SHA-256 {about['data_sha256']}, sources {', '.join(about['sources'])}.",
        f"- Facts, and how often each was known: {known}.",
        f"- Made {about['date']} by commit {made['commit']}, cxr-retrieval {made['cxr_retrieval']}, PyTorch {made['torch']}, with "
        f"`{json.dumps(about['config'], sort_keys=True)}`.",
        f"- Parity with PyTorch: {', '.join(f'{runtime} within {gap:.1e}' for runtime, gap in parity.items())} (limit {TOLERANCE:g}).",
        *(_section(name, one) for name, one in about["figures"].items()),
        "## What confounds it",
        "Patients came to it as their hospital chose, and films as their publishers did: what is predicted is who was given it "
        "there and then, beds and customs included, not who needs it. Which facts are known at all may tell of the outcome. Films of one "
        "patient are no independent cases; the intervals count patients. In another hospital none of these figures holds until it is "
        "measured there.",
    ]
    return "\n\n".join(lines) + "\n"


def _section(name: str, one: Mapping[str, Any]) -> str:
    table = [
        f"| {row['part']} | {row['learner']} | {row['auc']:.3f} | {_ends(row['auc_ci'])} | {row['brier']:.3f} | {row['ece']:.3f} |"
        for row in served_rows(one)
    ]
    added = one["features_add"]
    return "\n".join(
        [
            f"## {name}: {one['with']} of {one['n']} films, {one['patients_with']} of {one['patients']} patients",
            "",
            f"Cross-validated, {one['folds']} folds by patient; to the area of the facts the film adds {added['auc']:+.3f} "
            f"({_ends(added['auc_ci'])}).",
            "",
            "| rests on | learner | area under the curve | 95 % (patients) | Brier | calibration error |",
            "|---|---|---|---|---|---|",
            *table,
        ]
    )


def _ends(ends: list[float] | None) -> str:
    return "–" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
