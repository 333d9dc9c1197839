"""Training configuration: frozen, checked when made, read from TOML (`configs/` holds the ones that ship).

The names of networks and losses stand here, so that a wrong configuration is refused before PyTorch, seconds to load, is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cxr_retrieval.contract import EMBEDDING_SIZE
from cxr_retrieval.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports] (installed on Python 3.10 only)

CONFIGS = Path(__file__).parent / "configs"

SegmenterName = Literal["unet", "unetplusplus", "fpn", "linknet", "deeplabv3plus"]
BackboneName = Literal["resnet50", "efficientnet_lite0"]
KeptName = Literal["best", "last"]
"""Of a network: the state that did best on val, or the one that training ends with."""
LossName = Literal["multi_similarity", "normalized_softmax", "info_nce", "cross_entropy"]

FindingsLoss = Literal["weighted", "plain", "softmax"]
"""Binary cross-entropy of each finding, its rarer side weighed more, or both alike; or one label a film."""

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SegmentationStage(_Frozen):
    """So many passes over the masks at one image size (a multiple of 32; 256 is the size served)."""

    image_size: Annotated[int, Field(ge=64, le=256, multiple_of=32)]
    epochs: PositiveInt


class SegmentationConfig(_Frozen):
    """`cxr train segmentation`."""

    seed: int = 1
    init: Literal["imagenet", "random"] = "imagenet"
    members: tuple[SegmenterName, ...] = get_args(SegmenterName)
    batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 1e-4
    member_learning_rates: dict[SegmenterName, PositiveFloat] = {}
    """Where a member needs another one."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Of the learning rate: as it is, or falling to a fiftieth."""
    patience_epochs: PositiveInt = 20
    """A member stops when its val Dice at the served size has not risen for so many epochs."""
    keep: KeptName = "best"
    """With `last` no member stops before its last epoch."""
    stages: tuple[SegmentationStage, ...]


class EmbedderStage(_Frozen):
    """So many iterations at one image size on a weighted sum of losses."""

    losses: dict[LossName, PositiveFloat] = {"multi_similarity": 1.0}
    image_size: Annotated[int, Field(ge=64, le=256, multiple_of=32)]
    iterations: PositiveInt
    learning_rate: PositiveFloat


class EmbedderMemberConfig(_Frozen):
    """How one of the networks is trained."""

    stages: Annotated[tuple[EmbedderStage, ...], Field(min_length=1)]


class EmbedderConfig(_Frozen):
    """`cxr train embedder`."""

    seed: int = 1
    backbone: BackboneName = "efficientnet_lite0"
    init: Literal["imagenet", "random"] = "imagenet"
    """For the backbone; ResNet-50 takes its ImageNet weights from `--init` instead."""
    learned_size: PositiveInt = EMBEDDING_SIZE
    """So many numbers each member learns; those of all members side by side are the embedding."""
    mirrored: bool = False
    """Lungs are mirrored at random in training; in service the lungs and their mirror image are looked at."""
    attention: bool = True
    attention_standardised: bool = True
    """The attention map is standardised over its cells before the sigmoid, with a learnt gain; as published it is not."""
    view: Literal["lungs", "frame"] = "lungs"
    """What is brought to a square: the box around the lungs, whatever its aspect; or, as published, the frame with the lungs alone."""
    augmented: bool = True
    """All of `EmbeddingAugment`; False: random crops (`jitter`) alone, as published."""
    lungs_only: bool = True
    """False: the whole radiograph (ablation)."""
    lungs_from: SegmenterName | None = None
    """Train on the lungs that this one member finds, for a fraction of the work; vectors and service use the ensemble's."""
    frozen_layers: Annotated[int, Field(ge=0)] = 0
    """So many of the first modules of f1 keep their initial weights and statistics."""
    appearance_size: Annotated[int, Field(ge=0)] = 0
    """So many numbers beside the embedding describe what the lungs look like (`Embedder`)."""
    appearance_forgets_source: bool = False
    """What tells sources apart within a label is taken out of them."""
    retrieve_with: Literal["embedding", "features"] = "embedding"
    """What is compared in retrieval; the baseline of Table 3 and 4 uses the pooled features."""
    leave_out_source: str | None = None
    """Rows of this source are neither trained on nor watched."""
    leave_out_fold: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=2)]] | None = None
    """(i, n): of that source only patients of fold i of n, for a cross-validation grouped by patient."""
    images_per_class: PositiveInt = 16
    jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Each edge of the lungs' box moves by up to this share of its size; of a frame, a window smaller by so much is cut out at random."""
    lesion_images: Annotated[int, Field(ge=0)] = 0
    """Extra images a batch with radiologist-drawn lesions (column lesion_mask_path), on which attention is supervised."""
    lesion_weight: Annotated[float, Field(ge=0)] = 0.0
    warm_up_iterations: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the exponential moving average of the weights, which is what is kept; 0 keeps the weights themselves."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled (AdamW); with 0 it is Adam."""
    clip_gradients: Annotated[float, Field(ge=0)] = 5.0
    """To this length of all together; 0: not."""
    int8_weights: bool = False
    """Ships with weights that int8 holds (`as_shipped`)."""
    keep: KeptName = "best"
    validate_every: PositiveInt = 200
    alpha: PositiveFloat = 2.0
    beta: PositiveFloat = 20.0
    base: float = 0.5
    miner_epsilon: PositiveFloat = 0.1
    members: Annotated[tuple[EmbedderMemberConfig, ...], Field(min_length=1)]
    """The networks of an `Embedder`, each with its own seed and schedule."""

    @model_validator(mode="after")
    def _fold_of_a_source(self) -> EmbedderConfig:
        if self.leave_out_fold is not None and (self.leave_out_source is None or self.leave_out_fold[0] >= self.leave_out_fold[1]):
            raise ValueError("leave_out_fold = [i, n] needs leave_out_source and i below n")
        return self


