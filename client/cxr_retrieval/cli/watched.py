"""How a bulk command is seen: bar and words on a terminal, or JSON lines; metrics and spans beside either."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Final, TypeVar

import typer
from rich.progress import Progress
from rich.text import Text

from cxr_retrieval import __version__
from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.archive.watching import Event, Watch
from cxr_retrieval.cli.console import INTERRUPTED, talk
from cxr_retrieval.errors import CxrError, ServiceError, SetupError
from cxr_retrieval.progress import progress_bar
from cxr_retrieval.settings import LogFormat, TelemetrySettings
from cxr_retrieval.telemetry.log import JsonLog

T = TypeVar("T")

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Bar:
    """How far it is; `shown` None: nowhere."""

    def __init__(self, shown: Progress | None, description: str, total: int | None) -> None:
        self._shown = shown
        self._task = None if shown is None else shown.add_task(description, total=total)

    def advance(self, count: int) -> None:
        """So many more are dealt with."""
        if self._shown is not None and self._task is not None:
            self._shown.update(self._task, advance=count)

    def describe(self, description: str, to_go: int | None = None) -> None:
        """Says something else, and, once that is known, how many are to go."""
        if self._shown is not None and self._task is not None:
            total = None if to_go is None else self._shown.tasks[self._task].completed + to_go
            self._shown.update(self._task, description=description, total=total)


class Watched:
    """What a command tells its watchers, and people, unless the log is JSON: then people are told nothing that is not an event.

    Args:
        watches: Each gets every event.
        log: The JSON log, if there is one; it is among `watches`.
    """

    def __init__(self, watches: list[Watch], log: JsonLog | None) -> None:
        self._watches = watches
        self._log = log
        self._console = talk()

    @property
    def speaks(self) -> bool:
        """Whether people read stderr."""
        return self._log is None

    def watch(self, event: Event) -> None:
        """Passes an event on."""
        for watch in self._watches:
            watch(event)

    def tell(self, words: str) -> None:
        """For people; whoever reads JSON gets the event."""
        if self.speaks:
            self._console.print(Text(words), soft_wrap=True)

    @contextmanager
    def bar(self, description: str, total: int | None = None) -> Generator[Bar]:
        """Progress for people; shows nothing to whoever reads JSON. `total` None: not known yet."""
        if not self.speaks:
            yield Bar(None, description, total)
            return
        with progress_bar() as shown:
            before, self._console = self._console, shown.console
            try:
                yield Bar(shown, description, total)
            finally:
                self._console = before


@contextmanager
def watched(settings: TelemetrySettings) -> Generator[Watched]:
    """Serves, logs and exports what the settings and OpenTelemetry's variables ask for, until left.

    An error that leaves it is, where the log is JSON, its last line: the caller's words would carry names.

    Raises:
        SetupError: A port that is taken, an extra that is missing.
    """
    with ExitStack() as opened:
        watches: list[Watch] = []
        log = None
        if settings.log_format is LogFormat.json:
            log = JsonLog(sys.stderr)
            opened.enter_context(log.others_too())
            opened.enter_context(_last_line(log))
        seen = Watched(watches, log)
        if settings.metrics:
            from cxr_retrieval.telemetry.metrics import Metrics, served

            metrics = Metrics(__version__)
            address = opened.enter_context(served(metrics, settings.metrics_host, settings.metrics_port))
            watches.append(metrics)
            seen.tell(f"metrics at http://{address}/metrics")
            if log is not None:
                log.say("metrics", address=address)
        if endpoint := next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None):
            watches.append(opened.enter_context(_exported(endpoint)))
        if log is not None:
            watches.append(log)  # the last one: what its lines say, metrics say already
        yield seen


def first_contact(patience: Patience, service: str, connect: Callable[[], T]) -> T:
    """Connects, waiting for a server that is not there yet: a job of the night may start before it. After Ctrl-C, ends as one does."""
    try:
        return patience.until(service, connect)
    except ServiceError:
        if patience.stop.is_set():
            raise typer.Exit(INTERRUPTED) from None
        raise


@contextmanager
def _exported(endpoint: str) -> Generator[Watch]:
    if importlib.util.find_spec("opentelemetry.exporter") is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        raise SetupError(
            "spans are asked for, and OpenTelemetry is not installed",
            expected="the extra telemetry, or no OTEL_EXPORTER_OTLP_ENDPOINT",
            got=f"the endpoint {endpoint}",
            next_step="pip install 'cxr-retrieval[telemetry]'",
        )
    from cxr_retrieval.telemetry.spans import exported

    with exported(__version__) as watch:
        yield watch


@contextmanager
def _last_line(log: JsonLog) -> Generator[None]:
    try:
        yield
    except typer.Exit:
        log.end(None)
        raise
    except Exception as error:  # one that nobody expected, too: its traceback holds names
        log.end(error)
        raise typer.Exit(error.exit_code if isinstance(error, CxrError) else 2) from error
    log.end(None)
