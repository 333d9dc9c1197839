"""A hospital's profile: that the labels come in the shares that were told, what is refused, what is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.retrieval.site import (
    LEAST_FILMS,
    UNSTEADY,
    Adapted,
    adapted,
    deviation_of,
    fitted,
    normalised,
    probabilities,
    read_sites,
    sites_as_text,
)

LABELS = ("control", "covid19", "flu")
FILMS = 200


def evidence(random: np.random.Generator, sick: int, films: int = FILMS) -> tuple[list[dict[str, float]], list[str]]:
    """Films that look, all of them, more like COVID-19 than like anything else; those that have it, of which there are so many, a little more."""
    truth = ["covid19"] * sick + ["control"] * (films - sick)
    usual = {"control": 0.4, "covid19": 0.8, "flu": 0.3}
    seen = [{label: usual[label] + 0.05 * (label == true) + 0.01 * float(random.normal()) for label in LABELS} for true in truth]
    return seen, truth


def learnt(shares: dict[str, float], sick: int = 50, *, assumed: bool = False, films: int = FILMS) -> tuple[Adapted, float]:
    seen, truth = evidence(np.random.default_rng(0), sick, films)
    found = adapted("st-mary", seen, ["covid19"] * films, shares, model_version="v", gallery=1000, about={"made": "today"}, assumed=assumed)
    return found, float(np.mean([found.site.vote(one).label == true for one, true in zip(seen, truth, strict=True)]))


def test_what_is_usual_in_a_hospital_no_longer_votes() -> None:
    found, right = learnt({"control": 150, "covid19": 50})
    assert right > 0.95, "the nearest cases' vote, COVID-19 for every film, is right of a quarter"
    assert found.before == {"covid19": FILMS}
    assert found.after == pytest.approx({"control": 150, "covid19": 50}, abs=8)
    assert found.changed == found.after["control"]
    assert found.site.shares == {"control": 0.75, "covid19": 0.25}
    vote = found.site.vote({"control": 0.5, "covid19": 0.8, "flu": 0.99})
    assert (vote.label, set(vote.scores)) == ("control", {"control", "covid19"}), "a label that it never sees is not voted for"
    assert sum(vote.scores.values()) == pytest.approx(1)
    assert next(iter(vote.scores)) == vote.label
    assert vote.confidence == max(vote.scores.values())


def test_wrong_shares_are_wrong_answers_and_said_to_matter() -> None:
    _, right = learnt({"control": 1, "covid19": 9})
    assert right < 0.9
    random = np.random.default_rng(1)
    alike = [{label: float(random.normal()) for label in LABELS[:2]} for _ in range(FILMS)]
    of_nothing = adapted("st-mary", alike, ["control"] * FILMS, {"control": 1, "covid19": 1}, model_version="v", gallery=1, about={})
    apart, _ = learnt({"control": 1, "covid19": 1}, sick=100)
    assert of_nothing.unsteady > apart.unsteady, "where films are not apart, the shares decide"


@pytest.mark.parametrize(
    ("shares", "sick", "assumed", "words"),
    [
        ({"control": 1, "covid19": 1}, 100, True, "nobody said"),
        ({"control": 0.98, "covid19": 0.02}, 4, False, "of covid19 the films can hold a few only"),
    ],
)
def test_what_makes_a_profile_unsafe_is_said(shares: dict[str, float], sick: int, assumed: bool, words: str) -> None:
    found, _ = learnt(shares, sick, assumed=assumed)
    assert words in " ".join(found.warnings)
    silent, _ = learnt({"control": 1, "covid19": 1}, 100)
    assert words not in " ".join(silent.warnings)


def test_shares_that_change_the_answers_are_warned_of() -> None:
    random = np.random.default_rng(2)
    alike = [{"control": float(random.normal()), "covid19": float(random.normal())} for _ in range(FILMS)]
    found = adapted("st-mary", alike, ["control"] * FILMS, {"control": 1, "covid19": 1}, model_version="v", gallery=1, about={})
    assert any("be sure of them" in warning for warning in found.warnings)
    assert found.unsteady > UNSTEADY


def test_too_few_films_are_refused() -> None:
    with pytest.raises(UsageError, match=rf"too few films of st-mary.*{LEAST_FILMS} usable ones.*got {LEAST_FILMS - 1}"):
        learnt({"control": 1, "covid19": 1}, 20, films=LEAST_FILMS - 1)


@pytest.mark.parametrize("shares", [{}, {"control": 1.0}, {"control": 1.0, "covid19": 0.0}, {"control": 1.0, "covid19": -1.0}])
def test_shares_that_cannot_be_meant_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="two labels or more"):
        normalised(shares)
    with pytest.raises(UsageError, match="cannot be meant"):
        normalised({"control": 1.0, "covid19": float("inf")})


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.floats(0.02, 1), min_size=2, max_size=5), st.floats(1e-3, 10))
def test_offsets_give_every_label_its_share(seed: int, told: list[float], scale: float) -> None:
    """Whatever the evidence; an offset more for all films of one label changes nothing."""
    shares = np.array(told) / sum(told)
    seen = scale * np.random.default_rng(seed).normal(size=(120, len(told)))
    deviation = deviation_of(seen)
    offsets = fitted(seen, shares, deviation)
    assert probabilities(seen, offsets, deviation).mean(axis=0) == pytest.approx(shares, abs=1e-4)
    moved = seen + np.arange(len(told))
    assert deviation_of(moved) == pytest.approx(deviation)
    again = fitted(moved, shares, deviation)
    assert probabilities(moved, again, deviation) == pytest.approx(probabilities(seen, offsets, deviation), abs=1e-3)


def test_films_that_are_all_alike_get_the_shares_themselves() -> None:
    seen = np.tile([0.4, 0.8], (60, 1))
    offsets = fitted(seen, np.array([0.3, 0.7]), deviation_of(seen))
    assert probabilities(seen, offsets, deviation_of(seen))[0] == pytest.approx([0.3, 0.7], abs=1e-4)


def test_profiles_are_kept_as_text_and_come_back() -> None:
    site = learnt({"control": 3, "covid19": 1})[0].site
    other = replace(site, name='of "quotes" und Umlaute ä')
    text = sites_as_text({site.name: site, other.name: other})
    assert read_sites(text) == {site.name: site, other.name: other}
    assert sites_as_text(read_sites(text)) == text
    assert (sites_as_text({}), read_sites("")) == ("", {})


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"layout": 2, "sites": {}}', '{"layout": 1, "sites": {"a": {"model_version": "v"}}}', '{"layout": 1, "sites": []}']
)
def test_damaged_profiles_are_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(SetupError, match=r"cannot be read.*`cxr adapt` each site again"):
        read_sites(text)


def test_a_gallery_that_has_grown_is_doubted() -> None:
    site = learnt({"control": 1, "covid19": 1})[0].site
    assert site.doubt(1000) is None
    assert site.doubt(1099) is None
    assert "held 1000 cases, not 1200" in (site.doubt(1200) or "")
    assert site.doubt(800) is not None


def test_what_is_told_is_json() -> None:
    found, _ = learnt({"control": 1, "covid19": 1}, assumed=True)
    told = json.loads(json.dumps(found.as_json()))
    assert {"name", "films", "shares", "offsets", "before", "after", "changed", "unsteady", "warnings"} <= told.keys()
