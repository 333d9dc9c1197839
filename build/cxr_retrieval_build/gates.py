"""Parity gates: how far a runtime and precision may take the answers from PyTorch in fp32, on real validation images.

Measured end to end, as a query is answered: the mask, the embedding made of what that mask leaves, the ten nearest of the train split and
the vote. Only the queries change; the gallery stays as fp32 embedded it, so a passed gate also says that a gallery need not be embedded
again when the precision changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from torch import nn

from cxr_retrieval.cases.manifest import Manifest
from cxr_retrieval.contract import EMBEDDER, IMAGE, LUNG_MASK, LUNG_SEGMENTATION, LUNGS
from cxr_retrieval.errors import SetupError
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, PARTS, comparable, side_by_side
from cxr_retrieval.progress import track
from cxr_retrieval.retrieval.voting import DEFAULT_K, weighted_vote
from cxr_retrieval.serving.choices import (
    EMBEDDED_RUNTIME,
    ENGINE_GRAPHS_RUNTIME,
    PARITY_REPORT,
    EnginePrecision,
    Networks,
    Precision,
    missed,
)
from cxr_retrieval.serving.repository import graph_file, has_graph
from cxr_retrieval_build.lower_precision import engine_graph, to_int8
from cxr_retrieval_training.cpu_engine import CpuEngine
from cxr_retrieval_training.data.datasets import load_images
from cxr_retrieval_training.embedding.train_embedder import load_embedder
from cxr_retrieval_training.segmentation.lungs import find_lungs, load_segmenter
from cxr_retrieval_training.segmentation.metrics import dice_coefficient

Images = NDArray[np.uint8]
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Answers:
    """LUNG_MASK `[n, 1, 256, 256]` of images, and `[n, 120]` by which they are compared at the default balance."""

    masks: Images
    embeddings: Vectors


@dataclass(frozen=True)
class Gallery:
    """What images are compared by `[m, 120]`, with their labels."""

    embeddings: Vectors
    labels: Sequence[str]


@dataclass(frozen=True)
class Checkpoints:
    """What was exported: the networks that find the lungs (five, or the student), and the embedder (the tuned one, or the published)."""

    networks: Networks
    segmenter: Path
    embedder: Path


@dataclass(frozen=True)
class Limit:
    """The least that passes, or the most where `at_most`."""

    value: float
    at_most: bool = False

    def passes(self, value: float) -> bool:
        """Whether a measured value does."""
        return value <= self.value if self.at_most else value >= self.value


_LIMITS: Final = {
    "mask_dice": Limit(0.995),
    "embedding_cosine_p1": Limit(0.999),
    "top10_overlap": Limit(0.98),
    "vote_accuracy_change_points": Limit(0.3, at_most=True),
}
_INT8_LIMITS: Final = {
    "mask_dice": Limit(0.99),
    "embedding_cosine_p1": Limit(0.99),
    "top10_overlap": Limit(0.95),
    "vote_accuracy_change_points": Limit(1.0, at_most=True),
}


def limits(precision: str) -> dict[str, Limit]:
    """Name of a figure → its limit."""
    return _INT8_LIMITS if precision == "int8" else _LIMITS


def measure_gate(reference: Answers, got: Answers, gallery: Gallery, labels: Sequence[str], precision: str) -> dict[str, Any]:
    """The four figures of one precision, each with its limit and whether it passes.

    Mean Dice coefficient of the masks; 1st percentile of the embeddings' cosine similarity; mean share of the reference's ten nearest that
    are found; change of the vote's accuracy in points. Anything not finite passes nothing.
    """
    cosine = (reference.embeddings * got.embeddings).sum(axis=1)
    nearest = [_nearest(answers.embeddings, gallery) for answers in (reference, got)]
    overlap = [len(set(a) & set(b)) / DEFAULT_K for (a, _), (b, _) in zip(*nearest, strict=True)]
    right = [
        np.mean(
            [
                weighted_vote([(gallery.labels[i], s) for i, s in zip(*one, strict=True)]).label == label
                for one, label in zip(each, labels, strict=True)
            ]
        )
        for each in nearest
    ]
    values = {
        "mask_dice": float(np.mean([dice_coefficient(b > 0, a > 0) for a, b in zip(reference.masks, got.masks, strict=True)])),
        "embedding_cosine_p1": float(np.percentile(cosine, 1)),
        "top10_overlap": float(np.mean(overlap)),
        "vote_accuracy_change_points": float(100 * abs(right[1] - right[0])),
    }
    figures = {
        name: {
            "value": round(values[name], 5),
            "limit": limit.value,
            "passed": bool(np.isfinite(values[name]) and limit.passes(values[name])),
        }
        for name, limit in limits(precision).items()
    }
    return {"n": len(labels), "figures": figures, "passed": all(one["passed"] for one in figures.values())}


def record(repository: Path, gates: Sequence[dict[str, Any]]) -> None:
    """Puts the gates into `parity.json`, in the place of earlier ones of the same networks, runtime and precision."""
    path = repository / PARITY_REPORT
    report = json.loads(path.read_text("utf-8"))

    def key(gate: dict[str, Any]) -> tuple[str, ...]:
        return gate["networks"], gate["runtime"], gate["precision"]

    kept = {key(gate): gate for gate in [*report.get("gates", []), *gates]}
    report["gates"] = [kept[name] for name in sorted(kept)]
    path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def require_passed(gates: Sequence[dict[str, Any]]) -> None:
    """Fails for a gate that was missed.

    Raises:
        SetupError: Which, by how much.
    """
    beyond = [f"{gate['networks']} in {gate['runtime']} {gate['precision']}: {missed(gate)}" for gate in gates if not gate["passed"]]
    if beyond:
        raise SetupError("a parity gate was missed", got="; ".join(beyond), next_step="do not ship this precision with these weights")


class Measure:
    """What all gates of one set of weights share: the val images, PyTorch's answers to them, and the gallery of the train split."""

    def __init__(self, repository: Path, manifest: Manifest, checkpoints: Checkpoints) -> None:
        val, train = manifest.require(split="val"), manifest.require(split="train")
        self.repository, self.networks = repository, checkpoints.networks
        self.images = load_images(val, f"{len(val)} val images")
        self.labels = [row.label for row in val]
        lungs = find_lungs(checkpoints.segmenter, train, "train", torch.device("cpu"))
        self.gallery = Gallery(embed(repository, self.networks, lungs), [row.label for row in train])
        segmenter, embedder = load_segmenter(checkpoints.segmenter), load_embedder(checkpoints.embedder, torch.device("cpu")).eval()
        self.reference = pytorch_answers(segmenter, embedder, self.images)

    def gate(self, runtime: str, precision: str, answers: Answers) -> dict[str, Any]:
        """The entry of `parity.json`."""
        about = {"networks": self.networks.value, "runtime": runtime, "precision": precision}
        return {**about, **measure_gate(self.reference, answers, self.gallery, self.labels, precision)}


