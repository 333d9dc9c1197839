"""A run as JSON lines on stderr. No line names a file, a patient or an image: not as a field, and not in the words of an error.

An error's words are told only as far as they stand in the source (`CxrError.literal`), with the line that made it; what they were about,
results and dead letters say, which stay on this machine. What other libraries log is told by its place alone, for the same reason.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Final, TextIO

from cxr_retrieval.archive.watching import (
    Answered,
    Arrived,
    Asked,
    Away,
    Back,
    Begun,
    Delivered,
    Depths,
    Dissolved,
    Event,
    Expected,
    Failed,
    Kept,
    Listening,
    Read,
    Retried,
    Settled,
    Unanswered,
)
from cxr_retrieval.errors import CxrError

_PROGRESS_S: Final = 10.0
"""Seconds between two lines that say how far it is."""


class JsonLog:
    """A watcher that writes lines, and what a command has to say itself (`say`)."""

    def __init__(self, stream: TextIO) -> None:
        self._logger = logging.Logger("cxr", logging.INFO)  # of no family: nobody else's handlers get these, nor we theirs
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_Json())
        self._logger.addHandler(handler)
        self._states: Counter[str] = Counter()
        self._expected = 0
        self._told = time.monotonic()
        self._look = lambda: Depths(0, 0, 0, 0, 0, 0)

    def __call__(self, event: Event) -> None:
        """Writes what is worth a line: trouble as it comes, requests once they are answered, progress now and then."""
        match event:
            case Begun(look):
                self._look = look
            case Expected(films):
                self._expected = films
                self.say("expected", files=films)
            case Answered(trace, films, took):
                self.say("answered", trace_id=trace.trace_id, span_id=trace.span_id, films=films, seconds=round(took.seconds, 4))
            case Unanswered(trace, error):
                self.say("unanswered", logging.WARNING, trace_id=trace.trace_id, span_id=trace.span_id, **described(error))
            case Retried(service, reason, trace):
                self.say("retried", logging.WARNING, service=service, reason=reason, **({"trace_id": trace.trace_id} if trace else {}))
            case Dissolved(trace):
                self.say("dissolved", logging.WARNING, trace_id=trace.trace_id)
            case Failed(error, number, pseudonym):
                known_by = {"input": number, "pseudonym": pseudonym}
                known = {name: value for name, value in known_by.items() if value is not None}
                self.say("failed", logging.WARNING, **known, **described(error))
            case Arrived(what):
                self.say("arrived", logging.WARNING if what.startswith("rejected") else logging.INFO, what=what)
            case Delivered(destination, outcome):
                self.say("delivered", logging.INFO if outcome == "sent" else logging.WARNING, destination=destination, outcome=outcome)
            case Away(service, error):
                self.say("waiting", logging.WARNING, service=service, **described(error))
            case Back(service, seconds):
                self.say("back", service=service, seconds=round(seconds, 1))
            case Settled(states):
                self._states.update(states)
                if time.monotonic() > self._told + _PROGRESS_S:
                    self._told = time.monotonic()
                    depths = self._look()
                    self.say("progress", files=self._expected, **self._counted(), in_flight=depths.in_flight, limit=depths.limit)
            case Read() | Asked() | Kept() | Listening():
                pass

    def say(self, event: str, level: int = logging.INFO, **fields: str | float) -> None:
        """One line; fields are the caller's own words and numbers, never a name."""
        self._logger.log(level, event, extra={"fields": fields})

    def end(self, error: Exception | None) -> None:
        """The last line: what became of the files, and what ended the run before its time."""
        level = logging.INFO if error is None else logging.ERROR
        self.say("ended", level, files=self._expected, **self._counted(), **(described(error) if error else {}))

    def _counted(self) -> dict[str, int]:
        return {state: count for state, count in sorted(self._states.items()) if count}

    @contextmanager
    def others_too(self) -> Generator[None]:
        """Whatever other libraries of this process log as a warning or worse becomes a line as well, by its place alone."""
        root, handler = logging.getLogger(), _Foreign(self)
        root.addHandler(handler)
        logging.captureWarnings(capture=True)
        try:
            yield
        finally:
            logging.captureWarnings(capture=False)
            root.removeHandler(handler)


def described(error: Exception) -> dict[str, str]:
    """What may be said of an error where no name may stand: its class, the line that made it, and those of its words which are no data."""
    about = {"error": type(error).__name__}
    if isinstance(error, CxrError):
        return {**about, "at": error.raised_at, **error.literal}
    lines = [f"{frame.f_globals.get('__name__', '')}:{line}" for frame, line in traceback.walk_tb(error.__traceback__)]
    return {**about, "at": lines[-1] if lines else ""}


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        return json.dumps({"time": when, "level": record.levelname.lower(), "event": record.getMessage(), **fields}, ensure_ascii=False)


class _Foreign(logging.Handler):
    def __init__(self, log: JsonLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.say("library", record.levelno, logger=record.name, at=f"{record.module}:{record.lineno}")
