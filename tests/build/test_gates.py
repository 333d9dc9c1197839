"""The parity gates can be passed and missed, each figure by itself; what is recorded is what `--precision auto` goes by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.choices import Networks, Precision, doubts, graph_path, resolve
from cxr_retrieval_build.gates import Answers, Gallery, limits, measure_gate, record, require_passed, table

N = 200
FLAGS = frozenset({"avx512_bf16", "avx512_vnni"})


@pytest.fixture
def reference() -> Answers:
    random = np.random.default_rng(0)
    masks = np.zeros((N, 1, 64, 64), np.uint8)
    masks[:, :, 10:50, 12:52] = 255
    vectors = random.normal(size=(N, 64)).astype(np.float32)
    return Answers(masks, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


@pytest.fixture
def gallery() -> Gallery:
    random = np.random.default_rng(1)
    vectors = random.normal(size=(500, 64)).astype(np.float32)
    return Gallery(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), ["a", "b"] * 250)


def figures(reference: Answers, got: Answers, gallery: Gallery, precision: str = "bf16") -> dict[str, Any]:
    return measure_gate(reference, got, gallery, ["a", "b"] * (N // 2), precision)


def turned(vectors: Any, amount: float) -> Any:
    noise = np.random.default_rng(2).normal(size=vectors.shape).astype(np.float32) * amount / 8
    moved = vectors + noise
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


def test_the_same_passes_in_full(reference: Answers, gallery: Gallery) -> None:
    found = figures(reference, reference, gallery)
    values = {name: one["value"] for name, one in found["figures"].items()}
    assert values == pytest.approx(
        {"mask_dice": 1.0, "embedding_cosine_p1": 1.0, "top10_overlap": 1.0, "vote_accuracy_change_points": 0.0}, abs=1e-5
    )
    assert found["passed"]
    assert found["n"] == N


def test_other_masks_miss_the_first_figure_alone(reference: Answers, gallery: Gallery) -> None:
    found = figures(reference, replace(reference, masks=np.roll(reference.masks, 1, axis=2)), gallery)
    assert found["figures"]["mask_dice"]["value"] == pytest.approx(39 / 40)
    assert [name for name, one in found["figures"].items() if not one["passed"]] == ["mask_dice"]
    assert not found["passed"]


def test_turned_embeddings_miss_the_others(reference: Answers, gallery: Gallery) -> None:
    found = figures(reference, replace(reference, embeddings=turned(reference.embeddings, 0.8)), gallery)
    missed = {name for name, one in found["figures"].items() if not one["passed"]}
    assert {"embedding_cosine_p1", "top10_overlap"} <= missed
    assert found["figures"]["embedding_cosine_p1"]["value"] < 0.9


def test_int8_may_be_further_off(reference: Answers, gallery: Gallery) -> None:
    slightly = replace(reference, embeddings=turned(reference.embeddings, 0.05))
    assert not figures(reference, slightly, gallery, "bf16")["figures"]["embedding_cosine_p1"]["passed"]
    assert figures(reference, slightly, gallery, "int8")["figures"]["embedding_cosine_p1"]["passed"]
    assert {name: one.value for name, one in limits("int8").items()} == {
        "mask_dice": 0.99,
        "embedding_cosine_p1": 0.99,
        "top10_overlap": 0.95,
        "vote_accuracy_change_points": 1.0,
    }


def test_not_a_number_never_passes(reference: Answers, gallery: Gallery) -> None:
    broken = reference.embeddings.copy()
    broken[3] = np.nan
    found = figures(reference, replace(reference, embeddings=broken), gallery)
    assert not found["figures"]["embedding_cosine_p1"]["passed"]


def entry(precision: str, *, passed: bool, networks: str = "ensemble") -> dict[str, Any]:
    one = {"value": 1.0 if passed else 0.5, "limit": 0.98, "passed": passed}
    about = {"networks": networks, "runtime": "OpenVINO", "precision": precision}
    return {**about, "n": 1, "figures": dict.fromkeys(limits(precision), one), "passed": passed}


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    (tmp_path / "parity.json").write_text(json.dumps({"model_version": "x", "parity": []}))
    record(tmp_path, [entry("bf16", passed=False), entry("int8", passed=True, networks="student")])
    return tmp_path


def test_record_replaces_the_same_and_keeps_the_rest(recorded: Path) -> None:
    record(recorded, [entry("bf16", passed=True)])
    report = json.loads((recorded / "parity.json").read_text())
    assert report["model_version"] == "x"
    assert [(one["networks"], one["precision"], one["passed"]) for one in report["gates"]] == [
        ("ensemble", "bf16", True),
        ("student", "int8", True),
    ]


def test_auto_takes_the_fastest_that_the_cpu_has_and_that_passed(recorded: Path) -> None:
    def chosen(networks: Networks, flags: frozenset[str] = FLAGS) -> Precision:
        return resolve(recorded, Precision.auto, networks, flags)

    assert chosen(Networks.ensemble) is Precision.fp32, "bf16 missed its gate"
    assert chosen(Networks.student) is Precision.fp32, "int8 passed, but its graph is not here"
    graph = graph_path(recorded, "lung_segmentation", Networks.student, int8=True)
    graph.parent.mkdir(parents=True)
    graph.touch()
    assert chosen(Networks.student) is Precision.int8
    assert chosen(Networks.student, frozenset()) is Precision.fp32, "the CPU has no int8"
    record(recorded, [entry("bf16", passed=True)])
    assert chosen(Networks.ensemble) is Precision.bf16
    assert resolve(recorded, Precision.fp32, Networks.student, FLAGS) is Precision.fp32, "asked for"
    assert resolve(recorded / "nowhere", Precision.auto, Networks.ensemble, FLAGS) is Precision.fp32


def test_doubts_are_told(recorded: Path) -> None:
    assert "missed its parity gate" in doubts(recorded, Precision.bf16, Networks.ensemble, FLAGS)
    assert "mask_dice 0.5000 (limit 0.98)" in doubts(recorded, Precision.bf16, Networks.ensemble, FLAGS)
    assert "was not measured" in doubts(recorded, Precision.bf16, Networks.student, FLAGS)
    assert "no int8 arithmetic" in doubts(recorded, Precision.int8, Networks.student, frozenset())
    assert doubts(recorded, Precision.int8, Networks.student, FLAGS) == ""
    record(recorded, [entry("fp32", passed=False)])
    assert doubts(recorded, Precision.fp32, Networks.ensemble, frozenset()) == "", "there is nothing more exact to serve"


def test_missed_gates_fail_and_say_which() -> None:
    require_passed([entry("fp32", passed=True)])
    with pytest.raises(SetupError, match=r"ensemble in OpenVINO fp32: mask_dice 0\.5000 \(limit 0\.98\)"):
        require_passed([entry("fp32", passed=False)])
    assert table([entry("fp32", passed=False)]).row_count == 1


def test_shipped_report_belongs_to_the_shipped_weights(repository: Path) -> None:
    """Were the gates of other weights left in it, `auto` would go by them."""
    from cxr_retrieval_build.onnx_export import weights_version

    report = json.loads((repository / "parity.json").read_text())
    assert report["model_version"] == weights_version(repository)
    assert report["student_model_version"] == weights_version(repository, Networks.student)