def measure_gates(repository: Path, manifest: Manifest, checkpoints: Checkpoints) -> list[dict[str, Any]]:
    """All runtimes and precisions that there are graphs for."""
    measure = Measure(repository, manifest, checkpoints)
    precisions = [Precision.fp32, Precision.bf16]
    if has_graph(repository, LUNG_SEGMENTATION, checkpoints.networks, int8=True):
        precisions.append(Precision.int8)
    gates = []
    for precision in precisions:
        graph = graph_file(repository, LUNG_SEGMENTATION, checkpoints.networks, int8=precision is Precision.int8)
        answers = openvino_answers(measure, graph, precision)
        gates.append(measure.gate(EMBEDDED_RUNTIME, precision.value, answers))
    engines = [EnginePrecision.fp32, EnginePrecision.fp16, *([EnginePrecision.int8] if Precision.int8 in precisions else [])]
    return gates + [measure.gate(ENGINE_GRAPHS_RUNTIME, one.value, engine_graph_answers(measure, one)) for one in engines]


def build_int8(repository: Path, manifest: Manifest, checkpoints: Checkpoints, images: int) -> list[dict[str, Any]]:
    """Quantises the segmentation graph on radiographs of the train split drawn at random, and keeps it if it passes its gate.

    Returns:
        That gate, and the one of the graph that TensorRT builds from, whose activations all have a sign; both recorded in `parity.json`.
        Missing the second keeps `cxr build engines` from building int8, and nothing else.

    Raises:
        SetupError: The gate was missed; the repository is then as before but for the record.
    """
    train = manifest.require(split="train")
    drawn = [train[i] for i in np.random.default_rng(0).permutation(len(train))[:images]]
    calibration = load_images(drawn, f"{len(drawn)} images to calibrate on")
    source = graph_file(repository, LUNG_SEGMENTATION, checkpoints.networks)
    target = source.with_name(f"{source.stem}.int8.onnx")
    fresh = target.with_name(f".{target.name}")
    measure = Measure(repository, manifest, checkpoints)
    try:
        onnx.save(to_int8(onnx.load(source), {IMAGE.name: calibration}), fresh)
        gate = measure.gate(EMBEDDED_RUNTIME, "int8", openvino_answers(measure, fresh, Precision.int8))
        record(repository, [gate])
        require_passed([gate])
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)
    of_engines = measure.gate(ENGINE_GRAPHS_RUNTIME, "int8", engine_graph_answers(measure, EnginePrecision.int8))
    record(repository, [of_engines])
    return [gate, of_engines]


