"""The limit of requests in flight against a queue with known capacity."""

from __future__ import annotations

import pytest

from cxr_retrieval.inference.in_flight import InFlight


def settled(capacity: int, most: int = 32, rounds: int = 400) -> int:
    """A server that works on `capacity` requests at once, one second each, and has the others wait."""
    limit = InFlight(most)
    for _ in range(rounds):
        limit.answered(max(1.0, limit.limit / capacity))
    return limit.limit


@pytest.mark.parametrize("capacity", [1, 2, 5, 13])
def test_it_fills_the_server_and_no_long_queue(capacity: int) -> None:
    assert capacity <= settled(capacity) <= capacity + 4


def test_it_never_leaves_its_bounds() -> None:
    assert settled(50, most=7) == 7
    limit = InFlight(1)
    for _ in range(5):
        limit.overloaded()
    assert limit.limit == 1


def test_a_full_server_halves_it_and_it_grows_again() -> None:
    limit = InFlight(32)
    for _ in range(400):
        limit.answered(max(1.0, limit.limit / 12))
    before = limit.limit
    limit.overloaded()
    assert limit.limit == before // 2
    for _ in range(400):
        limit.answered(max(1.0, limit.limit / 12))
    assert limit.limit >= 12
