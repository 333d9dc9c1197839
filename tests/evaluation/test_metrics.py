from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.errors import InputError
from cxr_retrieval.evaluation.intervals import RESAMPLES
from cxr_retrieval.evaluation.metrics import (
    Gallery,
    LabelledSet,
    Ranking,
    area,
    average_precision_at_r,
    balanced_interval,
    comparable_patients,
    evaluate,
    rank,
)
from cxr_retrieval.radiograph.letterbox import pixel_digest


def random_set(n: int, seed: int, patients: list[str] | None = None, prefix: str = "g", spread: float = 1.0) -> LabelledSet:
    random = np.random.default_rng(seed)
    labels = [("control", "covid19", "non_covid_pneumonia")[i % 3] for i in range(n)]
    centres = np.random.default_rng(99).normal(size=(3, 7))
    vectors = np.array([centres[i % 3] for i in range(n)]) + spread * random.normal(size=(n, 7))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [f"{prefix}{i}" for i in range(n)]
    return LabelledSet(ids, vectors.astype(np.float32), labels, patients or ids, [("north", "south")[i % 2] for i in range(n)])


PML = """
import json, sys, torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
measure = AccuracyCalculator(include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count", device=torch.device("cpu"))
json.dump(measure.get_accuracy(*map(torch.tensor, json.load(sys.stdin))), sys.stdout)
"""
"""In a process of its own: it changes faiss for all who use that, and Milvus Lite, which other tests run in this one, then cannot search."""


