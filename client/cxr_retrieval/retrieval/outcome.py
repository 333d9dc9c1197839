"""What becomes of patients: the probability that a served outcome model gives, beside what became of the cases that look alike.

Zhong et al. 2020, 3.4. A model that does not say what it was trained on and how well it does (its card) is not asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.facts import fact_number, read_facts
from cxr_retrieval.contract import CARD_PARAMETER, MODEL_VERSION_PARAMETER, OUTCOME_MODEL, OUTCOME_PARTS, outcome_leaf
from cxr_retrieval.errors import InferenceError, UsageError
from cxr_retrieval.gallery.store import Neighbour
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.retrieval.summary import Flag, called

_NEXT: Final = "serve one that `cxr build outcome` wrote, with `cxr serve --outcome FOLDER`"
_RESTS_ON: Final = {"image": "the film alone", "facts": "the facts alone", "both": "the film and the facts"}


@dataclass(frozen=True)
class Measured:
    """How well one outcome was told of patients that the model was not fitted on, by what is used of it.

    Attributes:
        auc: Part of OUTCOME_PARTS → area under the curve; auc_ci: its 95 % interval, None of too few patients.
        films, patients: It was fitted on. with_it: films to which the outcome came.
    """

    auc: Mapping[str, float]
    auc_ci: Mapping[str, tuple[float, float] | None]
    films: int
    patients: int
    with_it: int


@dataclass(frozen=True)
class Outcome:
    """One outcome of one film.

    Attributes:
        name: Column of the manifest, `went_icu` say.
        probability: That which counts; `rests_on`: of which part: both if any fact is known, else the image.
        probabilities: All of OUTCOME_PARTS.
        within_h: Hours after the film within which it counts; None: at any time of the stay.
        neighbours: What is known of the neighbours' own.
    """

    name: str
    probability: float
    rests_on: str
    probabilities: Mapping[str, float]
    within_h: float | None
    neighbours: Flag
    measured: Measured

    def as_json(self) -> dict[str, Any]:
        """Under these names."""
        ends = self.measured.auc_ci[self.rests_on]
        return {
            "probability": self.probability,
            "rests_on": self.rests_on,
            "probabilities": dict(self.probabilities),
            "within_hours": self.within_h,
            "neighbours": self.neighbours.as_json(),
            "measured": {
                "auc": self.measured.auc[self.rests_on],
                "auc_ci": None if ends is None else list(ends),
                "films": self.measured.films,
                "patients": self.measured.patients,
                "with_it": self.measured.with_it,
            },
        }

    def words(self) -> str:
        """In a line, with what the probability is worth."""
        within = "" if self.within_h is None else f" within {self.within_h:g} h"
        area, ends = self.measured.auc[self.rests_on], self.measured.auc_ci[self.rests_on]
        cases = self.neighbours.known + self.neighbours.unknown
        came = (
            f"of the {cases} nearest it came to {self.neighbours.words()}"
            if self.neighbours.known
            else f"known of none of the {cases} nearest"
        )
        known = "" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]"
        return (
            f"{called(self.name)}{within}: {self.probability:.0%} by {_RESTS_ON[self.rests_on]}; {came}. "
            f"Learnt from {self.measured.films} films of {self.measured.patients} patients, area under the curve {area:.2f}{known}"
        )


@dataclass(frozen=True)
class OutcomeModel:
    """A served outcome model, as its card says.

    Attributes:
        facts, outcomes: In the order of its tensors.
    """

    facts: tuple[str, ...]
    outcomes: tuple[str, ...]
    within_h: float | None
    measured: Mapping[str, Measured]

    @classmethod
    def served_by(cls, triton: TritonClient) -> OutcomeModel:
        """The one that this server has.

        Raises:
            InferenceError: It has none, one without a card, or one trained on the features of other weights.
        """
        parameters = triton.parameters(OUTCOME_MODEL)
        if parameters is None:
            raise InferenceError(f"the server has no model {OUTCOME_MODEL}", next_step=_NEXT)
        try:
            card = json.loads(parameters[CARD_PARAMETER])
            model = cls(tuple(card["facts"]), tuple(card["outcomes"]), card["within_h"], _measured(card))
        except (KeyError, TypeError, ValueError) as error:
            raise InferenceError(
                f"the model {OUTCOME_MODEL} has no card, and without one its probabilities say nothing",
                got=repr(error)[:200],
                next_step=_NEXT,
            ) from error
        if parameters.get(MODEL_VERSION_PARAMETER) != triton.model_version:
            raise InferenceError(
                f"the model {OUTCOME_MODEL} was trained on features of other weights",
                expected=triton.model_version,
                got=parameters.get(MODEL_VERSION_PARAMETER, "none that it names"),
                next_step="train it anew with `cxr train outcome` on this server",
            )
        return model

    def read(self, given: Iterable[str]) -> dict[str, float]:
        """`NAME=VALUE` each → what `predict` takes.

        Raises:
            UsageError: As `read_facts`, or the model knows no such fact.
        """
        facts = read_facts(list(given))
        if unknown := sorted(facts.keys() - set(self.facts)):
            raise UsageError(
                f"the model {OUTCOME_MODEL} does not know {', '.join(unknown)}",
                expected=f"of {', '.join(self.facts)} what is known",
                next_step="leave it out",
            )
        return facts

    def predict(self, triton: TritonClient, features: NDArray[np.float32], facts: Mapping[str, float]) -> NDArray[np.float64]:
        """Probabilities `[outcomes, 3]` of one film with FEATURES `[2048]`.

        Raises:
            InferenceError: Triton cannot serve.
        """
        leaf = outcome_leaf(len(self.facts), len(self.outcomes))
        values = np.array([[facts.get(name, 0.0) for name in self.facts]], np.float32)
        known = np.array([[float(name in facts) for name in self.facts]], np.float32)
        found = triton.infer_further(leaf, (features[None], values, known))
        return np.asarray(found[leaf.outputs[0].name][0], np.float64)

    def told(self, probabilities: NDArray[np.float64], neighbours: Iterable[Neighbour], *, known: bool) -> tuple[Outcome, ...]:
        """What `predict` found, beside the neighbours' own outcomes; `known`: whether any fact was."""
        cases = [hit.case for hit in neighbours]
        rests_on = "both" if known else "image"
        found = []
        for name, row in zip(self.outcomes, probabilities.tolist(), strict=True):
            parts: dict[str, float] = dict(zip(OUTCOME_PARTS, row, strict=True))
            came = [number for case in cases if (number := fact_number(name, case.metadata.get(name))) is not None]
            own = Flag(int(sum(came)), len(came), len(cases) - len(came))
            found.append(Outcome(name, parts[rests_on], rests_on, parts, self.within_h, own, self.measured[name]))
        return tuple(found)


def _measured(card: Mapping[str, Any]) -> dict[str, Measured]:
    found: dict[str, Measured] = {}
    for name in card["outcomes"]:
        figures = card["figures"][name]
        parts = {part: figures["parts"][part] for part in OUTCOME_PARTS}
        ends = {part: one["auc_ci"] for part, one in parts.items()}
        found[name] = Measured(
            {part: float(one["auc"]) for part, one in parts.items()},
            {part: None if one is None else (float(one[0]), float(one[1])) for part, one in ends.items()},
            int(figures["n"]),
            int(figures["patients"]),
            int(figures["with"]),
        )
    return found
