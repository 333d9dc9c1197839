"""The exact audit's own arithmetic, against all comparisons at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.evaluation.exact import _Nearest  # pyright: ignore[reportPrivateUsage]
from cxr_retrieval.evaluation.intervals import wilson
from vectors import unit_vectors


@given(st.lists(st.integers(1, 23), min_size=1, max_size=5), st.integers(1, 7))
def test_page_by_page_is_all_at_once(pages: list[int], k: int) -> None:
    cases = unit_vectors(sum(pages))
    keys = [f"{number:032x}" for number in range(len(cases))]
    nearest = _Nearest(cases[:3], keys[:3], k)
    start = 0
    for size in pages:
        nearest.see(keys[start : start + size], cases[start : start + size])
        start += size
    assert nearest.seen == len(cases)
    for query in range(min(3, len(cases))):
        alike = cases @ cases[query]
        order = [number for number in np.argsort(-alike) if number != query][:k]
        best = [(keys[number], float(alike[number])) for number in order]
        assert nearest.share(query, best) == 1.0
        if best:
            assert nearest.share(query, best[1:]) == pytest.approx(1 - 1 / len(best))
            assert nearest.share(query, [("another", best[-1][1])]) == pytest.approx(1 / len(best)), "equally near is as good"
            assert nearest.share(query, [("another", best[-1][1] - 1e-3)]) == 0.0


def test_interval_of_a_share() -> None:
    """0.5 of 100: Newcombe 1998, method 3, gives 0.4038 to 0.5962."""
    assert wilson(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=5e-5)
    assert wilson(1.0, 200)[1] == 1.0
    assert wilson(1.0, 200)[0] == pytest.approx(0.9811, abs=5e-4)
