"""Trains the five members one after another, `cxr train segmentation`, and one small network on what they find, `cxr train student`.

Section 2.3: Adam, learning rate 1e-4, batch 8, 200 epochs, the listed augmentations (`configs/segmentation-published.toml`). The
shipped config trains for minutes rather than days: a larger learning rate that falls to a fiftieth, small images first, and the epoch
kept that did best on val. The loss is not published; we sum binary cross-entropy and soft Dice.

The student is not in the paper. It learns the ensemble's mean probability (knowledge distillation: Hinton et al. 2015, section 2,
at temperature 1) on every radiograph of the split, not on the few with drawn masks alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segmentation_models_pytorch.losses import BINARY_MODE, DiceLoss, SoftBCEWithLogitsLoss
from torch import Tensor, nn
from torch.nn import functional

from cxr_retrieval.cases.manifest import Manifest, ManifestRow
from cxr_retrieval.errors import UsageError
from cxr_retrieval.evaluation.intervals import interval, patient_weights
from cxr_retrieval.progress import progress_bar
from cxr_retrieval.retrieval.query import MIN_LUNG_AGREEMENT
from cxr_retrieval_training.checkpoints import Checkpoint, append_log, load_checkpoint, mixed_precision, on_device, save_checkpoint
from cxr_retrieval_training.config import SegmentationConfig, SegmenterName
from cxr_retrieval_training.data.augment import SegmentationAugment
from cxr_retrieval_training.data.datasets import Images, load_images, load_lung_masks, with_lung_masks
from cxr_retrieval_training.segmentation.lungs import find_probabilities, load_segmenter
from cxr_retrieval_training.segmentation.metrics import dice_coefficient, hausdorff_95
from cxr_retrieval_training.segmentation.segmenter import LungSegmenter, NormalisedMember


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


@dataclass(frozen=True)
class _Run:
    """What the members of one training run share. `start` is what they start from, `stem` what their files are called by."""

    config: SegmentationConfig
    train: Masked
    val: Masked
    out: Path
    device: torch.device
    identity: Mapping[str, object]
    stem: str = "segmenter"
    soft: bool = False
    start: Mapping[str, Tensor] | None = None


def train_segmentation(config: SegmentationConfig, manifest: Manifest, out: Path, device: torch.device) -> Path:
    """Trains what is missing and joins the members into `<out>/segmenter.pt`.

    Resumes each member after its last finished epoch. The result does not depend on where it was interrupted: the
    random state of every epoch follows from seed, member and epoch alone.

    Returns:
        The joined checkpoint: {model, config, data_sha256, report}; the report also goes to `<out>/segmentation.json`.
    """
    train, val = load_masked(manifest, "train"), load_masked(manifest, "val")
    identity = {"config": config.model_dump(mode="json"), "data_sha256": manifest.sha256}
    return _train_members(_Run(config, train, val, out, device, identity), out / "segmentation.json")


def train_student(config: SegmentationConfig, manifest: Manifest, teacher: Path, out: Path, device: torch.device) -> Path:
    """Trains one network to find what the teacher's ensemble finds, starting from the ensemble's member of that architecture.

    Returns:
        `<out>/student.pt`, as `train_segmentation` writes it; the report also goes to `<out>/student.json`.

    Raises:
        UsageError: The config names several members, or one that the teacher lacks.
    """
    if len(config.members) != 1:
        raise UsageError("a student is one network", expected="one name in members", got=", ".join(config.members), next_step="choose one")
    rows = manifest.require(split="train")
    start = load_segmenter(teacher, config.members[0], shipped=False).members[config.members[0]].state_dict()
    train = Masked(load_images(rows, f"{len(rows)} train images"), find_probabilities(teacher, rows, "train", device), rows)
    identity = {
        "config": config.model_dump(mode="json"),
        "data_sha256": manifest.sha256,
        "teacher_sha256": sha256(teacher.read_bytes()).hexdigest(),
    }
    val = load_masked(manifest, "val")
    return _train_members(_Run(config, train, val, out, device, identity, "student", soft=True, start=start), out / "student.json")


def _train_members(run: _Run, report_path: Path) -> Path:
    """Trains each member, joins the best checkpoints, reports."""
    joined = LungSegmenter(run.config.members)
    members: dict[str, object] = {}
    for name in run.config.members:
        checkpoint = _train_member(name, run)
        joined.members[name].load_state_dict(checkpoint["model"])
        members[name] = {"dice": checkpoint["dice"], "epoch": checkpoint["epoch"], "seconds": checkpoint["seconds"]}
    report = {"train_images": len(run.train.rows), "members": members, **segmentation_report(joined, run.val, run.device)}
    report_path.write_text(json.dumps(report, indent=2) + "\n")
    path = run.out / f"{run.stem}.pt"
    save_checkpoint(path, {"model": joined.state_dict(), "report": report, **run.identity})
    return path


def _train_member(name: SegmenterName, run: _Run) -> Checkpoint:
    """Trains one member and returns its best checkpoint: {model, dice, epoch, seconds, …}."""
    config, train, val, out, device = run.config, run.train, run.val, run.out, run.device
    last, best = out / f"{run.stem}-{name}-last.pt", out / f"{run.stem}-{name}-best.pt"
    sizes = [stage.image_size for stage in config.stages for _ in range(stage.epochs)]
    served = sizes[-1]
    seed = config.seed * 1000 + config.members.index(name)
    torch.manual_seed(seed)
    member = on_device(NormalisedMember(name, imagenet=config.init == "imagenet"), device)
    if run.start is not None:
        member.load_state_dict(run.start)
    learning_rate = config.member_learning_rates.get(name, config.learning_rate)
    optimizer = torch.optim.Adam(member.parameters(), lr=learning_rate)
    steps = len(sizes) * (len(train.images) // config.batch_size)
    least = learning_rate / 50 if config.schedule == "cosine" else learning_rate
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=least)
    done, seconds, best_dice, best_epoch = 0, 0.0, -1.0, 0
    if last.exists():
        checkpoint = load_checkpoint(last, expected=run.identity)
        member.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        done, seconds = checkpoint["epoch"], checkpoint["seconds"]
        best_dice, best_epoch = checkpoint["best_dice"], checkpoint["best_epoch"]
    augment = SegmentationAugment(soft=run.soft).to(device)
    overlap, entropy = DiceLoss(BINARY_MODE), SoftBCEWithLogitsLoss()
    with progress_bar() as bar:
        task = bar.add_task(name, total=len(sizes), completed=done)
        for epoch in range(done + 1, len(sizes) + 1):
            if best_epoch and epoch - best_epoch > config.patience_epochs:
                break
            started = time.monotonic()
            size = sizes[epoch - 1]
            torch.manual_seed(seed * 1000 + epoch)
            member.train()
            losses: list[float] = []
            for image, mask in _batches(train, config.batch_size, size, np.random.default_rng([seed, epoch]), device):
                pixels, target = augment(image, mask)
                with mixed_precision(device):
                    logits = member(pixels.to(memory_format=torch.channels_last)).float()
                loss = entropy(logits, target) + overlap(logits, target)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            seconds += time.monotonic() - started
            record: dict[str, object] = {
                "member": name,
                "epoch": epoch,
                "image_size": size,
                "loss": float(np.mean(losses)),
                "seconds": seconds,
            }
            shared = {"model": member.state_dict(), "epoch": epoch, "seconds": seconds, **run.identity}
            if size == served:  # smaller images are a warm-up; how it would do on them is nobody's question
                record["val_dice"] = dice = float(np.mean(member_dice(member, val, device)))
                if dice > best_dice or config.keep == "last":
                    best_dice, best_epoch = dice, epoch
                    save_checkpoint(best, {**shared, "dice": dice})
            append_log(out, record)
            save_checkpoint(
                last,
                {
                    **shared,
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "best_dice": best_dice,
                    "best_epoch": best_epoch,
                },
            )
            bar.update(task, advance=1, description=f"{name} loss {np.mean(losses):.3f} best Dice {max(best_dice, 0):.3f}")
    return load_checkpoint(best)


def _batches(data: Masked, size: int, image_size: int, order: np.random.Generator, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches at `image_size`; a last, smaller one is left out."""
    shuffled = order.permutation(len(data.images))
    for start in range(0, len(shuffled) - size + 1, size):
        chosen = np.sort(shuffled[start : start + size])
        yield resized(data.images[chosen], image_size, device), resized(data.masks[chosen], image_size, device)


