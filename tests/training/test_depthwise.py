"""The compiled gradients equal PyTorch's own; geometry in distinct primes, so that swapped axes fail."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cxr_retrieval_training.depthwise import DepthwiseConv2d, with_fast_depthwise


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((5, 3), (2, 1), (2, 0), (1, 2)),
        ((3, 5), (1, 2), (0, 3), (2, 1)),
        ((5, 5), (2, 2), (2, 2), (1, 1)),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_equal_pytorchs(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], threads: int
) -> None:
    torch.manual_seed(0)
    theirs = nn.Conv2d(7, 7, kernel, stride, padding, dilation, groups=7, bias=False)
    ours = copy.deepcopy(theirs)
    with_fast_depthwise(nn.Sequential(ours))
    assert isinstance(ours, DepthwiseConv2d)
    pixels = torch.randn(5, 7, 11, 13)
    used, found = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for network in (theirs, ours):
            seen = pixels.clone().requires_grad_()
            output = network(seen)
            output.backward(torch.linspace(-1, 1, output.numel()).reshape(output.shape))
            found.append((output.detach(), seen.grad, network.weight.grad))
    finally:
        torch.set_num_threads(used)
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_half_precision_follows_autocast() -> None:
    """As PyTorch's own: bf16 in, bf16 out, gradients in the parameter's type."""
    torch.manual_seed(0)
    network = with_fast_depthwise(nn.Sequential(nn.Conv2d(3, 3, 3, groups=3, bias=False)))
    pixels = torch.randn(2, 3, 7, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(pixels)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    gradient = next(network.parameters()).grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert pixels.grad is not None
    assert pixels.grad.dtype == torch.float32


def test_only_depthwise_ones_change() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 4, 3, groups=2, bias=False))
    names = list(network.state_dict())
    with_fast_depthwise(network)
    assert [type(module) for module in network] == [DepthwiseConv2d, nn.Conv2d, nn.Conv2d]
    assert list(network.state_dict()) == names
