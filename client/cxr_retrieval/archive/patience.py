"""Servers that went away, or fail whatever they are asked, are waited for; and that is said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    sleep_using_event,
    stop_after_delay,
    stop_any,
    stop_when_event_set,
    wait_random_exponential,
)

from cxr_retrieval.archive.watching import Away, Back, Retried, Watch, unwatched
from cxr_retrieval.errors import CxrError, PeerDownError, ServerDownError, StoreDownError

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to wait (`seconds`; 0: not at all), what ends it before (`stop`), and who is told."""

    stop: threading.Event
    seconds: float
    tell: Callable[[str], None] = lambda _: None
    watch: Watch = unwatched

    def until(
        self,
        service: str,
        call: Callable[[], T],
        *others: threading.Event,
        probe: Callable[[], None] = lambda: None,
        because: CxrError | None = None,
        attempts: int = 1,
    ) -> T:
        """Calls again, ever more seldom and at random moments, what raises an error that may pass.

        Args:
            service: Whom the call is for.
            others: Further events that end the waiting.
            probe: Called before each further call; as good as the call itself if it raises.
            because: What has failed already, so that waiting has begun; else it begins with the first call that fails.
            attempts: Calls until an error that does not say of itself that it may pass is believed.

        Raises:
            CxrError: The last one, once patience has ended.
        """
        started = time.monotonic()
        waiting = because is not None
        calls = 0

        def attempt() -> T:
            nonlocal calls
            calls += 1
            if calls > 1:
                probe()
            return call()

        def again(state: RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            return isinstance(error, CxrError) and (error.may_pass or state.attempt_number < attempts)

        def before_sleep(state: RetryCallState) -> None:
            nonlocal waiting
            error = state.outcome.exception() if state.outcome else None
            if isinstance(error, CxrError):
                self.watch(Retried(service, type(error).__name__))
                if not waiting:
                    waiting = True
                    self._say(service, error)

        if because is not None:
            self._say(service, because)
        found = Retrying(
            retry=again,
            wait=wait_random_exponential(multiplier=0.5, max=15),
            stop=stop_any(stop_after_delay(self.seconds), *map(stop_when_event_set, (self.stop, *others))),
            sleep=sleep_using_event(self.stop),
            before_sleep=before_sleep,
            reraise=True,
        )(attempt)
        if waiting:
            seconds = time.monotonic() - started
            self.tell(f"{service.capitalize()} is back after {seconds:.0f} s")
            self.watch(Back(service, seconds))
        return found

    def _say(self, service: str, error: CxrError) -> None:
        how = "is away" if isinstance(error, (ServerDownError, StoreDownError, PeerDownError)) else "cannot serve now"
        self.tell(f"{service.capitalize()} {how}: {error.what}. Waiting for it")
        self.watch(Away(service, error))
