"""Two versions compared: against `evaluate` as the oracle, and where the answer is known beforehand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cxr_retrieval.errors import InputError
from cxr_retrieval.evaluation.metrics import LabelledSet, evaluate
from cxr_retrieval.evaluation.versions import compare

LABELS = ("control", "covid19", "non_covid_pneumonia")


def unit(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def images(n: int, seed: int, patients: int = 13) -> LabelledSet:
    random = np.random.default_rng(seed)
    embeddings = unit(random.normal(size=(n, 7)))
    chosen = [LABELS[i] for i in random.integers(0, 3, n)]
    return LabelledSet([f"i{i}" for i in range(n)], embeddings, chosen, [f"p{i % patients}" for i in range(n)], ["north"] * n)


def part(of: LabelledSet, n: int) -> LabelledSet:
    return LabelledSet(of.image_ids[:n], of.embeddings[:n], of.labels[:n], of.patients[:n], of.sources[:n])


@given(st.integers(0, 10_000), st.integers(1, 12))
def test_a_version_beside_itself_keeps_everything_and_scores_as_evaluate_says(seed: int, k: int) -> None:
    gallery = images(41, seed)
    queries = part(gallery, 11)
    found = compare((gallery, queries), (gallery, queries), k=k)
    assert found["votes"] == {"changed": 0, "become_right": 0, "were_right": 0}
    assert found["kept"] == {"neighbours": 1, "nearest": 1}
    assert found["former"] == found["latter"]
    told = evaluate(gallery, queries, k=k, model_version="v")["overall"]
    assert found["former"]["accuracy"] == pytest.approx(told["accuracy"])
    assert found["former"]["recall_at"] == pytest.approx(told["recall_at"])


@given(st.integers(0, 10_000))
def test_two_versions_each_score_as_evaluate_says_of_them(seed: int) -> None:
    former, other = images(41, seed), images(41, seed + 1)
    latter = replace(former, embeddings=other.embeddings)
    sets = [(one, part(one, 17)) for one in (former, latter)]
    found = compare(sets[0], sets[1], k=5)
    for side, (gallery, queries) in zip(("former", "latter"), sets, strict=True):
        told = evaluate(gallery, queries, k=5, model_version="v")["overall"]
        assert found[side]["accuracy"] == pytest.approx(told["accuracy"])
        assert found[side]["recall_at"] == pytest.approx(told["recall_at"])
    votes = found["votes"]
    difference = 17 * (found["latter"]["accuracy"] - found["former"]["accuracy"])
    assert votes["become_right"] - votes["were_right"] == pytest.approx(difference)
    assert votes["become_right"] + votes["were_right"] <= votes["changed"] <= 17
    assert 0 <= found["kept"]["neighbours"] <= 1


def test_a_turned_space_is_the_same_space() -> None:
    gallery = images(60, 5)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(7, 7)))[0].astype(np.float32)
    turned = replace(gallery, embeddings=unit((gallery.embeddings @ turn).astype(np.float64)))
    assert compare((gallery, gallery), (turned, turned), k=4)["kept"] == {"neighbours": 1, "nearest": 1}


def test_nothing_to_compare() -> None:
    gallery = images(5, 0)
    with pytest.raises(InputError, match="nothing to compare"):
        compare((gallery, part(gallery, 0)), (gallery, part(gallery, 0)), k=1)
    one_patient = images(5, 0, patients=1)
    with pytest.raises(InputError, match="no gallery image of another patient"):
        compare((one_patient, one_patient), (one_patient, one_patient), k=1)
