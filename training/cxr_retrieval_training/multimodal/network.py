"""Two branches into one subspace: a perceptron on a film's features, and a small transformer on a text's subwords."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cxr_retrieval.contract import FINDING_FEATURE_SIZE, SUBSPACE_SIZE, TEXT_LENGTH

_NOWHERE: Final = -1e4
"""Added to the attention that a place without a subword would get."""


class ImageBranch(nn.Module):
    """FINDING_FEATURES → IMAGE_VECTOR."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FINDING_FEATURE_SIZE, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, SUBSPACE_SIZE))

    def forward(self, features: Float[Tensor, "batch 1024"]) -> Float[Tensor, "batch 128"]:
        """Of unit length. Features come with unit length, too; a number of them is as large as 1/32."""
        return functional.normalize(self.layers(features * math.sqrt(FINDING_FEATURE_SIZE)), dim=1)


class _Block(nn.Module):
    """Self-attention and a perceptron, each after a layer norm (Xiong et al. 2020)."""

    def __init__(self, size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self._heads = heads
        self.first, self.second = nn.LayerNorm(size), nn.LayerNorm(size)
        self.to_attention, self.from_attention = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.perceptron = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * size, size))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch length size"], nowhere: Float[Tensor, "batch length"]) -> Float[Tensor, "batch length size"]:
        batch, length, size = x.shape
        parts = self.to_attention(self.first(x)).view(batch, length, 3, self._heads, size // self._heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        attention = query @ key.transpose(2, 3) / math.sqrt(size // self._heads) + nowhere[:, None, None, :]
        seen = (self.dropout(attention.softmax(dim=3)) @ value).transpose(1, 2).reshape(batch, length, size)
        x = x + self.dropout(self.from_attention(seen))
        return x + self.dropout(self.perceptron(self.second(x)))


class TextBranch(nn.Module):
    """TOKENS → TEXT_VECTOR: a transformer that tells "no effusion" from "effusion" by what stands beside a word."""

    def __init__(self, vocabulary: int, size: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, size, padding_idx=0)
        self.places = nn.Parameter(torch.randn(TEXT_LENGTH, size) * 0.02)
        self.blocks = nn.ModuleList(_Block(size, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(size)
        self.weigh = nn.Linear(size, 1)
        self.last = nn.Linear(size, SUBSPACE_SIZE)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch 128"]:
        """Of unit length; `length` is TEXT_LENGTH, or less where no text is as long."""
        nowhere = (tokens == 0).float() * _NOWHERE
        x = self.words(tokens.long()) + self.places[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, nowhere)
        x = self.norm(x)
        share = (self.weigh(x)[:, :, 0] + nowhere).softmax(dim=1)
        return functional.normalize(self.last((share[:, :, None] * x).sum(dim=1)), dim=1)


class Multimodal(nn.Module):
    """Both branches, and a linear classifier that they share, which is not served."""

    def __init__(self, config: Mapping[str, Any], vocabulary: int, labels: int) -> None:
        super().__init__()
        self.image = ImageBranch(config["width"], config["dropout"])
        self.text = TextBranch(vocabulary, config["text_size"], config["text_layers"], config["text_heads"], config["dropout"])
        self.classifier = nn.Linear(SUBSPACE_SIZE, labels)

    def logits(self, vectors: Float[Tensor, "batch 128"]) -> Float[Tensor, "batch labels"]:
        """Of either modality; a vector of unit length alone could not be sure of anything."""
        return self.classifier(vectors * math.sqrt(SUBSPACE_SIZE))
