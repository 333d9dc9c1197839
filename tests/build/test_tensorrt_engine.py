"""Engines built for real with TensorRT-RTX, without a GPU, and inspected; none is executed here, and no test pretends so."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from rich.console import Console

from cxr_retrieval.contract import LEAVES
from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.choices import EnginePrecision, Networks
from cxr_retrieval.serving.repository import announce, model_version, read_config
from cxr_retrieval_build import tensorrt_engine
from cxr_retrieval_build.lower_precision import engine_graph
from cxr_retrieval_build.tensorrt_engine import (
    PLAN,
    STAMP,
    batch_range,
    build_engines,
    find_tensorrt,
    gpu_compute_capability,
    require_fitting,
)
from tests_support import run_cxr

QUIET = Console(quiet=True)


def build(repository: Path, out: Path, precision: EnginePrecision = EnginePrecision.fp16) -> dict[str, Any]:
    return build_engines(repository, out, precision, Networks.ensemble, find_tensorrt(), QUIET)


@pytest.fixture(scope="module")
def engines(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines")
    build(repository, out)
    return out


def test_every_leaf_has_an_engine_of_this_tensorrt(engines: Path) -> None:
    """The plan's own header: magic, a size that is the file's, and the version of TensorRT-RTX."""
    for leaf in LEAVES:
        plan = (engines / leaf.name / "1" / PLAN).read_bytes()
        assert plan[:4] == b"vtrt"
        assert int.from_bytes(plan[16:24], "little") == len(plan)
        assert ".".join(map(str, plan[24:28])) == find_tensorrt().api.__version__


def test_report_tells_what_was_built(engines: Path, repository: Path) -> None:
    report = json.loads((engines / "engines.json").read_text())
    assert report["tensorrt"] == find_tensorrt().name
    assert (report["compute_capability"], report["precision"]) == ("any", "fp16")
    for leaf in LEAVES:
        engine = report["engines"][leaf.name]
        types = {"UINT8": "UINT8", "FP32": "FLOAT"}
        expected = {spec.name: f"{types[spec.dtype]} {[-1, *spec.shape]}" for spec in (*leaf.inputs, *leaf.outputs)}
        assert engine["tensors"] == expected
        assert engine["plan_bytes"] == (engines / leaf.name / "1" / PLAN).stat().st_size
        assert engine["batch"]["max"] == read_config(repository / leaf.name).max_batch_size


def test_it_is_a_repository_as_triton_serves_it(engines: Path, repository: Path) -> None:
    assert model_version(engines) == model_version(repository)
    for leaf in LEAVES:
        config = read_config(engines / leaf.name)
        assert (config.platform, config.default_model_filename) == ("tensorrt_plan", PLAN)
        assert config == read_config(repository / leaf.name)


def test_int8_engines_are_built_from_the_graph_that_ships(engines: Path, repository: Path, tmp_path: Path) -> None:
    report = build(repository, tmp_path, EnginePrecision.int8)
    half = json.loads((engines / "engines.json").read_text())
    assert report["precision"] == "int8"
    for leaf in LEAVES:
        assert report["engines"][leaf.name]["tensors"] == half["engines"][leaf.name]["tensors"]
        assert (tmp_path / leaf.name / "1" / PLAN).read_bytes()[:4] == b"vtrt"


def test_engines_that_fit_are_kept_and_others_built_anew(engines: Path, repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "engines"
    shutil.copytree(engines, out)
    before = times(out)
    damaged = out / "attention_map" / "1" / PLAN
    damaged.write_bytes(damaged.read_bytes()[:-1])
    build(repository, out)
    assert {name for name, time in times(out).items() if time != before[name]} == {"attention_map"}
    require_fitting(out, repository, find_tensorrt())


def edited(repository: Path, folder: Path, model: str, old: str, new: str) -> Path:
    """The production repository, its weights linked, with one edit in a `config.pbtxt`."""
    target = folder / "edited"
    shutil.copytree(repository, target, copy_function=lambda a, b: os.link(a, b) if str(a).endswith(".onnx") else shutil.copy(a, b))
    path = target / model / "config.pbtxt"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return target


def times(out: Path) -> dict[str, int]:
    return {leaf.name: (out / leaf.name / "1" / PLAN).stat().st_mtime_ns for leaf in LEAVES}


@pytest.mark.parametrize(
    ("model", "old", "new"),
    [
        ("lung_segmentation", "max_queue_delay_microseconds: 2000", "max_queue_delay_microseconds: 500"),
        ("lung_segmentation", "count: 1 kind: KIND_GPU", "count: 2 kind: KIND_GPU"),
        ("cxr_retrieval", "max_inflight_requests: 128", "max_inflight_requests: 64"),
    ],
)
def test_an_edited_configuration_arrives_though_every_engine_fits(
    engines: Path, repository: Path, tmp_path: Path, model: str, old: str, new: str
) -> None:
    """Until it has arrived, `--check` refuses to serve the one before."""
    out = tmp_path / "engines"
    shutil.copytree(engines, out)
    source = edited(repository, tmp_path, model, old, new)
    assert read_config(out / model) != announce(read_config(source / model), Networks.ensemble)
    with pytest.raises(SetupError, match=rf"{model}: config\.pbtxt in .* is not the one derived from .*Next: run `cxr build engines`"):
        require_fitting(out, source, find_tensorrt())
    before = times(out)
    build(source, out)
    assert times(out) == before, "the engines were kept"
    assert read_config(out / model) == announce(read_config(source / model), Networks.ensemble)
    require_fitting(out, source, find_tensorrt())


def test_a_greater_batch_in_the_configuration_needs_another_engine(engines: Path, repository: Path, tmp_path: Path) -> None:
    """Triton refuses a configuration whose batch is greater than the engine's profile allows."""
    out = tmp_path / "engines"
    shutil.copytree(engines, out)
    before = times(out)
    report = build(edited(repository, tmp_path, "attention_map", "max_batch_size: 64", "max_batch_size: 96"), out)
    assert {name for name, time in times(out).items() if time != before[name]} == {"attention_map"}
    assert report["engines"]["attention_map"]["batch"]["max"] == read_config(out / "attention_map").max_batch_size == 96


