"""What the embedder sees of the lungs: cut to a box around them, stretched to a square, grey values standardised inside.

Ours, not the paper's, and part of the exported graph. Position, size and aspect ratio of the lungs in the frame, and the
exposure of the film, tell hospitals (and children from adults) apart before any disease does; the sources at hand differ in
all of them. Outside the lungs stands 0, the lungs' own mean, so that the outline itself is faint.

Everything is made of reductions and matrix products, which every runtime has; symbols: t, b, l, r = the box's edges in pixels.
"""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

TAIL: Final = 0.005
"""Share of the lungs' pixels that may lie beyond an edge before the box is widened: one of them more or less hardly moves it."""
WIDENED: Final = (0.063, 0.099, 0.0535, 0.0535)
"""Above, below, left and right, of the height or width between the tails: what reaches on average (train split) 3 % beyond the outermost
pixels, the box that the shipped weights were trained on, give or take a jitter of 8 %."""
_NOISE: Final = 2.0
"""Grey levels; keeps an even area from being stretched into structure."""
_CLIP: Final = 4.0
"""Standard deviations."""


def lung_box(inside: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 4"]:
    """Edges (t, b, l, r) in pixels of a box around everything above 0, with a margin; the whole frame if empty.

    From quantiles of rows and columns, not from the outermost pixels: one pixel at the tip of a lung, which a rounding may flip, would
    move all that the network sees.
    """
    here = (inside > 0).to(inside.dtype)
    top, bottom = _extent(here.sum(dim=(1, 3)), *WIDENED[:2])
    left, right = _extent(here.sum(dim=(1, 2)), *WIDENED[2:])
    return torch.stack([top, bottom, left, right], dim=1)


def _extent(count: Float[Tensor, "batch length"], before: float, behind: float) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Both edges along one axis, given the lungs' pixels in each row (or column)."""
    length = count.shape[1]
    total = count.sum(dim=1, keepdim=True)
    share = torch.where(total > 0, count / total.clamp(min=1.0), 1.0 / length)
    pixel = torch.arange(length, device=count.device)
    lower = (pixel[:, None] < pixel[None, :]).to(share.dtype)
    first, rest = (((TAIL - share @ beyond) / share.clamp(min=1e-9)).clamp(0.0, 1.0).sum(dim=1) for beyond in (lower, lower.T))
    last = length - rest
    extent = last - first
    return first - before * extent, last + behind * extent


def standardised_lungs(
    lungs: Float[Tensor, "batch 1 height width"], box: Float[Tensor, "batch 4"], size: int
) -> Float[Tensor, "batch 1 rows columns"]:
    """Cut to the box and to `size`×`size`, zero mean and unit deviation over the pixels above 0, 0 elsewhere."""
    inside = (lungs > 0).to(lungs.dtype)
    count = inside.sum(dim=(2, 3), keepdim=True).clamp(min=1.0)
    centred = (lungs - lungs.sum(dim=(2, 3), keepdim=True) / count) * inside
    deviation = (centred.square().sum(dim=(2, 3), keepdim=True) / count + _NOISE**2).sqrt()
    z = (centred / deviation).clamp(-_CLIP, _CLIP)
    rows = _sampling(box[:, 0], box[:, 1], lungs.shape[2], size)
    columns = _sampling(box[:, 2], box[:, 3], lungs.shape[3], size)
    return (rows @ z[:, 0] @ columns.transpose(1, 2)).unsqueeze(1)


def _sampling(low: Float[Tensor, " batch"], high: Float[Tensor, " batch"], length: int, size: int) -> Float[Tensor, "batch size length"]:
    """Weights of linear interpolation from `length` pixels to `size` cells of [low, high], widened where it shrinks.

    Where it shrinks they sum to 1 ± 11 % as they fall on the pixels' grid, which is a moiré over the lungs. The shipped networks learnt
    with it, and answer a little worse without it (docs/performance.md, "Parity gates").
    """
    step = ((high - low) / size)[:, None, None]
    cell = torch.arange(size, device=low.device, dtype=low.dtype)[None, :, None]
    pixel = torch.arange(length, device=low.device, dtype=low.dtype)[None, None, :]
    reach = step.clamp(min=1.0)
    return (1.0 - (low[:, None, None] + (cell + 0.5) * step - 0.5 - pixel).abs() / reach).clamp(min=0.0) / reach


def from_box(
    values: Float[Tensor, "batch 1 rows columns"], box: Float[Tensor, "batch 4"], height: int, width: int
) -> Float[Tensor, "batch 1 height width"]:
    """Puts a map in the box's coordinates back into the frame (bilinear; the map's edge goes on outside the box)."""
    rows = _placing(box[:, 0], box[:, 1], height, values.shape[2])
    columns = _placing(box[:, 2], box[:, 3], width, values.shape[3])
    return (rows @ values[:, 0] @ columns.transpose(1, 2)).unsqueeze(1)


def _placing(low: Float[Tensor, " batch"], high: Float[Tensor, " batch"], length: int, size: int) -> Float[Tensor, "batch length size"]:
    step = ((high - low) / size)[:, None, None]
    pixel = torch.arange(length, device=low.device, dtype=low.dtype)[None, :, None]
    cell = torch.arange(size, device=low.device, dtype=low.dtype)[None, None, :]
    position = ((pixel + 0.5 - low[:, None, None]) / step - 0.5).clamp(0.0, size - 1.0)
    return (1.0 - (position - cell).abs()).clamp(min=0.0)
