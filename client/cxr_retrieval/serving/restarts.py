"""Keeps the embedded Triton running: one that ends by itself is started again on the same ports, ever later, until it is hopeless."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random

from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.server import Endpoints, ServerOptions, embedded_triton


@dataclass(frozen=True)
class Restarts:
    """How often, and how soon.

    Args:
        tries: In a row, before it is given up.
        first_s: Before the second try; doubled before each further one, up to `longest_s`.
        well_s: Whoever ran that long ran well: the next crash is the first again.
    """

    tries: int = 5
    first_s: float = 1.0
    longest_s: float = 60.0
    well_s: float = 300.0


def keep_running(options: ServerOptions, restarts: Restarts, ready: Callable[[Endpoints], None], tell: Callable[[str], None]) -> NoReturn:
    """Serves until the caller is interrupted.

    Call it in the thread that lives longest: Triton ends with the thread that started it.

    Args:
        ready: Told each time that all models are.
        tell: Told what happened, and what is done about it.

    Raises:
        SetupError: Triton did not start at first, or crashed and could not be kept running again (its own reason).
    """
    options = options.on_free_ports()
    ended, ran_s = _run(options, ready)  # what does not start at first is for its user to mend, not for time

    def again() -> tuple[str, float]:
        ended, ran_s = _run(options, ready)
        if ran_s < restarts.well_s:
            raise _by_itself(ended)
        return ended, ran_s

    def wait(state: RetryCallState) -> None:
        seconds = state.next_action.sleep if state.next_action else 0.0
        tell(f"{_reason(state)}; trying again in {seconds:.0f} s ({state.attempt_number} of {restarts.tries} tries)")

    def give_up(state: RetryCallState) -> NoReturn:
        raise SetupError(
            f"Triton crashed, and could not be kept running in {state.attempt_number} tries",
            got=_reason(state),
            next_step="mend that, then start again; if nothing is wrong there, look for memory pressure in the system log",
        )

    retrying = Retrying(
        retry=retry_if_exception_type(SetupError),
        stop=stop_after_attempt(restarts.tries),
        wait=wait_exponential(multiplier=restarts.first_s, max=restarts.longest_s) + wait_random(0, restarts.first_s),
        before_sleep=wait,
        retry_error_callback=give_up,
    )
    while restarts.tries:
        tell(f"Triton ended by itself after {ran_s:.0f} s: {ended}. Starting it again; the gallery stays up")
        ended, ran_s = retrying(again)
    raise _by_itself(ended)


def _run(options: ServerOptions, ready: Callable[[Endpoints], None]) -> tuple[str, float]:
    """Serves until Triton ends by itself; how it ended, and after how many seconds."""
    with embedded_triton(options) as triton:
        since = time.monotonic()
        ready(triton)
        code = triton.process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}, its last words: {triton.last_words()}", time.monotonic() - since


def _by_itself(ended: str) -> SetupError:
    return SetupError(
        "Triton ended by itself", got=ended, next_step="start it again; if this repeats, look for memory pressure in the system log"
    )


def _reason(state: RetryCallState) -> str:
    error = state.outcome.exception() if state.outcome else None
    return f"{error.what}: {error.got}" if isinstance(error, SetupError) and error.got else getattr(error, "what", str(error))
