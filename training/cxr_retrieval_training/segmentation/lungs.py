"""What a trained segmenter finds in every radiograph of a split, found once and kept beside it: lungs for the embedder,
probabilities for the student.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.contract import IMAGE, IMAGE_SIZE, LUNGS
from cxr_retrieval.errors import UsageError
from cxr_retrieval.progress import progress_bar
from cxr_retrieval_training.checkpoints import load_checkpoint, mixed_precision, on_device
from cxr_retrieval_training.cpu_engine import CpuEngine
from cxr_retrieval_training.data.datasets import Images, load_images
from cxr_retrieval_training.segmentation.segmenter import SURE, LungSegmenter
from cxr_retrieval_training.shipped import as_shipped

_CHUNK = 64


def load_segmenter(checkpoint: Path, member: str | None = None, *, shipped: bool = True) -> LungSegmenter:
    """The ensemble of `cxr train segmentation`, or one of its members by itself, in evaluation mode.

    Args:
        shipped: With the numbers that ship; otherwise as trained, which training can go on from.
    """
    state = load_checkpoint(checkpoint)
    segmenter = LungSegmenter(state["config"]["members"])
    segmenter.load_state_dict(state["model"])
    if member is not None:
        if member not in segmenter.members:
            expected = ", ".join(segmenter.members)
            raise UsageError(f"{checkpoint.name} has no member {member}", expected=expected, next_step="correct lungs_from")
        segmenter.members = nn.ModuleDict({member: segmenter.members[member]})
    return as_shipped(segmenter, IMAGE) if shipped else segmenter.eval()


def find_lungs(checkpoint: Path, rows: Sequence[ManifestRow], split: str, device: torch.device, member: str | None = None) -> Images:
    """LUNGS `[n, 2, 256, 256]` of the rows, from `<checkpoint's folder>/lungs-<split>-<hash>.npy` as far as they are there."""
    return _find("lungs", _Lungs(load_segmenter(checkpoint, member)), LUNGS.shape, checkpoint.parent, rows, split, device)


def find_probabilities(checkpoint: Path, rows: Sequence[ManifestRow], split: str, device: torch.device) -> Images:
    """The ensemble's mean probability of lung `[n, 1, 256, 256]`, 0…255 for 0…1, from `probabilities-<split>-<hash>.npy` likewise."""
    return _find("probabilities", _Probability(load_segmenter(checkpoint)), IMAGE.shape, checkpoint.parent, rows, split, device)


class _Lungs(nn.Module):
    """LUNGS alone."""

    def __init__(self, segmenter: LungSegmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image: UInt8[Tensor, "batch 1 height width"]) -> UInt8[Tensor, "batch 2 height width"]:
        return self.segmenter(image)[1]


class _Probability(nn.Module):
    """Mean probability of the members, in 255ths."""

    def __init__(self, segmenter: LungSegmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image: UInt8[Tensor, "batch 1 height width"]) -> UInt8[Tensor, "batch 1 height width"]:
        return (self.segmenter.member_probabilities(image).mean(dim=0) * 255.0).round().to(torch.uint8)


def _find(
    what: str, network: nn.Module, shape: tuple[int, ...], folder: Path, rows: Sequence[ManifestRow], split: str, device: torch.device
) -> Images:
    """An interrupted run goes on after its last chunk. The hash is over the shape, how lungs are cut, the weights and the rows' files."""
    digest = hashlib.sha256(repr((shape, SURE)).encode())
    for tensor in network.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    for row in rows:
        digest.update(f"{row.image_id}\0{row.fields.get('sha256', row.path)}\n".encode())
    path = folder / f"{what}-{split}-{digest.hexdigest()[:12]}.npy"
    counter = path.with_suffix(".done")
    done = int(counter.read_text()) if counter.exists() and path.exists() else 0
    whole = None if done else (len(rows), *shape)
    found = np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=np.uint8, shape=whole)
    if done < len(rows):
        run = _on_cpu(network) if device.type == "cpu" else _on_gpu(network, device)
        with progress_bar() as bar:
            task = bar.add_task(f"finding {what} ({split})", total=len(rows), completed=done)
            for start in range(done, len(rows), _CHUNK):
                images = load_images(rows[start : start + _CHUNK])
                found[start : start + len(images)] = run(images)
                found.flush()
                counter.write_text(str(start + len(images)))
                bar.update(task, advance=len(images))
    return found


def _on_cpu(network: nn.Module) -> Callable[[Images], NDArray[np.uint8]]:
    example = torch.zeros((2, 1, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    model: Any = ov.convert_model(network, example_input=example, input=[(-1, 1, IMAGE_SIZE, IMAGE_SIZE)])
    engine = CpuEngine(model)
    return lambda images: engine(images)[0]


def _on_gpu(network: nn.Module, device: torch.device) -> Callable[[Images], NDArray[np.uint8]]:
    on_device(network, device)

    @torch.inference_mode()
    def run(images: Images) -> NDArray[np.uint8]:
        with mixed_precision(device):
            return network(torch.from_numpy(images).to(device)).cpu().numpy()

    return run
