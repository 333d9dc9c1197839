"""Makes checkpoints of the graphs that ship: `cxr build checkpoints`, the way back of `cxr build onnx`.

Whoever has a clone has the weights: can measure the parity gates on a machine and radiographs of their own, train an embedder or a student
on the lungs these networks find, or export anew when the code around the networks has changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import onnx
import torch
from onnx import numpy_helper
from torch import nn

from cxr_retrieval.contract import EMBEDDER, LUNG_SEGMENTATION, TensorSpec
from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval_build.lower_precision import with_plain_weights
from cxr_retrieval_build.onnx_export import GRAPHS, PUBLISHED, STUDENT
from cxr_retrieval_training.checkpoints import save_checkpoint
from cxr_retrieval_training.embedding.train_embedder import described_embedder
from cxr_retrieval_training.segmentation.segmenter import LungSegmenter
from cxr_retrieval_training.shipped import as_trained

FILES: Final = {LUNG_SEGMENTATION: "segmenter.pt", EMBEDDER: "embedder.pt", STUDENT: "student.pt", PUBLISHED: "published.pt"}
"""Graph → checkpoint; the attention map has no weights."""


def write_checkpoints(repository: Path, out: Path) -> list[Path]:
    """Writes a checkpoint of each graph with weights (of those that a repository may lack, if there is one) into a folder, or none.

    Exported again they give the same weights. Batch norms, folded on export, are there and change nothing.

    Raises:
        UsageError: The folder holds one of the files already.
        SetupError: A graph is absent, or was exported before graphs said how their networks are built.
    """
    checkpoints: dict[Path, dict[str, Any]] = {}
    for graph in GRAPHS:
        source = repository / graph.file
        if graph.name not in FILES or (graph.name in (STUDENT, PUBLISHED) and not source.is_file()):
            continue
        path = out / FILES[graph.name]
        if path.exists():
            raise UsageError(f"{path}: already exists", expected="a folder without it", next_step="remove it, or give another folder")
        checkpoints[path] = _checkpoint(source, graph.leaf.inputs[0], graph.leaf.name == EMBEDDER)
    for path, checkpoint in checkpoints.items():
        save_checkpoint(path, checkpoint)
    return list(checkpoints)


def _checkpoint(source: Path, takes: TensorSpec, embedder: bool) -> dict[str, Any]:
    if not source.is_file():
        raise SetupError(f"{source}: no such graph", expected="a model repository with weights", next_step="check --repository")
    model = with_plain_weights(onnx.load(source))
    told = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    if "checkpoint" not in told:
        raise SetupError(
            f"{source}: does not say how its network is built", expected="a graph of `cxr build onnx`", next_step="export it again"
        )
    about = told["checkpoint"]
    network: nn.Module = described_embedder(about) if embedder else LungSegmenter(about["config"]["members"])
    shipped = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in model.graph.initializer}
    shipped |= {name: torch.zeros(held) if isinstance(held, int) else shipped[held] for name, held in told["stored_as"].items()}
    return {"model": as_trained(network, shipped, takes).state_dict(), **about}
