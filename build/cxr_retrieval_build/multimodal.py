"""`cxr build multimodal`: films and reports in one subspace → two folders that Triton serves, each with graph, configuration and card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from cxr_retrieval.contract import (
    CARD_PARAMETER,
    MODEL_VERSION_PARAMETER,
    MULTIMODAL_IMAGE_LEAF,
    MULTIMODAL_TEXT_LEAF,
    TEXT_LENGTH,
    TOKENIZER_PARAMETER,
    TOKENS,
)
from cxr_retrieval.serving.repository import write_config
from cxr_retrieval_build.further import further_config, new_folder, require_parity, version_of
from cxr_retrieval_build.multilabel import film_inputs
from cxr_retrieval_build.onnx_export import save, traced
from cxr_retrieval_build.parity import Arrays
from cxr_retrieval_training.config import MultilabelConfig
from cxr_retrieval_training.multilabel.network import FindingsNetwork
from cxr_retrieval_training.multilabel.train_multilabel import new_network
from cxr_retrieval_training.multimodal.network import Multimodal
from cxr_retrieval_training.multimodal.page import retrieval_table
from cxr_retrieval_training.multimodal.train_multimodal import load_multimodal

TOLERANCE: Final = 2e-3
"""Greatest difference of a number of a vector of unit length from PyTorch's, in any runtime."""


class _Film(nn.Module):
    """IMAGE → IMAGE_VECTOR: the network below, and the image branch."""

    def __init__(self, base: FindingsNetwork, network: Multimodal) -> None:
        super().__init__()
        self.base, self.image = base, network.image

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.image(self.base(image)[0]),)


class _Text(nn.Module):
    """TOKENS → TEXT_VECTOR."""

    def __init__(self, network: Multimodal) -> None:
        super().__init__()
        self.text = network.text

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (self.text(tokens),)


def build_multimodal(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Writes both folders, whole or not at all; returns their version, and how far each runtime is from PyTorch.

    Raises:
        UsageError: The checkpoint cannot be used.
        SetupError: `out` is there already, or a runtime misses the tolerance.
    """
    with new_folder(out) as fresh:
        network, state, about = load_multimodal(checkpoint)
        below = about["multilabel"]
        base = new_network(MultilabelConfig.model_validate(below["config"]), below["findings"])
        base.load_state_dict(state)
        made = {
            MULTIMODAL_IMAGE_LEAF: (_Film(base, network).eval(), film_inputs()),
            MULTIMODAL_TEXT_LEAF: (_Text(network).eval(), _text_inputs(network)),
        }
        parity = dict[str, dict[str, float]]()
        for leaf, (module, inputs) in made.items():
            graph = fresh / leaf.name / "1" / "model.onnx"
            save(traced(module, leaf), graph)
            parity[leaf.name] = require_parity(module, leaf, graph, inputs, TOLERANCE)
        version = version_of(*(fresh / leaf.name / "1" / "model.onnx" for leaf in made))
        kept = ("labels", "column", "films", "with_report", "reports_alone", "date", "data_sha256")
        told = json.dumps({**{key: about[key] for key in kept}, "figures": about["figures"]["1.0"]}, sort_keys=True)
        words = card(about, version, parity)
        for leaf in made:
            reads = {TOKENIZER_PARAMETER: about["tokenizer"]} if leaf is MULTIMODAL_TEXT_LEAF else {}
            parameters = {MODEL_VERSION_PARAMETER: version, CARD_PARAMETER: told, **reads}
            write_config(fresh / leaf.name, further_config(leaf, parameters, on_gpu=leaf is MULTIMODAL_IMAGE_LEAF))
            (fresh / leaf.name / "CARD.md").write_text(words, "utf-8")
    return {"models": str(out), "model_version": version, "parity": parity, "tolerance": TOLERANCE}


def _text_inputs(network: Multimodal) -> Arrays:
    """Made-up texts of every length, one of none."""
    random = np.random.default_rng(0)
    tokens = random.integers(2, network.text.words.num_embeddings, (16, TEXT_LENGTH)).astype(np.int32)
    lengths = np.linspace(0, TEXT_LENGTH, len(tokens)).astype(int)
    return {TOKENS.name: np.where(np.arange(TEXT_LENGTH) < lengths[:, None], tokens, 0).astype(np.int32)}


def card(about: Mapping[str, Any], version: str, parity: Mapping[str, Mapping[str, float]]) -> str:
    """CARD.md: data, figures, what is known to confound."""
    made, films, told = about["provenance"], about["films"], about["with_report"]
    config, below = about["config"], about["multilabel"]
    gaps = ", ".join(f"{model} in {runtime} within {gap:.1e}" for model, found in parity.items() for runtime, gap in found.items())
    learnt = f"{films['train']} train films, {told['train']} with a report"
    if config["folds"]:
        both = films["train"] + films["val"], told["train"] + told["val"]
        learnt = f"{both[0]} films, {both[1]} with a report (the figures are of folds that were held out)"
    hidden = f"Words that begin so were hidden: {', '.join(config['hidden'])}." if config["hidden"] else "No word was hidden."
    lines = [
        f"# Films and reports {version}",
        "**Research use only. Not for diagnosis, not for decisions about a patient.**",
        "A film and a text each become 128 numbers of one subspace (after Yu et al. 2021): a perceptron on the features of a DenseNet-121, "
        "two layers of a transformer on subwords; trained with classification in each modality, the distance of a film and its report, and "
        "a ranking by similarity.",
        f"- Data: manifest with SHA-256 {about['data_sha256']}: {learnt}, sources {', '.join(about['sources'])}; labels of column "
        f"{about['column']}; {about['reports_alone']} reports without a film. {hidden}",
        f"- Below it, frozen: a network for {', '.join(below['findings'])}, learnt from column {below['column']} of the manifest with "
        f"SHA-256 {below['data_sha256']}.",
        f"- Made {about['date']} by commit {made['commit']}, cxr-retrieval {made['cxr_retrieval']}, PyTorch {torch.__version__}, with "
        f"`{json.dumps(config, sort_keys=True)}`.",
        f"- Parity with PyTorch: {gaps} (limit {TOLERANCE:g}).",
        f"## What is found, judged by column {about['judged_by']}",
        retrieval_table(about["figures"]["1.0"]),
        "## What confounds it",
        "Reports say what their writers thought worth saying, and what they knew besides the film. The network below sees the whole frame, "
        "and with it which hospital took a film. A text is understood as far as such words stood in the reports learnt from; others are "
        "noise. In another hospital none of these figures holds until it is measured there.",
    ]
    return "\n\n".join(lines) + "\n"
