"""The attention embedder and the attention-map head (Zhong et al. 2020, section 2.4.2 and 2.4.3).

Symbols: f1 = ResNet-50 up to conv3_4 (stride 8), f2 = up to conv4_6 (stride 16), α = attention module, g = projection head
(the rest of ResNet-50 and two fully connected layers). Eq. 4: f̃(x) = g(α(f1(x)) ⊙ f2(f1(x))).

Two backbones have these parts: the published ResNet-50, and EfficientNet-Lite0, for which ImageNet weights can be had from a
package registry and which is what the shipped weights use; a 1×1 convolution brings its last stage to the same 2048 features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import timm
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck
from torchvision.ops import SqueezeExcitation

from cxr_retrieval.contract import ATTENTION_SIZE, EMBEDDING_SIZE, FEATURE_SIZE, IMAGE_SIZE
from cxr_retrieval.errors import UsageError
from cxr_retrieval_training.config import BackboneName
from cxr_retrieval_training.embedding.normalisation import between_boxes, from_box, lung_box, standardised_lungs, whole_frame
from cxr_retrieval_training.imagenet import BACKBONE as LITE0
from cxr_retrieval_training.imagenet import imagenet_state

_HELD: Final = 2.0**15
"""Well within what fp16, in which weights ship, can hold."""

_RIDGE: Final = 0.1
"""Of the largest variance, added to each before whitening: small axes would magnify what a runtime rounds."""


class _Backbone(NamedTuple):
    f1: nn.Sequential
    f2: nn.Sequential
    rest: nn.Sequential
    f1_channels: int
    f2_channels: int
    attention_channels: int


def _resnet50() -> _Backbone:
    net = resnet50(weights=None)
    f1 = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2)
    return _Backbone(f1, nn.Sequential(net.layer3), nn.Sequential(net.layer4), 512, 1024, 1024)


def _efficientnet_lite0(*, imagenet: bool) -> _Backbone:
    net: Any = timm.create_model(LITE0)
    if imagenet:
        net.load_state_dict(imagenet_state(), strict=False)
    f1 = nn.Sequential(net.conv_stem, net.bn1, *net.blocks[:3])
    widened = nn.Sequential(nn.Conv2d(320, FEATURE_SIZE, 1, bias=False), nn.BatchNorm2d(FEATURE_SIZE), nn.ReLU6(inplace=True))
    return _Backbone(f1, nn.Sequential(*net.blocks[3:5]), nn.Sequential(*net.blocks[5:], widened), 40, 112, 128)


class SpatialAttention(nn.Module):
    """α: "3 'bottleneck' building blocks in the ResNet, followed by a Squeeze-and-Excitation layer, channel-wise
    averaging and sigmoid activation" (section 2.4.3).

    The first block halves the resolution, so that a 256×256 image gets the published 16×16 mask. Before the sigmoid we
    standardise the averaged map over its 256 cells and scale it by a learnt gain: the plain mean of so many rectified
    channels hardly varies over the image, and the sigmoid of it would be nearly flat.

    So the mask says which places of a film stand out from the rest of that film; it does not tell a sick film from a healthy one
    (measured: CARD.md of the embedder). What the map is before it is standardised tells the source, and hardly the disease.

    Args:
        standardised: False: the sigmoid of the averaged map itself, as published.
    """

    def __init__(self, channels_in: int, channels_out: int, *, standardised: bool = True) -> None:
        super().__init__()
        width = channels_out // Bottleneck.expansion
        shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False), nn.BatchNorm2d(channels_out))
        self.blocks = nn.Sequential(
            Bottleneck(channels_in, width, stride=2, downsample=shortcut), Bottleneck(channels_out, width), Bottleneck(channels_out, width)
        )
        self.squeeze_excitation = SqueezeExcitation(channels_out, channels_out // 16)
        self.gain = nn.Parameter(torch.ones(())) if standardised else None

    def forward(self, f1: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 height/2 width/2"]:
        """Returns the mask m(x) in (0, 1)."""
        averaged = self.squeeze_excitation(self.blocks(f1)).float().mean(dim=1, keepdim=True)
        if self.gain is None:
            return torch.sigmoid(averaged)
        centred = averaged - averaged.mean(dim=(2, 3), keepdim=True)
        deviation = (centred.square().mean(dim=(2, 3), keepdim=True) + 1e-5).sqrt()
        return torch.sigmoid(self.gain * centred / deviation)


class Strata(NamedTuple):
    """Label and source of each row, as numbers `[n]`."""

    labels: NDArray[np.int64]
    sources: NDArray[np.int64]


class PrincipalAxes(nn.Module):
    """Fewer numbers for many, of unit length: the leading principal axes, in closed form from the train rows after training.

    Centred, and each axis divided by its standard deviation (Jégou & Chum 2012), so that all count alike (nearly: see `_RIDGE`).
    """

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.projection: Tensor
        self.register_buffer("mean", torch.zeros(size_in))
        self.register_buffer("projection", torch.zeros(size_in, size_out))

    def fit(self, rows: NDArray[np.float32], strata: Strata | None = None) -> None:
        """Takes `[n, size_in]`.

        Args:
            strata: If given, what tells sources apart within a label is taken out of the axes (`source_directions`).

        Raises:
            UsageError: Fewer images than axes.
        """
        size = self.projection.shape[1]
        if len(rows) <= size:
            raise UsageError(
                f"too few images to fit {size} principal axes",
                expected=f"more than {size} training images",
                got=str(len(rows)),
                next_step="train on more, or lower appearance_size in the config",
            )
        mean = rows.mean(axis=0)
        _, singular, axes = np.linalg.svd((rows - mean).astype(np.float64), full_matrices=False)
        variance = singular**2 / len(rows)
        projection = axes[:size].T * (variance[:size] + _RIDGE * max(variance[0], 1e-12)) ** -0.5
        if strata is not None:
            nuisance = source_directions((rows - mean) @ projection, strata)
            projection = projection - projection @ nuisance @ nuisance.T
        beyond = np.abs(projection).max() / _HELD
        if beyond > 1.0:  # a few films that hardly differ: unit length follows, so the scale is free
            projection = projection / beyond
        self.mean.copy_(torch.from_numpy(mean))
        self.projection.copy_(torch.from_numpy(projection.astype(np.float32)))

    def forward(self, rows: Float[Tensor, "batch many"]) -> Float[Tensor, "batch few"]:
        """Unit length (0 while not fitted)."""
        return functional.normalize((rows - self.mean) @ self.projection, dim=1)


def source_directions(rows: NDArray[np.float64], strata: Strata) -> NDArray[np.float64]:
    """Orthonormal `[size, d]` that span the differences between sources' mean rows `[n, size]` within a label.

    Without them the means are one (Haghighatkhah et al. 2022). A source counts where it holds at least as many films of the label
    as there are axes: the mean of fewer is mostly chance.
    """
    size = rows.shape[1]
    apart: list[NDArray[np.float64]] = []
    for label in np.unique(strata.labels):
        of_label = [(strata.labels == label) & (strata.sources == source) for source in np.unique(strata.sources)]
        means = [rows[mine].mean(axis=0) for mine in of_label if mine.sum() >= size]
        apart += [mean - means[0] for mean in means[1:]]
    if not apart:
        return np.zeros((size, 0))
    return np.linalg.qr(np.stack(apart, axis=1))[0]


class Description(NamedTuple):
    """All that is found: `learned` `[n, d]` (of several members side by side) and `layout` `[n, 4·channels]`, f2 averaged in each
    quarter, both of unit length, `features` `[n, 2048]`, `attention` `[n, 1, rows, columns]` in (0, 1) over the lungs' box.
    """

    learned: Tensor
    features: Tensor
    layout: Tensor
    attention: Tensor


class EmbedderMember(nn.Module):
    """The published network: eq. 4. `attention=False` gives the ablation of section 3.3.1 (the mask is then all ones).

    Args:
        learned_size: Numbers of its own share of the embedding.
        mirrored: Outside training it looks at the lungs and at their mirror image, and finds the mean of both.
        size: Side of the square the lungs are brought to: the size trained on (the published is 256).
        attention_standardised: See `SpatialAttention`.
        framed: It looks at the whole frame, as published, and not at the box around the lungs.
    """

    def __init__(
        self,
        learned_size: int = EMBEDDING_SIZE,
        *,
        backbone: BackboneName = "efficientnet_lite0",
        attention: bool = True,
        imagenet: bool = False,
        mirrored: bool = False,
        size: int = IMAGE_SIZE,
        attention_standardised: bool = True,
        framed: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.learned_size, self.mirrored, self.framed = size, learned_size, mirrored, framed
        parts = _resnet50() if backbone == "resnet50" else _efficientnet_lite0(imagenet=imagenet)
        self.f1, self.f2 = parts.f1, parts.f2
        self.layout_size = 4 * parts.f2_channels
        self.attention = (
            SpatialAttention(parts.f1_channels, parts.attention_channels, standardised=attention_standardised) if attention else None
        )
        self.rest = nn.Sequential(*parts.rest, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        # The paper gives the 64 of the second layer; the width of the first, and the ReLU between, are ours.
        self.head = nn.Sequential(nn.Linear(FEATURE_SIZE, 512), nn.ReLU(inplace=True), nn.Linear(512, learned_size))

    def keep_frozen(self, layers: int) -> None:
        """The first modules of f1 take no gradient, and their batch norm keeps its statistics (call after `train()`)."""
        for module in self.f1[:layers]:
            module.requires_grad_(requires_grad=False)
            module.eval()

    def box(self, share: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 4"]:
        """What of LUNGS it looks at, given how much each pixel counts as lung: the box around the lungs, or the frame."""
        return whole_frame(share) if self.framed else lung_box(share)

    def forward(
        self,
        lungs: UInt8[Tensor, "batch 2 height width"] | Float[Tensor, "batch 2 height width"],
        size: int | None = None,
        box: Float[Tensor, "batch 4"] | None = None,
    ) -> Description:
        """Looks at LUNGS, 0…255 (float when it comes from augmentation); size and box its own by default."""
        values = lungs.float()
        seen = standardised_lungs(values, self.box(values[:, 1:]) if box is None else box, size or self.size).expand(-1, 3, -1, -1)
        if self.training or not self.mirrored:
            return self._described(*self._look(seen))
        # unflatten, for chunk would fix the batch size in the exported graph
        both = [part.unflatten(0, (2, -1)) for part in self._look(torch.cat([seen, seen.flip(3)]))]
        (learned, features, quarters, mask), (learned_back, features_back, quarters_back, mask_back) = zip(*both, strict=True)
        return self._described(
            learned + learned_back, (features + features_back) / 2, quarters + quarters_back.flip(3), (mask + mask_back.flip(3)) / 2
        )

    def _look(self, seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Learned (unit length), features, f2 averaged in each quarter `[n, channels, 2, 2]`, and mask."""
        f1 = self.f1(seen.contiguous(memory_format=torch.channels_last))
        f2 = self.f2(f1)
        mask = self.attention(f1) if self.attention is not None else torch.ones_like(f2[:, :1]).float()
        features = self.rest(mask.to(f2.dtype) * f2)
        learned = functional.normalize(self.head(features).float(), dim=1)
        return learned, features.float(), functional.adaptive_avg_pool2d(f2, 2).float(), mask

    def _described(self, learned: Tensor, features: Tensor, quarters: Tensor, mask: Tensor) -> Description:
        return Description(functional.normalize(learned, dim=1), features, functional.normalize(quarters.flatten(1), dim=1), mask)


