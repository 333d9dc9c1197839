"""Lung segmentation: five EfficientNet networks averaged, small islands removed, everything outside the lungs blanked.

Zhong et al. 2020, section 2.3: "an ensemble of five deep neural networks [with] the same backbone structure of
EfficientNet, but with different architectures". The paper names neither the architectures nor the size of the backbone;
we take U-Net, U-Net++, FPN, LinkNet and DeepLabV3+ on EfficientNet-Lite0 with one input channel: B0 without what is slow on
a CPU, and ImageNet weights for it can be had from a package registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import segmentation_models_pytorch as smp
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from cxr_retrieval_training.imagenet import BACKBONE, imagenet_state

ARCHITECTURES: Final[Mapping[str, type[nn.Module]]] = {
    "unet": smp.Unet,
    "unetplusplus": smp.UnetPlusPlus,
    "fpn": smp.FPN,
    "linknet": smp.Linknet,
    "deeplabv3plus": smp.DeepLabV3Plus,
}
ENCODER: Final = f"tu-{BACKBONE}"

SURE: Final = (0.25, 0.75)
"""Mean probability at which a pixel begins to count as lung, and counts wholly; LUNG_MASK is cut between."""
_OPENING_RADIUS: Final = 6
"""Pixels at 256×256: an island that holds no 13×13 square is no lung (a neonate's lung is over 40 wide)."""
_BELOW_ALL: Final = -2.0
"""Less than any probability, or the negative of one: what lies outside the frame is never the greatest."""


def build_member(architecture: str, *, imagenet: bool = False) -> nn.Module:
    """One member: `[batch, 1, h, w]` → logits `[batch, 1, h, w]`; h, w multiples of 32.

    Args:
        imagenet: Start the encoder from ImageNet weights; the decoder is random in any case.
    """
    member = ARCHITECTURES[architecture](encoder_name=ENCODER, encoder_weights=None, in_channels=1, classes=1)
    if imagenet:
        encoder = member.encoder.model
        state = imagenet_state(channels=1)
        encoder.load_state_dict({name: state[name] for name in encoder.state_dict() if "num_batches_tracked" not in name}, strict=False)
    return member


class NormalisedMember(nn.Module):
    """A member behind the pixel normalisation, so that the exported graph takes raw pixels."""

    def __init__(self, architecture: str, *, imagenet: bool = False) -> None:
        super().__init__()
        self.network = build_member(architecture, imagenet=imagenet)

    def forward(self, pixels: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 height width"]:
        """Pixels in 0…255 → logits."""
        return self.network((pixels / 255.0 - 0.5) / 0.25)


class LungSegmenter(nn.Module):
    """The exported graph `lung_segmentation`: mean probability of all members → mask, lungs, agreement."""

    def __init__(self, architectures: Sequence[str] = tuple(ARCHITECTURES)) -> None:
        super().__init__()
        self.members = nn.ModuleDict({name: NormalisedMember(name) for name in architectures})

    def member_probabilities(self, image: UInt8[Tensor, "batch 1 height width"]) -> Float[Tensor, "members batch 1 height width"]:
        """Each member's probability of lung, in [0, 1]."""
        pixels = image.float()
        return torch.stack([torch.sigmoid(member(pixels).float()) for member in self.members.values()])

    def forward(
        self, image: UInt8[Tensor, "batch 1 height width"]
    ) -> tuple[UInt8[Tensor, "batch 1 height width"], UInt8[Tensor, "batch 2 height width"], Float[Tensor, "batch 1"]]:
        """Averages the probabilities (section 2.3).

        Returns:
            LUNG_MASK (0 or 255), LUNGS (the radiograph, 0 outside, and how much each pixel counts as lung), and LUNG_AGREEMENT.
        """
        each = self.member_probabilities(image)
        probability = drop_small_islands(each.mean(dim=0))
        inside = (probability >= 0.5).float()
        share = ((probability - SURE[0]) / (SURE[1] - SURE[0])).clamp(0.0, 1.0)
        lungs = torch.cat([image.float() * (share > 0.0), (share * 255.0).round()], dim=1)
        trust = agreement(each, inside) if len(self.members) > 1 else expected_dice(each[0], inside)
        return (inside * 255.0).to(torch.uint8), lungs.to(torch.uint8), trust


def agreement(
    probabilities: Float[Tensor, "members batch 1 height width"], inside: Float[Tensor, "batch 1 height width"]
) -> Float[Tensor, "batch 1"]:
    """Mean Dice coefficient of the members' own masks with the ensemble's, in [0, 1]; 0 where the ensemble finds no lung.

    Ours: the spread of an ensemble tells where it is out of its depth (Lakshminarayanan et al. 2017), and so which
    masks not to rely on.
    """
    own = (probabilities >= 0.5).float()
    both = (own * inside).sum(dim=(2, 3, 4))
    total = own.sum(dim=(2, 3, 4)) + inside.sum(dim=(1, 2, 3))
    return (2.0 * both / total.clamp(min=1.0)).mean(dim=0)[:, None]


def expected_dice(
    probability: Float[Tensor, "batch 1 height width"], inside: Float[Tensor, "batch 1 height width"]
) -> Float[Tensor, "batch 1"]:
    """Dice coefficient of a mask with the probabilities it was cut from, in [0, 1]; 0 where there is no lung.

    What stands in for `agreement` where there is one network: a student has learnt the ensemble's mean probability, which is far from 0
    and 1 where the five disagree.
    """
    both = (probability * inside).sum(dim=(1, 2, 3))
    total = probability.sum(dim=(1, 2, 3)) + inside.sum(dim=(1, 2, 3))
    return (2.0 * both / total.clamp(min=1.0))[:, None]


def drop_small_islands(probability: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 height width"]:
    """Removes islands too small to be lung, then fills holes as small, both by morphological reconstruction.

    Erode until only what holds a 13×13 square is left, then grow that back inside the mask: large regions keep their
    outline to the pixel, small islands are gone. Of grey values (Vincent 1993) it does at every threshold what it does of the
    mask that this threshold cuts. Made of maxima and minima alone, so that every runtime runs it (connected
    components exist in no ONNX operator set). The paper does not say what it does with islands.

    Args:
        probability: Of lung, in [0, 1], or a mask.
    """
    return -_open_by_reconstruction(-_open_by_reconstruction(probability))


def _open_by_reconstruction(values: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 height width"]:
    grown = -_dilated(-values, _OPENING_RADIUS)
    for _ in range(4 * _OPENING_RADIUS):
        grown = torch.minimum(_dilated(grown, 1), values)
    return grown


def _dilated(values: Float[Tensor, "batch 1 height width"], radius: int) -> Float[Tensor, "batch 1 height width"]:
    """The greatest value in the square of side 2·radius + 1 around each pixel: max-pooling, by shifts along one axis and then the other.

    Each shift doubles what a value is the greatest of, as far as that goes. OpenVINO's own max-pooling of a single channel takes four to
    five times as long (one thread, AVX-512), and fifty of them longer than the student's network.
    """
    values = functional.pad(values, (radius,) * 4, value=_BELOW_ALL)
    for axis in (2, 3):
        seen = 1
        while seen < 2 * radius + 1:
            shift = min(seen, 2 * radius + 1 - seen)
            left = values.shape[axis] - shift
            values = torch.maximum(values.narrow(axis, 0, left), values.narrow(axis, shift, left))
            seen += shift
    return values
