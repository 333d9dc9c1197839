from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from cxr_retrieval.errors import InputError
from cxr_retrieval.evaluation import LabelledSet, average_precision_at_r, evaluate, rank


def random_set(n: int, seed: int, patients: list[str] | None = None, prefix: str = "g", spread: float = 1.0) -> LabelledSet:
    random = np.random.default_rng(seed)
    labels = [("control", "covid19", "non_covid_pneumonia")[i % 3] for i in range(n)]
    centres = np.random.default_rng(99).normal(size=(3, 7))
    vectors = np.array([centres[i % 3] for i in range(n)]) + spread * random.normal(size=(n, 7))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"{prefix}{i}" for i in range(n)]
    return LabelledSet(ids, vectors.astype(np.float32), labels, patients or ids, [("north", "south")[i % 2] for i in range(n)])


def test_against_pytorch_metric_learning() -> None:
    """mAP@R and precision@1 (which is recall@1) against the authors' own implementation."""
    gallery, queries = random_set(60, 1), random_set(31, 2, prefix="q")
    ours = evaluate(gallery, queries, k=10, model_version="v")["overall"]
    index = {label: i for i, label in enumerate(sorted(set(gallery.labels)))}
    theirs = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count", device=torch.device("cpu")
    ).get_accuracy(
        torch.from_numpy(queries.embeddings),
        torch.tensor([index[label] for label in queries.labels]),
        torch.from_numpy(gallery.embeddings),
        torch.tensor([index[label] for label in gallery.labels]),
    )
    assert ours["recall_at"]["1"] == pytest.approx(theirs["precision_at_1"])
    assert ours["map_at_r"] == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)


def test_published_keys() -> None:
    result = evaluate(random_set(30, 1), random_set(12, 2, prefix="q"), k=5, model_version="v1")
    assert set(result) == {
        "model_version",
        "k",
        "gallery",
        "queries",
        "overall",
        "per_class",
        "per_source",
        "within_source",
        "cross_source",
        "nearest_from_own_source",
        "calibration",
    }
    assert result["gallery"] == {"n": 30, "patients": 30}
    summary = {
        "n",
        "accuracy",
        "accuracy_ci",
        "balanced_accuracy",
        "balanced_accuracy_ci",
        "map_at_r",
        "map_at_r_ci",
        "recall_at",
        "recall_at_ci",
        "precision_at",
        "precision_at_ci",
    }
    assert set(result["overall"]) == summary
    assert set(result["overall"]["recall_at"]) == {"1", "2", "4", "10"}
    assert set(result["per_source"]) == {"north", "south"}
    assert set(result["per_source"]["north"]) == summary | {"per_class"}
    assert set(result["per_class"]["control"]) == {"n", "sensitivity", "ppv", "f1", "recall_at"}


def test_images_of_the_same_patient_never_count() -> None:
    gallery = random_set(30, 1)
    same = LabelledSet(["q"], gallery.embeddings[:1], ["covid19"], [gallery.patients[0]], ["north"])
    order, similarity = rank(gallery, 0, same)
    assert 0 not in order
    assert len(order) == 29
    assert (np.diff(similarity) <= 0).all()
    other = LabelledSet(["q"], gallery.embeddings[:1], ["covid19"], ["someone else"], ["north"])
    assert rank(gallery, 0, other)[0][0] == 0, "another patient's identical image is the nearest"


def test_perfect_and_hopeless_embeddings() -> None:
    perfect = evaluate(random_set(30, 1, spread=0), random_set(9, 2, prefix="q", spread=0), k=5, model_version="v")
    assert perfect["overall"]["accuracy"] == perfect["overall"]["map_at_r"] == perfect["overall"]["balanced_accuracy"] == 1.0
    assert perfect["overall"]["accuracy_ci"] == [1.0, 1.0]
    gallery = random_set(30, 1, spread=0)
    turned = LabelledSet(gallery.image_ids, gallery.embeddings, [*gallery.labels[1:], gallery.labels[0]], gallery.patients, gallery.sources)
    assert evaluate(turned, random_set(9, 2, prefix="q", spread=0), k=5, model_version="v")["overall"]["accuracy"] == 0.0


def test_balanced_accuracy_weighs_classes_equally() -> None:
    gallery = random_set(30, 1, spread=0)
    good = random_set(27, 2, prefix="q", spread=0)
    wrong = ["covid19" if label == "control" else label for label in good.labels][:3]
    queries = LabelledSet(good.image_ids, good.embeddings, [*wrong, *good.labels[3:]], good.patients, good.sources)
    overall = evaluate(gallery, queries, k=5, model_version="v")["overall"]
    assert overall["accuracy"] == pytest.approx(26 / 27)
    assert overall["balanced_accuracy"] == pytest.approx((1 + 9 / 10 + 1) / 3)


