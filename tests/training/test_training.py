"""Losses against the published formula, batches, checkpoints, and short real runs on phantoms that resume exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss

from cxr_retrieval.errors import ImageError, ManifestError, UsageError
from cxr_retrieval.manifest import Manifest, read_manifest
from cxr_retrieval.phantoms import PHANTOM_LABELS, make_phantom, write_phantoms
from cxr_retrieval_training import train_embedder as embedder_training
from cxr_retrieval_training.augment import EmbeddingAugment, SegmentationAugment
from cxr_retrieval_training.checkpoints import load_checkpoint, pick_device, save_checkpoint
from cxr_retrieval_training.config import (
    CONFIGS,
    EmbedderConfig,
    EmbedderStage,
    SegmentationConfig,
    SegmentationStage,
    config_path,
    load_config,
)
from cxr_retrieval_training.datasets import load_images
from cxr_retrieval_training.embedder import Embedder
from cxr_retrieval_training.train_embedder import class_balanced_batch, load_resnet50, train_embedder
from cxr_retrieval_training.train_segmenter import dice_coefficient, load_masked, train_segmentation

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Eight phantoms of each label to train on, two of each to watch."""
    folder = tmp_path_factory.mktemp("train")
    path = write_phantoms(folder, [make_phantom(seed, label) for label in PHANTOM_LABELS for seed in range(4)], "train")
    text = path.read_text()
    write_phantoms(folder, [make_phantom(100 + seed, label) for label in PHANTOM_LABELS for seed in range(2)], "val")
    rows = path.read_text().splitlines()[1:]
    path.write_text(text + "\n".join(rows) + "\n")
    return read_manifest(path)


# ----------------------------------------------------------------------------------------------------------- pieces


def test_multi_similarity_is_equation_2() -> None:
    """α = 2, β = 20, λ = 0.5; every pair of the batch, written out."""
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(9, 5), dim=1)
    y = torch.arange(9) % 3
    s = x @ x.T
    total = 0.0
    for i in range(9):
        positive = sum(math.exp(-2 * (s[i, j] - 0.5)) for j in range(9) if j != i and y[j] == y[i])
        negative = sum(math.exp(20 * (s[i, j] - 0.5)) for j in range(9) if y[j] != y[i])
        total += math.log(1 + positive) / 2 + math.log(1 + negative) / 20
    assert MultiSimilarityLoss(2, 20, 0.5)(x, y).item() == pytest.approx(total / 9, rel=1e-5)


def test_batches_are_balanced_and_without_repetition() -> None:
    labels = np.array([0] * 100 + [1] * 50 + [2] * 16)
    batch = class_balanced_batch(labels, 16, np.random.default_rng(3))
    assert np.bincount(labels[batch]).tolist() == [16, 16, 16]
    assert len(set(batch.tolist())) == 48
    few = class_balanced_batch(np.array([0] * 100 + [1] * 5), 16, np.random.default_rng(3))
    assert len(few) == 32, "a small class repeats rather than shrinking the batch"


def test_dice() -> None:
    a = torch.zeros((3, 1, 4, 4), dtype=torch.bool)
    b = a.clone()
    a[0, 0, :2], b[0, 0, 1:3] = True, True
    a[1, 0, 0, 0] = True
    assert dice_coefficient(a, b).tolist() == [0.5, 0.0, 1.0]


def test_segmentation_augmentation_moves_mask_and_image_together() -> None:
    torch.manual_seed(0)
    yy, xx = torch.arange(64)[:, None], torch.arange(64)[None, :]
    disc = (((xx - 20) ** 2 + (yy - 40) ** 2) < 150).to(torch.uint8) * 255
    image, mask = disc.repeat(16, 1, 1, 1), disc.repeat(16, 1, 1, 1)
    pixels, target = SegmentationAugment()(image, mask)
    assert pixels.shape == target.shape == (16, 1, 64, 64)
    assert set(target.unique().tolist()) <= {0.0, 1.0}
    assert 0 <= pixels.min() <= pixels.max() <= 255
    inside, outside = pixels[target == 1].mean(), pixels[target == 0].mean()
    assert inside > outside + 100
    assert (target != (mask > 127).float()).any(), "it does move"


def test_embedding_augmentation_keeps_black_black() -> None:
    torch.manual_seed(0)
    lungs = torch.zeros((8, 1, 64, 64), dtype=torch.uint8)
    lungs[:, :, 24:40, 24:40] = 120
    out = EmbeddingAugment(64)(lungs)
    assert out.shape == (8, 1, 64, 64)
    assert (out[:, :, :4, :4] == 0).all()
    assert out.max() > 60


# -------------------------------------------------------------------------------------------- configs and checkpoints


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    load_config(path, SegmentationConfig if path.stem.startswith("segmentation") else EmbedderConfig)


