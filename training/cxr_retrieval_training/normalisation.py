"""What the embedder sees of the lungs: cut to their bounding box, stretched to a square, grey values standardised inside.

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

MARGIN: Final = 0.03
"""Of the box's height or width, on each side."""
_NOISE: Final = 2.0
"""Grey levels; keeps an even area from being stretched into structure."""
_CLIP: Final = 4.0
"""Standard deviations."""


def lung_box(inside: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 4"]:
    """Edges (t, b, l, r) in pixels of the smallest box around everything above 0, with a margin; the whole frame if empty."""
    height, width = inside.shape[2:]
    top, bottom = _extent(inside.amax(dim=(1, 3)), height)
    left, right = _extent(inside.amax(dim=(1, 2)), width)
    return torch.stack([top, bottom, left, right], dim=1)


def _extent(occupied: Float[Tensor, "batch length"], length: int) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    position = torch.arange(length, device=occupied.device, dtype=occupied.dtype)
    here = occupied > 0
    first = torch.where(here, position, float(length)).amin(dim=1)
    last = torch.where(here, position + 1.0, 0.0).amax(dim=1)
    empty = last <= first
    first, last = torch.where(empty, 0.0, first), torch.where(empty, float(length), last)
    margin = MARGIN * (last - first)
    return first - margin, last + margin


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
    """Weights of linear interpolation from `length` pixels to `size` cells of [low, high], widened where it shrinks."""
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
