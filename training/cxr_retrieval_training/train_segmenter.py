"""Trains the five members one after another: `cxr train segmentation`.

Section 2.3: Adam, batch 8, the listed augmentations. We train from random weights (the paper's encoders were pre-trained),
hence a larger learning rate and images that grow in stages, as the config says. The loss is not published; we sum
binary cross-entropy and soft Dice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from segmentation_models_pytorch.losses import BINARY_MODE, DiceLoss, SoftBCEWithLogitsLoss
from torch import Tensor, nn
from torch.nn import functional

from cxr_retrieval.evaluation import interval, patient_weights
from cxr_retrieval.manifest import Manifest, ManifestRow
from cxr_retrieval.progress import progress_bar
from cxr_retrieval_training.augment import SegmentationAugment
from cxr_retrieval_training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from cxr_retrieval_training.config import SegmentationConfig
from cxr_retrieval_training.datasets import Images, load_images, load_lung_masks, with_lung_masks
from cxr_retrieval_training.segmenter import LungSegmenter, NormalisedMember


@dataclass(frozen=True)
class Masked:
    """Radiographs with their lung masks, both `[n, 1, 256, 256]` uint8, and the rows they come from."""

    images: Images
    masks: Images
    rows: tuple[ManifestRow, ...]


def load_masked(manifest: Manifest, split: str) -> Masked:
    """All rows of a split that have a lung mask."""
    rows = with_lung_masks(manifest.require(split=split), manifest.path)
    return Masked(load_images(rows, f"{len(rows)} {split} images"), load_lung_masks(rows), rows)


def train_segmentation(config: SegmentationConfig, manifest: Manifest, out: Path, device: torch.device) -> Path:
    """Trains what is missing and joins the members into `<out>/segmenter.pt`.

    Resumes each member after its last finished epoch. The result does not depend on where it was interrupted: the
    random state of every epoch follows from seed, member and epoch alone.

    Returns:
        The joined checkpoint: {model, config, data_sha256, report}; the report also goes to `<out>/segmentation.json`.
    """
    train, val = load_masked(manifest, "train"), load_masked(manifest, "val")
    identity = {"config": config.model_dump(mode="json"), "data_sha256": manifest.sha256}
    joined = LungSegmenter(config.members)
    members: dict[str, object] = {}
    for name in config.members:
        checkpoint = _train_member(name, config, train, val, out, device, identity)
        joined.members[name].load_state_dict(checkpoint["model"])
        members[name] = {"dice": checkpoint["dice"], "seconds": checkpoint["seconds"]}
    report = {"train_images": len(train.rows), "members": members, "ensemble": ensemble_report(joined, val, device)}
    (out / "segmentation.json").write_text(json.dumps(report, indent=2) + "\n")
    path = out / "segmenter.pt"
    save_checkpoint(path, {"model": joined.state_dict(), "report": report, **identity})
    return path


def _train_member(
    name: str, config: SegmentationConfig, train: Masked, val: Masked, out: Path, device: torch.device, identity: Mapping[str, object]
) -> Checkpoint:
    path = out / f"segmenter-{name}.pt"
    sizes = [stage.image_size for stage in config.stages for _ in range(stage.epochs)]
    seed = config.seed * 1000 + config.members.index(name)
    torch.manual_seed(seed)
    member = on_device(NormalisedMember(name), device)
    optimizer = torch.optim.Adam(member.parameters(), lr=config.learning_rate)
    steps = len(sizes) * (len(train.images) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=config.learning_rate / 50)
    done, seconds, dice = 0, 0.0, 0.0
    if path.exists():
        checkpoint = load_checkpoint(path, expected=identity)
        member.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        done, seconds, dice = checkpoint["epochs"], checkpoint["seconds"], checkpoint["dice"]
    augment = SegmentationAugment().to(device)
    overlap, entropy = DiceLoss(BINARY_MODE), SoftBCEWithLogitsLoss()
    with progress_bar() as bar:
        task = bar.add_task(name, total=len(sizes), completed=done)
        for epoch in range(done, len(sizes)):
            started = time.monotonic()
            torch.manual_seed(seed * 1000 + epoch)
            member.train()
            for image, mask in _batches(train, config.batch_size, sizes[epoch], np.random.default_rng([seed, epoch]), device):
                pixels, target = augment(image, mask)
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    logits = member(pixels.to(memory_format=torch.channels_last)).float()
                loss = entropy(logits, target) + overlap(logits, target)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            seconds += time.monotonic() - started
            dice = float(np.mean(member_dice(member, val, device)))
            with (out / "log.jsonl").open("a") as log:
                log.write(
                    json.dumps({"member": name, "epoch": epoch + 1, "image_size": sizes[epoch], "val_dice": dice, "seconds": seconds})
                    + "\n"
                )
            save_checkpoint(
                path,
                {
                    "model": member.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "epochs": epoch + 1,
                    "seconds": seconds,
                    "dice": dice,
                    **identity,
                },
            )
            bar.update(task, advance=1, description=f"{name} Dice {dice:.3f}")
    return load_checkpoint(path)


def _batches(data: Masked, size: int, image_size: int, order: np.random.Generator, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches at `image_size`; a last, smaller one is left out."""
    shuffled = order.permutation(len(data.images))
    for start in range(0, len(shuffled) - size + 1, size):
        chosen = np.sort(shuffled[start : start + size])
        yield resized(data.images[chosen], image_size, device), resized(data.masks[chosen], image_size, device)


