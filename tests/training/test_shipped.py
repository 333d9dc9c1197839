"""The networks that ship: batch norms folded, weights as fp16 holds them, and still what was trained."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from cxr_retrieval.contract import IMAGE, LUNGS
from cxr_retrieval_training.config import BackboneName
from cxr_retrieval_training.embedding.embedder import Embedder
from cxr_retrieval_training.segmentation.segmenter import LungSegmenter
from cxr_retrieval_training.shipped import HALVED_FROM, Convolution, as_shipped, int8_scale


def look_at_noise(network: nn.Module, channels: int) -> None:
    """Leaves batch norms that do something."""
    with torch.no_grad():
        network.train()(torch.randint(0, 256, (4, channels, 64, 64), dtype=torch.uint8))
    network.eval()


def rounded_only_as(network: nn.Module) -> bool:
    """Whether fp16 holds every large tensor, and bf16 every convolution's weights."""
    large = [tensor for tensor in network.state_dict().values() if tensor.dtype == torch.float32 and tensor.numel() >= HALVED_FROM]
    weights = [module.weight for module in network.modules() if isinstance(module, Convolution)]
    return (
        len(large) > 0
        and len(weights) > 0
        and all(torch.equal(tensor, tensor.half().float()) for tensor in large)
        and all(torch.equal(weight, weight.bfloat16().float()) for weight in weights)
    )


@pytest.mark.parametrize("architecture", ["linknet", "deeplabv3plus"])
def test_segmentation_finds_the_same_with_folded_and_rounded_weights(architecture: str) -> None:
    torch.manual_seed(0)
    trained = LungSegmenter((architecture,))
    look_at_noise(trained, 1)
    shipped = as_shipped(copy.deepcopy(trained), IMAGE)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in shipped.modules())
    assert rounded_only_as(shipped)
    assert not rounded_only_as(trained)
    image = torch.randint(0, 256, (2, 1, 128, 128), dtype=torch.uint8)
    with torch.inference_mode():
        expected, got = (network.member_probabilities(image) for network in (trained, shipped))
    assert np.corrcoef(expected.flatten(), got.flatten())[0, 1] > 0.99, "an untrained map is nearly even: what varies must vary alike"


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet50"])
def test_embedder_finds_the_same_with_folded_and_rounded_weights(backbone: BackboneName) -> None:
    torch.manual_seed(0)
    trained = Embedder(backbone=backbone, mirrored=True, sizes=(64,))
    look_at_noise(trained, 2)
    shipped = as_shipped(copy.deepcopy(trained), LUNGS)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in shipped.modules())
    assert rounded_only_as(shipped)
    lungs = torch.randint(0, 256, (2, 2, 128, 128), dtype=torch.uint8)
    with torch.inference_mode():
        expected, got = (network(lungs)[0] for network in (trained, shipped))
    assert (got * expected).sum(dim=1).min() > 0.999


def test_embedder_finds_nearly_the_same_with_weights_of_int8() -> None:
    """And rounding them again, or as others are, changes nothing."""
    torch.manual_seed(0)
    trained = Embedder(backbone="resnet50", sizes=(64,))
    look_at_noise(trained, 2)
    shipped = as_shipped(copy.deepcopy(trained), LUNGS, int8_weights=True)
    assert rounded_only_as(shipped)
    again = as_shipped(copy.deepcopy(shipped), LUNGS, int8_weights=True)
    for module, other in zip(shipped.modules(), again.modules(), strict=True):
        if isinstance(module, Convolution | nn.Linear):
            assert isinstance(other, Convolution | nn.Linear)
            steps = module.weight / int8_scale(module.weight)
            assert torch.equal(steps, steps.round())
            assert 63 < steps.abs().flatten(1).amax(dim=1).min() <= steps.abs().max() <= 127
            assert torch.equal(module.weight, other.weight)
    lungs = torch.randint(0, 256, (2, 2, 128, 128), dtype=torch.uint8)
    with torch.inference_mode():
        expected, got = (network(lungs)[0] for network in (trained, shipped))
    assert (got * expected).sum(dim=1).min() > 0.998


def test_a_row_of_zeros_has_a_scale() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -127.0], [127.5, 1.0], [2.0**-20, 0.0]])
    assert int8_scale(weight).flatten().tolist() == [1.0, 1.0, 2.0, 2.0**-26]
