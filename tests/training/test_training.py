"""Losses against the published formula, batches, checkpoints, and short real runs on phantoms that resume exactly."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from pytorch_metric_learning.losses import MultiSimilarityLoss

from cxr_retrieval.cases.manifest import Manifest, ManifestRow, read_manifest
from cxr_retrieval.errors import ImageError, ManifestError, UsageError
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE
from cxr_retrieval_training.checkpoints import load_checkpoint, pick_device, save_checkpoint
from cxr_retrieval_training.config import (
    CONFIGS,
    EmbedderConfig,
    EmbedderMemberConfig,
    EmbedderStage,
    LossName,
    MultilabelConfig,
    MultimodalConfig,
    OutcomeConfig,
    SegmentationConfig,
    SegmentationStage,
    config_path,
    load_config,
)
from cxr_retrieval_training.data.augment import EmbeddingAugment, SegmentationAugment
from cxr_retrieval_training.data.datasets import Images, load_images
from cxr_retrieval_training.embedding import train_embedder as embedder_training
from cxr_retrieval_training.embedding.ablations import ABLATIONS, ablation_config
from cxr_retrieval_training.embedding.embedder import EmbedderMember
from cxr_retrieval_training.embedding.losses import Criterion, attention_on_lesions
from cxr_retrieval_training.embedding.train_embedder import (
    balanced_batch,
    left_out,
    load_embedder,
    load_resnet50,
    load_training_set,
    train_embedder,
)
from cxr_retrieval_training.report.page import write_report
from cxr_retrieval_training.report.results import blanked, shuffled
from cxr_retrieval_training.segmentation.lungs import find_lungs, find_probabilities, load_segmenter
from cxr_retrieval_training.segmentation.metrics import dice_coefficient
from cxr_retrieval_training.segmentation.train_segmenter import load_masked, train_segmentation, train_student
from tests_support import phantoms_to_train_on

pytestmark = pytest.mark.usefixtures("small_networks")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return phantoms_to_train_on(tmp_path_factory.mktemp("train"), 4)


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
    batch = balanced_batch(labels, 16, np.random.default_rng(3))
    assert np.bincount(labels[batch]).tolist() == [16, 16, 16]
    assert len(set(batch.tolist())) == 48
    few = np.array([0] * 100 + [1] * 5)
    assert len(balanced_batch(few, 16, np.random.default_rng(3))) == 32, "a small class repeats"


def test_info_nce_written_out() -> None:
    """−log of e^{s/τ} of a positive over itself and all negatives, mean over positive pairs, τ = 0.1, written out."""
    torch.manual_seed(0)
    x, y = torch.nn.functional.normalize(torch.randn(9, 7), dim=1), torch.arange(9) % 3
    s = x @ x.T
    terms = [
        -math.log(math.exp(s[i, j] / 0.1) / (math.exp(s[i, j] / 0.1) + sum(math.exp(s[i, n] / 0.1) for n in range(9) if y[n] != y[i])))
        for i in range(9)
        for j in range(9)
        if i != j and y[i] == y[j]
    ]
    found = criterion("info_nce")({"info_nce": 1.0}, x, torch.zeros(9, 2048), y)
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def criterion(*names: LossName) -> Criterion:
    torch.manual_seed(1)
    return Criterion(frozenset(names), classes=3, embedding_size=7, alpha=2.0, beta=20.0, base=0.5, miner_epsilon=0.1)


def test_losses_add_up_with_their_weights() -> None:
    x, features, y = torch.nn.functional.normalize(torch.randn(6, 7), dim=1), torch.randn(6, 2048), torch.arange(6) % 3
    both = criterion("multi_similarity", "cross_entropy")
    one, other = (both({name: 1.0}, x, features, y).item() for name in ("multi_similarity", "cross_entropy"))
    assert both({"multi_similarity": 0.5, "cross_entropy": 2.0}, x, features, y).item() == pytest.approx(0.5 * one + 2 * other)
    with pytest.raises(ValueError, match="not among those announced"):
        both({"normalized_softmax": 1.0}, x, features, y)


def test_attention_loss_is_the_share_on_lesions() -> None:
    attention, lesions = torch.ones((2, 1, 4, 4)), torch.zeros((2, 1, 4, 4))
    lesions[0, 0, :1] = 1
    assert attention_on_lesions(attention, lesions).item() == pytest.approx(math.log(4)), "an image without lesions says nothing"
    assert attention_on_lesions(attention, torch.zeros_like(lesions)).item() == 0


def test_dice() -> None:
    a = torch.zeros((3, 1, 4, 4), dtype=torch.bool)
    b = a.clone()
    a[0, 0, :2], b[0, 0, 1:3] = True, True
    a[1, 0, 0, 0] = True
    assert [dice_coefficient(one.numpy(), other.numpy()) for one, other in zip(a, b, strict=True)] == [0.5, 0.0, 1.0]


def test_soft_targets_stay_probabilities() -> None:
    torch.manual_seed(0)
    image = torch.full((4, 1, 64, 64), 100, dtype=torch.uint8)
    mask = torch.full((4, 1, 64, 64), 102, dtype=torch.uint8)
    _, soft = SegmentationAugment(soft=True)(image, mask)
    _, hard = SegmentationAugment()(image, mask)
    assert soft[:, :, 24:40, 24:40] == pytest.approx(torch.full((4, 1, 16, 16), 0.4), abs=0.02)
    assert set(hard.unique().tolist()) == {0.0}


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


def test_embedding_augmentation_keeps_black_black_and_lesions_inside() -> None:
    torch.manual_seed(0)
    lungs, lesions = torch.zeros((8, 2, 64, 64), dtype=torch.uint8), torch.zeros((8, 1, 64, 64), dtype=torch.uint8)
    lungs[:, 0, 20:44, 20:44] = 120
    lungs[:, 1, 20:44, 20:44] = 255
    lesions[:, :, 24:30, 24:30] = 255
    changed, moved = EmbeddingAugment()(lungs, lesions)
    pixels, share = changed[:, :1], changed[:, 1:]
    assert pixels.shape == share.shape == moved.shape == (8, 1, 64, 64)
    assert (pixels[:, :, :4, :4] == 0).all()
    assert (pixels[share == 0] == 0).all()
    assert (share[moved > 0] > 127).all()
    assert pixels.max() > 60
    assert share.max() == 255
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    assert moved.sum() > 8 * 20
    assert (pixels[0] != pixels[1]).any(), "every image gets its own"


def test_without_augmentation_films_stay_as_they_are() -> None:
    torch.manual_seed(0)
    lungs, lesions = torch.randint(1, 256, (16, 2, 64, 64), dtype=torch.uint8), torch.zeros((16, 1, 64, 64), dtype=torch.uint8)
    plain, _ = EmbeddingAugment(plain=True)(lungs, lesions)
    assert (plain - lungs).abs().max() < 1e-3
    usual, _ = EmbeddingAugment()(lungs, lesions)
    assert (usual - lungs).abs().max() > 10


def test_crops_keep_the_aspect_and_stay_in_the_frame() -> None:
    torch.manual_seed(0)
    box = torch.tensor([[0.0, 200.0, 10.0, 110.0]]).expand(500, 4)
    cropped = embedder_training._cropped(box, 0.1)  # pyright: ignore[reportPrivateUsage]
    height, width = cropped[:, 1] - cropped[:, 0], cropped[:, 3] - cropped[:, 2]
    assert torch.allclose(height, torch.tensor(180.0), atol=1e-3)
    assert torch.allclose(width, torch.tensor(90.0), atol=1e-3)
    assert cropped[:, 0].min() >= 0
    assert cropped[:, 1].max() <= 200 + 1e-3
    assert cropped[:, 2].min() >= 10
    assert cropped[:, 3].max() <= 110 + 1e-3
    assert cropped[:, 0].max() - cropped[:, 0].min() > 15, "anywhere in it"


# -------------------------------------------------------------------------------------------- configs and checkpoints


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    kinds = {
        "segmentation": SegmentationConfig,
        "outcome": OutcomeConfig,
        "multilabel": MultilabelConfig,
        "multimodal": MultimodalConfig,
    }
    load_config(path, kinds.get(path.stem.partition("-")[0], EmbedderConfig))


def test_published_numbers_of_the_outcome() -> None:
    """Zhong et al. 2020, 3.4."""
    published = load_config(config_path("outcome-published"), OutcomeConfig)
    assert (published.depth, published.trees, published.folds, published.layers) == (5, 50, 5, (128, 128))
    assert (published.learning_rate, published.epochs, published.components) == (1e-4, 10, 0)


def test_published_numbers_of_the_multilabel_network() -> None:
    """Haq et al. 2020, section 3."""
    published = load_config(config_path("multilabel"), MultilabelConfig)
    assert (published.batch_size, published.epochs, published.learning_rate, published.loss) == (32, 20, 1e-3, "weighted")


def test_published_numbers() -> None:
    published = load_config(config_path("embedder-published"), EmbedderConfig)
    assert (published.alpha, published.beta, published.base, published.images_per_class) == (2, 20, 0.5, 16)
    assert [(stage.iterations, stage.learning_rate, stage.image_size) for stage in published.members[0].stages] == [(2000, 3e-5, 256)]
    segmentation = load_config(config_path("segmentation-published"), SegmentationConfig)
    assert (segmentation.learning_rate, segmentation.batch_size, segmentation.stages[0].epochs) == (1e-4, 8, 200)
    assert len(segmentation.members) == 5
    assert (segmentation.schedule, segmentation.keep) == ("constant", "last")
    assert (published.schedule, published.keep, published.view) == ("constant", "last", "frame")
    assert (published.augmented, published.attention_standardised, published.mirrored, published.lesion_weight) == (False, False, False, 0)
    assert (published.clip_gradients, published.weight_decay, published.frozen_layers, published.warm_up_iterations) == (0, 0, 0, 0)


def test_configs_of_before_these_knobs_mean_what_they_meant() -> None:
    """A checkpoint's config names only what there was when it was made."""
    old = EmbedderConfig.model_validate({"members": [{"stages": [{"image_size": 128, "iterations": 1, "learning_rate": 1e-3}]}]})
    assert (old.attention_standardised, old.view, old.augmented, old.clip_gradients, old.keep) == (True, "lungs", True, 5.0, "best")
    segmentation = SegmentationConfig(stages=(SegmentationStage(image_size=64, epochs=1),))
    assert (segmentation.schedule, segmentation.keep) == ("cosine", "best")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = ", "not TOML"),
        ("members = [{stages = []}]\nspeed = 9", "members.0.stages is wrong"),
        ("speed = 9\nmembers = [{stages = [{image_size = 128, iterations = 1, learning_rate = 1e-3}]}]", "speed is wrong"),
        ("members = [{stages = [{image_size = 100, iterations = 1, learning_rate = 1e-3}]}]", "multiple of 32"),
        ("members = [{stages = [{image_size = 128, iterations = 1, learning_rate = 1e-3, losses = {hinge = 1.0}}]}]", "losses.hinge"),
        ("members = [{stages = [{image_size = 128, iterations = 0, learning_rate = 1e-3}]}]", "greater than 0"),
        ("learned_size = 0\nmembers = [{stages = [{image_size = 128, iterations = 1, learning_rate = 1e-3}]}]", "learned_size is wrong"),
        ("", "members is wrong"),
        (
            'lungs_from = "unnet"\nmembers = [{stages = [{image_size = 128, iterations = 1, learning_rate = 1e-3}]}]',
            "'unet', 'unetplusplus'",
        ),
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
    model = EmbedderMember(backbone="resnet50")
    load_resnet50(model, tmp_path / "resnet50.pt")
    own = model.state_dict()
    assert torch.equal(own["f1.0.weight"], source["conv1.weight"])
    assert torch.equal(own["f1.5.3.conv3.weight"], source["layer2.3.conv3.weight"])
    assert torch.equal(own["f2.0.5.bn2.running_var"], source["layer3.5.bn2.running_var"])
    assert torch.equal(own["rest.0.2.conv1.weight"], source["layer4.2.conv1.weight"])
    torch.save({f"module.pre.{key}": value for key, value in source.items()}, tmp_path / "imgsim.pth")
    within = EmbedderMember(backbone="resnet50")
    load_resnet50(within, tmp_path / "imgsim.pth")
    assert torch.equal(within.state_dict()["rest.0.2.conv1.weight"], source["layer4.2.conv1.weight"])
    torch.save({"fc.weight": source["fc.weight"]}, tmp_path / "head.pt")
    with pytest.raises(UsageError, match="not a torchvision ResNet-50"):
        load_resnet50(model, tmp_path / "head.pt")
    with pytest.raises(UsageError, match="--init is for ResNet-50"):
        load_resnet50(EmbedderMember(), tmp_path / "resnet50.pt")


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


