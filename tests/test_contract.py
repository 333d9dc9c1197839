"""The hand-kept production configurations say what the contract says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from tritonclient.grpc import model_config_pb2

from cxr_retrieval import contract
from cxr_retrieval.serving.repository import read_config

TYPES = {"TYPE_UINT8": "UINT8", "TYPE_FP32": "FP32"}


def specs(tensors: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    names: Any = cast("Any", model_config_pb2).DataType
    return [(tensor.name, TYPES[names.Name(tensor.data_type)], tuple(tensor.dims)) for tensor in tensors]


def as_tuples(tensors: tuple[contract.TensorSpec, ...]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]


@pytest.mark.parametrize("leaf", contract.LEAVES, ids=lambda leaf: leaf.name)
def test_leaf(leaf: contract.LeafSpec, repository: Path) -> None:
    config = read_config(repository / leaf.name)
    assert config.name == leaf.name
    assert config.platform == "tensorrt_plan"
    assert config.max_batch_size >= 64
    assert config.HasField("dynamic_batching")
    assert len(config.model_warmup) == 1
    assert specs(config.input) == as_tuples(leaf.inputs)
    assert specs(config.output) == as_tuples(leaf.outputs)


def test_ensemble(repository: Path) -> None:
    config = read_config(repository / contract.ENSEMBLE)
    assert config.name == "cxr_retrieval"
    assert specs(config.input) == [("IMAGE", "UINT8", (1, 256, 256))]
    assert sorted(specs(config.output)) == sorted(
        [
            ("EMBEDDING", "FP32", (64,)),
            ("APPEARANCE", "FP32", (56,)),
            ("LUNG_MASK", "UINT8", (1, 256, 256)),
            ("ATTENTION_MAP", "FP32", (1, 256, 256)),
            ("FEATURES", "FP32", (2048,)),
            ("LUNG_AGREEMENT", "FP32", (1,)),
        ]
    )
    assert [step.model_name for step in config.ensemble_scheduling.step] == list(contract.LEAF_MODELS)


def test_no_tensor_that_a_later_step_consumes_leaves_the_ensemble(repository: Path) -> None:
    """Else Triton could not skip the steps that a request does not need."""
    config = read_config(repository / contract.ENSEMBLE)
    consumed = {name for step in config.ensemble_scheduling.step for name in step.input_map.values()}
    assert not consumed & {tensor.name for tensor in config.output}


def test_label_order_is_the_papers() -> None:
    assert contract.LABELS == ("control", "non_covid_pneumonia", "covid19")
