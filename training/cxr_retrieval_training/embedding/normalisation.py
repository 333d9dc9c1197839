"""What the embedder sees of the lungs: cut to a box around them, stretched to a square, grey values standardised inside.

Ours, not the paper's, and part of the exported graph. Position, size and aspect ratio of the lungs in the frame, and the
exposure of the film, tell hospitals (and children from adults) apart before any disease does; the sources at hand differ in
all of them. Outside the lungs stands 0, the lungs' own mean, so that the outline itself is faint.

A pixel at the outline counts in part, everywhere alike: a mask cut at one half would hand on what a runtime rounds as whole pixels.

Everything is made of reductions and matrix products, which every runtime has; symbols: t, b, l, r = the box's edges in pixels.
"""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

REACH: Final = (3.08, 3.30, 2.68, 2.68)
"""So many deviations above, below, left and right of the lungs' centre of mass lie the box's edges: in the median (train split) 3 % beyond
the outermost pixels, the box that the shipped weights were trained on, give or take a jitter of 8 %."""
_NOISE: Final = 2.0
"""Grey levels; keeps an even area from being stretched into structure."""
_CLIP: Final = 4.0
"""Standard deviations."""


def lung_box(share: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 4"]:
    """Edges (t, b, l, r) in pixels of a box around the lungs, with a margin; the whole frame if there are none.

    From moments of rows and columns, not from the outermost pixels: one pixel at the tip of a lung, which a rounding may flip, would
    move all that the network sees.

    Args:
        share: How much each pixel counts as lung, on any scale from 0.
    """
    top, bottom = _extent(share.sum(dim=(1, 3)), *REACH[:2])
    left, right = _extent(share.sum(dim=(1, 2)), *REACH[2:])
    return torch.stack([top, bottom, left, right], dim=1)


def whole_frame(share: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 4"]:
    """The frame's own edges, as `lung_box` gives them."""
    height, width = share.shape[2:]
    return share.new_tensor([0.0, height, 0.0, width]).expand(share.shape[0], 4)


def _extent(count: Float[Tensor, "batch length"], before: float, behind: float) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Both edges along one axis, given how much lung is in each row (or column): from the centre so many root mean squares of what lies
    on that side; a pixel is one wide, hence the 1/24.
    """
    length = count.shape[1]
    total = count.sum(dim=1, keepdim=True)
    share = torch.where(total > 0, count / total.clamp(min=1.0), 1.0 / length)
    place = torch.arange(length, device=count.device, dtype=share.dtype) + 0.5
    centre = (share * place).sum(dim=1, keepdim=True)
    here, there = (((side * (place - centre)).clamp(min=0.0).square() * share).sum(dim=1).add(1 / 24).sqrt() for side in (-1.0, 1.0))
    return centre[:, 0] - before * here, centre[:, 0] + behind * there


def standardised_lungs(
    lungs: Float[Tensor, "batch 2 height width"], box: Float[Tensor, "batch 4"], size: int
) -> Float[Tensor, "batch 1 rows columns"]:
    """LUNGS cut to the box and to `size`×`size`, zero mean and unit deviation over the lungs, 0 elsewhere."""
    pixels, share = lungs[:, :1], lungs[:, 1:] / 255.0
    count = share.sum(dim=(2, 3), keepdim=True).clamp(min=1.0)
    centred = pixels - (pixels * share).sum(dim=(2, 3), keepdim=True) / count
    deviation = ((centred.square() * share).sum(dim=(2, 3), keepdim=True) / count + _NOISE**2).sqrt()
    z = (centred / deviation).clamp(-_CLIP, _CLIP) * share
    rows = sampling(box[:, 0], box[:, 1], lungs.shape[2], size)
    columns = sampling(box[:, 2], box[:, 3], lungs.shape[3], size)
    return (rows @ z[:, 0] @ columns.transpose(1, 2)).unsqueeze(1)


def sampling(low: Float[Tensor, " batch"], high: Float[Tensor, " batch"], length: int, size: int) -> Float[Tensor, "batch size length"]:
    """Weights that bring `length` pixels to `size` cells of [low, high]: a tent two cells wide (two pixels, where those are larger),
    integrated over each pixel.

    A tent read off at the pixels' centres would sum to 1 ± 11 % as it falls on the pixels' grid, and the network see a moiré
    that another twentieth of a pixel changes. The integrals sum to 1 wherever the box lies.
    """
    step = ((high - low) / size)[:, None, None]
    cell = torch.arange(size, device=low.device, dtype=low.dtype)[None, :, None]
    edge = torch.arange(length + 1, device=low.device, dtype=low.dtype)[None, None, :]
    x = ((edge - low[:, None, None] - (cell + 0.5) * step) / step.clamp(min=1.0)).clamp(-1.0, 1.0)
    integral = x - x * x.abs() / 2.0
    return integral[:, :, 1:] - integral[:, :, :-1]


def from_box(
    values: Float[Tensor, "batch 1 rows columns"], box: Float[Tensor, "batch 4"], height: int, width: int
) -> Float[Tensor, "batch 1 height width"]:
    """Puts a map in the box's coordinates back into the frame (bilinear; the map's edge goes on outside the box)."""
    rows = _placing(box[:, 0], box[:, 1], height, values.shape[2])
    columns = _placing(box[:, 2], box[:, 3], width, values.shape[3])
    return (rows @ values[:, 0] @ columns.transpose(1, 2)).unsqueeze(1)


def between_boxes(
    values: Float[Tensor, "batch 1 rows columns"], box: Float[Tensor, "batch 4"], other: Float[Tensor, "batch 4"]
) -> Float[Tensor, "batch 1 rows columns"]:
    """A map over one box read at the cells of another (bilinear; the map's edge goes on outside its box)."""
    rows, columns = values.shape[2:]
    start, step = other[:, ::2], (other[:, 1::2] - other[:, ::2]) / torch.tensor([rows, columns], device=other.device, dtype=other.dtype)
    low, high = (box[:, ::2] - start) / step, (box[:, 1::2] - start) / step  # in cells of the other, which take the place of pixels
    return (
        _placing(low[:, 0], high[:, 0], rows, rows) @ values[:, 0] @ _placing(low[:, 1], high[:, 1], columns, columns).transpose(1, 2)
    ).unsqueeze(1)


def _placing(low: Float[Tensor, " batch"], high: Float[Tensor, " batch"], length: int, size: int) -> Float[Tensor, "batch length size"]:
    step = ((high - low) / size)[:, None, None]
    pixel = torch.arange(length, device=low.device, dtype=low.dtype)[None, :, None]
    cell = torch.arange(size, device=low.device, dtype=low.dtype)[None, None, :]
    position = ((pixel + 0.5 - low[:, None, None]) / step - 0.5).clamp(0.0, size - 1.0)
    return (1.0 - (position - cell).abs()).clamp(min=0.0)
