"""Lung segmentation: five EfficientNet networks averaged, small islands removed, everything outside the lungs blanked.

Zhong et al. 2020, section 2.3: "an ensemble of five deep neural networks [with] the same backbone structure of
EfficientNet, but with different architectures". The paper names neither the architectures nor the size of the backbone;
we take U-Net, U-Net++, FPN, LinkNet and DeepLabV3+ on EfficientNet-B0 with one input channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import segmentation_models_pytorch as smp
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

ARCHITECTURES: Final = {
    "unet": smp.Unet,
    "unetplusplus": smp.UnetPlusPlus,
    "fpn": smp.FPN,
    "linknet": smp.Linknet,
    "deeplabv3plus": smp.DeepLabV3Plus,
}
ENCODER: Final = "efficientnet-b0"

_OPENING_RADIUS: Final = 6
"""Pixels at 256×256: an island that holds no 13×13 square is no lung (a neonate's lung is over 40 wide)."""


def build_member(architecture: str) -> nn.Module:
    """One member, random weights: `[batch, 1, h, w]` in [0, 1] → logits `[batch, 1, h, w]`; h, w multiples of 32.

    The encoders' batch-norm momentum is raised from 0.01 to PyTorch's 0.1: trained from scratch for a few epochs, the
    running statistics would otherwise lag so far behind that evaluation mode sees nothing.
    """
    member = ARCHITECTURES[architecture](encoder_name=ENCODER, encoder_weights=None, in_channels=1, classes=1)
    for module in member.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return member


class NormalisedMember(nn.Module):
    """A member behind the pixel normalisation, so that the exported graph takes raw pixels."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.network = build_member(architecture)

    def forward(self, pixels: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 height width"]:
        """Pixels in 0…255 → logits."""
        return self.network((pixels / 255.0 - 0.5) / 0.25)


class LungSegmenter(nn.Module):
    """The exported graph `lung_segmentation`: mean probability of all members → mask and masked radiograph."""

    def __init__(self, architectures: Sequence[str] = tuple(ARCHITECTURES)) -> None:
        super().__init__()
        self.members = nn.ModuleDict({name: NormalisedMember(name) for name in architectures})

    def probability(self, image: UInt8[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 height width"]:
        """Average of the members' probabilities (section 2.3), in [0, 1]."""
        pixels = image.float()
        maps = [torch.sigmoid(member(pixels).float()) for member in self.members.values()]
        return torch.stack(maps).mean(dim=0)

    def forward(
        self, image: UInt8[Tensor, "batch 1 height width"]
    ) -> tuple[UInt8[Tensor, "batch 1 height width"], UInt8[Tensor, "batch 1 height width"]]:
        """Returns LUNG_MASK (0 or 255) and LUNGS (the radiograph, 0 outside the lungs)."""
        inside = drop_small_islands((self.probability(image) >= 0.5).float())
        return (inside * 255.0).to(torch.uint8), (image.float() * inside).to(torch.uint8)


def drop_small_islands(mask: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 height width"]:
    """Removes islands too small to be lung, then fills holes as small, both by morphological reconstruction.

    Erode until only what holds a 13×13 square is left, then grow that back inside the mask: large regions keep their
    outline to the pixel, small islands are gone. Made of max-pooling alone, so that every runtime runs it (connected
    components exist in no ONNX operator set). The paper does not say what it does with islands.
    """
    opened = _open_by_reconstruction(mask)
    return 1.0 - _open_by_reconstruction(1.0 - opened)


def _open_by_reconstruction(mask: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 height width"]:
    grown = -functional.max_pool2d(-mask, 2 * _OPENING_RADIUS + 1, stride=1, padding=_OPENING_RADIUS)
    for _ in range(4 * _OPENING_RADIUS):
        grown = functional.max_pool2d(grown, 3, stride=1, padding=1) * mask
    return grown
