"""Derives the embedded model repository from the production one.

`model_repository/*/config.pbtxt` are the only hand-kept configurations. They are read and written through Triton's own
`ModelConfig` protobuf; a leaf model changes its backend from TensorRT to the Python backend running OpenVINO, the
ensemble stays as it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from cxr_retrieval.contract import CARD_PARAMETER, ENSEMBLE, LEAF_MODELS, LUNG_SEGMENTATION, MODEL_VERSION_PARAMETER, OUTCOME_MODEL
from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.choices import Networks, Precision, graph_path

_pb: Any = model_config_pb2  # generated code without type information
ModelConfig = Any
"""Triton's `inference.ModelConfig` protobuf."""

_INSTANCES: Final = {LUNG_SEGMENTATION: 2}
"""Of the engines that have more than one."""
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


def write_config(model: Path, config: ModelConfig) -> None:
    """Writes `<model>/config.pbtxt`, beside an empty version folder if there is none yet."""
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "config.pbtxt").write_text(text_format.MessageToString(config), "utf-8")


def model_version(repository: Path, networks: Networks = Networks.ensemble) -> str:
    """The version of the weights that the ensemble announces when it finds the lungs in this way."""
    return announce(read_config(repository / ENSEMBLE), networks).parameters[MODEL_VERSION_PARAMETER].string_value


def announce(ensemble: ModelConfig, networks: Networks) -> ModelConfig:
    """The ensemble's configuration with the version of just what is served, so that galleries of two sets of networks are never mixed."""
    config = _pb.ModelConfig()
    config.CopyFrom(ensemble)
    names = [one.version_parameter for one in Networks if one.version_parameter in config.parameters]
    versions = {name: config.parameters[name].string_value for name in names}
    for name in versions:
        del config.parameters[name]
    if versions:
        config.parameters[MODEL_VERSION_PARAMETER].string_value = versions.get(networks.version_parameter, "")
    return config


def graph_file(repository: Path, leaf: str, networks: Networks, *, int8: bool = False) -> Path:
    """The ONNX graph of one leaf.

    Raises:
        SetupError: It is not there.
    """
    path = graph_path(repository, leaf, networks, int8=int8)
    if path.is_file():
        return path.resolve()
    command = "cxr build int8" if int8 else "cxr build onnx"
    raise SetupError(f"{leaf}: no weights", expected=str(path), next_step=f"check out the weights, or run `{command}`")


def has_graph(repository: Path, leaf: str, networks: Networks, *, int8: bool = False) -> bool:
    """Whether `graph_file` finds one."""
    return graph_path(repository, leaf, networks, int8=int8).is_file()


def derive_embedded(repository: Path, target: Path, precision: Precision, networks: Networks, threads: int) -> None:
    """Writes the four embedded models under `target`; the ONNX files are linked, not copied.

    Args:
        precision: Of the segmentation networks, nine tenths of the work. The embedder computes in fp32 whatever it is: its whitened
            axes magnify what bf16 loses (docs/performance.md).
        threads: CPU threads of each engine.

    Raises:
        SetupError: A configuration or an ONNX file is missing.
    """
    for name in LEAF_MODELS:
        lowered = precision if name == LUNG_SEGMENTATION else Precision.fp32
        onnx = graph_file(repository, name, networks, int8=lowered is Precision.int8)
        write_config(target / name, embedded_leaf(read_config(repository / name), onnx, lowered, threads))
        shutil.copyfile(_BACKEND_MODEL, target / name / "1" / "model.py")
    ensemble = announce(read_config(repository / ENSEMBLE), networks)
    ensemble.ensemble_scheduling.ClearField("max_inflight_requests")  # the embedded Triton 2.51 does not know it
    write_config(target / ENSEMBLE, ensemble)


def derive_further(name: str, folder: Path, repository: Path, target: Path, networks: Networks, threads: int) -> None:
    """Writes the embedded form of a model that is no step of the ensemble, a folder that `cxr build` wrote, under `target`.

    Raises:
        SetupError: No such folder, a model without a card, or an outcome model trained on the features of other weights than those served.
    """
    kind = name.partition("_")[0]
    expected = f"a folder that `cxr build {kind}` wrote: config.pbtxt, CARD.md, 1/model.onnx"
    onnx = folder / "1" / "model.onnx"
    absent = [path.relative_to(folder).as_posix() for path in (folder / "config.pbtxt", folder / "CARD.md", onnx) if not path.is_file()]
    if absent:
        raise SetupError(f"{folder}: no {', '.join(absent)}", expected=expected, next_step=f"correct --{kind}")
    config = read_config(folder)
    if config.name != name or not config.parameters[CARD_PARAMETER].string_value:
        raise SetupError(f"{folder}: no {kind} model with a card", expected=expected, next_step=f"build it anew with `cxr build {kind}`")
    trained, served = config.parameters[MODEL_VERSION_PARAMETER].string_value, model_version(repository, networks)
    if name == OUTCOME_MODEL and trained != served:
        raise SetupError(
            f"{folder}: trained on features of other weights",
            expected=served,
            got=trained,
            next_step="serve those, or train it anew with `cxr train outcome`",
        )
    write_config(target / name, embedded_leaf(config, onnx.resolve(), Precision.fp32, threads))
    shutil.copyfile(_BACKEND_MODEL, target / name / "1" / "model.py")


def embedded_leaf(production: ModelConfig, onnx: Path, precision: Precision, threads: int) -> ModelConfig:
    """The embedded form of one leaf: same tensors and warm-up; other backend, CPU instance, OpenVINO settings.

    Whatever waits is handed over at once: on a CPU an image costs the same alone and in a batch, so waiting for more gains nothing.
    Of two instances of the segmentation, most of the work, one is still busy when the other has dealt out the last image of its batch,
    so no core falls idle in between.
    """
    config = _pb.ModelConfig()
    config.CopyFrom(production)
    config.platform = ""
    config.backend = "python"
    config.default_model_filename = "model.py"
    config.dynamic_batching.Clear()
    config.dynamic_batching.SetInParent()
    del config.instance_group[:]
    config.instance_group.add(count=_INSTANCES.get(production.name, 1), kind=_pb.ModelInstanceGroup.KIND_CPU)
    hint = "bf16" if precision is Precision.bf16 else "f32"
    for key, value in {"onnx": str(onnx), "inference_precision": hint, "threads": str(threads)}.items():
        config.parameters[key].string_value = value
    return config
