"""A reader's marks move the question: cases that were right draw it towards them, cases that were not push it away. No model changes.

The question is the film's vector q, of what was learnt and what lungs look like, as those of the cases are (`gallery/balance.py`). With r
cases marked relevant and n not, means R and N, the next search is made with

    q + PULL · (√r · R − √n · N) / (√r + √n)

which is Rocchio's (1971; Manning et al. 2008, chapter 9: α q + β R − γ N), but for what the two sides weigh: as the roots of their numbers
and not each a constant, so that one wrong mark among ten right ones does not count as much as all of these. Both numbers were chosen on the
train films by simulated readers (`evaluation/feedback.py`; docs/feedback.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.pseudonyms import DIGITS
from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.store import Neighbour, Store

PULL: Final = 1.5
"""Of the marked cases, beside the 1 of the film itself."""
ROOT: Final = 0.5
"""The power of a side's number that it weighs with."""
MOST_MARKS: Final = 200
"""Of one film."""
MOVED: Final = "a reader's marks moved the question"
"""Why nothing that was measured on unmoved ones holds."""

Vector = NDArray[np.float32]
_KEY: Final = re.compile(rf"[0-9a-f]{{{DIGITS}}}")


@dataclass(frozen=True)
class Mark:
    """What a reader said of a case: is it relevant to the film?

    Raises:
        UsageError: `key` is no case's.
    """

    key: str
    relevant: bool

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise UsageError("a mark names no case", expected=f"its key, {DIGITS} hex digits", next_step="mark a case that is shown")


@dataclass(frozen=True)
class Marked:
    """A case that was marked; `hit.similarity` is that to the question as the marks have moved it."""

    hit: Neighbour
    relevant: bool


@dataclass(frozen=True)
class Led:
    """A question as marks have moved it.

    Attributes:
        vector: `[size]`; the film's own where there are no marks. Weighed by the balance it is as long as that.
        marked: As they were marked.
        gone: How many of the cases the gallery no longer holds; these do not count.
    """

    vector: Vector
    marked: tuple[Marked, ...] = ()
    gone: int = 0

    @property
    def set_aside(self) -> frozenset[str]:
        """Keys of the cases that are not relevant: they are no neighbours any more."""
        return frozenset(one.hit.case.key for one in self.marked if not one.relevant)


def moved(
    query: Vector,
    relevant: Vector,
    other: Vector,
    pull: float = PULL,
    root: float = ROOT,
    length_of: Callable[[Vector], Any] = np.linalg.norm,
) -> Vector:
    """The question after marks, of length 1.

    Args:
        query: `[d]`, of length 1. relevant, other: `[r, d]` and `[n, d]`, of cases marked relevant and not.
        pull, root: As PULL and ROOT.
        length_of: What length is.
    """
    sides = [(sign, len(side) ** root, side.mean(axis=0)) for sign, side in ((1, relevant), (-1, other)) if len(side)]
    weight = sum(weight for _, weight, _ in sides)
    found = query + sum((sign * pull * share / weight * mean for sign, share, mean in sides), np.zeros_like(query))
    length = float(length_of(found))
    return np.asarray(found / length, np.float32) if sides and length else query


def led(query: Vector, marks: Sequence[Mark], store: Store, balance: float) -> Led:
    """The question after marks on cases of a gallery; of two marks on one case the later counts.

    Args:
        query: `[size]`, the film's vector. The balance weighs its parts afterwards, which is the same: all that happens here is a sum.
        balance: At which the cases are compared: as long as they are by it, the question is to be.

    Raises:
        UsageError: More than MOST_MARKS.
        StoreError: Milvus cannot serve.
    """
    said = {mark.key: mark.relevant for mark in marks}
    if len(said) > MOST_MARKS:
        raise UsageError("too many marks", expected=f"at most {MOST_MARKS}", got=str(len(said)), next_step="take some back")
    if not said:
        return Led(query)
    cases, vectors = store.cases(list(said)), store.embeddings(list(said))
    held = {key: relevant for key, relevant in said.items() if key in cases and key in vectors}
    asked = {key: store.space.as_question(vector) for key, vector in vectors.items()}
    relevant, other = (_side(held, asked, query, relevant=said) for said in (True, False))
    vector = moved(query, relevant, other, length_of=lambda found: np.linalg.norm(store.space.comparable(found, balance)))
    marked = [
        Marked(Neighbour(cases[key], *store.space.likeness(vector, vectors[key], balance)), relevant) for key, relevant in held.items()
    ]
    return Led(vector, tuple(marked), len(said) - len(held))


def _side(said: Mapping[str, bool], vectors: Mapping[str, Vector], query: Vector, *, relevant: bool) -> Vector:
    return np.array([vectors[key] for key, so in said.items() if so == relevant], np.float32).reshape(-1, len(query))
