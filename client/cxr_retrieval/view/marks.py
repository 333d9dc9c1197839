"""What a reader makes of an answer, round after round: which marks are new, and which cases came and went by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cxr_retrieval.archive.pairs import NOT_RELEVANT, RELEVANT, TAKEN_BACK
from cxr_retrieval.errors import UsageError
from cxr_retrieval.retrieval.feedback import MOST_MARKS, Mark


def parsed(given: Sequence[Any]) -> tuple[Mark, ...]:
    """From what a browser sent: {key, relevant} each.

    Raises:
        UsageError: It is anything else, or more than MOST_MARKS.
    """
    if len(given) > MOST_MARKS:
        raise UsageError("too many marks", expected=f"at most {MOST_MARKS}", got=str(len(given)), next_step="take some back")
    marks: list[Mark] = []
    for one in given:
        if not (isinstance(one, dict) and isinstance(one.get("key"), str) and isinstance(one.get("relevant"), bool)):
            raise UsageError("a mark is malformed", expected="{key, relevant}", next_step="reload the page")
        marks.append(Mark(one["key"], one["relevant"]))
    return tuple(marks)


def changed(before: Sequence[Mark], after: Sequence[Mark]) -> dict[str, str]:
    """Key → what became of its mark, for those that are not as they were; what the audit log is told."""
    old, new = ({mark.key: mark.relevant for mark in marks} for marks in (before, after))
    said = {key: RELEVANT if relevant else NOT_RELEVANT for key, relevant in new.items() if old.get(key) is not relevant}
    return said | {key: TAKEN_BACK for key in old if key not in new}


def shown_keys(answer: Mapping[str, Any]) -> set[str]:
    """Keys of the cases that an answer showed."""
    return {hit["key"] for name in ("neighbours", "earlier_films", "marked", "went") for hit in answer[name]}


def came_and_went(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """`came`: keys of the neighbours that the answer before had not; `went`: those of its neighbours that are neither here nor marked."""
    seen, had = ({hit["key"] for hit in answer["neighbours"]} for answer in (now, before))
    kept = seen | {hit["key"] for hit in now["marked"]}
    return {
        "came": [hit["key"] for hit in now["neighbours"] if hit["key"] not in had],
        "went": [hit for hit in before["neighbours"] if hit["key"] not in kept],
    }
