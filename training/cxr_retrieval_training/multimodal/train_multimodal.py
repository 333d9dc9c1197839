"""Brings films and reports into one subspace: `cxr train multimodal`.

After Yu et al. 2021, of which the abstract is at hand: features of each modality, mapped into a common subspace, trained for several tasks
at once (`losses.py`). Where we deviate, or had to choose: the film's features are those of `cxr train multilabel`, frozen, so that two
cores are enough; text is read by two layers of a transformer over subwords; of a film without a report the image terms alone count. Nothing
is chosen on val: the last epoch is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold
from torch import Tensor

from cxr_retrieval.cases.manifest import Manifest
from cxr_retrieval.contract import SUBSPACE_SIZE
from cxr_retrieval.errors import ManifestError, UsageError
from cxr_retrieval.inference.tokens import require_tokenizers, tokens_of
from cxr_retrieval.progress import progress_bar
from cxr_retrieval_training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint, understood_as
from cxr_retrieval_training.config import MultimodalConfig
from cxr_retrieval_training.data.datasets import load_images
from cxr_retrieval_training.multilabel.train_multilabel import load_multilabel, look
from cxr_retrieval_training.multimodal.cases import Cases, Reports, held, names_in, read_reports, texts_in
from cxr_retrieval_training.multimodal.losses import classification, distance, likeness, ranking
from cxr_retrieval_training.multimodal.network import Multimodal
from cxr_retrieval_training.multimodal.page import Direction, draw_shares, figures, markdown, retrieved

CHECKPOINT: Final = "multimodal.pt"
_FEATURES: Final = "features.npz"
_AT_ONCE: Final = 256

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Learnt:
    """A trained network and what reads text for it."""

    network: Multimodal
    tokenizer: Any

    @torch.inference_mode()
    def images(self, features: Floats) -> Floats:
        """IMAGE_VECTOR `[n, 128]`."""
        return self.network.eval().image(torch.from_numpy(features)).numpy()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Floats:
        """TEXT_VECTOR `[n, 128]`; zeros where there is none."""
        found = np.zeros((len(texts), SUBSPACE_SIZE), np.float32)
        told = [number for number, text in enumerate(texts) if text]
        self.network.eval()
        for start in range(0, len(told), _AT_ONCE):
            some = told[start : start + _AT_ONCE]
            tokens = torch.from_numpy(tokens_of(self.tokenizer, [texts[number] for number in some]))
            found[some] = self.network.text(tokens).numpy()
        return found


def train_multimodal(
    config: MultimodalConfig,
    manifest: Manifest,
    multilabel: Path,
    out: Path,
    device: torch.device,
    column: str = "label",
    judged_by: str | None = None,
    text_column: str = "clinical_notes",
    reports: Path | None = None,
) -> Path:
    """Trains on the manifest's `train` rows and asks about its `val` rows, or, with folds, about all films with a report, fold by fold.

    Args:
        multilabel: Checkpoint of `cxr train multilabel`, whose features are a film's.
        column: Of the manifest, with the labels that are trained on. judged_by: With those by which retrieval is judged; None: the same.
        text_column: With the reports.
        reports: CSV of reports without films, to learn words from.

    Returns:
        The page `<out>/multimodal.md`; beside it multimodal.pt, multimodal.json and shares.png.

    Raises:
        ManifestError: A column without anything in it, or a film that cannot be read.
        UsageError: The checkpoint is none, or there are too few films with a report.
        SetupError: `tokenizers` is not installed.
    """
    require_tokenizers()
    base, base_about = load_multilabel(multilabel)
    judged_by = judged_by or column
    alone = None if reports is None else read_reports(reports, config.hidden)
    train, val = (_cases(manifest, split, column, judged_by, text_column, config) for split in ("train", "val"))
    _require_reports(train, val, text_column, config)
    out.mkdir(parents=True, exist_ok=True)
    looked = _look(base, base_about, (train, val), out, device)
    train, val = (_with_features(part, looked) for part in (train, val))
    torch.set_num_threads(min(2, torch.get_num_threads()))
    runs: dict[float, list[Direction]] = {}
    served: Learnt | None = None
    with progress_bar() as bar:
        shares = sorted({*config.shares, 1.0})
        parts = parts_of(train, val, config)
        task = bar.add_task("films and reports", total=len(shares) * len(parts) * config.epochs)
        for share in shares:
            found: list[list[Direction]] = []
            for gallery, queries in parts:
                learnt = fit(gallery.with_share(share, config.seed), config, alone, lambda: bar.update(task, advance=1))
                found.append(retrieved(gallery, queries, learnt.images, learnt.texts))
                served = learnt if share == 1.0 else served
            runs[share] = [Direction.joined(same) for same in zip(*found, strict=True)]
        if config.folds:  # what is served has seen all of them
            served = fit(_with_texts_of(train, val), config, alone, lambda: None)
    if served is None:
        raise AssertionError("a share of 1.0 is always trained")
    told = {str(share): figures(directions) for share, directions in runs.items()}
    about = {
        "config": config.model_dump(mode="json"),
        "column": column,
        "judged_by": judged_by,
        "text_column": text_column,
        "labels": list(names_in(manifest, column)),
        "films": {name: len(part.rows) for name, part in (("train", train), ("val", val))},
        "with_report": {name: sum(map(bool, part.texts)) for name, part in (("train", train), ("val", val))},
        "reports_alone": 0 if alone is None else len(alone.texts),
        "sources": sorted({row.source or "" for row in train.rows}),
        "data_sha256": manifest.sha256,
        "multilabel": {key: base_about[key] for key in ("config", "findings", "column", "data_sha256", "date")},
        "date": datetime.now(tz=timezone.utc).date().isoformat(),
    }
    state = {"state": served.network.state_dict(), "tokenizer": served.tokenizer.to_str(), "base": base.state_dict()}
    save_checkpoint(out / CHECKPOINT, {**about, "figures": told, **state})
    (out / "multimodal.json").write_text(json.dumps({**about, "figures": told}, indent=2) + "\n", "utf-8")
    draw_shares(told, out / "shares.png")
    page = out / "multimodal.md"
    page.write_text(markdown(about, told), "utf-8")
    return page


def load_multimodal(path: Path) -> tuple[Multimodal, dict[str, Any], dict[str, Any]]:
    """The network of a checkpoint, in evaluation mode, the state of the network below it, and what else the checkpoint says.

    Raises:
        UsageError: Absent, damaged, or of another command.
    """
    checkpoint: Checkpoint = load_checkpoint(path)
    with understood_as(path, "a multimodal network", f"{CHECKPOINT} of `cxr train multimodal`"):
        state = checkpoint.pop("state")
        labels, vocabulary = state["classifier.bias"].shape[0], state["text.words.weight"].shape[0]
        network = Multimodal(checkpoint["config"], vocabulary, labels)
        network.load_state_dict(state)
        base = checkpoint.pop("base")
    return network.eval(), base, checkpoint


def fit(cases: Cases, config: MultimodalConfig, alone: Reports | None, advance: Callable[[], None] = lambda: None) -> Learnt:
    """A network trained on these films, and on reports alone where there are some.

    Args:
        advance: Told of each epoch.
    """
    torch.manual_seed(config.seed)
    random = np.random.default_rng(config.seed)
    told = [text for text in cases.texts if text]
    tokenizer = _tokenizer([*told, *(alone.texts if alone else ())], config.vocabulary)
    network = Multimodal(config.model_dump(), tokenizer.get_vocab_size(), cases.labels.shape[1])
    terms = None if alone is None else torch.nn.Linear(SUBSPACE_SIZE, len(alone.terms))
    trained = [*network.parameters(), *(terms.parameters() if terms is not None else ())]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    features, labels = torch.from_numpy(cases.features), torch.from_numpy(cases.labels)
    tokens = torch.from_numpy(tokens_of(tokenizer, cases.texts))
    has_text = torch.tensor([bool(text) for text in cases.texts])
    others = torch.from_numpy(tokens_of(tokenizer, alone.texts)) if alone else None
    an_epoch = max(1, len(cases.rows) // config.batch_size)
    for epoch in range(config.epochs):
        order = random.permutation(len(cases.rows))
        for step in range(an_epoch):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule((epoch * an_epoch + step) / (config.epochs * an_epoch))
            chosen = torch.from_numpy(order[step * config.batch_size : (step + 1) * config.batch_size])
            network.train()
            noise = 1.0 + config.feature_noise * torch.randn(len(chosen), features.shape[1])
            image = network.image(features[chosen] * noise)
            loss = _image_terms(network, image, labels[chosen], config)
            paired = has_text[chosen]
            if paired.any():
                text = network.text(_trimmed(tokens[chosen][paired]))
                loss = loss + _text_terms(network, image, text, labels[chosen], paired, config)
            if alone is not None and others is not None and terms is not None:
                some = random.choice(len(others), min(config.report_batch, len(others)), replace=False)
                said = terms(network.text(_trimmed(others[some])) * math.sqrt(SUBSPACE_SIZE))
                loss = loss + config.report_weight * classification(said, torch.from_numpy(alone.given[some]))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        advance()
    return Learnt(network.eval(), tokenizer)


def _image_terms(network: Multimodal, image: Tensor, labels: Tensor, config: MultimodalConfig) -> Tensor:
    loss = classification(network.logits(image), labels)
    others = ~torch.eye(len(image), dtype=torch.bool)
    return loss + config.ranking_weight * ranking(image @ image.T, likeness(labels), others, config.temperature, config.sharpness)


def _text_terms(network: Multimodal, image: Tensor, text: Tensor, labels: Tensor, paired: Tensor, config: MultimodalConfig) -> Tensor:
    """A case's own report comes first, then, half as much wanted, those of cases with the same labels."""
    mine = labels[paired]
    wanted = config.label_likeness * likeness(mine)
    wanted.fill_diagonal_(1.0)
    there = torch.ones_like(wanted, dtype=torch.bool)
    similarity = image[paired] @ text.T
    both = sum(ranking(one, wanted, there, config.temperature, config.sharpness) for one in (similarity, similarity.T))
    loss = classification(network.logits(text), mine)
    return loss + config.distance_weight * distance(image[paired], text) + config.ranking_weight * both


