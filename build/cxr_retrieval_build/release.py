"""Exports into a side folder, checks parity, then puts everything in place at once."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import torch
from rich.console import Console

from cxr_retrieval.contract import EMBEDDER, LUNG_SEGMENTATION
from cxr_retrieval.serving.choices import PARITY_REPORT, Networks
from cxr_retrieval_build.onnx_export import GRAPHS, PUBLISHED, STUDENT, announce_versions, export, load_networks, weights_version
from cxr_retrieval_build.parity import as_report, compare, parity_inputs, require_parity
from cxr_retrieval_training.checkpoints import load_checkpoint


def release(
    segmenter: Path, embedder: Path, student: Path | None, published: Path | None, repository: Path, console: Console
) -> dict[str, Any]:
    """Writes the graphs, `parity.json` and the model versions; takes away what was derived from the graphs before.

    Args:
        student: Small segmentation network.
        published: Embedder of `embedder-published.toml`.

    Raises:
        UsageError: A checkpoint cannot be used.
        SetupError: An output misses its tolerance; the repository is then unchanged.
    """
    modules = load_networks(segmenter, embedder, student, published)
    checkpoints = {LUNG_SEGMENTATION: segmenter, EMBEDDER: embedder, STUDENT: student, PUBLISHED: published}
    with tempfile.TemporaryDirectory(dir=repository, prefix=".export-") as folder:
        fresh = Path(folder)
        for graph in GRAPHS:
            if graph.name in modules:
                console.print(f"exporting {graph.name}")
                checkpoint = checkpoints.get(graph.name)
                about = load_checkpoint(checkpoint) if checkpoint is not None else None
                export(modules[graph.name], graph.leaf, fresh / graph.file, about)
        console.print("comparing with PyTorch in ONNX Runtime and OpenVINO")
        results = compare(modules, fresh, parity_inputs())
        require_parity(results)
        made = {Networks.ensemble: True, Networks.student: student is not None, Networks.published: published is not None}
        versions = {networks: weights_version(fresh, networks) for networks, there in made.items() if there}
        for graph in GRAPHS:
            target = repository / graph.file
            target.parent.mkdir(parents=True, exist_ok=True)
            for old in (target, target.with_name(f"{target.stem}.int8.onnx")):
                old.unlink(missing_ok=True)
            if graph.name in modules:
                (fresh / graph.file).replace(target)
    announce_versions(repository, versions)
    report = {
        **{networks.version_parameter: versions.get(networks, "") for networks in Networks},
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0]},
        "parity": as_report(results),
    }
    (repository / PARITY_REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report