def test_interval_is_over_patients() -> None:
    """Ten images of one patient carry no more certainty than one."""
    gallery = random_set(30, 1)
    many = random_set(40, 5, prefix="q", spread=2.0)
    few = LabelledSet(many.image_ids, many.embeddings, many.labels, [f"p{i // 10}" for i in range(40)], many.sources)
    own, grouped = (evaluate(gallery, queries, k=5, model_version="v")["overall"]["accuracy_ci"] for queries in (many, few))
    assert 0 <= own[0] < own[1] <= 1
    assert own != grouped


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_average_precision_bounds(flags: list[bool]) -> None:
    value = average_precision_at_r(np.array(flags))
    assert 0 <= value <= 1
    if any(flags):
        assert (value == 1) == all(flags[: sum(flags)])


def test_average_precision_by_hand() -> None:
    """R = 3; hits at ranks 1 and 3: (1/1 + 2/3) / 3."""
    assert average_precision_at_r(np.array([True, False, True, False, True])) == pytest.approx((1 + 2 / 3) / 3)


def test_empty_sets_and_lonely_patients_are_refused() -> None:
    gallery = random_set(3, 1)
    empty = LabelledSet([], np.zeros((0, 7), np.float32), [], [], [])
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(gallery, empty, k=1, model_version="v")
    lonely = LabelledSet(["g"], gallery.embeddings[:1], ["covid19"], ["p"], ["north"])
    with pytest.raises(InputError, match="no gallery image of another patient"):
        evaluate(lonely, lonely, k=1, model_version="v")


def hand_made(vectors: Sequence[Sequence[float]], labels: list[str], sources: list[str], prefix: str) -> LabelledSet:
    ids = [f"{prefix}{i}" for i in range(len(labels))]
    unit = np.array(vectors, np.float32)
    return LabelledSet(ids, unit / np.linalg.norm(unit, axis=1, keepdims=True), labels, ids, sources)


def test_within_and_across_sources() -> None:
    """North lies along x whatever its label, south along y: sources can be told apart, labels only within them."""
    gallery = hand_made(
        [[9, 0, 1], [9, 0, -1], [0, 9, 1], [0, 9, -1]],
        ["control", "covid19", "covid19", "control"],
        ["north", "north", "south", "south"],
        "g",
    )
    queries = hand_made([[9, 0, 2], [9, 0, -2]], ["control", "covid19"], ["north", "north"], "q")
    result = evaluate(gallery, queries, k=1, model_version="v")
    assert result["within_source"]["overall"]["accuracy"] == 1.0
    assert result["cross_source"]["overall"]["accuracy"] == 0.0
    assert result["cross_source"]["per_source"]["north"]["n"] == 2
    assert result["nearest_from_own_source"] == {"n": 2, "share": 1.0, "share_ci": [1.0, 1.0]}


def test_foregone_conclusions_are_left_out() -> None:
    """A gallery of one label only, or without the query's label, measures nothing."""
    gallery = hand_made([[1, 0], [0, 1], [1, 1]], ["control", "covid19", "control"], ["north", "north", "south"], "g")
    queries = hand_made([[1, 0], [0, 1]], ["control", "covid19"], ["north", "north"], "q")
    result = evaluate(gallery, queries, k=1, model_version="v")
    assert result["within_source"]["n"] == 2
    assert result["cross_source"] == {"n": 0, "left_out": 2}
    assert result["nearest_from_own_source"]["n"] == 1, "covid19 comes from one source alone: there is no choice"


def test_precision_counts_every_neighbour() -> None:
    gallery = hand_made([[9, 1], [9, 2], [9, 3], [9, 4]], ["control", "covid19", "control", "control"], ["n"] * 4, "g")
    overall = evaluate(gallery, hand_made([[9, 0]], ["control"], ["n"], "q"), k=1, model_version="v")["overall"]
    assert overall["precision_at"] == {"1": 1.0, "2": 0.5, "4": 0.75, "10": 0.75}


def test_calibration_and_selection() -> None:
    """Nine certain and right votes, one split and wrong one: the error is the split's alone, and setting it aside mends accuracy."""
    gallery = hand_made([[1, 0], [1, 0.001], [0, 1], [0, 1.0]], ["control", "control", "covid19", "control"], ["n"] * 4, "g")
    queries = hand_made([[1, 0]] * 9 + [[0, 1]], ["control"] * 9 + ["non_covid_pneumonia"], ["n"] * 10, "q")
    calibration = evaluate(gallery, queries, k=2, model_version="v")["calibration"]
    filled = {entry["from"]: entry for entry in calibration["bins"] if entry["n"]}
    assert filled[0.9]["n"] == 9
    assert filled[0.9]["accuracy"] == filled[0.9]["confidence"] == 1.0
    assert filled[0.5] == {"from": 0.5, "to": 0.6, "n": 1, "confidence": pytest.approx(0.5), "accuracy": 0.0}
    assert calibration["ece"] == pytest.approx(0.05)
    assert calibration["selective"]["n"] == 9
    assert calibration["selective"]["accuracy"] == 1.0