def _schedule(done: float) -> float:
    """Of the learning rate: up for a twentieth, then down along a cosine."""
    return min(1.0, done / 0.05 + 0.02) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def _trimmed(tokens: Tensor) -> Tensor:
    """Without places that no text of the batch uses."""
    return tokens[:, : max(1, int((tokens != 0).sum(dim=1).max()))]


def _tokenizer(texts: Sequence[str], size: int) -> Any:
    """Byte-pair encoding (Sennrich et al. 2016) of lower-case words, learnt from these texts; 0 is no subword, 1 an unknown one."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    unknown = "[UNK]"
    tokenizer: Any = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, special_tokens=["[PAD]", unknown], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _cases(manifest: Manifest, split: str, column: str, judged_by: str, text_column: str, config: MultimodalConfig) -> Cases:
    rows = tuple(manifest.require(split=split))
    labels = held(rows, column, names_in(manifest, column)).astype(np.float32)
    truth = held(rows, judged_by, names_in(manifest, judged_by))
    return Cases(rows, np.empty((len(rows), 0), np.float32), labels, truth, texts_in(rows, text_column, config.hidden))


def _require_reports(train: Cases, val: Cases, column: str, config: MultimodalConfig) -> None:
    for name, part, least in (("train", train, config.batch_size), ("val", val, 0 if config.folds else 1)):
        count = sum(map(bool, part.texts))
        if count < least:
            raise ManifestError(
                f"too few {name} films with a report in column {column}",
                expected=f"{least} or more",
                got=str(count),
                next_step="correct --text-column, or add reports",
            )


def _look(base: Any, about: Mapping[str, Any], parts: Sequence[Cases], out: Path, device: torch.device) -> dict[str, Floats]:
    """Image id → features; those that an interrupted run has looked at with the same network are not looked at again."""
    path, network = (
        out / _FEATURES,
        f"{about['data_sha256']} {json.dumps(about['config'], sort_keys=True)} {about['column']} {about['epoch']}",
    )
    rows = [row for part in parts for row in part.rows]
    try:
        with np.load(path, allow_pickle=False) as kept:
            known = dict(zip(kept["image_ids"].tolist(), kept["features"], strict=True)) if str(kept["network"]) == network else {}
    except (OSError, KeyError, ValueError):
        known = {}
    missing = [row for row in rows if row.image_id not in known]
    if missing:
        base.to(device)
        found, _ = look(base, load_images(missing, "films"), device, "features of films")
        base.to("cpu")
        known |= dict(zip((row.image_id for row in missing), found, strict=True))
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, network=np.array(network), image_ids=np.array(list(known)), features=np.stack(list(known.values())))
        partial.replace(path)
    return known


def _with_features(part: Cases, looked: Mapping[str, Floats]) -> Cases:
    return Cases(part.rows, np.stack([looked[row.image_id] for row in part.rows]), part.labels, part.truth, part.texts)


def parts_of(train: Cases, val: Cases, config: MultimodalConfig) -> list[tuple[Cases, Cases]]:
    """What is learnt from and sought in, and what is asked about: train and val, or all films with a report, fold by fold.

    Raises:
        UsageError: Fewer patients with a report than folds.
    """
    if not config.folds:
        return [(train, val[np.array([bool(text) for text in val.texts])])]
    everything = _with_texts_of(train, val)
    told = np.array([bool(text) for text in everything.texts])
    index = np.flatnonzero(told)
    if len(set(everything.patients[index].tolist())) < config.folds:
        raise UsageError("fewer patients with a report than folds", expected=f"{config.folds} or more", next_step="take fewer folds")
    parts = []
    for _, asked in GroupKFold(config.folds).split(index, groups=everything.patients[index]):
        out = np.isin(everything.patients, everything.patients[index[asked]])
        queries = np.zeros_like(told)
        queries[index[asked]] = True
        parts.append((everything[~out], everything[queries]))
    return parts


def _with_texts_of(train: Cases, val: Cases) -> Cases:
    return Cases(
        (*train.rows, *val.rows),
        np.concatenate([train.features, val.features]),
        np.concatenate([train.labels, val.labels]),
        np.concatenate([train.truth, val.truth]),
        (*train.texts, *val.texts),
    )
