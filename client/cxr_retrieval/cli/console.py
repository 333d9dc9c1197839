"""Results go to stdout, talk and progress to stderr; what is printed means what it says: `[copy]` in a name is no markup."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from cxr_retrieval.progress import progress_bar

if TYPE_CHECKING:
    from cxr_retrieval.archive.embedding import Advance, Problem
    from cxr_retrieval.cases.fields import Doubt


_DOUBTS_SHOWN = 20
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def talk() -> Console:
    """The console for people, on stderr."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def results() -> Console:
    """The console for results, on stdout; wide when nobody is watching, so that a table in a file is not broken up."""
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 140)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextmanager
def progress(description: str, total: int) -> Generator[Advance]:
    """A bar with count, time spent and time left; yields a function that moves it on."""
    with progress_bar() as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.update(task, advance=count)


def print_problems(problems: Sequence[Problem]) -> None:
    """Each unusable input on a line of its own."""
    console = talk()
    for problem in problems:
        console.print(Text.assemble(("failed", "red"), f" {problem.image_id}: {problem.error}"), soft_wrap=True)


def print_doubts(doubts: Sequence[Doubt], doubted: int) -> None:
    """The first values that are not plausible, a line each, and how many more there are."""
    console = talk()
    for doubt in doubts[:_DOUBTS_SHOWN]:
        console.print(Text.assemble(("warning", "yellow"), f" {doubt.image_id}: {doubt.words}"), soft_wrap=True)
    if doubted > _DOUBTS_SHOWN:
        console.print(f"{doubted - _DOUBTS_SHOWN} more values are not plausible", soft_wrap=True)
