"""Which cases are the query's own, and the nearest that are not.

Own ones are told apart here and not by a clause: a clause would tell Milvus whose film is asked about, drop cases whose patient is
unknown, and cost the index recall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.gallery.store import MAX_HITS, Case, Neighbour
from cxr_retrieval.radiograph.decoding import Film

OWN_EXPECTED: Final = 2
"""Hits asked for beyond `top_k`, so that a patient's own films seldom need a second search."""


def nobodys(case: Case) -> bool:
    """No case counts as own."""
    return False


def own_cases(film: Film, patient_id: str | None, pseudonyms: Pseudonyms) -> Callable[[Case], bool]:
    """Which cases are the query's own: the same 256×256 picture, or the same patient (of whatever source, to be on the safe side)."""
    patient_id = patient_id or film.patient_id
    patient = pseudonyms.patient(patient_id) if patient_id else None
    pixels = pseudonyms.digest(film.pixels)
    return lambda case: case.pixels == pixels or (patient is not None and case.patient_id == patient)


def nearest_others(
    hits: Sequence[Neighbour], search: Callable[[int], Sequence[Neighbour]], top_k: int, is_own: Callable[[Case], bool]
) -> tuple[list[Neighbour], list[Neighbour]]:
    """The nearest `top_k` cases that are not the query's own, and those of its own that are as near as the last of them.

    Args:
        hits: The nearest `top_k + OWN_EXPECTED`, nearest first.
        search: Number of hits → the nearest; asked for more where too many of the first are own.
    """
    limit = min(top_k + OWN_EXPECTED, MAX_HITS)
    while True:
        others = [hit for hit in hits if not is_own(hit.case)][:top_k]
        if len(others) == top_k or len(hits) < limit or limit == MAX_HITS:
            least = others[-1].similarity if len(others) == top_k else -1.0
            return others, [hit for hit in hits if is_own(hit.case) and hit.similarity >= least]
        limit = min(2 * limit, MAX_HITS)
        hits = search(limit)
