"""`cxr build multilabel`: a trained network of several findings → a folder that Triton serves: graph, configuration, card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from cxr_retrieval.contract import CARD_PARAMETER, IMAGE, MODEL_VERSION_PARAMETER, MULTILABEL_LEAF
from cxr_retrieval.evaluation.intervals import in_brackets
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.phantoms import PHANTOM_FINDINGS, make_findings
from cxr_retrieval.serving.repository import write_config
from cxr_retrieval_build.further import further_config, new_folder, require_parity, version_of
from cxr_retrieval_build.onnx_export import save, traced
from cxr_retrieval_build.parity import Arrays
from cxr_retrieval_training.multilabel.network import FindingsNetwork
from cxr_retrieval_training.multilabel.page import retrieval_table
from cxr_retrieval_training.multilabel.train_multilabel import load_multilabel

TOLERANCE: Final = 2e-3
"""Greatest difference of a feature from PyTorch's in any runtime; a vector of 1024 numbers has unit length."""


class _Features(nn.Module):
    """FINDING_FEATURES alone."""

    def __init__(self, network: FindingsNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.network(image)[0],)


def build_multilabel(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Writes the folder, whole or not at all; returns its version, and how far each runtime is from PyTorch.

    Raises:
        UsageError: The checkpoint cannot be used.
        SetupError: `out` is there already, or a runtime misses the tolerance.
    """
    with new_folder(out) as fresh:
        trained, about = load_multilabel(checkpoint)
        network = _Features(trained).eval()
        graph = fresh / "1" / "model.onnx"
        save(traced(network, MULTILABEL_LEAF), graph)
        parity = require_parity(network, MULTILABEL_LEAF, graph, film_inputs(), TOLERANCE)
        version = version_of(graph)
        kept = ("findings", "column", "films", "date", "data_sha256")
        told = {**{key: about[key] for key in kept}, "areas": about["figures"]["areas"]}
        parameters = {MODEL_VERSION_PARAMETER: version, CARD_PARAMETER: json.dumps(told, sort_keys=True)}
        write_config(fresh, further_config(MULTILABEL_LEAF, parameters, on_gpu=True))
        (fresh / "CARD.md").write_text(card(about, version, parity), "utf-8")
    return {"model": str(out), "model_version": version, "parity": parity, "tolerance": TOLERANCE}


def film_inputs() -> Arrays:
    """Phantoms, one for each finding and one of none, and a picture of noise and one of nothing at all."""
    films = [letterbox(make_findings(700 + n, names)[0].pixels)[0] for n, names in enumerate(((), *((one,) for one in PHANTOM_FINDINGS)))]
    noise = np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8)
    return {IMAGE.name: np.stack([*films, noise, np.zeros_like(noise)])[:, None]}


def card(about: Mapping[str, Any], version: str, parity: Mapping[str, float]) -> str:
    """CARD.md: data, figures, what is known to confound."""
    made, config = about["provenance"], about["config"]
    areas = [
        f"| {one['finding']} | {one['with']} of {one['with'] + one['without']} | {one['auc']:.3f}{in_brackets(one['auc_ci'])} |"
        for one in about["figures"]["areas"]
    ]
    lines = [
        f"# Multi-label network {version}",
        "**Research use only. Not for diagnosis, not for decisions about a patient.**",
        "DenseNet-121 (Huang et al. 2017) trained as in Haq et al. 2020; 1024 features of unit length stand for a film. It sees the whole "
        f"frame at {config['image_size']}×{config['image_size']}.",
        f"- Data: manifest with SHA-256 {about['data_sha256']}, column {about['column']}, {about['films']['train']} train films, sources "
        f"{', '.join(about['sources'])}; began with weights {about['init']}.",
        f"- Findings: {', '.join(about['findings'])}.",
        f"- Made {about['date']} by commit {made['commit']}, cxr-retrieval {made['cxr_retrieval']}, PyTorch {torch.__version__}, with "
        f"`{json.dumps(config, sort_keys=True)}`; epoch {about['epoch']} is kept, by the loss of a tenth of the training patients.",
        f"- Parity with PyTorch: {', '.join(f'{runtime} within {gap:.1e}' for runtime, gap in parity.items())} (limit {TOLERANCE:g}).",
        f"## {about['films']['val']} val films, asked about once",
        "\n".join(["| finding | films | area under the curve, 95 % over patients |", "|---|---|---|", *areas]),
        retrieval_table(about["figures"]["retrieval"]),
        "## What confounds it",
        "Labels are what the manifest says, with its mistakes; a finding that is not stated counts as absent. The whole frame shows "
        "which hospital took a film, and where findings come with hospitals, the network may tell these apart instead. In another hospital "
        "none of these figures holds until it is measured there.",
    ]
    return "\n\n".join(lines) + "\n"
