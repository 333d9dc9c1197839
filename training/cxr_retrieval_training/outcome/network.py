"""What is served: FEATURES and facts → probabilities. Forests as tensors, the Deep & Cross network, and what both are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cxr_retrieval.contract import FEATURE_SIZE, OUTCOME_PARTS

LEAST_SHARE: Final = 0.01
"""Of a forest's votes: its log odds are those of a share between this and its opposite, for no share of 50 trees is certain."""


class Facts(nn.Module):
    """Facts as they come → filled, and beside each whether it was known: the median of those that the fold knew stands for the others.

    Args:
        medians: `[f]`.
    """

    medians: Tensor

    def __init__(self, medians: Tensor) -> None:
        super().__init__()
        self.register_buffer("medians", medians)

    def forward(self, facts: Float[Tensor, "batch f"], known: Float[Tensor, "batch f"]) -> Float[Tensor, "batch twof"]:
        """`known`: 1 or 0; what `facts` holds where it is 0 does not matter."""
        return torch.cat([torch.where(known > 0, facts, self.medians), known], dim=1)


class Forest(nn.Module):
    """Trees filled up to one depth, so that all are walked down at once: left where the value is no greater than the threshold.

    Args:
        columns: `[trees, 2^depth − 1]` which value a node looks at; node n has the children 2n + 1 and 2n + 2.
        thresholds: The same shape.
        shares: `[trees, 2^depth]`: of each leaf, how many of its cases came to the outcome.
    """

    columns: Tensor
    thresholds: Tensor
    shares: Tensor

    def __init__(self, columns: Tensor, thresholds: Tensor, shares: Tensor) -> None:
        super().__init__()
        self.register_buffer("columns", columns)
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("shares", shares)
        self._depth = shares.shape[1].bit_length() - 1

    @classmethod
    def of(cls, trees: Sequence[Any], depth: int) -> Forest:
        """That of scikit-learn's decision trees of two classes, none of them deeper."""
        nodes = 2**depth - 1
        columns, thresholds, shares = (
            np.zeros((len(trees), nodes), np.int64),
            np.zeros((len(trees), nodes)),
            np.zeros((len(trees), nodes + 1)),
        )
        for number, fitted in enumerate(trees):
            tree = fitted.tree_
            counts = tree.value[:, 0, :]
            places = [(0, 0)]
            while places:
                place, node = places.pop()
                if place >= nodes:
                    shares[number, place - nodes] = counts[node, 1] / counts[node].sum()
                elif tree.children_left[node] < 0:  # a leaf above the last level: both ways lead to it
                    places += [(2 * place + 1, node), (2 * place + 2, node)]
                else:
                    columns[number, place], thresholds[number, place] = tree.feature[node], tree.threshold[node]
                    places += [(2 * place + 1, tree.children_left[node]), (2 * place + 2, tree.children_right[node])]
        return cls(torch.from_numpy(columns), torch.from_numpy(_no_greater(thresholds)), torch.from_numpy(shares.astype(np.float32)))

    def forward(self, values: Float[Tensor, "batch columns"]) -> Float[Tensor, " batch"]:
        """Log odds of the mean of all trees' shares."""
        right = (values[:, self.columns] > self.thresholds).to(torch.int64)  # [batch, trees, nodes]
        place = torch.zeros_like(right[:, :, :1])
        for _ in range(self._depth):
            place = 2 * place + 1 + torch.gather(right, 2, place)
        leaves = self.shares.expand(values.shape[0], -1, -1)
        share = torch.gather(leaves, 2, place - (leaves.shape[2] - 1))[:, :, 0].mean(dim=1)
        return torch.logit(share.clamp(LEAST_SHARE, 1 - LEAST_SHARE))


