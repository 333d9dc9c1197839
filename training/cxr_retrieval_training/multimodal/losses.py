"""What brings films and reports together: classification in each modality, their distance, and a ranking by similarity.

The abstract of Yu et al. 2021 names the parts; the formulas are ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def classification(logits: Float[Tensor, "batch labels"], labels: Float[Tensor, "batch labels"]) -> Float[Tensor, ""]:
    """Binary cross-entropy of each label."""
    return functional.binary_cross_entropy_with_logits(logits, labels)


def distance(images: Float[Tensor, "batch d"], texts: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """Mean squared distance of a film and its own report, both of unit length: 2 − 2 cos."""
    return (images - texts).square().sum(dim=1).mean()


def likeness(labels: Float[Tensor, "batch labels"]) -> Float[Tensor, "batch batch"]:
    """Of any two cases in [0, 1]: of the labels that either has, the share that both have; 1 where neither has any (ACGp)."""
    common = labels @ labels.T
    either = labels.sum(dim=1)[:, None] + labels.sum(dim=1)[None, :] - common
    return torch.where(either > 0, common / either.clamp(min=1), 1.0)


def ranking(
    similarity: Float[Tensor, "batch other"],
    wanted: Float[Tensor, "batch other"],
    there: Bool[Tensor, "batch other"],
    temperature: float,
    sharpness: float,
) -> Float[Tensor, ""]:
    """Listwise ranking (Cao et al. 2007, top-one): the cases that a question finds, in the order in which they should be found.

    Cross-entropy of softmax(similarity / temperature) under softmax(wanted × sharpness), over those that are there; 0 of nobody.
    """
    asked = there.any(dim=1)
    if not bool(asked.any()):
        return similarity.new_zeros(())
    hidden = ~there[asked]
    said = (similarity[asked] / temperature).masked_fill(hidden, -1e9).log_softmax(dim=1)
    target = (wanted[asked] * sharpness).masked_fill(hidden, -1e9).softmax(dim=1)
    return -(target * said).sum(dim=1).mean()
