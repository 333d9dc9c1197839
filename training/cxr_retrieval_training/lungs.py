"""The lungs of every radiograph of a split, found once by a trained segmenter and kept beside it for all embedder runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray

from cxr_retrieval.contract import IMAGE_SIZE
from cxr_retrieval.errors import UsageError
from cxr_retrieval.manifest import ManifestRow
from cxr_retrieval.progress import progress_bar
from cxr_retrieval_training.checkpoints import load_checkpoint, mixed_precision, on_device
from cxr_retrieval_training.datasets import Images, load_images
from cxr_retrieval_training.segmenter import LungSegmenter

_CHUNK = 64


def load_segmenter(checkpoint: Path, member: str | None = None) -> LungSegmenter:
    """The ensemble of `cxr train segmentation`, or one of its members by itself, in evaluation mode."""
    state = load_checkpoint(checkpoint)
    segmenter = LungSegmenter(state["config"]["members"])
    segmenter.load_state_dict(state["model"])
    if member is None:
        return segmenter.eval()
    if member not in segmenter.members:
        raise UsageError(f"{checkpoint.name} has no member {member}", expected=", ".join(segmenter.members), next_step="correct lungs_from")
    alone = LungSegmenter((member,))
    alone.members[member] = segmenter.members[member]
    return alone.eval()


def find_lungs(checkpoint: Path, rows: Sequence[ManifestRow], split: str, device: torch.device, member: str | None = None) -> Images:
    """LUNGS `[n, 1, 256, 256]` of the rows, from `<checkpoint's folder>/lungs-<split>-<hash>.npy` as far as they are there.

    An interrupted run goes on after its last chunk. The hash is over the networks' weights and the rows' files.
    """
    segmenter = load_segmenter(checkpoint, member)
    digest = hashlib.sha256()
    for tensor in segmenter.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    for row in rows:
        digest.update(f"{row.image_id}\0{row.fields.get('sha256', row.path)}\n".encode())
    path = checkpoint.parent / f"lungs-{split}-{digest.hexdigest()[:12]}.npy"
    counter = path.with_suffix(".done")
    done = int(counter.read_text()) if counter.exists() and path.exists() else 0
    shape = (len(rows), 1, IMAGE_SIZE, IMAGE_SIZE)
    lungs = np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=np.uint8, shape=None if done else shape)
    if done < len(rows):
        run = _on_cpu(segmenter) if device.type == "cpu" else _on_gpu(segmenter, device)
        with progress_bar() as bar:
            task = bar.add_task(f"finding lungs ({split})", total=len(rows), completed=done)
            for start in range(done, len(rows), _CHUNK):
                images = load_images(rows[start : start + _CHUNK])
                lungs[start : start + len(images)] = run(images)
                lungs.flush()
                counter.write_text(str(start + len(images)))
                bar.update(task, advance=len(images))
    return lungs


def _on_cpu(segmenter: LungSegmenter) -> Callable[[Images], NDArray[np.uint8]]:
    """OpenVINO, the CPU engine that serves, is about three times as fast as PyTorch here."""
    example = torch.zeros((2, 1, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    model: Any = ov.convert_model(segmenter, example_input=example, input=[(-1, 1, IMAGE_SIZE, IMAGE_SIZE)])
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "THROUGHPUT"})

    def run(images: Images) -> NDArray[np.uint8]:
        out = np.empty_like(images)
        queue: Any = ov.AsyncInferQueue(compiled)

        def keep(request: Any, start: int) -> None:
            found = request.get_output_tensor(1).data
            out[start : start + len(found)] = found

        queue.set_callback(keep)
        for start in range(0, len(images), 4):
            queue.start_async({0: images[start : start + 4]}, start)
        queue.wait_all()
        return out

    return run


def _on_gpu(segmenter: LungSegmenter, device: torch.device) -> Callable[[Images], NDArray[np.uint8]]:
    on_device(segmenter, device)

    @torch.inference_mode()
    def run(images: Images) -> NDArray[np.uint8]:
        with mixed_precision(device):
            return segmenter(torch.from_numpy(images).to(device))[1].cpu().numpy()

    return run
