"""Simulated readers: what is counted, beside a plain telling of the same."""

from __future__ import annotations

import numpy as np
import pytest

from cxr_retrieval.evaluation.feedback import READERS, ROUNDS, WAYS, measured
from cxr_retrieval.evaluation.metrics import LabelledSet, Ranking
from cxr_retrieval.retrieval.feedback import moved

K = 5


def drawn(count: int, seed: int, prefix: str) -> LabelledSet:
    """Two labels that lie apart by a little, in two sources that lie apart by more."""
    random = np.random.default_rng(seed)
    labels, sources = np.arange(count) % 2, np.arange(count) // 2 % 2
    found = random.normal(size=(count, 6))
    found[:, 0] += 1.2 * labels
    found[:, 1] += 2.0 * sources
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    names = [f"{prefix}{number}" for number in range(count)]
    patients = [f"p{number % 37}" for number in range(count)]
    return LabelledSet(names, found.astype(np.float32), [f"l{one}" for one in labels], patients, [f"s{one}" for one in sources])


@pytest.fixture(scope="module")
def sets() -> tuple[LabelledSet, LabelledSet]:
    return drawn(160, 1, "g"), drawn(30, 2, "q")


def test_a_reader_told_plainly(sets: tuple[LabelledSet, LabelledSet]) -> None:
    gallery, queries = sets
    found = measured(Ranking(gallery, queries), K)
    shown, new = np.zeros((30, ROUNDS + 1)), np.zeros((30, ROUNDS + 1))
    for number in range(30):
        others = [i for i in range(160) if gallery.patients[i] != queries.patients[number]]
        marks: dict[int, bool] = {}
        vector = queries.embeddings[number]
        for at in range(ROUNDS + 1):
            order = sorted(others, key=lambda i: -float(gallery.embeddings[i] @ vector))
            ten = [i for i in order if marks.get(i) is not False][:K]
            shown[number, at] = np.mean([gallery.labels[i] == queries.labels[number] for i in ten])
            new[number, at] = np.mean([gallery.labels[i] == queries.labels[number] for i in order if i not in marks][:K])
            marks |= {i: gallery.labels[i] == queries.labels[number] for i in ten if i not in marks}
            right, wrong = ([i for i, said in marks.items() if said is side] for side in (True, False))
            vector = moved(queries.embeddings[number], gallery.embeddings[right], gallery.embeddings[wrong])
    told = found["readers"][0]["ways"]["shipped"]
    assert [row["shown"] for row in told] == pytest.approx(shown.mean(0))
    assert [row["new"] for row in told] == pytest.approx([float(np.mean(new[:, at])) for at in range(ROUNDS + 1)])
    assert all(row["shown_ci"][0] <= row["shown"] <= row["shown_ci"][1] for row in told)
    assert all(row["recall_shown"] >= row["shown"] for row in told)


def test_marks_help_and_every_reader_and_way_is_told(sets: tuple[LabelledSet, LabelledSet]) -> None:
    found = measured(Ranking(*sets), K)
    assert [(reader["looks_for"], reader["errs"]) for reader in found["readers"]] == [
        ("label", 0.0),
        ("label", 0.1),
        ("label and source", 0.0),
        ("label and source", 0.1),
    ]
    for reader in found["readers"]:
        ways = reader["ways"]
        assert set(ways) == set(WAYS)
        assert all(len(rounds) == ROUNDS + 1 for rounds in ways.values())
        assert len({rounds[0]["shown"] for rounds in ways.values()}) == 1, "before any mark they are one"
    plain, erring = found["readers"][:2]
    assert plain["ways"]["shipped"][2]["new"] > plain["ways"]["unmoved"][2]["new"] + 0.05
    assert plain["ways"]["shipped"][1]["shown"] > erring["ways"]["shipped"][1]["shown"]
    assert found == measured(Ranking(*sets), K), "nothing is left to chance"


def test_queries_with_too_few_cases_are_left_out() -> None:
    gallery, queries = drawn(14, 1, "g"), drawn(4, 2, "q")
    found = measured(Ranking(gallery, queries), K)
    assert found["queries"] == {"n": 0, "patients": 0, "left_out": 4}
    assert [reader["ways"] for reader in found["readers"]] == [{}] * len(READERS)
    assert found["grid"] == {}
