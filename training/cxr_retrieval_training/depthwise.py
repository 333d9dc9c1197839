"""Gradients of depthwise convolutions on CPU, where PyTorch's take most of the time that training an EfficientNet takes.

The backward pass of a strided depthwise convolution takes up to fifty times as long as the forward pass there (bf16; ten times in
fp32), though it has but twice the arithmetic. Here it is one loop over which pixel meets which tap, innermost over channels,
compiled by Numba. The sums are the same; their order, and so the last bits, are not.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

Floats = NDArray[np.float32]


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise `nn.Conv2d` that trains fast on CPU; elsewhere, and outside training, it is its parent."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the parent's name)
        """`[n, c, h, w]` → `[n, c, h', w']`."""
        if self.training and torch.is_grad_enabled() and input.device.type == "cpu":
            output = _Depthwise.apply(input, self.weight, self.stride, self.padding, self.dilation)
            assert isinstance(output, Tensor)
            return output
        return super().forward(input)


def with_fast_depthwise(network: nn.Module) -> nn.Module:
    """Makes every depthwise convolution of the network a `DepthwiseConv2d`, in place; parameters and their names stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d and _can(module):
            module.__class__ = DepthwiseConv2d
    return network


def _can(module: nn.Conv2d) -> bool:
    depthwise = 1 < module.groups == module.in_channels == module.out_channels
    return depthwise and module.bias is None and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
        ctx.save_for_backward(pixels, weight)
        ctx.geometry = (*stride, *padding, *dilation)
        if torch.is_autocast_enabled("cpu"):
            pixels, weight = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (pixels, weight))
        return functional.conv2d(pixels, weight, None, stride, padding, dilation, len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pixels, weight = ctx.saved_tensors
        seen, arrived = (tensor.float().permute(0, 2, 3, 1).contiguous().numpy() for tensor in (pixels, gradients[0]))
        taps = weight.detach()[:, 0].float().permute(1, 2, 0).contiguous().numpy()
        back = np.zeros_like(seen)
        parts = np.array_split(np.arange(len(seen)), min(len(seen), torch.get_num_threads()))

        def of(part: NDArray[np.int64]) -> Floats:
            some = slice(part[0], part[-1] + 1)
            return _accumulate(seen[some], arrived[some], taps, back[some], *ctx.geometry)

        with ThreadPoolExecutor(len(parts)) as threads:
            to_taps = sum(threads.map(of, parts), np.zeros_like(taps))
        to_weight = torch.from_numpy(to_taps).permute(2, 0, 1)[:, None]
        return torch.from_numpy(back).permute(0, 3, 1, 2).to(pixels.dtype), to_weight.to(weight.dtype), None, None, None


@numba.njit(cache=True, fastmath=True, nogil=True)
@no_type_check  # Numba compiles it as it stands, not as a type checker at run time would wrap it
def _accumulate(
    seen: Floats, arrived: Floats, taps: Floats, back: Floats, stride_y: int, stride_x: int, pad_y: int, pad_x: int, far_y: int, far_x: int
) -> Floats:
    """Adds to `back`, the gradient of the pixels `seen` `[n, h, w, c]`, and returns that of the taps `[kh, kw, c]`, given the
    gradient `arrived` of the output `[n, h', w', c]`; far_y and far_x are the dilation.
    """
    count, height, width, channels = seen.shape
    _, rows, columns, _ = arrived.shape
    to_taps = np.zeros_like(taps)
    for n in range(count):
        for row in range(rows):
            for i in range(taps.shape[0]):
                y = row * stride_y + i * far_y - pad_y
                if y < 0 or y >= height:
                    continue
                for column in range(columns):
                    for j in range(taps.shape[1]):
                        x = column * stride_x + j * far_x - pad_x
                        if x < 0 or x >= width:
                            continue
                        given, pixel, tap = arrived[n, row, column], seen[n, y, x], taps[i, j]
                        to_pixel, to_tap = back[n, y, x], to_taps[i, j]
                        for c in range(channels):
                            to_pixel[c] += tap[c] * given[c]
                            to_tap[c] += pixel[c] * given[c]
    return to_taps