def test_segmentation_keeps_the_best_epoch_and_reports_it(trained: Path) -> None:
    checkpoint = load_checkpoint(trained)
    assert checkpoint["config"]["members"] == ["linknet"]
    assert set(checkpoint["provenance"]) == {"commit", "cxr_retrieval", "torch"}
    log = [json.loads(line) for line in (trained.parent / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log] == list(range(1, 4))
    best = max(log, key=lambda record: record["val_dice"])
    report = json.loads((trained.parent / "segmentation.json").read_text())
    assert report == checkpoint["report"]
    assert (report["members"]["linknet"]["dice"], report["members"]["linknet"]["epoch"]) == (best["val_dice"], best["epoch"])
    found = report["by_reference"]["unknown"]
    assert found["n"] == 6
    ensemble = found["ensemble"]
    assert ensemble["dice_least"] <= ensemble["dice_ci"][0] <= ensemble["dice"] <= ensemble["dice_ci"][1] <= 1
    assert ensemble["hausdorff_95"] > 0
    assert found["members_mean"] == found["members"]["linknet"], "of one member, the mean is itself"


def test_student_learns_what_the_teacher_finds_from_where_it_stands(trained: Path, manifest: Manifest, tmp_path: Path) -> None:
    """Targets are the teacher's probabilities, not the drawn masks; the first epoch starts from the teacher's own weights."""
    config = SEGMENTATION.model_copy(update={"learning_rate": 1e-6, "stages": (SegmentationStage(image_size=64, epochs=1),)})
    student = load_checkpoint(train_student(config, manifest, trained, tmp_path, CPU))
    teacher = load_checkpoint(trained)
    assert student["report"]["train_images"] == len(manifest.require(split="train"))
    assert student["report"] == json.loads((tmp_path / "student.json").read_text())
    for name, value in teacher["model"].items():
        if name.endswith("weight"):
            assert torch.allclose(student["model"][name], value, atol=1e-3)
    rows = manifest.require(split="train")[:2]
    found = find_probabilities(trained, manifest.require(split="train"), "train", CPU)[:2]
    with torch.inference_mode():
        expected = load_segmenter(trained).member_probabilities(torch.from_numpy(load_images(rows))).mean(dim=0).numpy()
    assert np.abs(found / 255.0 - expected).max() < 0.01
    assert ((found > 5) & (found < 250)).mean() > 0, "probabilities, not masks"


def test_student_is_one_network_of_the_teacher(trained: Path, manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a student is one network"):
        train_student(SEGMENTATION.model_copy(update={"members": ("unet", "fpn")}), manifest, trained, tmp_path, CPU)
    with pytest.raises(UsageError, match="has no member fpn"):
        train_student(SEGMENTATION.model_copy(update={"members": ("fpn",)}), manifest, trained, tmp_path, CPU)


def test_early_stopping(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dice that never rises after the first epoch ends the member after `patience_epochs` more."""
    import cxr_retrieval_training.segmentation.train_segmenter as module

    scores = iter([0.5, 0.4, 0.4, 0.4, 0.4, 0.4])
    monkeypatch.setattr(module, "member_dice", lambda *_: np.array([next(scores)]))
    config = SEGMENTATION.model_copy(update={"patience_epochs": 2, "stages": (SegmentationStage(image_size=64, epochs=6),)})
    train_segmentation(config, manifest, tmp_path, CPU)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert load_checkpoint(tmp_path / "segmenter-linknet-best.pt")["epoch"] == 1


def test_segmentation_resumes_exactly(trained: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the second epoch, it ends with the same weights as an uninterrupted run."""
    import cxr_retrieval_training.segmentation.train_segmenter as module

    saves = 0

    def dying(path: Path, checkpoint: dict[str, object]) -> None:
        nonlocal saves
        save_checkpoint(path, checkpoint)
        saves += path.stem.endswith("-last")
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
    learned_size=11,
    mirrored=True,
    images_per_class=2,
    frozen_layers=2,
    appearance_size=8,
    appearance_forgets_source=True,
    lesion_images=1,
    lesion_weight=0.1,
    ema_decay=0.5,
    schedule="cosine",
    validate_every=3,
    warm_up_iterations=2,
    members=tuple(
        EmbedderMemberConfig(
            stages=(
                EmbedderStage(losses={"normalized_softmax": 1.0, "multi_similarity": 0.5}, image_size=64, iterations=3, learning_rate=1e-3),
                EmbedderStage(losses={"multi_similarity": 1.0}, image_size=size, iterations=3, learning_rate=1e-3),
            )
        )
        for size in (64, 96)
    ),
)


@pytest.fixture(scope="module")
def finished(trained: Path, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_embedder(EMBEDDER, manifest, trained, tmp_path_factory.mktemp("runs") / "whole", CPU)


def test_embedder_resumes_exactly(
    trained: Path, finished: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder_training, "SAVE_EVERY", 2)

    def dying(path: Path, checkpoint: dict[str, object]) -> None:
        save_checkpoint(path, checkpoint)
        if path.name == "embedder-1-last.pt" and checkpoint["iteration"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(embedder_training, "save_checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        train_embedder(EMBEDDER, manifest, trained, tmp_path / "cut", CPU)
    monkeypatch.setattr(embedder_training, "save_checkpoint", save_checkpoint)
    result = load_checkpoint(train_embedder(EMBEDDER, manifest, trained, tmp_path / "cut", CPU))
    resumed, whole = (load_checkpoint(folder / "embedder-1-last.pt") for folder in (tmp_path / "cut", finished.parent))
    assert resumed["iteration"] == 6
    for part in ("model", "kept"):
        for name, value in whole[part].items():
            assert torch.equal(value, resumed[part][name]), name
    for name, value in load_checkpoint(finished)["model"].items():
        assert torch.equal(value, result["model"][name]), name
    assert any(not torch.equal(value, whole["kept"][name]) for name, value in whole["model"].items()), "the average is another"
    other = EMBEDDER.model_copy(update={"seed": 2})
    with pytest.raises(UsageError, match="belongs to another run"):
        train_embedder(other, manifest, trained, tmp_path / "cut", CPU)


def test_the_states_that_did_best_on_val_are_kept(finished: Path) -> None:
    log = [json.loads(line) for line in (finished.parent / "log.jsonl").read_text().splitlines()]
    state = load_checkpoint(finished)
    for member in (0, 1):
        watched = [record for record in log if record["member"] == member and "val_recall_at_1" in record]
        assert [record["iteration"] for record in watched] == [3, 6]
        best = max(watched, key=lambda record: (record["val_recall_at_1"], -record["iteration"]))
        assert {key: state["members"][member][key] for key in ("iteration", "val_recall_at_1", "image_size")} == {
            key: best[key] for key in ("iteration", "val_recall_at_1", "image_size")
        }
    network = load_embedder(finished, CPU)
    first, second = network.each()
    assert first.size == 64
    assert second.size == state["members"][1]["image_size"]
    weights = [next(member.head.parameters()) for member in (first, second)]
    assert not torch.equal(*weights), "another seed"
    assert network.appearance is not None
    assert network.appearance.projection.abs().sum() > 0, "fitted"


def test_members_can_be_added_to_a_finished_run(finished: Path, trained: Path, manifest: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    one = load_checkpoint(train_embedder(EMBEDDER.model_copy(update={"members": EMBEDDER.members[:1]}), manifest, trained, out, CPU))
    two = load_checkpoint(train_embedder(EMBEDDER, manifest, trained, out, CPU))
    assert two["members"][0] == one["members"][0], "the first was not trained again, even its seconds are the same"
    for name, value in load_checkpoint(finished)["model"].items():
        assert torch.equal(value, two["model"][name]), name


def test_a_source_can_be_left_out(trained: Path, manifest: Manifest) -> None:
    whole = load_training_set(EMBEDDER, manifest, trained, CPU)
    part = load_training_set(EMBEDDER.model_copy(update={"leave_out_source": "phantom-north"}), manifest, trained, CPU)
    kept = np.array([row.source != "phantom-north" for row in manifest.select(split="train")])
    assert 0 < kept.sum() < len(kept)
    assert (part.lungs == np.asarray(whole.lungs)[kept]).all()
    assert (part.labels == whole.labels[kept]).all()
    assert len(set(part.sources.tolist())) == len(set(whole.sources.tolist())) - 1
    with pytest.raises(UsageError, match="no such source, or the only one"):
        load_training_set(EMBEDDER.model_copy(update={"leave_out_source": "elsewhere"}), manifest, trained, CPU)


def test_folds_of_a_source_partition_its_patients(trained: Path, manifest: Manifest) -> None:
    rows = manifest.select(split="train")
    source = EMBEDDER.model_copy(update={"leave_out_source": "phantom-north"})
    folds = [left_out(source.model_copy(update={"leave_out_fold": (i, 3)}), rows) for i in range(3)]
    assert (np.sum(folds, axis=0) == left_out(source, rows)).all()
    of_patient = {row.patient: tuple(fold[number] for fold in folds) for number, row in enumerate(rows)}
    assert all(tuple(fold[number] for fold in folds) == of_patient[row.patient] for number, row in enumerate(rows))
    part = load_training_set(source.model_copy(update={"leave_out_fold": (0, 3)}), manifest, trained, CPU)
    assert len(part.labels) == len(rows) - folds[0].sum()
    with pytest.raises(ValidationError, match="needs leave_out_source and i below n"):
        EmbedderConfig.model_validate({**EMBEDDER.model_dump(), "leave_out_fold": (0, 3)})
    with pytest.raises(ValidationError, match="needs leave_out_source and i below n"):
        EmbedderConfig.model_validate({**source.model_dump(), "leave_out_fold": (3, 3)})


def test_lungs_are_found_once_and_go_on_after_an_interruption(
    trained: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cxr_retrieval_training.segmentation.lungs as module

    checkpoint = tmp_path / "segmenter.pt"
    checkpoint.write_bytes(trained.read_bytes())
    rows = manifest.select(split="val")
    monkeypatch.setattr(module, "_CHUNK", 2)
    reads: list[int] = []

    def reading(part: Sequence[ManifestRow]) -> Images:
        reads.append(len(part))
        if len(reads) == 2:
            raise KeyboardInterrupt
        return load_images(part)

    monkeypatch.setattr(module, "load_images", reading)
    with pytest.raises(KeyboardInterrupt):
        find_lungs(checkpoint, rows, "val", CPU)
    found = find_lungs(checkpoint, rows, "val", CPU)
    assert reads == [2, 2, 2, 2], "the first two are not read again"
    again = find_lungs(checkpoint, rows, "val", CPU)
    assert len(reads) == 4
    with torch.inference_mode():
        expected = load_segmenter(checkpoint)(torch.from_numpy(load_images(rows)))[1].numpy()
    assert (found != expected).mean() < 1e-3, "OpenVINO and PyTorch agree but for pixels on the threshold"
    assert (found == again).all()
    with pytest.raises(UsageError, match="has no member fpn"):
        find_lungs(checkpoint, rows, "val", CPU, "fpn")


def test_ablations_change_what_they_are_named_for() -> None:
    base = ablation_config("shipped-recipe").model_dump()
    for name in ABLATIONS:
        changed = {key for key, value in ablation_config(name).model_dump().items() if value != base[key]}
        assert changed or name in ("shipped-recipe",), name
    assert ablation_config("size-128").learned_size == 128
    assert ablation_config("info-nce").members[0].stages[0].losses == {"info_nce": 1.0}
    assert ablation_config("cross-entropy-without-kermany").leave_out_source == "kermany"
    alone = ablation_config("multi-similarity", "unseen").members
    assert [[stage.losses for stage in member.stages] for member in alone] == [[{"multi_similarity": 1.0}]]
    assert len(ablation_config("two-members", "unseen").members) == 2
    with pytest.raises(UsageError, match="no ablation nonsense"):
        ablation_config("nonsense")


def test_appearance_is_fitted_anew_without_training(trained: Path, finished: Path, manifest: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    shutil.copytree(finished.parent, folder)
    anew = EMBEDDER.model_copy(update={"appearance_size": 11, "appearance_forgets_source": False})
    path = train_embedder(anew, manifest, trained, folder, CPU)
    assert (folder / "log.jsonl").read_bytes() == (finished.parent / "log.jsonl").read_bytes(), "no iteration more"
    members = [
        {name: value for name, value in load_checkpoint(at)["model"].items() if name.startswith("members.")} for at in (path, finished)
    ]
    assert members[0].keys() == members[1].keys()
    assert all(torch.equal(value, members[1][name]) for name, value in members[0].items())
    with np.load(folder / "vectors-val.npz") as stored:
        assert stored["embedding"].shape == (6, 22), "of two members"
        assert stored["appearance"].shape == (6, 11)
        assert np.square(stored["appearance"]).sum(axis=1) == pytest.approx(np.ones(6), abs=1e-3)
    with pytest.raises(UsageError, match="belongs to another run"):
        train_embedder(anew.model_copy(update={"learned_size": 12}), manifest, trained, folder, CPU)


@pytest.mark.parametrize(
    "name",
    ["cross-entropy", "cross-entropy-resnet50", "no-attention", "multi-similarity", "info-nce", "whole-radiograph", "ensemble-lungs"],
)
def test_ablations_train(name: str, trained: Path, manifest: Manifest, tmp_path: Path) -> None:
    """Two real iterations of each kind of comparison, down to its vectors."""
    config = ablation_config(name)
    stages = tuple(stage.model_copy(update={"iterations": 2, "image_size": 64}) for stage in config.members[0].stages)
    small = {
        "images_per_class": 2,
        "lungs_from": None,
        "appearance_size": min(8, config.appearance_size),
        "members": (EmbedderMemberConfig(stages=stages),),
    }
    path = train_embedder(config.model_copy(update=small), manifest, trained, tmp_path, CPU)
    with np.load(path.parent / "vectors-val.npz") as stored:
        assert stored[config.retrieve_with].shape == (6, 2048 if config.retrieve_with == "features" else 32)
        assert np.isfinite(stored[config.retrieve_with]).all()


def test_published_embedder_trains(trained: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two iterations, small: no gradient is clipped, and the last state is kept though the first did better on val."""
    published = load_config(config_path("embedder-published"), EmbedderConfig)
    stage = published.members[0].stages[0].model_copy(update={"iterations": 2, "image_size": 64})
    small = {"images_per_class": 2, "validate_every": 1, "appearance_size": 8, "members": (EmbedderMemberConfig(stages=(stage,)),)}
    scores = iter([0.9, 0.1])
    monkeypatch.setattr(embedder_training, "leave_one_out_recall", lambda *_: next(scores))

    def clipped(*_: object) -> None:
        raise AssertionError("a gradient was clipped")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    path = train_embedder(published.model_copy(update=small), manifest, trained, tmp_path, CPU)
    assert load_checkpoint(path)["members"][0]["iteration"] == 2
    network = load_embedder(path, CPU)
    assert network.each()[0].framed
    assert not any(name.endswith("gain") for name in network.state_dict())
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["learning_rate"] for record in log] == [3e-5, 3e-5]
    with np.load(tmp_path / "vectors-val.npz") as stored:
        assert np.isfinite(stored["embedding"]).all()


def test_published_segmentation_trains(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of one member, small: the learning rate stays, no member stops early, the last epoch is kept though the first did better."""
    import cxr_retrieval_training.segmentation.train_segmenter as module

    published = load_config(config_path("segmentation-published"), SegmentationConfig)
    scores = iter([0.9, 0.1, 0.1])
    monkeypatch.setattr(module, "member_dice", lambda *_: np.array([next(scores)]))
    small = {"members": ("linknet",), "patience_epochs": 1, "stages": (SegmentationStage(image_size=64, epochs=3),)}
    train_segmentation(published.model_copy(update=small), manifest, tmp_path, CPU)
    assert load_checkpoint(tmp_path / "segmenter-linknet-best.pt")["epoch"] == 3
    last = load_checkpoint(tmp_path / "segmenter-linknet-last.pt")
    assert last["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-4, rel=1e-9)


def test_lungs_without_anatomy() -> None:
    """The outline stays; blanked, nothing else does; shuffled, the distribution of grey values of each image."""
    lungs = np.zeros((2, 2, 11, 13), np.uint8)
    lungs[:, 0, 2:9, 3:10] = np.random.default_rng(0).integers(1, 256, (2, 7, 7))
    lungs[:, 1, 2:9, 3:10] = 255
    assert set(blanked(lungs)[:, 0][lungs[:, 1] > 0].tolist()) == {128}
    assert (blanked(lungs)[:, 0][lungs[:, 1] == 0] == 0).all()
    found = shuffled(lungs)
    assert (found != lungs).any()
    assert (found == shuffled(lungs)).all()
    for image, other in zip(lungs, found, strict=True):
        assert ((image > 0) == (other > 0)).all()
        assert sorted(image[image > 0].tolist()) == sorted(other[other > 0].tolist())


def test_report_of_two_runs(trained: Path, finished: Path, manifest: Manifest, tmp_path: Path) -> None:
    """Real vectors of two real, hardly trained runs: every figure is there and lies in its range; the page shows its pictures."""
    smaller = EMBEDDER.model_copy(update={"learned_size": 7})
    other = train_embedder(smaller, manifest, trained, finished.parent.parent / "smaller", CPU)
    page = write_report(manifest, trained, [finished.parent, other.parent], tmp_path, CPU).read_text()
    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found["runs"]) == ["whole", "smaller"]
    assert set(found["closer"]) == {"run", "k", "balance", "style_only", "attention", "near_duplicates"}
    dial = found["closer"]["balance"]
    assert [row["balance"] for row in dial["rows"]] == pytest.approx(np.linspace(0, 1, 21))
    for row in dial["rows"]:
        assert all(0 <= row[name] <= 1 for name in ("balanced_accuracy", "recall_at_1"))
        assert -1 <= row["structure"] <= 1
    overall = found["runs"]["whole"]["evaluation"]["overall"]
    at_default = next(row for row in dial["rows"] if row["balance"] == DEFAULT_BALANCE)
    assert at_default["balanced_accuracy"] == pytest.approx(overall["balanced_accuracy"]), "as it was evaluated"
    assert overall["n"] == 6
    assert [len(values) for values in found["closer"]["k"].values()] == [30, 30]
    for name in ("accuracy", "balanced_accuracy"):
        assert found["closer"]["k"][name][9] == pytest.approx(overall[name]), "the vote of ten is what was evaluated"
    assert f"| whole | {overall['balanced_accuracy']:.3f} – |" in page, "six patients: no interval"
    for name in ("k.png", "reliability.png", "training.png", "montage.png", "embedding-size.png", "balance.png"):
        assert f"![{name}]" in page
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
    with pytest.raises(UsageError, match="no checkpoint"):
        write_report(manifest, trained, [tmp_path], tmp_path, CPU)
