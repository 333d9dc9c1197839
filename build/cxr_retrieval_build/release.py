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

from cxr_retrieval.contract import LEAVES
from cxr_retrieval_build.onnx_export import announce_version, export, load_networks, weights_version
from cxr_retrieval_build.parity import as_report, compare, parity_inputs, require_parity


def release(segmenter: Path, embedder: Path, repository: Path, console: Console) -> dict[str, Any]:
    """Writes `<model>/1/model.onnx`, `parity.json` and the ensemble's model version.

    Raises:
        UsageError: A checkpoint cannot be used.
        SetupError: An output misses its tolerance; the repository is then unchanged.
    """
    networks = load_networks(segmenter, embedder)
    with tempfile.TemporaryDirectory(dir=repository, prefix=".export-") as folder:
        fresh = Path(folder)
        for leaf in LEAVES:
            console.print(f"exporting {leaf.name}")
            export(networks.modules[leaf.name], leaf, fresh / leaf.name / "1" / "model.onnx")
        console.print("comparing with PyTorch in ONNX Runtime and OpenVINO")
        results = compare(networks, fresh, parity_inputs())
        require_parity(results)
        version = weights_version(fresh)
        for leaf in LEAVES:
            target = repository / leaf.name / "1" / "model.onnx"
            target.parent.mkdir(parents=True, exist_ok=True)
            (fresh / leaf.name / "1" / "model.onnx").replace(target)
    announce_version(repository, version)
    report = {
        "model_version": version,
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0]},
        "parity": as_report(results),
    }
    (repository / "parity.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report
