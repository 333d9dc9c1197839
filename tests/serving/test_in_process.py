"""Networks in this process say what Triton says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from cxr_retrieval.contract import (
    ATTENTION_MAP,
    EMBEDDING,
    ENSEMBLE_OUTPUTS,
    FINDING_FEATURES,
    LEAVES,
    LUNG_AGREEMENT,
    LUNG_MASK,
    LUNG_SEGMENTATION,
    TensorSpec,
)
from cxr_retrieval.errors import InferenceError, SetupError, UnusableOutputError
from cxr_retrieval.inference.triton import Outputs, TritonClient
from cxr_retrieval.locations import default_repository
from cxr_retrieval.serving.choices import Networks
from cxr_retrieval.serving.in_process import Engines, InProcess, Run, Runtime, onnx_leaf
from cxr_retrieval.serving.repository import graph_file


def numbers(values: object) -> NDArray[np.float64]:
    return np.asarray(cast("ArrayLike", values), np.float64)


CLOSE = {LUNG_MASK: 0.0, LUNG_AGREEMENT: 1e-5}


@pytest.fixture(scope="module")
def student_engines() -> Engines:
    return InProcess(Runtime.openvino, Networks.student).open()


def test_the_same_as_triton(student: TritonClient, student_engines: Engines, squares: NDArray[np.uint8]) -> None:
    assert student_engines.model_version == student.model_version
    films = squares[:3]
    ours, theirs = student_engines.infer(films), student.infer(films)
    assert set(ours) == set(theirs) == {output.name for output in ENSEMBLE_OUTPUTS}
    for output in ENSEMBLE_OUTPUTS:
        assert ours[output.name].dtype == theirs[output.name].dtype
        np.testing.assert_allclose(numbers(ours[output.name]), numbers(theirs[output.name]), atol=CLOSE.get(output, 1e-4))
    one_by_one = [student_engines.infer(films[n : n + 1], (EMBEDDING,))[EMBEDDING.name] for n in range(3)]
    np.testing.assert_array_equal(numbers(np.concatenate(one_by_one)), numbers(ours[EMBEDDING.name]))


def test_onnx_runtime_runs_the_same_chain(student_engines: Engines, squares: NDArray[np.uint8]) -> None:
    """On a CPU here, by the provider that a TensorRT build has, too; the engines themselves need a GPU."""
    leaves = {
        leaf.name: onnx_leaf(graph_file(default_repository(), leaf.name, Networks.student), ["CPUExecutionProvider"]) for leaf in LEAVES
    }
    films = squares[:2]
    ours, reference = Engines(leaves, "x").infer(films), student_engines.infer(films)
    for name in ("EMBEDDING", "APPEARANCE"):
        assert (numbers(ours[name]) * numbers(reference[name])).sum(axis=1) == pytest.approx([1, 1], abs=2e-3)
    assert (numbers(ours["LUNG_MASK"]) == numbers(reference["LUNG_MASK"])).mean() > 0.999


@pytest.mark.parametrize(("wanted", "run"), [((LUNG_MASK,), 1), ((EMBEDDING,), 2), ((LUNG_AGREEMENT, EMBEDDING), 2), ((ATTENTION_MAP,), 3)])
def test_only_what_is_needed_is_run(wanted: tuple[TensorSpec, ...], run: int, squares: NDArray[np.uint8]) -> None:
    asked: list[str] = []

    def leaf(name: str) -> Run:
        outputs = next(one.outputs for one in LEAVES if one.name == name)

        def run(_: Mapping[str, NDArray[np.generic]]) -> Outputs:
            asked.append(name)
            return {one.name: np.zeros((2, *one.shape), np.float32) for one in outputs}

        return run

    engines = Engines({one.name: leaf(one.name) for one in LEAVES}, "x")
    assert set(engines.infer(squares[:2], wanted)) == {output.name for output in wanted}
    assert asked == [one.name for one in LEAVES[:run]]


def test_what_cannot_be_answered(squares: NDArray[np.uint8]) -> None:
    def broken(_: Mapping[str, NDArray[np.generic]]) -> Outputs:
        return {"LUNG_AGREEMENT": np.full((1, 1), np.nan, np.float32), "LUNG_MASK": np.zeros((1, 1, 256, 256), np.float32)}

    engines = Engines({LUNG_SEGMENTATION: broken}, "x")
    with pytest.raises(UnusableOutputError, match="LUNG_AGREEMENT with NaN"):
        engines.infer(squares[:1], (LUNG_AGREEMENT,))
    with pytest.raises(InferenceError, match="in this process have no FINDING_FEATURES"):
        engines.infer(squares[:1], (FINDING_FEATURES,))


def test_tensorrt_where_there_is_none() -> None:
    with pytest.raises(SetupError, match="TensorRT cannot be run in this process"):
        InProcess(Runtime.tensorrt).open()
