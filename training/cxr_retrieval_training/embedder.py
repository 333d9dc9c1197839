"""The attention embedder and the attention-map head (Zhong et al. 2020, section 2.4.2 and 2.4.3).

Symbols: f1 = ResNet-50 up to conv3_4 (`stem` + `layer1` + `layer2`), f2 = up to conv4_6 (`layer3`), α = attention module,
g = projection head (the rest of ResNet-50 and two fully connected layers). Eq. 4: f̃(x) = g(α(f1(x)) ⊙ f2(f1(x))).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck
from torchvision.ops import SqueezeExcitation

from cxr_retrieval.contract import EMBEDDING_SIZE, FEATURE_SIZE

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class SpatialAttention(nn.Module):
    """α: "3 'bottleneck' building blocks in the ResNet, followed by a Squeeze-and-Excitation layer, channel-wise
    averaging and sigmoid activation" (section 2.4.3).

    The first block halves the resolution, so that a 256×256 image gets the published 16×16 mask. Before the sigmoid we
    standardise the averaged map over its 256 cells and scale it by a learnt gain: the plain mean of 1024 rectified
    channels hardly varies over the image, and the sigmoid of it would be nearly flat.
    """

    def __init__(self, channels_in: int = 512, channels_out: int = 1024) -> None:
        super().__init__()
        width = channels_out // Bottleneck.expansion
        shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride=2, bias=False), nn.BatchNorm2d(channels_out))
        self.blocks = nn.Sequential(
            Bottleneck(channels_in, width, stride=2, downsample=shortcut), Bottleneck(channels_out, width), Bottleneck(channels_out, width)
        )
        self.squeeze_excitation = SqueezeExcitation(channels_out, channels_out // 16)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, f1: Float[Tensor, "batch 512 height width"]) -> Float[Tensor, "batch 1 height/2 width/2"]:
        """Returns the mask m(x) in (0, 1)."""
        averaged = self.squeeze_excitation(self.blocks(f1)).float().mean(dim=1, keepdim=True)
        centred = averaged - averaged.mean(dim=(2, 3), keepdim=True)
        deviation = (centred.square().mean(dim=(2, 3), keepdim=True) + 1e-5).sqrt()
        return torch.sigmoid(self.gain * centred / deviation)


class Embedder(nn.Module):
    """The exported graph `embedder`. `attention=False` gives the ablation of section 3.3.1 (the mask is then all ones)."""

    def __init__(self, embedding_size: int = EMBEDDING_SIZE, *, attention: bool = True) -> None:
        super().__init__()
        backbone = resnet50(weights=None)
        self.f1 = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool, backbone.layer1, backbone.layer2)
        self.f2 = backbone.layer3
        self.attention = SpatialAttention() if attention else None
        self.rest = nn.Sequential(backbone.layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        # The paper gives the 64 of the second layer; the width of the first, and the ReLU between, are ours.
        self.head = nn.Sequential(nn.Linear(FEATURE_SIZE, 512), nn.ReLU(inplace=True), nn.Linear(512, embedding_size))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1))

    def forward(
        self, lungs: UInt8[Tensor, "batch 1 height width"] | Float[Tensor, "batch 1 height width"]
    ) -> tuple[Float[Tensor, "batch embedding"], Float[Tensor, "batch 2048"], Float[Tensor, "batch 1 height/16 width/16"]]:
        """Takes the masked radiograph, 0…255 (float when it comes from augmentation).

        Returns:
            EMBEDDING of unit length (eq. 1), FEATURES before the projection head (section 3.4), ATTENTION in (0, 1).
        """
        grey = (lungs.float() / 255.0).expand(-1, 3, -1, -1)
        f1 = self.f1((grey - self.mean) / self.std)
        f2 = self.f2(f1)
        mask = self.attention(f1) if self.attention is not None else torch.ones_like(f2[:, :1]).float()
        features = self.rest(mask.to(f2.dtype) * f2)
        embedding = functional.normalize(self.head(features).float(), dim=1)
        return embedding, features.float(), mask


class AttentionMapHead(nn.Module):
    """The exported graph `attention_map`: attention at image size, inside the lungs only; passes the mask on.

    The mask leaves the server here and not after segmentation, because Triton prunes steps that no requested output
    needs only while no tensor consumed by a later step is itself an ensemble output.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size

    def forward(
        self, attention: Float[Tensor, "batch 1 rows columns"], lung_mask: UInt8[Tensor, "batch 1 height width"]
    ) -> tuple[Float[Tensor, "batch 1 height width"], UInt8[Tensor, "batch 1 height width"]]:
        """Returns ATTENTION_MAP in [0, 1] and LUNG_MASK unchanged."""
        upsampled = functional.interpolate(attention, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        inside = lung_mask.float()
        return (upsampled * (inside / 255.0)).clamp(0.0, 1.0), inside.to(torch.uint8)
