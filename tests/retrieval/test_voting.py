from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxr_retrieval.retrieval.voting import EPSILON, neighbour_weight, weighted_vote

similarity = st.floats(-1, 1, allow_nan=False)
neighbours = st.lists(st.tuples(st.sampled_from("abc"), similarity), min_size=1, max_size=30)


def test_by_hand() -> None:
    """Two far neighbours against one near: w = 1/(0.5 + ε) twice, 1/(0.1 + ε) once."""
    vote = weighted_vote([("far", 0.5), ("far", 0.5), ("near", 0.9)])
    near, far = 1 / (0.1 + EPSILON), 2 / (0.5 + EPSILON)
    assert vote.label == "near"
    assert vote.confidence == pytest.approx(near / (near + far))
    assert vote.scores == pytest.approx({"near": near / (near + far), "far": far / (near + far)})


@given(st.floats(-1, 1 - 2e-6, allow_nan=False), st.floats(1e-6, 2))
def test_weight_grows_as_distance_shrinks(low: float, closer: float) -> None:
    assert neighbour_weight(low) < neighbour_weight(min(1.0, low + closer))


@given(neighbours)
def test_scores_are_shares(found: list[tuple[str, float]]) -> None:
    vote = weighted_vote(found)
    assert sum(vote.scores.values()) == pytest.approx(1)
    assert set(vote.scores) == {label for label, _ in found}
    assert vote.confidence == vote.scores[vote.label] == max(vote.scores.values())


@given(neighbours, st.randoms(use_true_random=False))
def test_order_of_neighbours_does_not_matter(found: list[tuple[str, float]], random: object) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert weighted_vote(shuffled) == weighted_vote(found)


def test_an_identical_picture_outweighs_nine_strangers() -> None:
    assert weighted_vote([("same", 1.0), *[("other", 0.95)] * 9]).label == "same"


def test_exact_tie_goes_to_the_closer_then_the_first_by_name() -> None:
    assert weighted_vote([("b", 0.5), ("a", 0.5)]).label == "a"


def test_similarity_above_one_by_rounding_is_no_error() -> None:
    assert neighbour_weight(1.0000001) == neighbour_weight(1.0)


def test_nobody_cannot_vote() -> None:
    with pytest.raises(ValueError, match="at least one neighbour"):
        weighted_vote([])


def test_labels_of_several_findings_vote_for_each() -> None:
    vote = weighted_vote([("effusion|nodule", 0.5), (" nodule |effusion", 0.5), ("effusion", 0.5), ("no finding", 0.5)])
    assert vote.findings == pytest.approx({"effusion": 0.75, "nodule": 0.5, "no finding": 0.25})
    assert list(vote.findings) == ["effusion", "nodule", "no finding"]
    assert weighted_vote([("effusion", 0.5), ("no finding", 0.5)]).findings == {}, "nothing that the scores do not say"
