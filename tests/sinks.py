"""Works and a sink for tests of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.archive.pipeline import Seen
from cxr_retrieval.contract import EMBEDDING
from cxr_retrieval.errors import CxrError


@dataclass(frozen=True)
class Numbered:
    path: Path
    number: int
    member: str | None = None


class Counting:
    """Keeps every film's number; `troubles` are raised by the first calls."""

    outputs = (EMBEDDING,)

    def __init__(self, *troubles: CxrError) -> None:
        self.troubles = list(troubles)
        self.numbers: list[int] = []
        self.bad: list[int] = []
        self.embeddings: dict[int, NDArray[np.generic]] = {}

    def keep(self, seen: Sequence[Seen[Numbered]]) -> Sequence[Seen[Numbered]]:
        if self.troubles:
            raise self.troubles.pop(0)
        return seen

    def kept(self, result: Sequence[Seen[Numbered]]) -> None:
        self.numbers += [one.work.number for one in result]
        self.embeddings |= {one.work.number: one.outputs[EMBEDDING.name] for one in result}

    def failed(self, work: Numbered, error: CxrError) -> None:
        self.bad.append(work.number)