def table(gates: Sequence[dict[str, Any]]) -> Table:
    """Figures beside their limits, for people."""
    shown = Table("networks", "runtime", "precision", *(name.replace("_", " ") for name in _LIMITS), "")
    for gate in gates:
        figures = [f"{gate['figures'][name]['value']:.4f} ({gate['figures'][name]['limit']:g})" for name in _LIMITS]
        verdict = Text("passed", "green") if gate["passed"] else Text("missed", "yellow")
        shown.add_row(gate["networks"], gate["runtime"], gate["precision"], *figures, verdict)
    return shown


@torch.inference_mode()
def pytorch_answers(segmenter: nn.Module, embedder: nn.Module, images: Images) -> Answers:
    """The reference: fp32, one image at a time."""
    masks, embeddings = np.empty_like(images), []
    for i in track(range(len(images)), "PyTorch fp32"):
        mask, lungs, _ = segmenter(torch.from_numpy(images[i : i + 1]))
        masks[i] = mask[0].numpy()
        embeddings.append(_compared_by([part.numpy() for part in embedder(lungs)]))
    return Answers(masks, np.concatenate(embeddings))


def openvino_answers(measure: Measure, graph: Path, precision: Precision) -> Answers:
    """As `cxr serve` computes it: the segmentation graph in the precision, the embedder in fp32."""
    hint = "bf16" if precision is Precision.bf16 else "f32"
    masks, lungs, _ = CpuEngine(graph, hint)(measure.images, f"OpenVINO {precision.value}")
    return Answers(masks, embed(measure.repository, measure.networks, lungs))


def embed(repository: Path, networks: Networks, lungs: Images) -> Vectors:
    """What LUNGS are compared by, from the served embedder."""
    path = graph_file(repository, EMBEDDER, networks)
    return _compared_by(CpuEngine(path)(lungs, "embedding"))


def engine_graph_answers(measure: Measure, precision: EnginePrecision) -> Answers:
    """The graphs that TensorRT builds from, executed by ONNX Runtime on the CPU.

    Says what the graph's own rounding does, not what TensorRT makes of it.
    """
    images = measure.images
    segment, embedder = (
        onnxruntime.InferenceSession(engine_graph(measure.repository, leaf, precision, measure.networks).SerializeToString())
        for leaf in (LUNG_SEGMENTATION, EMBEDDER)
    )
    masks, embeddings = np.empty_like(images), []
    for i in track(range(len(images)), f"ONNX Runtime {precision.value}"):
        found: Any = segment.run([LUNG_MASK.name, LUNGS.name], {IMAGE.name: images[i : i + 1]})
        masks[i] = found[0][0]
        parts: Any = embedder.run([part.name for part in PARTS], {LUNGS.name: found[1]})
        embeddings.append(_compared_by(parts))
    return Answers(masks, np.concatenate(embeddings))


def _compared_by(outputs: Sequence[NDArray[Any]]) -> Vectors:
    """`[n, 120]` of the embedder's outputs, of which PARTS are the first."""
    return comparable(side_by_side({part.name: values for part, values in zip(PARTS, outputs, strict=False)}), DEFAULT_BALANCE)


def _nearest(embeddings: Vectors, gallery: Gallery) -> list[tuple[list[int], list[float]]]:
    similarity = embeddings @ gallery.embeddings.T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :DEFAULT_K]
    return [(one.tolist(), row[one].tolist()) for one, row in zip(order, similarity, strict=True)]
