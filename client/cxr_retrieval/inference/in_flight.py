"""How many requests a server should have at once: as many as raise its throughput, and no more than it can take.

TCP Vegas' rule (Brakmo and Peterson 1995, section 4), as Netflix' concurrency-limits applies it to servers: with `n` requests in flight,
the fastest time `base` a request ever took and the time `now`, about n·(1 − base/now) of them wait in a queue. While hardly any does, one
more raises the throughput; when several do, one less loses none. We deviate by beginning with two, and by halving when the server says that
it is full, as TCP does when a packet is lost.
"""

from __future__ import annotations

import threading
from typing import Final

_FEW: Final = 2.0
_MANY: Final = 4.0
"""Requests waiting at the server, below which one more is sent, and above which one less.

Of one that waits, a server of several steps lets a step idle whenever two requests are in the same one: two should."""
_FORGET: Final = 1.01
"""Growth of `base` at each change, so that one lucky request is not believed for ever."""


class InFlight:
    """The limit, told of every request's end. Safe for threads.

    Args:
        most: Never more than these.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._limit = min(2, most)
        self._base = float("inf")
        self._since_change = 0

    @property
    def limit(self) -> int:
        """Requests that may be open now; at least 1."""
        return self._limit

    def answered(self, seconds: float) -> None:
        """A request took so long."""
        with self._lock:
            self._base = min(self._base, seconds)
            self._since_change += 1
            if self._since_change < self._limit:  # what is in flight was sent under the former limit
                return
            waiting = self._limit * (1 - self._base / seconds)
            if waiting < _FEW:
                self._change(self._limit + 1)
            elif waiting > _MANY:
                self._change(self._limit - 1)

    def overloaded(self) -> None:
        """The server had no room for a request."""
        with self._lock:
            self._change(self._limit // 2)

    def _change(self, limit: int) -> None:
        self._limit = max(1, min(limit, self._most))
        self._base *= _FORGET
        self._since_change = 0
