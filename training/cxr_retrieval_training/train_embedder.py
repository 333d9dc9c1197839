"""Trains the attention embedder on lungs alone: `cxr train embedder`.

Sections 2.4.1 and 2.4.3: multi-similarity loss with α = 2, β = 20, λ = 0.5 and hard mining (Wang et al. 2019), batches of 16
images of each class, Adam. The paper starts from ImageNet weights with learning rate 3e-5. From random weights that does
not get going: all embeddings start out alike (cosine > 0.999), where the gradient of a pair loss vanishes; the loss stayed
at its collapsed value of 1.60 for 150 iterations. The shipped config therefore begins with a proxy loss (normalised softmax,
Zhai & Wu 2019), whose gradient does not vanish there, and goes on with the published loss; images grow in stages.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_metric_learning.losses import MultiSimilarityLoss, NormalizedSoftmaxLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import Tensor, nn

from cxr_retrieval.contract import LABELS
from cxr_retrieval.errors import UsageError
from cxr_retrieval.manifest import Manifest, ManifestRow
from cxr_retrieval.progress import progress_bar
from cxr_retrieval_training.augment import EmbeddingAugment
from cxr_retrieval_training.checkpoints import load_checkpoint, save_checkpoint
from cxr_retrieval_training.config import EmbedderConfig
from cxr_retrieval_training.datasets import Images, load_images
from cxr_retrieval_training.embedder import Embedder
from cxr_retrieval_training.segmenter import LungSegmenter
from cxr_retrieval_training.train_segmenter import on_device, resized

SAVE_EVERY = 25
"""Iterations; what a kill can lose."""


def train_embedder(
    config: EmbedderConfig, manifest: Manifest, segmenter: Path, out: Path, device: torch.device, init: Path | None = None
) -> Path:
    """Trains on the manifest's `train` rows, watching `val` rows, and writes `<out>/embedder.pt`.

    Resumes where it stopped; every iteration draws its batch and augmentation from (seed, iteration) alone.

    Args:
        segmenter: Checkpoint of `cxr train segmentation`; its lungs are what the embedder sees.
        init: Optional torchvision ResNet-50 state dict (for those who have ImageNet weights).

    Returns:
        The checkpoint: {model, proxies, optimizer, iteration, seconds, config, data_sha256}.
    """
    rows = {split: manifest.require(split=split, labels=LABELS) for split in ("train", "val")}
    checkpoint = load_checkpoint(segmenter)
    masker = LungSegmenter(checkpoint["config"]["members"])
    masker.load_state_dict(checkpoint["model"])
    lungs = {split: cached_lungs(masker, rows[split], out / f"lungs-{split}.npy", device) for split in rows}
    labels = {split: np.array([LABELS.index(row.label) for row in rows[split]]) for split in rows}

    identity = {"config": config.model_dump(mode="json"), "data_sha256": manifest.sha256}
    path = out / "embedder.pt"
    torch.manual_seed(config.seed)
    model = Embedder(config.embedding_size, attention=config.attention)
    if init is not None:
        load_resnet50(model, init)
    on_device(model, device)
    proxies = NormalizedSoftmaxLoss(len(LABELS), config.embedding_size, temperature=0.05).to(device)
    criterion = MultiSimilarityLoss(config.alpha, config.beta, config.base)  # pyright: ignore[reportArgumentType] (ints in its annotations)
    miner = MultiSimilarityMiner(epsilon=config.miner_epsilon)
    optimizer = torch.optim.Adam([*model.parameters(), *proxies.parameters()])
    done, seconds = 0, 0.0
    if path.exists():
        state = load_checkpoint(path, expected=identity)
        model.load_state_dict(state["model"])
        proxies.load_state_dict(state["proxies"])
        optimizer.load_state_dict(state["optimizer"])
        done, seconds = state["iteration"], state["seconds"]

    plan = [stage for stage in config.stages for _ in range(stage.iterations)]
    augment = {stage.image_size: EmbeddingAugment(stage.image_size).to(device) for stage in config.stages}
    with progress_bar() as bar:
        task = bar.add_task("embedder", total=len(plan), completed=done)
        for iteration in range(done, len(plan)):
            started = time.monotonic()
            stage = plan[iteration]
            torch.manual_seed(config.seed * 1_000_003 + iteration)
            chosen = class_balanced_batch(labels["train"], config.images_per_class, np.random.default_rng([config.seed, iteration]))
            pixels = augment[stage.image_size](resized(lungs["train"][chosen], stage.image_size, device))
            target = torch.from_numpy(labels["train"][chosen]).to(device)
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * min(1.0, (iteration + 1) / max(1, config.warm_up_iterations))
            model.train()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                embedding, _, _ = model(pixels.to(memory_format=torch.channels_last))
            if stage.loss == "multi_similarity":
                loss = criterion(embedding, target, miner(embedding, target))
            else:
                loss = proxies(embedding, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            seconds += time.monotonic() - started
            bar.update(task, advance=1, description=f"embedder loss {loss.item():.3f}")
            finished = iteration + 1
            record: dict[str, float] = {"iteration": finished, "image_size": stage.image_size, "loss": loss.item(), "seconds": seconds}
            if finished % config.validate_every == 0 or finished == len(plan):
                record["val_recall_at_1"] = leave_one_out_recall(
                    embed_all(model, lungs["val"], stage.image_size, device), labels["val"], rows["val"]
                )
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            if finished % SAVE_EVERY == 0 or finished == len(plan):
                save_checkpoint(
                    path,
                    {
                        "model": model.state_dict(),
                        "proxies": proxies.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "iteration": finished,
                        "seconds": seconds,
                        **identity,
                    },
                )
    return path


def class_balanced_batch(labels: NDArray[np.int64], per_class: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Indices of `per_class` random images of each class: "a minibatch of size T×N" (section 2.4.1)."""
    classes = np.unique(labels)
    drawn = [random.choice(np.flatnonzero(labels == c), per_class, replace=bool((labels == c).sum() < per_class)) for c in classes]
    return np.concatenate(drawn)


