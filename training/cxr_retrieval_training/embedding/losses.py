"""What the embedder is trained on, by the names that configs use; several may be summed with weights.

multi_similarity    Wang et al. 2019, as Zhong et al. 2020, eq. 2, with hard mining
normalized_softmax  Zhai & Wu 2019: one proxy per class
info_nce            InfoNCE (van den Oord et al. 2018; Zhong et al. 2020, section 3.3.2, no formula there): every positive of the
                    batch against all negatives
cross_entropy       a linear classifier on the pooled features (the baseline of Table 3 and 4, right)
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float, Int64
from pytorch_metric_learning.losses import MultiSimilarityLoss, NormalizedSoftmaxLoss, NTXentLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from torch import Tensor, nn
from torch.nn import functional

from cxr_retrieval.contract import FEATURE_SIZE
from cxr_retrieval_training.config import LossName


class Criterion(nn.Module):
    """The weighted sum of the named losses; holds the proxies and the classifier that train along.

    Args:
        names: Every loss that any stage uses.
    """

    def __init__(
        self,
        names: frozenset[LossName],
        *,
        classes: int,
        embedding_size: int,
        alpha: float,
        beta: float,
        base: float,
        miner_epsilon: float,
    ) -> None:
        super().__init__()
        self.multi_similarity = MultiSimilarityLoss(alpha, beta, base)  # pyright: ignore[reportArgumentType] (ints in its annotations)
        self.miner = MultiSimilarityMiner(epsilon=miner_epsilon)
        self.info_nce = NTXentLoss(temperature=0.1)
        self.proxies = NormalizedSoftmaxLoss(classes, embedding_size, temperature=0.05) if "normalized_softmax" in names else None
        self.classifier = nn.Linear(FEATURE_SIZE, classes) if "cross_entropy" in names else None

    def forward(
        self,
        weights: Mapping[LossName, float],
        embedding: Float[Tensor, "batch embedding"],
        features: Float[Tensor, "batch 2048"],
        label: Int64[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """The sum over the stage's losses."""
        total = embedding.new_zeros(())
        for name, weight in weights.items():
            total = total + weight * self._one(name, embedding, features, label)
        return total

    def _one(self, name: LossName, embedding: Tensor, features: Tensor, label: Tensor) -> Tensor:
        if name == "multi_similarity":
            return self.multi_similarity(embedding, label, self.miner(embedding, label))
        if name == "info_nce":
            return self.info_nce(embedding, label)
        if name == "normalized_softmax" and self.proxies is not None:
            return self.proxies(embedding, label)
        if name == "cross_entropy" and self.classifier is not None:
            return functional.cross_entropy(self.classifier(features), label)
        raise ValueError(f"the loss {name} was not among those announced")


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