class OutcomeConfig(_Frozen):
    """`cxr train outcome`."""

    seed: int = 1
    labels: tuple[str, ...] = ("covid19",)
    """Films of these take part."""
    facts: Annotated[tuple[str, ...], Field(min_length=1)]
    """Columns of what is known of a patient before the outcome is."""
    folds: Annotated[int, Field(ge=2)] = 5
    trees: PositiveInt = 50
    depth: Annotated[int, Field(ge=1, le=8)] = 5
    layers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (128, 128)
    """Widths of the deep part; the cross part has as many layers."""
    learning_rate: PositiveFloat = 1e-4
    epochs: PositiveInt = 10
    batch_size: PositiveInt = 32
    components: Annotated[int, Field(ge=0)] = 0
    """So many principal components stand for the features in all but forests; with 0 all 2048 do."""


class MultilabelConfig(_Frozen):
    """`cxr train multilabel`."""

    seed: int = 1
    image_size: Literal[64, 128, 256] = 256
    loss: FindingsLoss = "weighted"
    none: tuple[str, ...] = ("control", "no_finding", "normal")
    """Labels that say that there is none, whatever their case, spaces as _."""
    least_films: PositiveInt = 20
    """Findings that fewer train films have are not learnt, unless asked for."""
    augmented: bool = True
    epochs: PositiveInt = 20
    batch_size: Annotated[int, Field(ge=2)] = 32
    learning_rate: PositiveFloat = 1e-3
    plateau_epochs: PositiveInt = 2
    """The learning rate falls to a tenth when the loss of the watched patients has not fallen for so many epochs."""


class MultimodalConfig(_Frozen):
    """`cxr train multimodal`."""

    seed: int = 1
    width: PositiveInt = 512
    """Of the image branch's hidden layer."""
    vocabulary: Annotated[int, Field(ge=64)] = 2000
    """Subwords at most."""
    text_size: Annotated[int, Field(ge=8, multiple_of=8)] = 128
    text_layers: PositiveInt = 2
    text_heads: Literal[1, 2, 4, 8] = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    feature_noise: Annotated[float, Field(ge=0)] = 0.1
    """Each feature of a film is learnt from with so much noise, as a share of itself."""
    epochs: PositiveInt = 40
    batch_size: Annotated[int, Field(ge=4)] = 64
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    distance_weight: Annotated[float, Field(ge=0)] = 0.1
    ranking_weight: Annotated[float, Field(ge=0)] = 0.5
    report_weight: Annotated[float, Field(ge=0)] = 0.5
    """Of reports without a film."""
    report_batch: Annotated[int, Field(ge=1)] = 16
    """So many of them beside each batch of films."""
    temperature: PositiveFloat = 0.1
    sharpness: PositiveFloat = 10.0
    label_likeness: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How much a report of a case with the same labels is wanted for a film, beside its own, which is wanted with 1."""
    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (1.0,)
    """Of the films' reports: a training with each, to see what those that are missing cost; what is served learnt from all."""
    folds: Annotated[int, Field(ge=0)] = 0
    """Films with a report are asked about in so many folds; 0: the val split is."""
    hidden: tuple[str, ...] = ()
    """Words that begin so are taken out of every text."""


def config_path(name: str) -> Path:
    """A shipped config by name, or a file by path."""
    shipped = CONFIGS / f"{name}.toml"
    return shipped if shipped.is_file() else Path(name)


Config = TypeVar("Config", bound=_Frozen)


def load_config(path: Path, kind: type[Config]) -> Config:
    """Reads one TOML file.

    Raises:
        UsageError: Unreadable, not TOML, unknown key, or a value out of range.
    """
    try:
        return kind.model_validate(tomllib.loads(path.read_text("utf-8")))
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.toml")))
        raise UsageError(
            f"{path}: cannot be read", expected="a TOML file", got=str(error.strerror), next_step=f"shipped configs: {known}"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path.name}: not TOML", got=str(error), next_step="correct that line") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{path.name}: {where} is wrong", expected=first["msg"], got=str(first["input"])[:80], next_step="correct that value"
        ) from error
