"""What the embedder is trained on, by the names that configs use; several may be summed with weights.

multi_similarity    Wang et al. 2019, as Zhong et al. 2020, eq. 2, with hard mining
normalized_softmax  Zhai & Wu 2019: one proxy per class
info_nce            InfoNCE (van den Oord et al. 2018; Zhong et al. 2020, section 3.3.2, no formula there): every positive of the
                    batch against all negatives
cross_entropy       a linear classifier on the pooled features (the baseline of Table 3 and 4, right)
source_adversary    Ganin & Lempitsky 2015, conditioned on the label as Long et al. 2018 do: a classifier tries to tell the
                    source from embedding and label, and the embedding learns to defeat it
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from pytorch_metric_learning.losses import MultiSimilarityLoss, NormalizedSoftmaxLoss, NTXentLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import Tensor, nn
from torch.nn import functional

from cxr_retrieval.contract import FEATURE_SIZE
from cxr_retrieval_training.config import LossName


class Criterion(nn.Module):
    """The weighted sum of the named losses; holds the proxies, classifier and adversary that train along.

    Args:
        names: Every loss that any stage uses.
        across_sources: For pair losses, only pairs from different sources count as positives, where the anchor has any:
            what makes two films of one hospital alike must not be what makes them neighbours.
        held: `[sources, classes]`, which labels each source holds. If given, negatives come from the anchor's own source, and the proxy
            loss chooses among the labels of the film's source: to know the hospital then tells nothing of the label.
    """

    def __init__(
        self,
        names: frozenset[LossName],
        *,
        classes: int,
        sources: int,
        embedding_size: int,
        alpha: float,
        beta: float,
        base: float,
        miner_epsilon: float,
        across_sources: bool,
        held: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.across_sources = across_sources
        self.held: Tensor | None
        self.register_buffer("held", held)
        self.multi_similarity = MultiSimilarityLoss(alpha, beta, base)  # pyright: ignore[reportArgumentType] (ints in its annotations)
        self.miner = MultiSimilarityMiner(epsilon=miner_epsilon)
        self.info_nce = NTXentLoss(temperature=0.1)
        self.proxies = NormalizedSoftmaxLoss(classes, embedding_size, temperature=0.05) if "normalized_softmax" in names else None
        self.classifier = nn.Linear(FEATURE_SIZE, classes) if "cross_entropy" in names else None
        self.adversary = (
            nn.Sequential(nn.Linear(embedding_size * classes, 128), nn.ReLU(), nn.Linear(128, sources))
            if "source_adversary" in names
            else None
        )
        self.classes = classes

    def forward(
        self,
        weights: Mapping[LossName, float],
        embedding: Float[Tensor, "batch embedding"],
        features: Float[Tensor, "batch 2048"],
        label: Int64[Tensor, " batch"],
        source: Int64[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """The sum over the stage's losses."""
        total = embedding.new_zeros(())
        for name, weight in weights.items():
            total = total + weight * self._one(name, embedding, features, label, source)
        return total

    def _one(self, name: LossName, embedding: Tensor, features: Tensor, label: Tensor, source: Tensor) -> Tensor:
        if name == "multi_similarity":
            return self.multi_similarity(embedding, label, self.pairs(embedding, label, source))
        if name == "info_nce":
            return self.info_nce(embedding, label)
        if name == "normalized_softmax" and self.proxies is not None:
            return self.proxies(embedding, label) if self.held is None else self._among_held(self.proxies, embedding, label, source)
        if name == "cross_entropy" and self.classifier is not None:
            return functional.cross_entropy(self.classifier(features), label)
        if name == "source_adversary" and self.adversary is not None:
            joint = functional.one_hot(label, self.classes).to(embedding.dtype)[:, :, None] * embedding[:, None, :]
            return functional.cross_entropy(self.adversary(_Reversed.apply(joint.flatten(1))), source)
        raise ValueError(f"the loss {name} was not among those announced")

    def _among_held(self, proxies: NormalizedSoftmaxLoss, embedding: Tensor, label: Tensor, source: Tensor) -> Tensor:
        assert self.held is not None
        proxies.cast_types(embedding.dtype, embedding.device)
        logits = proxies.get_logits(embedding).masked_fill(~self.held[source], -torch.inf)
        return functional.cross_entropy(logits, label)

    def pairs(self, embedding: Tensor, label: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(anchor, positive, anchor, negative) indices: hard ones by similarity, positives across sources where there are any."""
        anchor, positive, other, negative = self.miner(embedding, label)
        if self.held is not None:
            within = source[other] == source[negative]
            other, negative = other[within], negative[within]
        if self.across_sources:
            crossing = source[anchor] != source[positive]
            has_crossing = torch.zeros(len(label), dtype=torch.bool, device=label.device)
            has_crossing[anchor[crossing]] = True
            keep = crossing | ~has_crossing[anchor]
            anchor, positive = anchor[keep], positive[keep]
        return anchor, positive, other, negative


class _Reversed(torch.autograd.Function):
    """The identity whose gradient changes sign."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return values.view_as(values)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -gradient


def attention_on_lesions(
    attention: Float[Tensor, "batch 1 height width"], lesions: Float[Tensor, "batch 1 height width"]
) -> Float[Tensor, ""]:
    """−log of the share of attention that falls on the lesions (both in the frame), mean over images that show some."""
    some = lesions.sum(dim=(1, 2, 3)) > 0
    if not bool(some.any()):
        return attention.new_zeros(())
    attention, lesions = attention[some], lesions[some]
    share = (attention * lesions).sum(dim=(1, 2, 3)) / attention.sum(dim=(1, 2, 3)).clamp(min=1e-6)
    return -(share.clamp(min=1e-4)).log().mean()
