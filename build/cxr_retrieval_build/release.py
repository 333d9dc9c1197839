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
from cxr_retrieval.serving.choices import PARITY_REPORT, Segmentation
from cxr_retrieval_build.onnx_export import GRAPHS, STUDENT, announce_versions, export, load_networks, weights_version
from cxr_retrieval_build.parity import as_report, compare, parity_inputs, require_parity
from cxr_retrieval_training.checkpoints import load_checkpoint


def release(segmenter: Path, embedder: Path, student: Path | None, repository: Path, console: Console) -> dict[str, Any]:
    """Writes the graphs, `parity.json` and the model versions; takes away what was derived from the graphs before.

    Raises:
        UsageError: A checkpoint cannot be used.
        SetupError: An output misses its tolerance; the repository is then unchanged.
    """
    networks = load_networks(segmenter, embedder, student)
    checkpoints = {LUNG_SEGMENTATION: segmenter, EMBEDDER: embedder, STUDENT: student}
    with tempfile.TemporaryDirectory(dir=repository, prefix=".export-") as folder:
        fresh = Path(folder)
        for graph in GRAPHS:
            if graph.name in networks:
                console.print(f"exporting {graph.name}")
                checkpoint = checkpoints.get(graph.name)
                about = load_checkpoint(checkpoint) if checkpoint is not None else None
                export(networks[graph.name], graph.leaf, fresh / graph.file, about)
        console.print("comparing with PyTorch in ONNX Runtime and OpenVINO")
        results = compare(networks, fresh, parity_inputs())
        require_parity(results)
        version = weights_version(fresh)
        of_student = weights_version(fresh, Segmentation.student) if student is not None else ""
        for graph in GRAPHS:
            target = repository / graph.file
            target.parent.mkdir(parents=True, exist_ok=True)
            for old in (target, target.with_name(f"{target.stem}.int8.onnx")):
                old.unlink(missing_ok=True)
            if graph.name in networks:
                (fresh / graph.file).replace(target)
    announce_versions(repository, version, of_student)
    report = {
        "model_version": version,
        "student_model_version": of_student,
        "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0]},
        "parity": as_report(results),
    }
    (repository / PARITY_REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report
