"""DenseNet-121 (Huang et al. 2017) on whole radiographs: 1024 features of unit length, and a probability for each finding."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import densenet121

from cxr_retrieval.contract import FINDING_FEATURE_SIZE, IMAGE_SIZE
from cxr_retrieval.errors import UsageError
from cxr_retrieval_training.checkpoints import load_checkpoint

_FLAT = 1e-3
"""Deviation of a film on which there is nothing to see, in units of full scale."""


class FindingsNetwork(nn.Module):
    """The network that is trained and served.

    It sees the whole frame, not the lungs alone: fluid takes the place of what looks like lung, and the heart lies outside. So it also sees
    what a hospital burns into its films.

    Args:
        findings: How many.
        image_size: Side at which it looks, in pixels: 256, or an integer part of it.
        exclusive: One label a film; probabilities then add up to 1.
    """

    def __init__(self, findings: int, image_size: int, *, exclusive: bool = False) -> None:
        super().__init__()
        body = densenet121(weights=None).features
        body.conv0 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
        self.body = body
        self.head = nn.Linear(FINDING_FEATURE_SIZE, findings)
        self._shrink, self._exclusive = IMAGE_SIZE // image_size, exclusive

    def features(self, image: Float[Tensor, "batch 1 256 256"]) -> Float[Tensor, "batch 1024"]:
        """Before they are normalised, of greys 0…255 of any exposure: each film is brought to mean 0 and deviation 1."""
        grey = functional.avg_pool2d(image, self._shrink) / 255.0
        moved = grey - grey.mean(dim=(2, 3), keepdim=True)
        spread = moved.square().mean(dim=(2, 3), keepdim=True).sqrt()
        found = functional.relu(self.body(moved / spread.clamp(min=_FLAT)))
        return found.mean(dim=(2, 3))

    def logits(self, features: Float[Tensor, "batch 1024"]) -> Float[Tensor, "batch findings"]:
        """Of what `features` gives."""
        return self.head(features)

    def forward(self, image: UInt8[Tensor, "batch 1 256 256"]) -> tuple[Float[Tensor, "batch 1024"], Float[Tensor, "batch findings"]]:
        """FINDING_FEATURES and FINDINGS, as served."""
        found = self.features(image.float())
        logits = self.logits(found)
        return functional.normalize(found, dim=1), torch.softmax(logits, dim=1) if self._exclusive else torch.sigmoid(logits)


def start_from(network: FindingsNetwork, weights: Path) -> None:
    """Takes over the layers of a torchvision DenseNet-121 (ImageNet, say); its first filters are summed over colours.

    Raises:
        UsageError: Not such a state dict.
    """
    state = {key.removeprefix("features."): value for key, value in load_checkpoint(weights).items() if key.startswith("features.")}
    try:
        state["conv0.weight"] = state["conv0.weight"].sum(dim=1, keepdim=True)
        network.body.load_state_dict(state)
    except (IndexError, KeyError, RuntimeError) as error:
        raise UsageError(
            f"{weights}: not a torchvision DenseNet-121",
            got=str(error)[:200],
            next_step="give the state dict of torchvision.models.densenet121",
        ) from error