class Embedder(nn.Module):
    """The exported graph `embedder`: what its members have learned, and beside it what lungs look like whatever the label.

    The paper has one network. As the paper does for lungs (section 2.3), several trained alike but for their seed look at the
    same lungs (Lakshminarayanan et al. 2017): what one has learnt by chance others outvote. Their numbers side by side are the
    embedding, so that the cosine similarity of two embeddings is the mean of the members'.

    What is learnt from three labels knows only those: a fourth disease lands among them at random, and within a label any
    neighbour is as good as another. So there is appearance, too, where lungs are light and dark: f2 averaged in each quarter of the
    box, whitened, which keeps like beside like. No label is looked at to fit it, but it is not free of them: f2 belongs to members
    that labels have trained, and where it forgets the source (`fit`), labels say within which films sources are compared.

    Args:
        learned_size: So many numbers each member learns.
        appearance_size: Numbers of APPEARANCE; 0 as published.
        sizes: For each member, the side of the square the lungs are brought to.
        mirrored: See `EmbedderMember`; so for attention_standardised and framed.
    """

    def __init__(
        self,
        learned_size: int = EMBEDDING_SIZE,
        *,
        backbone: BackboneName = "efficientnet_lite0",
        attention: bool = True,
        imagenet: bool = False,
        mirrored: bool = False,
        appearance_size: int = 0,
        sizes: Sequence[int] = (IMAGE_SIZE,),
        attention_standardised: bool = True,
        framed: bool = False,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            EmbedderMember(
                learned_size,
                backbone=backbone,
                attention=attention,
                imagenet=imagenet,
                mirrored=mirrored,
                size=size,
                attention_standardised=attention_standardised,
                framed=framed,
            )
            for size in sizes
        )
        layout_size = sum(member.layout_size for member in self.each())
        self.appearance = PrincipalAxes(layout_size, appearance_size) if appearance_size else None

    def each(self) -> list[EmbedderMember]:
        """The members by their type."""
        return [member for member in self.members if isinstance(member, EmbedderMember)]

    def forward(
        self, lungs: UInt8[Tensor, "batch 2 height width"]
    ) -> tuple[
        Float[Tensor, "batch embedding"], Float[Tensor, "batch appearance"], Float[Tensor, "batch 2048"], Float[Tensor, "batch 1 16 16"]
    ]:
        """Takes LUNGS: the radiograph, and how much each pixel counts as lung, 0…255.

        Returns:
            EMBEDDING of unit length (eq. 1), APPEARANCE of unit length (0 while not fitted), FEATURES before the projection head (section
            3.4; mean of the members'), ATTENTION in (0, 1) over the lungs' box (mean of the members'), 16×16 whatever their size is.
        """
        found = self.describe(lungs)
        return found.learned, self.look(found), found.features, found.attention

    def describe(self, lungs: UInt8[Tensor, "batch 2 height width"]) -> Description:
        """What all members find together."""
        parts = [member(lungs) for member in self.each()]
        masks = [
            functional.interpolate(part.attention, size=(ATTENTION_SIZE, ATTENTION_SIZE), mode="bilinear", align_corners=False)
            for part in parts
        ]
        if any(member.framed for member in self.each()):
            share = lungs[:, 1:].float()
            masks = [between_boxes(mask, whole_frame(share), lung_box(share)) for mask in masks]
        return Description(
            functional.normalize(torch.cat([part.learned for part in parts], dim=1), dim=1),
            torch.stack([part.features for part in parts]).mean(dim=0),
            functional.normalize(torch.cat([part.layout for part in parts], dim=1), dim=1),
            torch.stack(masks).mean(dim=0),
        )

    def look(self, found: Description) -> Float[Tensor, "batch appearance"]:
        """APPEARANCE; of no numbers where there is none."""
        return found.layout[:, :0] if self.appearance is None else self.appearance(found.layout)


class AttentionMapHead(nn.Module):
    """The exported graph `attention_map`: attention back in the frame, inside the lungs only; passes the mask on.

    The mask leaves the server here and not after segmentation, because Triton prunes steps that no requested output
    needs only while no tensor consumed by a later step is itself an ensemble output.
    """

    def forward(
        self, attention: Float[Tensor, "batch 1 rows columns"], lung_mask: UInt8[Tensor, "batch 1 height width"]
    ) -> tuple[Float[Tensor, "batch 1 height width"], UInt8[Tensor, "batch 1 height width"]]:
        """Returns ATTENTION_MAP in [0, 1] and LUNG_MASK unchanged."""
        inside = lung_mask.float()
        upsampled = from_box(attention, lung_box(inside), inside.shape[2], inside.shape[3])
        return (upsampled * (inside / 255.0)).clamp(0.0, 1.0), inside.to(torch.uint8)