def test_against_pytorch_metric_learning() -> None:
    """mAP@R and precision@1 (which is recall@1) against the authors' own implementation."""
    gallery, queries = random_set(60, 1), random_set(31, 2, prefix="q")
    ours = evaluate(gallery, queries, k=10, model_version="v")["overall"]
    index = {label: i for i, label in enumerate(sorted(set(gallery.labels)))}
    both = [part for one in (queries, gallery) for part in (one.embeddings.tolist(), [index[label] for label in one.labels])]
    asked = subprocess.run([sys.executable, "-c", PML], input=json.dumps(both), capture_output=True, text=True, timeout=120, check=False)
    assert asked.returncode == 0, asked.stderr
    theirs = json.loads(asked.stdout)
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
        "warnings",
    }
    assert result["warnings"] == []
    assert result["gallery"] == {"n": 30, "patients": 30}
    summary = {
        "n",
        "accuracy",
        "accuracy_ci",
        "balanced_accuracy",
        "balanced_accuracy_ci",
        "balanced_accuracy_redrawn",
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
    perfect = evaluate(random_set(30, 1, spread=0), random_set(12, 2, prefix="q", spread=0), k=5, model_version="v")
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
    """Ten copies of each patient's one image carry no more certainty than the one."""
    gallery = random_set(60, 1)
    one = random_set(24, 5, prefix="q", spread=2.0)
    copies = LabelledSet(
        [f"{name}-{i}" for i in range(10) for name in one.image_ids],
        np.tile(one.embeddings, (10, 1)),
        [*one.labels] * 10,
        [*one.patients] * 10,
        [*one.sources] * 10,
    )
    strangers = replace(copies, patients=copies.image_ids)
    single, grouped, apart = (evaluate(gallery, q, k=5, model_version="v")["overall"] for q in (one, copies, strangers))
    for name in ("accuracy_ci", "balanced_accuracy_ci", "map_at_r_ci"):
        assert grouped[name] == pytest.approx(single[name])
        assert apart[name][1] - apart[name][0] < 0.6 * (grouped[name][1] - grouped[name][0]), name


def test_no_interval_of_too_few_patients() -> None:
    """Nine patients with a hundred films are nine; the keys stay."""
    gallery = random_set(30, 1)
    queries = random_set(99, 2, patients=[f"p{i % 9}" for i in range(99)], prefix="q")
    result = evaluate(gallery, queries, k=5, model_version="v")
    overall = result["overall"]
    nothing = {"1": None, "2": None, "4": None, "10": None}
    assert [overall[f"{name}_ci"] for name in ("accuracy", "balanced_accuracy", "map_at_r")] == [None] * 3
    assert overall["recall_at_ci"] == overall["precision_at_ci"] == nothing
    assert overall["balanced_accuracy_redrawn"] is None
    assert result["calibration"]["selective"]["accuracy_ci"] is None
    assert result["nearest_from_own_source"]["share_ci"] is None
    ten = evaluate(gallery, replace(queries, patients=[f"p{i % 10}" for i in range(99)]), k=5, model_version="v")["overall"]
    assert ten["accuracy_ci"] is not None
    assert ten["balanced_accuracy_ci"] is not None


def test_every_resample_of_balanced_accuracy_holds_every_class() -> None:
    """98 patients of one class, half of them right, two of another, always wrong: never more than half of the resample's own share.

    A resample without the rare class used to score the frequent one alone, twice as much, and the interval reached there.
    """
    truth = np.array([0] * 98 + [1] * 2)
    correct = np.array([1.0, 0.0] * 49 + [0.0] * 2)
    patients = np.arange(100)
    found, redrawn = balanced_interval(correct, truth, patients)
    assert found is not None
    assert redrawn is not None
    assert found[1] < 0.31, "half of 0.5 and its uncertainty"
    assert 0.1 * RESAMPLES < redrawn < 0.2 * RESAMPLES, "0.98¹⁰⁰ = 0.13 of the resamples lack the rare class"
    assert balanced_interval(correct[:99], truth[:99], patients[:99]) == (None, None), "one patient of a class"
    many = np.repeat(np.arange(60), 2)
    assert balanced_interval(np.ones(120), many, np.arange(120)) == (None, None), "hardly any resample holds sixty classes"


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_average_precision_bounds(flags: list[bool]) -> None:
    value = average_precision_at_r(np.array(flags))
    assert 0 <= value <= 1
    assert (value > 0) == any(flags[: sum(flags)])
    assert (value == 1) == (any(flags) and all(flags[: sum(flags)]))


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
    told = {"n": 1, "share": 1.0, "by_chance": 0.5}
    of = [{"source": "north", "label": label, **told} for label in ("control", "covid19")]
    assert result["nearest_from_own_source"] == {"n": 2, "share": 1.0, "share_ci": None, "by_chance": 0.5, "of": of}


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


def naive_order(gallery: LabelledSet, query: int, queries: LabelledSet, compared: Gallery) -> tuple[list[int], list[float]]:
    """What `Ranking` promises, image by image and string by string."""
    similarity: list[float] = (gallery.embeddings @ queries.embeddings[query]).tolist()
    own = {source == queries.sources[query] for source in gallery.sources}
    admitted = {Gallery.everything: own, Gallery.own_source: {True}, Gallery.other_sources: {False}}[compared]
    kept = [
        i
        for i in range(len(similarity))
        if gallery.patients[i] != queries.patients[query] and (gallery.sources[i] == queries.sources[query]) in admitted
    ]
    kept.sort(key=lambda i: (-similarity[i], gallery.image_ids[i]))
    return kept, [similarity[i] for i in kept]


@pytest.mark.parametrize(("images", "asked", "looked_at"), [(211, 31, 31), (20_000, 100, 5)])
def test_ranking_is_what_a_loop_over_strings_gives(images: int, asked: int, looked_at: int) -> None:
    """To the bit, ties (copies of one vector) by name, and names in no order."""
    random = np.random.default_rng(3)
    gallery = random_set(images, 1, patients=[f"p{i % 97}" for i in range(images)])
    vectors = gallery.embeddings.copy()
    vectors[:: images // 40] = vectors[0]
    gallery = replace(gallery, embeddings=vectors, image_ids=[f"g{i}" for i in random.permutation(images)])
    queries = random_set(asked, 2, patients=[f"p{i}" for i in range(asked)], prefix="q")
    ranking = Ranking(gallery, queries)
    for query in range(looked_at):
        for compared in Gallery:
            order, similarity = ranking.of(query, compared)
            assert (order.tolist(), similarity.tolist()) == naive_order(gallery, query, queries, compared)
    result = evaluate(gallery, queries, k=10, model_version="v")
    assert result["overall"]["n"] == asked
    first = [naive_order(gallery, query, queries, Gallery.everything)[0][0] for query in range(looked_at)]
    hits = [gallery.labels[nearest] == queries.labels[query] for query, nearest in enumerate(first)]
    part = evaluate(gallery, taken(queries, looked_at), k=10, model_version="v")["overall"]
    assert part["recall_at"]["1"] == pytest.approx(np.mean(hits))


def taken(vectors: LabelledSet, n: int) -> LabelledSet:
    return LabelledSet(
        vectors.image_ids[:n], vectors.embeddings[:n], vectors.labels[:n], vectors.patients[:n], vectors.sources[:n], vectors.pixels[:n]
    )


def test_the_same_picture_never_counts_whatever_its_name() -> None:
    """One manifest has `source`, the other has not: the patients' keys differ, the picture is the same."""
    square = np.arange(256 * 256, dtype=np.uint32).astype(np.uint8).reshape(256, 256)
    other = square.copy()
    other[-1, -1] ^= 1
    assert pixel_digest(square) == pixel_digest(square.copy()) != pixel_digest(other)
    vectors = random_set(4, 1).embeddings
    gallery = LabelledSet(
        ["a", "b", "c"],
        vectors[[0, 1, 2]],
        ["control", "control", "covid19"],
        ["north/1", "north/2", "north/3"],
        ["north"] * 3,
        [pixel_digest(square), "", pixel_digest(other)],
    )
    queries = LabelledSet(["z", "y"], vectors[[0, 1]], ["control"] * 2, ["/1", "/2"], ["", ""], [pixel_digest(square), ""])
    assert 0 not in rank(gallery, 0, queries)[0]
    assert sorted(rank(gallery, 0, queries)[0]) == [1, 2]
    assert sorted(rank(gallery, 1, queries)[0]) == [0, 1, 2], "unknown equals nothing, unknown least of all"
    assert sorted(rank(replace(gallery, pixels=()), 0, queries)[0]) == [0, 1, 2], "nothing known, nothing left out"


def test_as_many_of_each() -> None:
    good = random_set(3, 1)
    with pytest.raises(ValueError, match="as many of each"):
        replace(good, pixels=["one"])
    with pytest.raises(ValueError, match="as many of each"):
        replace(good, labels=["control"])


def row(image_id: str, patient_id: str | None, source: str | None) -> ManifestRow:
    return ManifestRow(Path(), image_id, Path(image_id), "control", patient_id, source, None, {})


def test_patients_compare_where_only_one_manifest_has_a_source() -> None:
    gallery = [row("a", "1", "north"), row("b", "1", "south"), row("c", "2", "north"), row("e", None, "north")]
    queries = [row("a", "1", None), row("d", "3", None), row("e", None, None)]
    of_gallery, of_queries, sentences = comparable_patients(gallery, queries)
    assert of_queries[0] == of_gallery[0] == of_gallery[1], "patient 1 of any source"
    assert of_queries[2] == of_gallery[3], "no patient_id: at least the image_id"
    assert len({*of_gallery, *of_queries}) == 4
    assert sentences == [
        "the queries' manifest has no column `source`, or nothing in it: patients are compared by patient_id alone, whatever their source",
        "1 of 4 rows of the gallery's manifest have no `patient_id`: for those, films of one patient are not recognised",
        "1 of 3 rows of the queries' manifest have no `patient_id`: for those, films of one patient are not recognised",
    ]


def test_a_row_without_source_may_be_of_any() -> None:
    gallery = [row("a", "1", "north"), row("b", "1", "south"), row("c", "2", "north"), row("d", "2", "south")]
    queries = [row("e", "1", None), row("f", "2", "north")]
    of_gallery, of_queries, sentences = comparable_patients(gallery, queries)
    assert of_gallery[0] == of_gallery[1] == of_queries[0]
    assert of_gallery[2] == of_queries[1] != of_gallery[3], "where every row has a source, sources count"
    assert len(sentences) == 1
    assert sentences[0].startswith("1 of 2 rows of the queries' manifest have no `source`")


def test_nothing_is_said_of_complete_manifests_and_a_warning_is_handed_on() -> None:
    complete = [row("a", "1", "north"), row("b", "2", "south")]
    assert comparable_patients(complete, complete) == (["north/1", "south/2"], ["north/1", "south/2"], [])
    without = [row("a", "1", None)]
    assert comparable_patients(without, without)[2] == [], "no source in either: nothing is lost"
    nameless = comparable_patients([row("a", None, None)], [row("b", None, None)])[2]
    assert [sentence.split(": ")[1] for sentence in nameless] == ["films of one patient are not recognised"] * 2
    result = evaluate(random_set(30, 1), random_set(12, 2, prefix="q"), k=5, model_version="v", warnings=nameless)
    assert result["warnings"] == nameless


@given(st.integers(0, 10_000))
def test_areas_are_those_of_scikit_learn(seed: int) -> None:
    random = np.random.default_rng(seed)
    scores, came = random.integers(0, 9, 40).astype(float), random.integers(0, 2, 40).astype(float)
    came[:2] = 0, 1
    weights = random.integers(1, 4, (3, 40)).astype(float)
    expected = np.array([float(roc_auc_score(came, scores, sample_weight=one)) for one in weights])
    np.testing.assert_allclose(area(scores, came, weights), expected)


def test_a_resample_of_one_kind_has_no_area() -> None:
    assert np.isnan(area(np.array([1.0, 2.0]), np.array([0.0, 1.0]), np.array([[1.0, 0.0]]))[0])


def test_findings_are_told_one_by_one() -> None:
    """Three findings that come by themselves; vectors hold two of them, and say nothing of the third."""
    random = np.random.default_rng(3)
    held = random.random((240, 3)) < 0.5
    names = np.array(["effusion", "nodule", "pneumothorax"])
    labels = ["|".join(names[row]) if row.any() else "no finding" for row in held]
    vectors = np.concatenate([2.0 * held[:, :2] - 1, 0.4 * random.normal(size=(240, 3))], axis=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [str(i) for i in range(240)]
    whole = LabelledSet(ids, vectors.astype(np.float32), labels, [f"p{i // 2}" for i in range(240)], [""] * 240)
    first = np.arange(240) < 160
    found = evaluate(whole[first], whole[~first], k=10, model_version="v")["findings"]
    per = found["per_finding"]
    assert per.keys() == {*names, "no finding"}
    assert per["effusion"]["n"] == held[~first, 0].sum()
    assert min(per["effusion"]["auroc"], per["nodule"]["auroc"]) > 0.95
    assert per["pneumothorax"]["auroc_ci"][0] < 0.5 < per["pneumothorax"]["auroc_ci"][1]
    assert 0.5 < found["acg_p"] < found["precision"] < 1
    assert "findings" not in evaluate(random_set(40, 1), random_set(20, 2, prefix="q"), k=10, model_version="v")
