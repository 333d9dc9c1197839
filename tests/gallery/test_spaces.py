"""Spaces: what is stored of a film, what is asked with one, and that similarities are what Milvus ranks by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cxr_retrieval.contract import FINDING_FEATURES, IMAGE_VECTOR, SUBSPACE_SIZE, TEXT_VECTOR
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, PARTS
from cxr_retrieval.gallery.spaces import FILM, FINDINGS, REPORTS, SPACES, Space
from cxr_retrieval.settings import Match, SpaceName

Outputs = dict[str, NDArray[Any]]


def unit(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    values = random.normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def outputs(random: np.random.Generator, count: int, *, text: bool = True) -> Outputs:
    specs = (*PARTS, FINDING_FEATURES, IMAGE_VECTOR, *((TEXT_VECTOR,) if text else ()))
    return {spec.name: unit(random, count, *spec.shape) for spec in specs}


def test_every_name_has_its_space() -> None:
    assert set(SPACES) == set(SpaceName)
    assert len({space.size for space in SPACES.values()}) == 3  # an exported gallery is known by it


@given(st.integers(0, 1000), st.sampled_from((FILM, FINDINGS, REPORTS)), st.booleans())
def test_what_milvus_ranks_by_is_the_similarity(seed: int, space: Space, text: bool) -> None:
    """All stored vectors are equally long, so a cosine ranks as the inner product; with another film of the same kind it is that of `comparable`."""
    random = np.random.default_rng(seed)
    stored, asked = space.vector(outputs(random, 7, text=text)), space.question(outputs(random, 1))
    assert stored.shape == (7, space.size)
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), space.length, rtol=1e-5)
    product = (space.asked(asked, DEFAULT_BALANCE) @ stored.T)[0]
    similarities = [space.likeness(asked[0], one, DEFAULT_BALANCE).similarity for one in stored]
    np.testing.assert_allclose(product, similarities, atol=1e-5)
    again = space.asked(space.as_question(stored), DEFAULT_BALANCE) @ stored.T
    alike = space.comparable(stored, DEFAULT_BALANCE)
    np.testing.assert_allclose(again, alike @ alike.T, atol=1e-5)
    np.testing.assert_allclose(np.diag(again), 1, atol=1e-5)


def test_reports_are_compared_where_there_are_some() -> None:
    random = np.random.default_rng(3)
    told, untold = outputs(random, 5), outputs(random, 4, text=False)
    stored = np.concatenate([REPORTS.vector(told), REPORTS.vector(untold)])
    question: Outputs = {IMAGE_VECTOR.name: unit(random, SUBSPACE_SIZE)}
    by_report = stored @ REPORTS.question(question, Match.report)
    np.testing.assert_allclose(by_report[:5], told[TEXT_VECTOR.name] @ question[IMAGE_VECTOR.name], atol=1e-6)
    assert by_report[5:] == pytest.approx(-1)  # after every case that has one
    by_film = stored @ REPORTS.question(question, Match.film)
    images = np.concatenate([told[IMAGE_VECTOR.name], untold[IMAGE_VECTOR.name]])
    np.testing.assert_allclose(by_film, images @ question[IMAGE_VECTOR.name], atol=1e-6)


def test_findings_of_any_length_are_brought_to_one() -> None:
    found = FINDINGS.vector({FINDING_FEATURES.name: np.full((2, 1024), 3.0, np.float32)})
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    assert np.isfinite(FINDINGS.vector({FINDING_FEATURES.name: np.zeros(1024, np.float32)})).all()
