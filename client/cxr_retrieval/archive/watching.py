"""What is told of a run while it goes on, to whoever watches: metrics, a log, a trace. No event names a file, a patient or an image.

A watcher is a function that takes every event, from several threads, and raises nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from cxr_retrieval.errors import CxrError
from cxr_retrieval.inference.trace import Trace


@dataclass
class Took:
    """When something began (seconds since the epoch) and how long it took; `seconds` is set once it has ended."""

    began: float
    seconds: float = 0.0

    @property
    def ended(self) -> float:
        """Seconds since the epoch."""
        return self.began + self.seconds


@contextmanager
def timed() -> Generator[Took]:
    """Measures its body, also one that raises."""
    took, started = Took(time.time()), time.monotonic()
    try:
        yield took
    finally:
        took.seconds = time.monotonic() - started


@dataclass(frozen=True)
class Depths:
    """Films in each place between file and result, and requests; all at one moment."""

    reading: int
    to_ask: int
    doubted: int
    to_keep: int
    in_flight: int
    limit: int


@dataclass(frozen=True)
class Begun:
    """A pipeline runs; `look` may be called from any thread for as long as it does, and after."""

    look: Callable[[], Depths]


@dataclass(frozen=True)
class Expected:
    """So many films are to be done."""

    films: int


@dataclass(frozen=True)
class Read:
    """A file has become a film, or cannot."""

    seconds: float | None
    error: CxrError | None = None


@dataclass(frozen=True)
class Asked:
    """A request goes to Triton. `read`: from the first of its files to the last; `attempt`: how often it has failed before."""

    trace: Trace
    films: int
    sent_bytes: int
    read: Took
    attempt: int


@dataclass(frozen=True)
class Answered:
    """Triton has answered a request."""

    trace: Trace
    films: int
    took: Took


@dataclass(frozen=True)
class Unanswered:
    """A request has failed; who is to blame is not known yet."""

    trace: Trace
    error: CxrError


@dataclass(frozen=True)
class Retried:
    """Something is asked of a server again, because of an error of the class `reason`."""

    service: str
    reason: str
    trace: Trace | None = None


@dataclass(frozen=True)
class Dissolved:
    """The films of this request go on singly, or have failed."""

    trace: Trace


@dataclass(frozen=True)
class Kept:
    """Films have been searched for or stored (`keep`) and their outcomes written down (`record`); `traces`: trace id → how many of its."""

    traces: Mapping[str, int]
    keep: Took
    record: Took


@dataclass(frozen=True)
class Settled:
    """What has become of films: state → how many more."""

    states: Mapping[str, int]


@dataclass(frozen=True)
class Failed:
    """A film cannot be used; `number` is its place in the journal, `pseudonym` its image's, where there is one."""

    error: CxrError
    number: int | None = None
    pseudonym: str | None = None


@dataclass(frozen=True)
class Queue:
    """Of a node that receives films, at one moment: associations that are open, films without an answer, and what is to be sent; how long
    the oldest of each has waited, in seconds.
    """

    associations: int
    waiting: int
    oldest_s: float
    to_send: int
    oldest_parcel_s: float


@dataclass(frozen=True)
class Listening:
    """A node receives films; `look` may be called from any thread for as long as it does, and after."""

    look: Callable[[], Queue]


@dataclass(frozen=True)
class Arrived:
    """Something came to a node: "received", "again", "again, changed", "commitment", or "rejected" and why."""

    what: str


@dataclass(frozen=True)
class Delivered:
    """Something was sent to a destination: `outcome` is "sent", "postponed" or "given up"."""

    destination: str
    outcome: str


@dataclass(frozen=True)
class Away:
    """A server is waited for; nothing more is sent to it."""

    service: str
    error: CxrError


@dataclass(frozen=True)
class Back:
    """It answers again."""

    service: str
    seconds: float


Event = (
    Begun
    | Expected
    | Read
    | Asked
    | Answered
    | Unanswered
    | Retried
    | Dissolved
    | Kept
    | Settled
    | Failed
    | Listening
    | Arrived
    | Delivered
    | Away
    | Back
)
Watch = Callable[[Event], None]


def unwatched(_: Event) -> None:
    """Nobody watches."""
