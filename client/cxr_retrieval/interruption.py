"""What Ctrl-C and SIGTERM do while something is under way that they must not break."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def until_interrupted() -> Generator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; a second one ends the process as usual."""
    stop = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        stop.set()
        restore()

    with _handled_by(interrupt) as restore:
        yield stop


@contextmanager
def uninterrupted() -> Generator[None]:
    """They wait until the block has ended, however it ends. In threads beside the main one, where no signal comes, it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    try:
        with _handled_by(lambda number, _: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], object]) -> Generator[Callable[[], None]]:
    """Yields what gives them back to whoever had them, as the end of the block does, too."""
    former = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, before in former.items():
            signal.signal(number, before or signal.SIG_DFL)

    try:
        yield restore
    finally:
        restore()