def test_published_numbers() -> None:
    published = load_config(config_path("embedder-published"), EmbedderConfig)
    assert (published.alpha, published.beta, published.base, published.images_per_class) == (2, 20, 0.5, 16)
    assert [(stage.iterations, stage.learning_rate, stage.image_size) for stage in published.stages] == [(2000, 3e-5, 256)]
    segmentation = load_config(config_path("segmentation-published"), SegmentationConfig)
    assert (segmentation.learning_rate, segmentation.batch_size, segmentation.stages[0].epochs) == (1e-4, 8, 200)
    assert len(segmentation.members) == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = ", "not TOML"),
        ("stages = []\nspeed = 9", "speed is wrong"),
        ("stages = [{image_size = 100, iterations = 1, learning_rate = 1e-3}]", "multiple of 32"),
        ("stages = [{image_size = 128, iterations = 0, learning_rate = 1e-3}]", "greater than 0"),
        ("", "stages is wrong"),
    ],
)
def test_bad_config_is_explained(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        load_config(tmp_path / "c.toml", EmbedderConfig)


def test_checkpoints_refuse_another_run_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"config": {"seed": 1}, "model": {"w": torch.ones(2)}})
    assert load_checkpoint(path, expected={"config": {"seed": 1}})["model"]["w"].tolist() == [1, 1]
    with pytest.raises(UsageError, match="belongs to another run"):
        load_checkpoint(path, expected={"config": {"seed": 2}})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match="damaged checkpoint"):
        load_checkpoint(path)
    with pytest.raises(UsageError, match="no checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


def test_device_names() -> None:
    assert pick_device("cpu") == CPU
    with pytest.raises(UsageError, match="device quantum is not available"):
        pick_device("quantum")
    if not torch.cuda.is_available():
        assert pick_device("auto") == CPU
        with pytest.raises(UsageError, match="device cuda is not available"):
            pick_device("cuda")


def test_init_takes_a_torchvision_state_dict(tmp_path: Path) -> None:
    from torchvision.models import resnet50

    torch.manual_seed(3)
    source = resnet50(weights=None).state_dict()
    torch.save(source, tmp_path / "resnet50.pt")
    model = Embedder()
    load_resnet50(model, tmp_path / "resnet50.pt")
    own = model.state_dict()
    assert torch.equal(own["f1.0.weight"], source["conv1.weight"])
    assert torch.equal(own["f1.5.3.conv3.weight"], source["layer2.3.conv3.weight"])
    assert torch.equal(own["f2.5.bn2.running_var"], source["layer3.5.bn2.running_var"])
    assert torch.equal(own["rest.0.2.conv1.weight"], source["layer4.2.conv1.weight"])
    torch.save({"fc.weight": source["fc.weight"]}, tmp_path / "head.pt")
    with pytest.raises(UsageError, match="not a torchvision ResNet-50"):
        load_resnet50(model, tmp_path / "head.pt")


def test_unreadable_training_image_stops_with_its_id(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "m.csv").write_text("image_id,path,label,split\nfilm7,a.png,control,train\n")
    rows = read_manifest(tmp_path / "m.csv").rows
    with pytest.raises(ImageError, match="film7"):
        load_images(rows, "images")
    with pytest.raises(ManifestError, match="no lung masks"):
        load_masked(read_manifest(tmp_path / "m.csv"), "train")


# --------------------------------------------------------------------------------------------------------- real runs


SEGMENTATION = SegmentationConfig(
    members=("linknet",), batch_size=4, learning_rate=3e-3, stages=(SegmentationStage(image_size=64, epochs=3),)
)


@pytest.fixture(scope="module")
def trained(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_segmentation(SEGMENTATION, manifest, tmp_path_factory.mktemp("seg"), CPU)


def test_segmentation_logs_every_epoch_and_keeps_its_config(trained: Path) -> None:
    checkpoint = load_checkpoint(trained)
    assert checkpoint["config"]["members"] == ["linknet"]
    log = [json.loads(line) for line in (trained.parent / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log] == list(range(1, 4))
    report = json.loads((trained.parent / "segmentation.json").read_text())
    assert report == checkpoint["report"]
    assert report["members"]["linknet"]["dice"] == log[-1]["val_dice"]
    ensemble = report["ensemble"]["unknown"]
    assert ensemble["n"] == 6
    assert ensemble["least"] <= ensemble["ci"][0] <= ensemble["mean"] <= ensemble["ci"][1] <= 1


def test_segmentation_resumes_exactly(trained: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the second epoch, it ends with the same weights as an uninterrupted run."""
    import cxr_retrieval_training.train_segmenter as module

    saves = 0

    def dying(path: Path, checkpoint: dict[str, object]) -> None:
        nonlocal saves
        save_checkpoint(path, checkpoint)
        saves += 1
        if saves == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        train_segmentation(SEGMENTATION, manifest, tmp_path, CPU)
    monkeypatch.undo()
    resumed = load_checkpoint(train_segmentation(SEGMENTATION, manifest, tmp_path, CPU))
    expected = load_checkpoint(trained)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    for name, value in expected["model"].items():
        assert torch.equal(value, resumed["model"][name]), name


EMBEDDER = EmbedderConfig(
    images_per_class=2,
    validate_every=3,
    warm_up_iterations=2,
    stages=(
        EmbedderStage(loss="normalized_softmax", image_size=64, iterations=3, learning_rate=1e-3),
        EmbedderStage(image_size=64, iterations=3, learning_rate=1e-3),
    ),
)


def test_embedder_resumes_exactly(trained: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder_training, "SAVE_EVERY", 2)
    whole = load_checkpoint(train_embedder(EMBEDDER, manifest, trained, tmp_path / "whole", CPU))

    def dying(path: Path, checkpoint: dict[str, object]) -> None:
        save_checkpoint(path, checkpoint)
        if checkpoint["iteration"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(embedder_training, "save_checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        train_embedder(EMBEDDER, manifest, trained, tmp_path / "cut", CPU)
    monkeypatch.setattr(embedder_training, "save_checkpoint", save_checkpoint)
    resumed = load_checkpoint(train_embedder(EMBEDDER, manifest, trained, tmp_path / "cut", CPU))
    assert resumed["iteration"] == 6
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    other = EMBEDDER.model_copy(update={"seed": 2})
    with pytest.raises(UsageError, match="belongs to another run"):
        train_embedder(other, manifest, trained, tmp_path / "cut", CPU)