def _no_greater(thresholds: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The greatest float32 that is no greater: a float32 value lies below that just if it lies below the threshold of scikit-learn."""
    near = thresholds.astype(np.float32)
    return np.where(near > thresholds, np.nextafter(near, np.float32(-np.inf)), near)


class DeepAndCross(nn.Module):
    """Deep & Cross network (Wang et al. 2017): x_{l+1} = x_0 (x_lᵀ w_l) + b_l + x_l beside a multilayer perceptron, one logit from both.

    Args:
        size: Of its input.
        widths: Of the perceptron's layers; as many cross layers.
    """

    def __init__(self, size: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.crosses = nn.ModuleList(nn.Linear(size, 1, bias=False) for _ in widths)
        self.offsets = nn.ParameterList(nn.Parameter(torch.zeros(size)) for _ in widths)
        sizes = [size, *widths]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
        self.deep = nn.Sequential(*layers)
        self.last = nn.Linear(size + sizes[-1], 1)

    def forward(self, x: Float[Tensor, "batch size"]) -> Float[Tensor, " batch"]:
        """Log odds."""
        crossed = x
        for weigh, offset in zip(self.crosses, self.offsets, strict=True):
            crossed = x * weigh(crossed) + offset + crossed
        return self.last(torch.cat([crossed, self.deep(x)], dim=1))[:, 0]


class Scaled(nn.Module):
    """Values less their mean, times a factor each, or on axes.

    Args:
        mean: `[d]`. factors: `[d]`, or `[d, p]` axes.
    """

    mean: Tensor
    factors: Tensor

    def __init__(self, mean: Tensor, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("factors", factors)

    def forward(self, values: Float[Tensor, "batch d"]) -> Float[Tensor, "batch p"]:
        """Scaled; p is d without axes."""
        moved = values - self.mean
        return moved @ self.factors if self.factors.dim() == 2 else moved * self.factors


class Predictor(nn.Module):
    """One outcome: what 3.4 of the paper takes for each of OUTCOME_PARTS (a forest, a forest, the Deep & Cross network), with slopes and
    offsets `[3]` that calibrate their log odds (Platt 1999).
    """

    slopes: Tensor
    offsets: Tensor

    def __init__(
        self,
        facts: Facts,
        image_forest: Forest,
        facts_forest: Forest,
        scaled_image: Scaled,
        scaled_facts: Scaled,
        network: DeepAndCross,
        calibrations: Sequence[tuple[float, float]],
    ) -> None:
        super().__init__()
        self.facts, self.image_forest, self.facts_forest = facts, image_forest, facts_forest
        self.scaled_image, self.scaled_facts, self.network = scaled_image, scaled_facts, network
        slopes, offsets = zip(*calibrations, strict=True)
        self.register_buffer("slopes", torch.tensor(slopes, dtype=torch.float32))
        self.register_buffer("offsets", torch.tensor(offsets, dtype=torch.float32))

    def scores(
        self, features: Float[Tensor, "batch 2048"], facts: Float[Tensor, "batch f"], known: Float[Tensor, "batch f"]
    ) -> Float[Tensor, "batch 3"]:
        """Log odds for each of OUTCOME_PARTS, not calibrated."""
        filled = self.facts(facts, known)
        both = self.network(torch.cat([self.scaled_image(features), self.scaled_facts(filled)], dim=1))
        return torch.stack([self.image_forest(features), self.facts_forest(filled), both], dim=1)

    def forward(
        self, features: Float[Tensor, "batch 2048"], facts: Float[Tensor, "batch f"], known: Float[Tensor, "batch f"]
    ) -> Float[Tensor, "batch 3"]:
        """Calibrated probabilities for each of OUTCOME_PARTS."""
        return torch.sigmoid(self.slopes * self.scores(features, facts, known) + self.offsets)


class OutcomeNetwork(nn.Module):
    """Every outcome's predictor: OUTCOME `[batch, outcomes, 3]`."""

    def __init__(self, predictors: Sequence[Predictor]) -> None:
        super().__init__()
        self.predictors = nn.ModuleList(predictors)

    def forward(
        self, features: Float[Tensor, "batch 2048"], facts: Float[Tensor, "batch f"], known: Float[Tensor, "batch f"]
    ) -> tuple[Float[Tensor, "batch outcomes 3"]]:
        """Probabilities in the order of the outcomes and of OUTCOME_PARTS."""
        return (torch.stack([one(features, facts, known) for one in self.predictors], dim=1),)


def empty_network(about: Mapping[str, Any]) -> OutcomeNetwork:
    """A network of the shapes that a checkpoint says, to load its state into: `outcomes`, `facts` and `config` of it."""
    config, facts = about["config"], len(about["facts"])
    components = config["components"]

    def forest() -> Forest:
        nodes = 2 ** config["depth"] - 1
        trees = config["trees"]
        return Forest(torch.zeros(trees, nodes, dtype=torch.int64), torch.zeros(trees, nodes), torch.zeros(trees, nodes + 1))

    def predictor() -> Predictor:
        return Predictor(
            Facts(torch.zeros(facts)),
            forest(),
            forest(),
            Scaled(torch.zeros(FEATURE_SIZE), torch.zeros(FEATURE_SIZE, components) if components else torch.zeros(FEATURE_SIZE)),
            Scaled(torch.zeros(2 * facts), torch.zeros(2 * facts)),
            DeepAndCross((components or FEATURE_SIZE) + 2 * facts, config["layers"]),
            [(1.0, 0.0)] * len(OUTCOME_PARTS),
        )

    return OutcomeNetwork([predictor() for _ in about["outcomes"]])