def test_a_build_that_was_broken_off_is_not_served_and_goes_on(
    engines: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines of two precisions, under the report of the build before; then of one, and twice as large."""
    out = tmp_path / "engines"
    shutil.copytree(engines, out)

    def second_fails(path: Path, leaf: str, *which: Any) -> onnx.ModelProto:
        if leaf == "embedder":
            raise KeyboardInterrupt
        return engine_graph(path, leaf, *which)

    monkeypatch.setattr(tensorrt_engine, "engine_graph", second_fails)
    with pytest.raises(KeyboardInterrupt):
        build(repository, out, EnginePrecision.fp32)
    with pytest.raises(SetupError, match="lung_segmentation: this engine was built for another precision; expected fp16; got fp32"):
        require_fitting(out, repository, find_tensorrt())
    before = times(out)
    monkeypatch.undo()
    report = build(repository, out, EnginePrecision.fp32)
    assert times(out)["lung_segmentation"] == before["lung_segmentation"], "it was finished"
    half = json.loads((engines / "engines.json").read_text())
    assert half["engines"]["lung_segmentation"]["plan_bytes"] < 0.7 * report["engines"]["lung_segmentation"]["plan_bytes"]


def test_what_was_never_finished_is_not_served(engines: Path, repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "engines"
    shutil.copytree(engines, out)
    (out / "engines.json").unlink()
    with pytest.raises(SetupError, match=r"no finished build; expected engines\.json"):
        require_fitting(out, repository, find_tensorrt())


def test_check_of_the_command_asks_for_both(engines: Path, repository: Path, tmp_path: Path) -> None:
    fits = run_cxr("build", "engines", engines, "--check", "--repository", repository)
    assert fits.returncode == 0, fits.stderr
    assert "and their configurations the repository" in " ".join(fits.stderr.split())
    source = edited(repository, tmp_path, "embedder", "kind: KIND_GPU", "kind: KIND_CPU")
    differs = run_cxr("build", "engines", engines, "--check", "--repository", source)
    assert differs.returncode == 2
    assert "embedder: config.pbtxt in" in differs.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tensorrt": "tensorrt 10.0.0"},
            r"another TensorRT; expected tensorrt_rtx .*; got tensorrt 10\.0\.0\. Next: run `cxr build engines`",
        ),
        ({"compute_capability": "8.6"}, "another GPU; expected any; got 8.6"),
        ({"plan_sha256": "0"}, "is not the engine that"),
    ],
)
def test_engines_of_another_tensorrt_or_gpu_are_refused(
    engines: Path, repository: Path, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    out = tmp_path / "engines"
    shutil.copytree(engines, out)
    stamp = out / "embedder" / "1" / STAMP
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | change))
    with pytest.raises(SetupError, match=message):
        require_fitting(out, repository, find_tensorrt())


def test_engines_without_a_stamp_are_refused(engines: Path, repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "engines"
    shutil.copytree(engines, out)
    (out / "lung_segmentation" / "1" / STAMP).unlink()
    with pytest.raises(SetupError, match="lung_segmentation: no stamped engine"):
        require_fitting(out, repository, find_tensorrt())


def test_a_precision_that_missed_its_gate_is_not_built(repository: Path, tmp_path: Path) -> None:
    figures = {"top10_overlap": {"value": 0.9, "limit": 0.98, "passed": False}, "mask_dice": {"value": 1.0, "limit": 0.995, "passed": True}}
    about = {"networks": "ensemble", "runtime": "ONNX Runtime", "precision": "fp16"}
    models = tmp_path / "models"
    models.mkdir()
    (models / "parity.json").write_text(json.dumps({"gates": [{**about, "figures": figures, "passed": False}]}))
    with pytest.raises(SetupError, match=r"fp16 missed its parity gate.*got top10_overlap 0\.9000 \(limit 0\.98\)\. Next: .*fp32"):
        build(models, tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


def test_int8_wants_its_graph(repository: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(repository, models, ignore=shutil.ignore_patterns("*.onnx", "parity.json"))
    with pytest.raises(SetupError, match=r"lung_segmentation: no weights.*cxr build int8"):
        build(models, tmp_path / "engines", EnginePrecision.int8)


def test_tensorrt_says_why_it_refuses_a_graph(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nonsense(*which: Any) -> onnx.ModelProto:
        model = engine_graph(*which)
        model.graph.node[-1].op_type = "NoSuchOperator"
        return model

    monkeypatch.setattr(tensorrt_engine, "engine_graph", nonsense)
    with pytest.raises(SetupError, match=r"lung_segmentation: TensorRT refused the graph.*NoSuchOperator"):
        build(repository, tmp_path)


def test_batches_come_from_the_configuration(repository: Path) -> None:
    assert batch_range(read_config(repository / "lung_segmentation")) == (1, 32, 64)
    assert batch_range(read_config(repository / "attention_map")) == (1, 64, 64)


def test_a_gpu_is_seen_where_there_is_one_and_only_there() -> None:
    found = gpu_compute_capability()
    assert (found is not None) == Path("/dev/nvidiactl").exists()
    assert re.fullmatch(r"\d+\.\d+|None", str(found))


def test_container_engines_belong_to_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_engine, "gpu_compute_capability", lambda: "9.0")
    assert replace(find_tensorrt(), flavour="tensorrt").compute_capability() == "9.0"
    assert find_tensorrt().compute_capability() == "any"


def test_missing_tensorrt_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(tensorrt_engine.importlib, "import_module", absent)
    with pytest.raises(SetupError, match="TensorRT is not installed"):
        find_tensorrt()
