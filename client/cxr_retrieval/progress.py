"""Progress on stderr, so that stdout stays for results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Item = TypeVar("Item")


class _Rate(ProgressColumn):
    """Items a second, lately."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f}/s")


def progress_bar() -> Progress:
    """A bar with count, rate, time spent and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def track(items: Iterable[Item], description: str) -> Iterator[Item]:
    """Yields the items while showing how far it is."""
    with progress_bar() as bar:
        yield from bar.track(items, description=description, total=len(items) if isinstance(items, Sized) else None)