def load_resnet50(model: Embedder, weights: Path) -> None:
    """Copies a torchvision ResNet-50 state dict into f1, f2 and layer4; the attention module and head stay random.

    Raises:
        UsageError: Not such a state dict.
    """
    source = load_checkpoint(weights)
    stages = {
        "conv1": model.f1[0],
        "bn1": model.f1[1],
        "layer1": model.f1[4],
        "layer2": model.f1[5],
        "layer3": model.f2,
        "layer4": model.rest[0],
    }
    for name, module in stages.items():
        part = {key[len(name) + 1 :]: value for key, value in source.items() if key.startswith(f"{name}.")}
        try:
            module.load_state_dict(part)
        except RuntimeError as error:
            raise UsageError(
                f"{weights}: not a torchvision ResNet-50",
                expected=f"the tensors of {name}",
                got=f"{len(part)} of them",
                next_step="give the state dict of torchvision.models.resnet50",
            ) from error


@torch.inference_mode()
def cached_lungs(masker: LungSegmenter, rows: Sequence[ManifestRow], path: Path, device: torch.device, batch_size: int = 16) -> Images:
    """LUNGS of every row, computed once and kept in `path`; an interrupted run goes on after its last batch."""
    shape = (len(rows), 1, 256, 256)
    counter = path.with_suffix(".done")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = int(counter.read_text()) if counter.exists() and path.exists() else 0
    lungs = np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=np.uint8, shape=None if done else shape)
    if done < len(rows):
        images = load_images(rows, f"{len(rows)} images")
        on_device(masker, device).eval()
        with progress_bar() as bar:
            task = bar.add_task("finding lungs", total=len(rows), completed=done)
            for start in range(done, len(rows), batch_size):
                batch = torch.from_numpy(images[start : start + batch_size]).to(device)
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    lungs[start : start + batch_size] = masker(batch)[1].cpu().numpy()
                lungs.flush()
                counter.write_text(str(start + len(batch)))
                bar.update(task, advance=len(batch))
    return lungs


@torch.inference_mode()
def embed_all(model: nn.Module, lungs: Images, image_size: int, device: torch.device, batch_size: int = 32) -> NDArray[np.float32]:
    """Embeddings `[n, d]` in evaluation mode, at the size now trained on."""
    model.eval()
    parts: list[Tensor] = []
    for start in range(0, len(lungs), batch_size):
        batch = resized(lungs[start : start + batch_size], image_size, device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            parts.append(model(batch)[0].cpu())
    return torch.cat(parts).numpy()


def leave_one_out_recall(embeddings: NDArray[np.float32], labels: NDArray[np.int64], rows: Sequence[ManifestRow]) -> float:
    """Recall@1 of each image among the others of the set, images of the same patient left out: a watch on training,
    macro-averaged over classes. The reported figures come from `cxr evaluate`.
    """
    patients = np.array([row.patient for row in rows])
    similarity = embeddings @ embeddings.T
    similarity[patients[:, None] == patients[None, :]] = -np.inf
    hits = labels[similarity.argmax(axis=1)] == labels
    return float(np.mean([hits[labels == c].mean() for c in np.unique(labels)]))