def resized(pixels: Images, image_size: int, device: torch.device) -> Tensor:
    """uint8 `[n, 1, 256, 256]` to the device at another size, anti-aliased."""
    batch = torch.from_numpy(np.array(pixels)).to(device)
    if batch.shape[-1] == image_size:
        return batch
    return functional.interpolate(batch.float(), size=(image_size, image_size), mode="bilinear", antialias=True).round().to(torch.uint8)


@torch.inference_mode()
def member_dice(member: nn.Module, data: Masked, device: torch.device, batch_size: int = 16) -> NDArray[np.float64]:
    """Dice coefficient of one member per image, at 256×256, no islands removed."""
    member.eval()
    scores: list[float] = []
    for start in range(0, len(data.images), batch_size):
        pixels = torch.from_numpy(data.images[start : start + batch_size]).to(device).float()
        with mixed_precision(device):
            found = (member(pixels.to(memory_format=torch.channels_last)).float() >= 0).cpu().numpy()
        scores += [dice_coefficient(one, truth > 127) for one, truth in zip(found, data.masks[start : start + batch_size], strict=True)]
    return np.array(scores)


@torch.inference_mode()
def segmentation_report(segmenter: LungSegmenter, data: Masked, device: torch.device, batch_size: int = 8) -> dict[str, Any]:
    """Dice coefficient and 95th-percentile Hausdorff distance (pixels at 256×256), by who drew the reference (mask_source).

    Returns:
        `by_reference`: mask source → {n, members: {name: {dice, hausdorff_95}}, members_mean, ensemble}, the ensemble's
        figures being those of the finished mask (averaged, islands removed) with 95 % bootstrap intervals over patients;
        `doubtful`: images whose ensemble Dice is below 0.85 or whose agreement is below the client's limit.
    """
    on_device(segmenter, device).eval()
    names = [*segmenter.members, "ensemble"]
    dice, distance = (np.zeros((len(names), len(data.images))) for _ in range(2))
    agreed = np.zeros(len(data.images))
    for start in range(0, len(data.images), batch_size):
        image = torch.from_numpy(data.images[start : start + batch_size]).to(device)
        with mixed_precision(device):
            each = (segmenter.member_probabilities(image) >= 0.5).cpu().numpy()[:, :, 0]
            mask, _, agreement = segmenter(image)
        found = np.concatenate([each, mask.cpu().numpy()[None, :, 0] > 0])
        agreed[start : start + len(image)] = agreement[:, 0].cpu().numpy()
        for i in range(len(image)):
            truth = data.masks[start + i, 0] > 127
            dice[:, start + i] = [dice_coefficient(one, truth) for one in found[:, i]]
            distance[:, start + i] = [hausdorff_95(one, truth) for one in found[:, i]]
    drawn_by = np.array([row.fields.get("mask_source", "unknown") for row in data.rows])
    patients = np.array([row.patient for row in data.rows])
    by_reference: dict[str, Any] = {}
    for source in sorted(set(drawn_by.tolist())):
        mine = drawn_by == source
        weights = patient_weights(patients[mine])
        members = {
            name: {"dice": float(dice[i, mine].mean()), "hausdorff_95": float(distance[i, mine].mean())}
            for i, name in enumerate(names[:-1])
        }
        by_reference[source] = {
            "n": int(mine.sum()),
            "members": members,
            "members_mean": {key: float(np.mean([one[key] for one in members.values()])) for key in ("dice", "hausdorff_95")},
            "ensemble": {
                "dice": float(dice[-1, mine].mean()),
                "dice_ci": interval((weights @ dice[-1, mine]) / weights.sum(axis=1)),
                "dice_least": float(dice[-1, mine].min()),
                "hausdorff_95": float(distance[-1, mine].mean()),
                "hausdorff_95_ci": interval((weights @ distance[-1, mine]) / weights.sum(axis=1)),
            },
        }
    doubtful = [
        {"image_id": row.image_id, "dice": float(score), "agreement": float(trust), "flagged": bool(trust < MIN_LUNG_AGREEMENT)}
        for row, score, trust in zip(data.rows, dice[-1], agreed, strict=True)
        if score < 0.85 or trust < MIN_LUNG_AGREEMENT
    ]
    return {"by_reference": by_reference, "doubtful": doubtful}
