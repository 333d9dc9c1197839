"""The measures of Haq et al. 2020 on label sets small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.errors import UsageError
from cxr_retrieval.evaluation.gains import gains, label_sets


def test_by_hand() -> None:
    flags, names = label_sets(["edema|effusion", "effusion", "", "edema | effusion", "mass"])
    assert names == ("edema", "effusion", "mass")
    found = gains(flags[:1], [flags[1:]])
    assert found.acg == pytest.approx((2 / 3 + 1 / 3 + 3 / 3 + 0 / 3) / 4)
    assert found.acg_p == pytest.approx((1 / 2 + 0 + 1 + 0) / 4)
    assert found.precision == pytest.approx(2 / 4)
    assert found.exact == pytest.approx(1 / 4)
    assert found.gain == pytest.approx((1 + 0 + 2 + 0) / 4)


def test_two_cases_without_a_label_agree() -> None:
    flags, _ = label_sets(["", "", "mass"])
    found = gains(flags[:1], [flags[1:]])
    assert (found.acg_p, found.precision, found.exact, found.gain) == (0.5, 0.5, 0.5, 0.0)


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=12))
def test_where_each_has_one_label_all_but_acg_are_one_number(labels: list[str]) -> None:
    flags, _ = label_sets(labels)
    found = gains(flags[:1], [flags[1:]])
    assert found.acg_p == found.precision == found.exact == found.gain == pytest.approx(np.mean([one == labels[0] for one in labels[1:]]))
    assert found.acg >= found.precision


def test_means_are_over_queries_not_over_what_was_retrieved() -> None:
    flags, _ = label_sets(["a", "b"])
    assert gains(flags, [flags[[0]], flags[[0, 0, 1, 1]]]).precision == pytest.approx((1 + 0.5) / 2)


def test_labels_that_nobody_named_are_refused() -> None:
    assert label_sets(["a"], ["b", "a"])[0].tolist() == [[False, True]]
    with pytest.raises(UsageError, match="labels that nobody named: c"):
        label_sets(["a|c"], ["a", "b"])


def test_nothing_is_no_mean() -> None:
    flags, _ = label_sets(["a"])
    with pytest.raises(ValueError, match="something retrieved for each"):
        gains(flags, [flags[:0]])
