"""What stands in for DenseNet-121 in tests: as many features, and its first layer's name, in four convolutions. Training and exporting it takes seconds."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn


class SmallDenseNet(nn.Module):
    """`features`: 1024 maps of a sixteenth of the picture's side."""

    def __init__(self, weights: Any = None) -> None:
        super().__init__()
        assert weights is None
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv0=nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm0=nn.BatchNorm2d(64))
        layers |= {"relu0": nn.ReLU(), "pool0": nn.MaxPool2d(2)}
        for number, (before, after, side) in enumerate(((64, 64, 3), (64, 64, 3), (64, 1024, 1)), start=1):
            layers[f"conv{number}"] = nn.Conv2d(before, after, side, 1 if side == 1 else 2, side // 2, bias=False)
            layers[f"norm{number}"] = nn.BatchNorm2d(after)
            layers |= {f"relu{number}": nn.ReLU()} if side > 1 else {}
        self.features = nn.Sequential(layers)
