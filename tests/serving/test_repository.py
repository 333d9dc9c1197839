from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format

from cxr_retrieval.contract import LEAF_MODELS
from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.choices import Networks, Precision
from cxr_retrieval.serving.repository import derive_embedded, embedded_leaf, model_version, read_config

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", LEAF_MODELS)
def test_embedded_config_is_golden(name: str, repository: Path) -> None:
    """What `cxr serve` gives to Triton, to the letter. Regenerate by writing `text` to the file, and read the difference."""
    config = embedded_leaf(read_config(repository / name), Path("/models") / name / "model.onnx", Precision.bf16, 2)
    text = text_format.MessageToString(config)
    assert text == (GOLDEN / f"{name}.pbtxt").read_text("utf-8")


def test_derived_repository_is_complete(repository: Path, tmp_path: Path) -> None:
    derive_embedded(repository, tmp_path / "models", Precision.fp32, Networks.ensemble, 1)
    for name in LEAF_MODELS:
        assert (tmp_path / "models" / name / "1" / "model.py").is_file()
        assert Path(read_config(tmp_path / "models" / name).parameters["onnx"].string_value).is_file()
    derived, production = read_config(tmp_path / "models" / "cxr_retrieval"), read_config(repository / "cxr_retrieval")
    assert derived.ensemble_scheduling.step == production.ensemble_scheduling.step
    assert (derived.input, derived.output) == (production.input, production.output)


def test_version_announced_is_that_of_the_weights(repository: Path) -> None:
    from cxr_retrieval_build.onnx_export import weights_version

    assert model_version(repository) == weights_version(repository)


def test_missing_weights_and_broken_config_are_named(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(repository, copy, ignore=shutil.ignore_patterns("*.onnx"))
    with pytest.raises(SetupError, match="lung_segmentation: no weights"):
        derive_embedded(copy, tmp_path / "models", Precision.fp32, Networks.ensemble, 1)
    (copy / "embedder" / "config.pbtxt").write_text("nonsense {")
    with pytest.raises(SetupError, match="not a Triton ModelConfig"):
        read_config(copy / "embedder")
    with pytest.raises(SetupError, match="cannot be read"):
        read_config(copy / "nowhere")
