"""The fusion of what was learnt and what lungs look like: exact whatever the balance, and refused where it is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.cli.options import BALANCE_DEFAULT
from cxr_retrieval.contract import APPEARANCE, EMBEDDING, EMBEDDING_SIZE
from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.balance import (
    DEFAULT_BALANCE,
    VECTOR_SIZE,
    blended,
    checked,
    comparable,
    halves,
    likeness,
    side_by_side,
    weighed,
)
from vectors import unit_vectors

BALANCES = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))


@given(st.integers(0, 2**32 - 1), BALANCES)
def test_an_inner_product_is_the_fusion(seed: int, balance: float) -> None:
    """What a gallery computes, what an exact comparison computes and what is reported of a neighbour are one number, by the formula."""
    query, *stored = unit_vectors(9, seed)
    for one in stored:
        semantic = float(query[:EMBEDDING_SIZE].astype(np.float64) @ one[:EMBEDDING_SIZE])
        visual = float(query[EMBEDDING_SIZE:].astype(np.float64) @ one[EMBEDDING_SIZE:])
        expected = (1 - balance) * semantic + balance * visual
        assert likeness(query, one, balance) == pytest.approx((expected, semantic, visual), abs=1e-6)
        assert float(weighed(query, balance) @ one) == pytest.approx(expected, abs=1e-6)
        assert float(comparable(query, balance) @ comparable(one, balance)) == pytest.approx(expected, abs=1e-6)
        assert abs(likeness(query, one, balance).similarity) <= 1


@given(st.integers(0, 2**32 - 1), BALANCES)
def test_the_cosine_of_what_is_asked_orders_as_the_fusion(seed: int, balance: float) -> None:
    """Which is the metric that galleries have: what is stored is all of one length."""
    query, *rest = unit_vectors(60, seed)
    stored = np.stack(rest)
    assert np.linalg.norm(stored, axis=1) == pytest.approx(np.full(59, math.sqrt(2)), abs=1e-6)
    asked = weighed(query, balance)
    cosine = stored @ asked / (np.linalg.norm(stored, axis=1) * np.linalg.norm(asked))
    fused = np.array([likeness(query, one, balance).similarity for one in stored])
    assert (np.diff(fused[np.argsort(-cosine)]) < 1e-6).all()
    assert cosine * math.sqrt(2) * math.hypot(1 - balance, balance) == pytest.approx(fused, abs=1e-5)


def test_at_the_ends_one_part_alone_counts() -> None:
    query, stored = unit_vectors(2)
    e, a = halves(query)
    e_stored, a_stored = halves(stored)
    assert likeness(query, stored, 0.0).similarity == pytest.approx(float(e @ e_stored), abs=1e-6)
    assert likeness(query, stored, 1.0).similarity == pytest.approx(float(a @ a_stored), abs=1e-6)
    assert likeness(query, query, 0.3) == pytest.approx((1, 1, 1), abs=1e-12)


def test_what_a_runtime_rounds_changes_no_length() -> None:
    """Of an answer in bf16, say; and a part without length stays so."""
    outputs = {EMBEDDING.name: np.full((3, 64), 0.2, np.float32), APPEARANCE.name: np.zeros((3, 56), np.float32)}
    found = side_by_side(outputs)
    assert found.shape == (3, VECTOR_SIZE)
    assert np.linalg.norm(found[:, :64], axis=1) == pytest.approx(np.ones(3), abs=1e-6)
    assert not found[:, 64:].any()
    assert likeness(found[0], found[1], 0.25) == pytest.approx((0.75, 1, 0), abs=1e-6)


@pytest.mark.parametrize("balance", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_other_balances_are_refused(balance: float) -> None:
    vectors = unit_vectors(1)
    for call in (checked, lambda b: weighed(vectors, b), lambda b: blended(*halves(vectors), b)):
        with pytest.raises(UsageError, match=r"0 \(what was learnt from labels alone\) to 1"):
            call(balance)


def test_commands_have_the_librarys_default() -> None:
    """Said a second time there, so that `--help` loads no NumPy."""
    assert BALANCE_DEFAULT == DEFAULT_BALANCE