def on_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Moves a network, in the memory layout that convolutions on CPU (bf16) and tensor cores like best."""
    network.to(device)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing from torch's stub)


def resized(pixels: Images, image_size: int, device: torch.device) -> Tensor:
    """uint8 `[n, 1, 256, 256]` to the device at another size, anti-aliased."""
    batch = torch.from_numpy(np.array(pixels)).to(device)
    if batch.shape[-1] == image_size:
        return batch
    return functional.interpolate(batch.float(), size=(image_size, image_size), mode="bilinear", antialias=True).round().to(torch.uint8)


def member_dice(member: nn.Module, data: Masked, device: torch.device) -> NDArray[np.float64]:
    """Dice coefficient of one member per image, at 256×256, no islands removed."""
    return _dice_scores(member, lambda image: member(image.float().to(memory_format=torch.channels_last)).float() >= 0, data, device)


def ensemble_report(segmenter: LungSegmenter, data: Masked, device: torch.device) -> dict[str, dict[str, object]]:
    """Dice of the finished mask (averaged, islands removed) by who drew the reference (column mask_source).

    Returns:
        mask source → {n, mean, ci: 95 % bootstrap interval over patients, least}.
    """
    on_device(segmenter, device)
    dice = _dice_scores(segmenter, lambda image: segmenter(image)[0] > 0, data, device)
    drawn_by = np.array([row.fields.get("mask_source", "unknown") for row in data.rows])
    patients = np.array([row.patient for row in data.rows])
    report: dict[str, dict[str, object]] = {}
    for source in sorted(set(drawn_by)):
        mine = drawn_by == source
        weights = patient_weights(patients[mine])
        report[str(source)] = {
            "n": int(mine.sum()),
            "mean": float(dice[mine].mean()),
            "ci": interval((weights @ dice[mine]) / weights.sum(axis=1)),
            "least": float(dice[mine].min()),
        }
    return report


@torch.inference_mode()
def _dice_scores(
    network: nn.Module, predict: Callable[[Tensor], Tensor], data: Masked, device: torch.device, batch_size: int = 16
) -> NDArray[np.float64]:
    """Dice per image of what `predict` makes of uint8 batches, the network in evaluation mode."""
    network.eval()
    scores: list[float] = []
    for start in range(0, len(data.images), batch_size):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = predict(torch.from_numpy(data.images[start : start + batch_size]).to(device))
        truth = torch.from_numpy(data.masks[start : start + batch_size]).to(device) > 127
        scores += dice_coefficient(found, truth).tolist()
    return np.array(scores)


def dice_coefficient(predicted: Tensor, truth: Tensor) -> Tensor:
    """2·|A∩B| / (|A| + |B|) per image; 1 where both are empty."""
    both = (predicted & truth).sum(dim=(1, 2, 3))
    total = predicted.sum(dim=(1, 2, 3)) + truth.sum(dim=(1, 2, 3))
    return torch.where(total > 0, 2.0 * both / total.clamp(min=1), 1.0)
