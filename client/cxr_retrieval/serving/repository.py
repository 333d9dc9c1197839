"""Derives the embedded model repository from the production one.

`model_repository/*/config.pbtxt` are the only hand-kept configurations. They are read and written through Triton's own
`ModelConfig` protobuf; a leaf model changes its backend from TensorRT to the Python backend running OpenVINO, the
ensemble stays as it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from cxr_retrieval.contract import ENSEMBLE, LEAF_MODELS, MODEL_VERSION_PARAMETER
from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.precision import Precision

_pb: Any = model_config_pb2  # generated code without type information
ModelConfig = Any
"""Triton's `inference.ModelConfig` protobuf."""

_BACKEND_MODEL = Path(__file__).with_name("openvino_model.py")


def read_config(model: Path) -> ModelConfig:
    """Parses `<model>/config.pbtxt`.

    Raises:
        SetupError: Absent or not a ModelConfig.
    """
    path = model / "config.pbtxt"
    try:
        return text_format.Parse(path.read_text("utf-8"), _pb.ModelConfig())
    except OSError as error:
        raise SetupError(
            f"{path}: cannot be read", got=str(error.strerror), next_step="give --repository a folder with the four models"
        ) from error
    except text_format.ParseError as error:
        raise SetupError(f"{path}: not a Triton ModelConfig", got=str(error), next_step="correct that line") from error


def model_version(repository: Path) -> str:
    """The version of the weights that the ensemble announces."""
    return read_config(repository / ENSEMBLE).parameters[MODEL_VERSION_PARAMETER].string_value


def derive_embedded(repository: Path, target: Path, precision: Precision, threads: int) -> None:
    """Writes the four embedded models under `target`; the ONNX files are linked, not copied.

    Args:
        threads: CPU threads for each engine.

    Raises:
        SetupError: A configuration or an ONNX file is missing.
    """
    for name in LEAF_MODELS:
        onnx = repository / name / "1" / "model.onnx"
        if not onnx.is_file():
            raise SetupError(f"{name}: no weights", expected=str(onnx), next_step="check out the weights, or run `cxr build onnx`")
        _write(target / name, embedded_leaf(read_config(repository / name), onnx.resolve(), precision, threads))
        shutil.copyfile(_BACKEND_MODEL, target / name / "1" / "model.py")
    _write(target / ENSEMBLE, read_config(repository / ENSEMBLE))


def embedded_leaf(production: ModelConfig, onnx: Path, precision: Precision, threads: int) -> ModelConfig:
    """The embedded form of one leaf: same tensors, batching and warm-up; other backend, CPU instance, OpenVINO settings."""
    config = _pb.ModelConfig()
    config.CopyFrom(production)
    config.platform = ""
    config.backend = "python"
    config.default_model_filename = "model.py"
    del config.instance_group[:]
    config.instance_group.add(count=1, kind=_pb.ModelInstanceGroup.KIND_CPU)
    for key, value in {"onnx": str(onnx), "precision": precision.value, "threads": str(threads)}.items():
        config.parameters[key].string_value = value
    return config


def _write(model: Path, config: ModelConfig) -> None:
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(text_format.MessageToString(config), "utf-8")
