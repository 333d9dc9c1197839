"""What a gallery keeps as text, in a property of its collection: compact JSON with a layout, always the same for the same content."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from cxr_retrieval.errors import SetupError


def compact(held: Mapping[str, Any]) -> str:
    """The text."""
    return json.dumps(held, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


@contextmanager
def read_back(text: str, what: str, layout: int, next_step: str) -> Generator[dict[str, Any]]:
    """What the text holds beside its layout, while it is made sense of.

    Raises:
        SetupError: It is no such text, of another layout, or what it holds makes no sense.
    """
    try:
        held: dict[str, Any] = json.loads(text)
        if held.pop("layout") != layout:
            raise ValueError("of another layout")
        yield held
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SetupError(
            f"{what} cannot be read",
            expected="JSON that this version of the system has written",
            got=f"{type(error).__name__}: {error}",
            next_step=next_step,
        ) from error
