"""Learners that 3.4 of Zhong et al. 2020 compares, each fitted on some cases and asked for log odds of others.

Facts that are not known are imputed with the median of the cases that a learner is fitted on, never of those it is asked about. All but
forests see scaled values: facts of variance 1 each, and of the features the first principal components, all divided by the deviation of
the first, so that a network which is fitted to a few hundred films weighs what varies most before what hardly does. The paper says nothing
of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from cxr_retrieval_training.config import OutcomeConfig
from cxr_retrieval_training.outcome.cases import Cases
from cxr_retrieval_training.outcome.network import DeepAndCross, Facts, Forest, Predictor, Scaled

Floats = NDArray[np.float64]
_LEAST_SPREAD: Final = 1e-3


@dataclass(frozen=True)
class Given:
    """What is known of n films: FEATURES `[n, 2048]`, facts `[n, f]` with 0 where unknown, and whether each is known, 0 or 1."""

    features: Tensor
    facts: Tensor
    known: Tensor

    @classmethod
    def of(cls, cases: Cases) -> Given:
        """Of these cases."""
        known = np.isfinite(cases.facts)
        filled = np.where(known, cases.facts, 0.0)
        return cls(*(torch.from_numpy(np.asarray(part, np.float32)) for part in (cases.features, filled, known)))

    def __getitem__(self, chosen: NDArray[np.bool_]) -> Given:
        mask = torch.from_numpy(chosen)
        return Given(self.features[mask], self.facts[mask], self.known[mask])


@dataclass(frozen=True)
class _Prepared:
    """How values are imputed and scaled, learnt from some cases."""

    facts: Facts
    scaled_image: Scaled
    scaled_facts: Scaled

    @classmethod
    def on(cls, given: Given, components: int) -> _Prepared:
        imputing = _imputing(given)
        return cls(imputing, _projected(given.features, components), _scaled(imputing(given.facts, given.known)))

    def columns(self, part: str, given: Given) -> Tensor:
        """What a learner of this part sees, scaled."""
        image, facts = self.scaled_image(given.features), self.scaled_facts(self.facts(given.facts, given.known))
        return {"image": image, "facts": facts, "both": torch.cat([image, facts], dim=1)}[part]


def _imputing(given: Given) -> Facts:
    """By the medians of what is known; of what nobody knows, 0 for everybody."""
    facts = np.where(given.known.numpy() > 0, given.facts.numpy(), np.nan)
    known = np.isfinite(facts).any(axis=0)
    medians = np.zeros(facts.shape[1])
    medians[known] = np.nanmedian(facts[:, known], axis=0)
    return Facts(torch.from_numpy(medians.astype(np.float32)))


def _scaled(values: Tensor) -> Scaled:
    """To mean 0 and variance 1 by these values; a column that hardly varies is not blown up."""
    mean, spread = values.mean(dim=0), values.std(dim=0, correction=0)
    return Scaled(mean, torch.where(spread > _LEAST_SPREAD, 1 / spread.clamp_min(_LEAST_SPREAD), torch.zeros_like(spread)))


def _projected(values: Tensor, components: int) -> Scaled:
    """The first `components` of the scaled values, if there are so many, the first of variance 1; with 0 the scaled values."""
    scaled = _scaled(values)
    if not components:
        return scaled
    fitted = PCA(min(components, len(values) - 1), svd_solver="randomized", random_state=0).fit(scaled(values).numpy())
    found = np.asarray(fitted.components_, np.float32)
    axes = np.zeros((values.shape[1], components), np.float32)
    axes[:, : len(found)] = found.T / max(fitted.explained_variance_[0] ** 0.5, _LEAST_SPREAD)
    return Scaled(scaled.mean, scaled.factors[:, None] * torch.from_numpy(axes))


@dataclass(frozen=True)
class Learner:
    """One learner on one part.

    Attributes:
        part: image, facts or both.
        scores: (what is known of the cases to fit on, whether the outcome came to each, what is known of others) → log odds of the others.
    """

    part: str
    name: str
    scores: Callable[[Given, Floats, Given], Floats]


def learners(config: OutcomeConfig) -> tuple[Learner, ...]:
    """All that are compared. The first of each part is the paper's choice, and what is served."""

    def linear(part: str, name: str) -> Learner:
        def scores(given: Given, came: Floats, others: Given) -> Floats:
            prepared = _Prepared.on(given, config.components)
            x, y = prepared.columns(part, given).double().numpy(), prepared.columns(part, others).double().numpy()
            learner = LogisticRegression(max_iter=1000) if name == "logistic regression" else SVC(kernel="rbf")
            return np.asarray(learner.fit(x, came).decision_function(y), np.float64)

        return Learner(part, name, scores)

    def forest(part: str) -> Learner:
        def scores(given: Given, came: Floats, others: Given) -> Floats:
            imputing = _imputing(given)
            fitted = _forest(_forest_columns(part, imputing, given), came, config)
            return fitted(_forest_columns(part, imputing, others)).double().numpy()

        return Learner(part, "random forest", scores)

    def network(given: Given, came: Floats, others: Given) -> Floats:
        prepared = _Prepared.on(given, config.components)
        fitted = _network(prepared.columns("both", given), came, config)
        with torch.inference_mode():
            return fitted(prepared.columns("both", others)).double().numpy()

    others = [linear(part, name) for part in ("image", "facts", "both") for name in ("logistic regression", "support vectors")]
    return (forest("image"), forest("facts"), Learner("both", "Deep & Cross", network), forest("both"), *others)


def fit_predictor(given: Given, came: Floats, config: OutcomeConfig, calibrations: list[tuple[float, float]]) -> Predictor:
    """What is served of one outcome, fitted on all of these cases."""
    prepared = _Prepared.on(given, config.components)
    image, facts = (_forest(_forest_columns(part, prepared.facts, given), came, config) for part in ("image", "facts"))
    network = _network(prepared.columns("both", given), came, config)
    return Predictor(prepared.facts, image, facts, prepared.scaled_image, prepared.scaled_facts, network, calibrations).eval()


def _forest_columns(part: str, imputing: Facts, given: Given) -> Tensor:
    filled = imputing(given.facts, given.known)
    return {"image": given.features, "facts": filled, "both": torch.cat([given.features, filled], dim=1)}[part]


def _forest(values: Tensor, came: Floats, config: OutcomeConfig) -> Forest:
    fitted = RandomForestClassifier(config.trees, max_depth=config.depth, random_state=config.seed).fit(values.numpy(), came)
    return Forest.of(fitted.estimators_, config.depth)


def _network(values: Tensor, came: Floats, config: OutcomeConfig) -> DeepAndCross:
    """Trained with the seed of the config; the caller's random state stays as it was."""
    truth = torch.from_numpy(came.astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = DeepAndCross(values.shape[1], config.layers)
        optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
        for _ in range(config.epochs):
            for batch in torch.randperm(len(values)).split(config.batch_size):
                optimizer.zero_grad()
                binary_cross_entropy_with_logits(network(values[batch]), truth[batch]).backward()
                optimizer.step()
    return network.eval()
