"""How much of what a case has is also found in the cases retrieved for it: the measures of Haq et al. 2020, section 3, over sets of labels.

ACG: mean over the retrieved of the ratio of common labels, present or absent: of all labels that there are, the share that both have or
both lack. ACGp: of the labels that one of both has, the share that both have. Precision: share of the retrieved that have a label in
common with the query. The paper calls relevant what "matched exactly" as well as what has "common disease labels"; both are told, the
former as `exact`. Average gain: mean number of common labels, after Chen et al. 2018, its reference [5], which it names for it without a
formula. Where each case has one label, ACGp, precision, exact and gain are one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.labels import findings_of
from cxr_retrieval.errors import UsageError

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Gains:
    """Means over queries of the means over what was retrieved for each; `gain` in labels, the others in [0, 1]."""

    acg: float
    acg_p: float
    precision: float
    exact: float
    gain: float


def label_sets(texts: Sequence[str], names: Sequence[str] = ()) -> tuple[Flags, tuple[str, ...]]:
    """Which case has which label `[n, labels]`, and the labels' names: those given, or all that occur, in order.

    Raises:
        UsageError: A case has a label that is none of those given.
    """
    sets = [set(findings_of(text)) for text in texts]
    held = set[str]().union(*sets)
    known = tuple(names) or tuple(sorted(held))
    if strange := sorted(held - set(known)):
        raise UsageError(
            f"labels that nobody named: {', '.join(strange)}", expected=", ".join(known), next_step="name them, or correct the cases"
        )
    return np.array([[label in one for label in known] for one in sets], np.bool_).reshape(len(sets), len(known)), known


def gains(queries: Flags, retrieved: Sequence[Flags]) -> Gains:
    """Of queries `[q, labels]` and the label sets `[k, labels]` of what was retrieved for each; k may differ, and is at least 1.

    Raises:
        ValueError: Nothing was asked, or nothing retrieved for a query.
    """
    return Gains(*(float(mean) for mean in gains_of_each(queries, retrieved).mean(axis=0)))


def gains_of_each(queries: Flags, retrieved: Sequence[Flags]) -> NDArray[np.float64]:
    """The same of each query, `[q, 5]` in the order of the fields of `Gains`.

    Raises:
        ValueError: As `gains`.
    """
    if not len(queries) or not all(map(len, retrieved)) or len(queries) != len(retrieved):
        raise ValueError("gains need queries, and something retrieved for each")
    return np.array([_gains(query, cases) for query, cases in zip(queries, retrieved, strict=True)])


def _gains(query: Any, cases: Any) -> tuple[float, ...]:
    common, either = (cases & query).sum(axis=1), (cases | query).sum(axis=1)
    same = (cases == query).mean(axis=1)
    positive = np.where(either, common / np.maximum(either, 1), 1.0)  # neither has any: they agree
    return (
        float(same.mean()),
        float(positive.mean()),
        float(np.mean((common > 0) | (either == 0))),
        float((same == 1).mean()),
        float(common.mean()),
    )
