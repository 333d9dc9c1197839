"""Augmentation, on whole batches and on the training device, from kornia.

Segmentation: the list of section 2.3 (horizontal flip, Gaussian noise, perspective, sharpness, blurring, contrast, gamma,
brightness, CLAHE, grid distortion, affine, elastic). kornia has no grid distortion; its thin-plate spline, which moves a
grid of control points, stands in. Embedding: the paper has random crop alone (section 2.4.3; `augmented = false`), which
the jitter of the lungs' box does here; the rest is ours, against what tells sources apart.
"""

from __future__ import annotations

import kornia.augmentation as aug
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn


class SegmentationAugment(nn.Module):
    """Distorts radiographs and masks alike, in geometry; radiographs alone in exposure and sharpness.

    Args:
        soft: Masks are probabilities and stay so; otherwise they are cut at one half.
    """

    def __init__(self, *, soft: bool = False) -> None:
        super().__init__()
        self._soft = soft
        self.geometry = nn.Sequential(
            aug.RandomHorizontalFlip(p=0.5),
            aug.RandomAffine(degrees=12.0, translate=(0.06, 0.06), scale=(0.8, 1.2), shear=(-4.0, 4.0), p=0.7),
            aug.RandomPerspective(distortion_scale=0.2, p=0.2),
            aug.RandomThinPlateSpline(scale=0.08, p=0.15),
            aug.RandomElasticTransform(kernel_size=(31, 31), sigma=(8.0, 8.0), alpha=(0.6, 0.6), p=0.15),
        )
        self.exposure = nn.Sequential(
            aug.RandomBrightness(brightness=(0.75, 1.25), p=0.5),
            aug.RandomContrast(contrast=(0.7, 1.3), p=0.5),
            aug.RandomGamma(gamma=(0.6, 1.6), p=0.4),
            aug.RandomClahe(p=0.15),
            aug.RandomSharpness(sharpness=1.0, p=0.15),
            aug.RandomGaussianBlur(kernel_size=(5, 5), sigma=(0.3, 1.5), p=0.15),
            aug.RandomGaussianNoise(std=0.03, p=0.2),
        )

    @torch.no_grad()
    def forward(
        self, image: UInt8[Tensor, "batch 1 height width"], mask: UInt8[Tensor, "batch 1 height width"]
    ) -> tuple[Float[Tensor, "batch 1 height width"], Float[Tensor, "batch 1 height width"]]:
        """Returns pixels in 0…255 and masks in {0, 1}, soft ones in [0, 1]. Both ride through the geometry as channels of one picture."""
        moved = self.geometry(torch.cat([image.float() / 255.0, mask.float() / 255.0 if self._soft else (mask > 127).float()], dim=1))
        pixels = self.exposure(moved[:, :1].clamp(0.0, 1.0))
        return pixels.clamp(0.0, 1.0) * 255.0, moved[:, 1:].clamp(0.0, 1.0) if self._soft else (moved[:, 1:] > 0.5).float()


class EmbeddingAugment(nn.Module):
    """Rotation, shear and stretch; exposure, sharpness and noise inside the lungs; patches cut out; mirrored, half of them, if asked.

    Position and scale are left to the jitter of the lungs' box (`Embedder`), linear changes of exposure to its standardisation.

    Args:
        plain: Nothing but the mirroring.
    """

    def __init__(self, *, mirrored: bool = False, plain: bool = False) -> None:
        super().__init__()
        self.geometry = nn.Sequential(
            aug.RandomHorizontalFlip(p=0.5 if mirrored else 0.0),
            aug.RandomAffine(degrees=10.0, scale=(0.9, 1.1, 0.9, 1.1), shear=(-5.0, 5.0), p=0.0 if plain else 0.8),
        )
        self.exposure = nn.Sequential(
            aug.RandomGamma(gamma=(0.6, 1.6), p=0.0 if plain else 0.5),
            aug.RandomGaussianBlur(kernel_size=(5, 5), sigma=(0.3, 1.5), p=0.0 if plain else 0.2),
            aug.RandomGaussianNoise(std=0.03, p=0.0 if plain else 0.1),
        )
        self.erasing = aug.RandomErasing(scale=(0.01, 0.06), ratio=(0.4, 2.5), p=0.0 if plain else 0.15)

    @torch.no_grad()
    def forward(
        self, lungs: UInt8[Tensor, "batch 2 height width"], lesions: UInt8[Tensor, "batch 1 height width"]
    ) -> tuple[Float[Tensor, "batch 2 height width"], Float[Tensor, "batch 1 height width"]]:
        """Returns LUNGS, still 0…255 (a patch cut out no longer counts as lung), and lesions in {0, 1}, which follow the geometry."""
        moved = self.geometry(torch.cat([lungs.float() / 255.0, (lesions > 127).float()], dim=1)).clamp(0.0, 1.0)
        share = moved[:, 1:2]
        pixels = self.exposure(moved[:, :1]).clamp(0.0, 1.0) * (share > 0.0)
        return self.erasing(torch.cat([pixels, share], dim=1)) * 255.0, ((moved[:, 2:] > 0.5) & (share > 0.5)).float()


class FilmAugment(nn.Module):
    """Rotation, shift, scale, exposure and noise of whole films. They are never mirrored: a side is part of what a report says."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Sequential(
            aug.RandomAffine(degrees=8.0, translate=(0.04, 0.04), scale=(0.9, 1.1), p=0.8),
            aug.RandomGamma(gamma=(0.7, 1.4), p=0.5),
            aug.RandomGaussianNoise(std=0.02, p=0.2),
        )

    @torch.no_grad()
    def forward(self, image: UInt8[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 1 height width"]:
        """Returns pixels in 0…255."""
        return self.steps(image.float() / 255.0).clamp(0.0, 1.0) * 255.0
