"""Works are drawn in windows that grow, and none is left out."""

from __future__ import annotations

import threading
from itertools import count

from cxr_retrieval.archive import cluster


def test_every_work_is_in_one_window() -> None:
    works = [None if number % 7 == 0 else number for number in range(100_000)]
    windows = list(cluster.windows(works, threading.Event()))
    assert [one for window in windows for one in window] == [one for one in works if one is not None]
    sizes = [len(window) for window in windows]
    assert sizes[1] == 2 * sizes[0]
    assert sum(sizes[:2]) < len(works), "or this shows nothing"


def test_drawing_ends_when_told() -> None:
    stop = threading.Event()
    drawn = cluster.windows(count(), stop)
    first = next(drawn)
    stop.set()
    assert first
    assert list(drawn) == []


def test_nothing_makes_no_window() -> None:
    assert list(cluster.windows([None, None], threading.Event())) == []
