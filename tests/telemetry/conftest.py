"""A run in events, one of each kind at least."""

from __future__ import annotations

import pytest

from cxr_retrieval.archive.watching import (
    Answered,
    Arrived,
    Asked,
    Away,
    Back,
    Begun,
    Delivered,
    Depths,
    Event,
    Expected,
    Failed,
    Kept,
    Listening,
    Queue,
    Read,
    Retried,
    Settled,
    Took,
    Unanswered,
)
from cxr_retrieval.errors import ImageError, OverloadedError, ServerDownError
from cxr_retrieval.inference.trace import Trace

NAME = "MÜLLER^Änne"
TRACE = Trace()
AGAIN = TRACE.again()
_EVENTS: tuple[Event, ...] = (
    Expected(13),
    Begun(lambda: Depths(3, 5, 2, 7, 4, 6)),
    Read(0.02),
    Read(None, ImageError(f"{NAME}.dcm: the file is empty")),
    Failed(ImageError(f"{NAME}.dcm: the file is empty"), 7),
    Asked(TRACE, 8, 8 * 65536, Took(1.0, 0.5), 0),
    Unanswered(TRACE, OverloadedError("no room")),
    Retried("triton", "OverloadedError", TRACE),
    Away("triton", ServerDownError(f"no Triton at {NAME}")),
    Back("triton", 11.0),
    Away("milvus", ServerDownError("no Milvus")),
    Asked(AGAIN, 8, 8 * 65536, Took(1.0, 0.5), 1),
    Answered(AGAIN, 8, Took(2.0, 0.3)),
    Kept({TRACE.trace_id: 8}, Took(3.0, 0.1), Took(4.0, 0.01)),
    Settled({"answered": 8, "failed": 1}),
    Listening(lambda: Queue(2, 41, 7.5, 3, 90.0)),
    Arrived("received"),
    Arrived("rejected caller"),
    Delivered("archive", "sent"),
    Delivered("archive", "postponed"),
)


@pytest.fixture(scope="session")
def events() -> tuple[Event, ...]:
    return _EVENTS


@pytest.fixture(scope="session")
def name() -> str:
    """A patient's, planted in what errors say."""
    return NAME
