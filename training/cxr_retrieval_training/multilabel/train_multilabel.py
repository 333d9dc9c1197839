"""Trains one network for all findings of a film: `cxr train multilabel`.

Haq et al. 2020, section 2.1 and 3: DenseNet-121, weighted binary cross-entropy, uncertain labels ignored, batches of 32, Adam at 1e-3, a
tenth of that at each plateau, 20 epochs; the 1024 numbers before the last layer, normalised, stand for a film. Where we deviate: films are
seen at 256×256 and grey; where no ImageNet weights are given (`--init`) it begins at random; plateaus, and the epoch that is kept, are told
by a tenth of the training patients, so that the val split is asked about once.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cxr_retrieval.cases.labels import SEPARATOR
from cxr_retrieval.cases.manifest import Manifest
from cxr_retrieval.contract import FINDING_FEATURE_SIZE
from cxr_retrieval.errors import UsageError
from cxr_retrieval.progress import progress_bar
from cxr_retrieval_training.checkpoints import (
    Checkpoint,
    append_log,
    load_checkpoint,
    mixed_precision,
    on_device,
    save_checkpoint,
    understood_as,
)
from cxr_retrieval_training.config import FindingsLoss, MultilabelConfig
from cxr_retrieval_training.data.augment import FilmAugment
from cxr_retrieval_training.data.datasets import Images, load_images
from cxr_retrieval_training.multilabel.cases import Films, films_of, findings_in, held_out
from cxr_retrieval_training.multilabel.network import FindingsNetwork, start_from
from cxr_retrieval_training.multilabel.page import Run, draw_curves, figures, markdown, read_run

CHECKPOINT: Final = "multilabel.pt"
VECTORS: Final = "vectors-{}.npz"
_SAVE_EVERY: Final = 25
"""Iterations; what a kill can lose."""
_LOOKED_AT: Final = 32
"""Films at once where nothing is learnt."""


def train_multilabel(
    config: MultilabelConfig,
    manifest: Manifest,
    out: Path,
    device: torch.device,
    column: str = "label",
    wanted: Sequence[str] = (),
    init: Path | None = None,
    beside: Sequence[Path] = (),
) -> Path:
    """Trains on the manifest's `train` rows and asks about its `val` rows; an interrupted run goes on where it was.

    Args:
        column: Of the manifest, with a film's findings.
        wanted: Findings to learn; without it those that enough films have.
        init: Optional torchvision DenseNet-121 state dict.
        beside: Folders of other runs on the same films, to be told on the page beside this one.

    Returns:
        The page `<out>/multilabel.md`. Beside it multilabel.pt, multilabel.json, roc.png and the vectors of both splits.

    Raises:
        ManifestError: A column without anything in it, no film with a finding, or one that cannot be read.
        UsageError: Too few patients, several labels of one film with `softmax`, or a run beside that is of other films.
    """
    findings = findings_in(manifest, column, config, wanted)
    train, val = (films_of(manifest, split, column, findings) for split in ("train", "val"))
    if config.loss == "softmax":
        _refuse_several(train, findings)
    others = [read_run(path) for path in beside]
    watched = held_out(train)
    images = load_images(train.rows, "train films")
    identity = {
        "config": config.model_dump(mode="json"),
        "column": column,
        "findings": list(findings),
        "data_sha256": manifest.sha256,
    }
    network = new_network(config, findings)
    if init is not None:
        start_from(network, init)
    on_device(network, device)
    best = _train(
        network, config, (images[~watched], train[~watched].stated), (images[watched], train[watched].stated), out, device, identity
    )
    network.load_state_dict(best["model"])
    seen = {"train": (train, images), "val": (val, load_images(val.rows, "val films"))}
    runs = {}
    for split, (films, pictures) in seen.items():
        features, said = look(network, pictures, device, f"vectors of {split}")
        ids = np.array([row.image_id for row in films.rows])
        np.savez(out / VECTORS.format(split), image_ids=ids, features=features, findings=said)
        runs[split] = features, said
    this = Run(out.name, (seen["train"][0].rows, runs["train"][0]), (seen["val"][0].rows, runs["val"][0]))
    found = figures(this, others, findings, runs["val"][1], val.stated, column)
    about = {
        **identity,
        "films": {split: len(films.rows) for split, (films, _) in seen.items()},
        "sources": sorted({row.source or "" for row in train.rows}),
        "date": datetime.now(tz=timezone.utc).date().isoformat(),
        **{key: best[key] for key in ("epoch", "iterations", "seconds", "watched_loss")},
        "init": "given" if init else "random",
    }
    save_checkpoint(out / CHECKPOINT, {**about, "figures": found, "model": best["model"]})
    (out / "multilabel.json").write_text(json.dumps({**about, "figures": found}, indent=2) + "\n", "utf-8")
    draw_curves(findings, runs["val"][1], val.stated, out / "roc.png")
    page = out / "multilabel.md"
    page.write_text(markdown(about, found), "utf-8")
    return page


def load_multilabel(path: Path) -> tuple[FindingsNetwork, dict[str, Any]]:
    """The network of a checkpoint, in evaluation mode, and what else the checkpoint says.

    Raises:
        UsageError: Absent, damaged, or of another command.
    """
    checkpoint = load_checkpoint(path)
    with understood_as(path, "a multi-label network", f"{CHECKPOINT} of `cxr train multilabel`"):
        network = new_network(MultilabelConfig.model_validate(checkpoint["config"]), checkpoint["findings"])
        network.load_state_dict(checkpoint.pop("model"))
    return network.eval(), checkpoint


def new_network(config: MultilabelConfig, findings: Sequence[str]) -> FindingsNetwork:
    """One that has learnt nothing yet, for these findings."""
    torch.manual_seed(config.seed)
    return FindingsNetwork(len(findings), config.image_size, exclusive=config.loss == "softmax")


def _refuse_several(films: Films, findings: Sequence[str]) -> None:
    counts = np.nansum(films.stated, axis=1)
    if (counts > 1).any():
        row = films.rows[int(np.argmax(counts))]
        several = [name for name, one in zip(findings, films.stated[int(np.argmax(counts))], strict=True) if one == 1]
        raise UsageError(
            f"{row.image_id}: several labels, and loss = softmax",
            expected="one label a film",
            got=SEPARATOR.join(several),
            next_step="take another config, or a --column with single labels",
        )


def criterion(
    kind: FindingsLoss, stated: NDArray[np.float32]
) -> Callable[[Float[Tensor, "batch findings"], Float[Tensor, "batch findings"]], Float[Tensor, ""]]:
    """The loss of logits beside what is stated (NaN: ignored), for films of which `stated` `[n, findings]` is known.

    weighted: −(w₊ y log p + w₋ (1 − y) log(1 − p)), w₊ the share of films without the finding, w₋ with it (as in Rajpurkar et al. 2017; the
    paper's "ratio of positive and negative samples over the total" read the other way round would weigh the common side more).
    """
    share = torch.from_numpy(np.nanmean(stated, axis=0).astype(np.float32)).clamp(1e-3, 1 - 1e-3)
    positive, negative = (1 - share, share) if kind == "weighted" else (torch.ones_like(share), torch.ones_like(share))

    def binary(logits: Tensor, target: Tensor) -> Tensor:
        known = ~torch.isnan(target)
        y = torch.where(known, target, 0.0)
        weight = torch.where(y > 0, positive.to(y.device), negative.to(y.device)) * known
        each = functional.binary_cross_entropy_with_logits(logits, y, weight, reduction="sum")
        return each / known.sum().clamp(min=1)

    def exclusive(logits: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(logits, target)

    return exclusive if kind == "softmax" else binary


def _train(
    network: FindingsNetwork,
    config: MultilabelConfig,
    train: tuple[Images, NDArray[np.float32]],
    watched: tuple[Images, NDArray[np.float32]],
    out: Path,
    device: torch.device,
    identity: dict[str, Any],
) -> Checkpoint:
    """The checkpoint of the epoch that did best on the watched patients."""
    images, stated = train
    loss_of = criterion(config.loss, stated)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=config.plateau_epochs - 1, threshold=1e-3)
    augment = FilmAugment().to(device) if config.augmented else torch.nn.Identity()
    last, best = out / "multilabel-last.pt", out / "multilabel-best.pt"
    done, seconds, least = 0, 0.0, math.inf
    if last.exists():
        state = load_checkpoint(last, expected=identity)
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        plateau.load_state_dict(state["plateau"])
        done, seconds, least = state["iteration"], state["seconds"], state["least"]
    an_epoch = max(1, len(images) // config.batch_size)
    with progress_bar() as bar:
        task = bar.add_task("findings", total=config.epochs * an_epoch, completed=done)
        for iteration in range(done, config.epochs * an_epoch):
            started = time.monotonic()
            epoch, step = divmod(iteration, an_epoch)
            order = np.random.default_rng([config.seed, epoch]).permutation(len(images))
            chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
            torch.manual_seed(config.seed * 1_000_003 + iteration)
            batch = augment(torch.from_numpy(images[chosen]).to(device)).float()
            network.train()
            with mixed_precision(device):
                logits = network.logits(network.features(batch))
            loss = loss_of(logits.float(), torch.from_numpy(stated[chosen]).to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            seconds += time.monotonic() - started
            bar.update(task, advance=1, description=f"findings, epoch {epoch + 1}/{config.epochs}, loss {loss.item():.3f}")
            record: dict[str, object] = {"iteration": iteration + 1, "loss": loss.item(), "seconds": seconds}
            if step + 1 == an_epoch:
                record["watched_loss"] = found = _loss_on(network, *watched, loss_of, device)
                record["learning_rate"] = optimizer.param_groups[0]["lr"]
                plateau.step(found)
                if found < least:
                    least = found
                    told = {"epoch": epoch + 1, "iterations": iteration + 1, "seconds": seconds, "watched_loss": found}
                    save_checkpoint(best, {"model": network.state_dict(), **told, **identity})
            append_log(out, record)
            if (iteration + 1) % _SAVE_EVERY == 0 or step + 1 == an_epoch:
                kept = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "plateau": plateau.state_dict()}
                save_checkpoint(last, {**kept, "iteration": iteration + 1, "seconds": seconds, "least": least, **identity})
    return load_checkpoint(best, expected=identity)


@torch.inference_mode()
def _loss_on(
    network: FindingsNetwork,
    images: Images,
    stated: NDArray[np.float32],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> float:
    network.eval()
    total = 0.0
    for start in range(0, len(images), _LOOKED_AT):
        batch = torch.from_numpy(images[start : start + _LOOKED_AT]).to(device).float()
        with mixed_precision(device):
            logits = network.logits(network.features(batch))
        total += len(batch) * float(loss_of(logits.float(), torch.from_numpy(stated[start : start + _LOOKED_AT]).to(device)))
    return total / len(images)


@torch.inference_mode()
def look(network: FindingsNetwork, images: Images, device: torch.device, what: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """FINDING_FEATURES `[n, 1024]` and FINDINGS `[n, findings]` of films, in fp32, as served."""
    network.eval()
    features, said = (
        np.empty((len(images), FINDING_FEATURE_SIZE), np.float32),
        np.empty((len(images), network.head.out_features), np.float32),
    )
    with progress_bar() as bar:
        task = bar.add_task(what, total=len(images))
        for start in range(0, len(images), _LOOKED_AT):
            some = slice(start, start + _LOOKED_AT)
            found = network(torch.from_numpy(images[some]).to(device))
            features[some], said[some] = (one.cpu().numpy() for one in found)
            bar.update(task, advance=len(found[0]))
    return features, said
