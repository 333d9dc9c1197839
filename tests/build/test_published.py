"""The graphs that ship, made into networks again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from cxr_retrieval_build.parity import parity_inputs
from cxr_retrieval_build.published import write_checkpoints
from cxr_retrieval_training.embedding.train_embedder import load_embedder
from cxr_retrieval_training.segmentation.lungs import load_segmenter
from tests_support import cosine


def test_shipped_graphs_can_be_read_back(repository: Path, tmp_path: Path) -> None:
    """And what comes of them computes what ships: group norms, and layers that both members of the embedder share, included."""
    segmenter, embedder, student, *_ = write_checkpoints(repository, tmp_path)
    images = parity_inputs(per_class=1)
    lungs = images
    for path, file in ((student, "student.onnx"), (segmenter, "model.onnx")):
        session = onnxruntime.InferenceSession(repository / "lung_segmentation" / "1" / file)
        expected: Any = session.run(["LUNG_MASK", "LUNGS"], {"IMAGE": images})
        with torch.inference_mode():
            mask, lungs, _ = (tensor.numpy() for tensor in load_segmenter(path)(torch.from_numpy(images)))
        assert 0 < mask.mean() < 255
        assert (expected[0] != mask).mean() < 1e-4
        assert np.abs(expected[1].astype(int) - lungs).max() <= 1
    names = ["EMBEDDING", "APPEARANCE"]
    vectors: Any = onnxruntime.InferenceSession(repository / "embedder" / "1" / "model.onnx").run(names, {"LUNGS": lungs})
    with torch.inference_mode():
        again = load_embedder(embedder, torch.device("cpu"))(torch.from_numpy(lungs))
    for one, other in zip(vectors, again, strict=False):
        assert cosine(one, other.numpy()) > 0.99999
