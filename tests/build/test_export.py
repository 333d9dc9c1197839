"""Export of freshly initialised networks: PyTorch, ONNX Runtime, OpenVINO and Triton must agree; the gates must be able to fail."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from rich.console import Console
from torch import nn

from cxr_retrieval.contract import APPEARANCE_SIZE, EMBEDDING, LEAVES, LUNG_MASK, LeafSpec
from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.serving.choices import Embedder as EmbedderName
from cxr_retrieval.serving.choices import Networks, Precision, Segmentation, networks_of
from cxr_retrieval.serving.repository import derive_embedded, graph_file, model_version, read_config
from cxr_retrieval.serving.server import ServerOptions, embedded_triton
from cxr_retrieval.settings import TritonSettings
from cxr_retrieval_build.onnx_export import (
    DESCRIPTION,
    GRAPHS,
    PUBLISHED,
    announce_versions,
    load_networks,
    stored_as,
    with_own_biases,
    with_small_weights,
)
from cxr_retrieval_build.parity import TOLERANCES, measure, parity_inputs, require_parity
from cxr_retrieval_build.published import write_checkpoints
from cxr_retrieval_build.release import release
from cxr_retrieval_training.checkpoints import load_checkpoint, save_checkpoint
from cxr_retrieval_training.config import EmbedderConfig, EmbedderMemberConfig, EmbedderStage, config_path, load_config
from cxr_retrieval_training.embedding.embedder import Embedder
from cxr_retrieval_training.embedding.train_embedder import build_embedder
from cxr_retrieval_training.segmentation.segmenter import LungSegmenter
from tests_support import cosine

pytestmark = pytest.mark.usefixtures("small_networks")

MEMBERS = ("linknet", "deeplabv3plus")
Checkpoints = tuple[Path, Path, Path, Path]
"""segmenter, embedder, student, published"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Random weights of all networks, batch-norm statistics taken from noise so that activations have a sane range.

    Of the five that find the lungs two, which have between them every kind of layer: exporting all takes two minutes.
    """
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(4)
    config = EmbedderConfig(
        mirrored=True,
        learned_size=32,
        appearance_size=APPEARANCE_SIZE,
        members=(EmbedderMemberConfig(stages=(EmbedderStage(image_size=64, iterations=1, learning_rate=1e-3),)),) * 2,
    )
    of_paper = load_config(config_path("embedder-published"), EmbedderConfig).model_copy(update={"backbone": "efficientnet_lite0"})
    segmenter, embedder, published = LungSegmenter(MEMBERS), build_embedder(config, (128, 96)), build_embedder(of_paper, (64,))
    noise = torch.randint(0, 256, (4, 2, 128, 128), dtype=torch.uint8)
    for network, takes in ((segmenter, noise[:, :1]), (embedder, noise), (published, noise)):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.9
        network.train()
        with torch.no_grad():
            network(takes)
    for member in segmenter.members.values():  # most pixels well above the threshold: at it, fp16 weights flip an untrained mask
        head = member.get_submodule("network.segmentation_head.0")
        assert isinstance(head, nn.Conv2d)
        assert head.bias is not None
        with torch.no_grad():
            head.bias += 0.5
    save_checkpoint(folder / "segmenter.pt", {"model": segmenter.state_dict(), "config": {"members": list(MEMBERS)}})
    student = LungSegmenter(("linknet",))
    student.members["linknet"] = segmenter.members["linknet"]
    save_checkpoint(folder / "student.pt", {"model": student.state_dict(), "config": {"members": ["linknet"]}})
    for name, network, how in (("embedder", embedder, config), ("published", published, of_paper)):
        assert network.appearance is not None
        size = network.appearance.mean.numel()
        network.appearance.fit(np.random.default_rng(1).normal(size=(64, size)).astype(np.float32))
        members = [{"image_size": member.size} for member in network.each()]
        save_checkpoint(folder / f"{name}.pt", {"model": network.state_dict(), "members": members, "config": how.model_dump(mode="json")})
    return folder / "segmenter.pt", folder / "embedder.pt", folder / "student.pt", folder / "published.pt"


@pytest.fixture(scope="module")
def released(checkpoints: Checkpoints, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with these weights, written by the release step."""
    target = tmp_path_factory.mktemp("released") / "repository"
    shutil.copytree(repository, target, ignore=shutil.ignore_patterns("*.onnx"))
    release(*checkpoints, target, Console(stderr=True))
    return target


def test_report_holds_every_output_in_both_runtimes(released: Path) -> None:
    report = json.loads((released / "parity.json").read_text())
    measured = {(row["model"], row["output"], row["runtime"]) for row in report["parity"]}
    expected = {(one.name, spec.name, runtime) for one in GRAPHS for spec in one.leaf.outputs for runtime in ("ONNX Runtime", "OpenVINO")}
    assert measured == expected
    assert all(row["passed"] for row in report["parity"])
    assert report["model_version"] == model_version(released)
    assert {report[networks.version_parameter] for networks in Networks} == {model_version(released, networks) for networks in Networks}
    assert len({model_version(released, networks) for networks in Networks}) == 3


def test_graphs_have_contract_names_dynamic_batch_and_small_weights(released: Path) -> None:
    for one in GRAPHS:
        graph = onnx.load(released / one.file).graph
        assert [value.name for value in graph.input] == [spec.name for spec in one.leaf.inputs]
        assert [value.name for value in graph.output] == [spec.name for spec in one.leaf.outputs]
        assert all(value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output))
        large = {tensor.name: tensor.data_type for tensor in graph.initializer if numpy_helper.to_array(tensor).size >= 256}
        divisors = {name for name in large if name.endswith("_divisor")}
        assert onnx.TensorProto.FLOAT not in {large[name] for name in large.keys() - divisors}
        assert (onnx.TensorProto.INT8 in large.values()) == (one.name == PUBLISHED)


@pytest.fixture(scope="module")
def read_back(released: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints made of the graphs."""
    return write_checkpoints(released, tmp_path_factory.mktemp("read_back"))


def test_checkpoints_of_the_graphs_give_the_same_weights(checkpoints: Checkpoints, read_back: list[Path]) -> None:
    """To the bit."""
    assert [path.name for path in read_back] == [path.name for path in checkpoints]
    expected, got = load_networks(*checkpoints), load_networks(*read_back)
    for name, network in expected.items():
        state = network.state_dict()
        assert list(state) == list(got[name].state_dict())
        for key, tensor in got[name].state_dict().items():
            assert torch.equal(tensor, state[key]), f"{name}.{key}"


def test_checkpoints_of_the_graphs_say_what_the_first_ones_said(checkpoints: Checkpoints, read_back: list[Path]) -> None:
    """So that an export of them is the same file; and training can go on from them."""
    for path, again in zip(checkpoints, read_back, strict=True):
        first, second = load_checkpoint(path), load_checkpoint(again)
        assert {key: first.get(key) for key in DESCRIPTION} == {key: second.get(key) for key in DESCRIPTION}
        assert set(second["model"]) == set(first["model"])


def test_no_checkpoint_is_written_over_another(released: Path, tmp_path: Path) -> None:
    (tmp_path / "student.pt").write_bytes(b"of a week's training")
    with pytest.raises(UsageError, match=r"student\.pt: already exists"):
        write_checkpoints(released, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["student.pt"]


def test_graphs_that_do_not_say_how_they_are_built(released: Path, repository: Path, tmp_path: Path) -> None:
    target = tmp_path / "repository"
    with pytest.raises(SetupError, match="no such graph"):
        write_checkpoints(target, tmp_path / "out")
    shutil.copytree(released, target)
    graph = onnx.load(target / "embedder" / "1" / "model.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, target / "embedder" / "1" / "model.onnx")
    with pytest.raises(SetupError, match="does not say how its network is built"):
        write_checkpoints(target, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nor is the segmenter written, which could be"


def test_a_weight_that_the_graph_lacks_is_refused(checkpoints: Checkpoints, released: Path) -> None:
    graph = onnx.load(released / "lung_segmentation" / "1" / "student.onnx")
    with pytest.raises(SetupError, match=r"the exported graph does not hold members\.linknet\..*weight"):
        stored_as(load_networks(*checkpoints)["student"], graph)


def test_graphs_tell_nothing_of_the_machine_they_were_made_on(released: Path, repository: Path) -> None:
    paths = [*released.rglob("*.onnx"), *repository.rglob("*.onnx")]
    assert len(paths) > len(GRAPHS)
    for path in paths:
        data = path.read_bytes()
        assert b"site-packages" not in data
        assert b"/cxr_retrieval_training/" not in data


def test_served_equals_pytorch(released: Path, checkpoints: Checkpoints) -> None:
    """The whole chain: PyTorch originals against the ensemble in Triton."""
    images = parity_inputs(per_class=1)
    networks = load_networks(*checkpoints)
    with torch.inference_mode():
        mask, lungs, agreement = networks["lung_segmentation"](torch.from_numpy(images))
        embedding, appearance, features, attention = networks["embedder"](lungs)
        attention_map, _ = networks["attention_map"](attention, mask)
    with (
        embedded_triton(ServerOptions(released, grpc_port=0, http_port=0, metrics_port=0)) as server,
        TritonClient(TritonSettings(server.grpc)) as client,
    ):
        assert client.model_version == model_version(released)
        served = client.infer(images)
    # Each step alone agrees far closer (see the parity report); here a pixel at the threshold of an untrained segmenter may
    # fall on the other side, and the embedder then sees another picture.
    assert cosine(served["EMBEDDING"], embedding.numpy()) > 0.99
    assert cosine(served["APPEARANCE"], appearance.numpy()) > 0.99
    assert cosine(served["FEATURES"], features.numpy()) > 0.99
    assert (served["LUNG_MASK"] != mask.numpy()).mean() < 5e-3
    assert np.abs(served["LUNG_AGREEMENT"] - agreement.numpy()).max() < 0.01
    same = (served["LUNG_MASK"] == mask.numpy()).astype(float)
    assert np.abs((served["ATTENTION_MAP"] - attention_map.numpy()) * same).max() < 0.05


def copying(released: Path) -> Callable[[nn.Module, LeafSpec, Path, object], None]:
    """In the place of `export`, which takes a minute: the graphs exported before."""

    def copied(network: nn.Module, leaf: LeafSpec, path: Path, about: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(released / leaf.name / "1" / path.name, path)

    return copied


def test_other_weights_fail_the_gate_and_change_nothing(
    released: Path, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the export computed something else than the network it came from."""
    import cxr_retrieval_build.release as module

    target = tmp_path / "repository"
    shutil.copytree(released, target)
    before = (target / "embedder" / "1" / "model.onnx").read_bytes()
    networks = load_networks(*checkpoints)
    networks["embedder"] = Embedder(32, appearance_size=APPEARANCE_SIZE, sizes=(128, 96)).eval()
    monkeypatch.setattr(module, "load_networks", lambda *paths: networks)
    monkeypatch.setattr(module, "export", copying(released))
    with pytest.raises(SetupError, match=r"the export differs from PyTorch.*embedder\.EMBEDDING"):
        release(*checkpoints, target, Console(stderr=True))
    assert (target / "embedder" / "1" / "model.onnx").read_bytes() == before
    assert model_version(target) == model_version(released)
    assert not list(target.glob(".export-*"))


def test_student_is_served_in_the_place_of_the_five(released: Path, checkpoints: Checkpoints) -> None:
    """Its mask, its agreement, and its own model version, so that its gallery is its own."""
    images = parity_inputs(per_class=1)[:2]
    with torch.inference_mode():
        mask, _, agreement = load_networks(*checkpoints)["student"](torch.from_numpy(images))
    options = ServerOptions(released, networks=Networks.student, grpc_port=0, http_port=0, metrics_port=0)
    with embedded_triton(options) as server, TritonClient(TritonSettings(server.grpc)) as client:
        assert client.model_version == model_version(released, Networks.student)
        served = client.infer(images)
    assert (served["LUNG_MASK"] != mask.numpy()).mean() < 5e-3
    assert served["LUNG_AGREEMENT"] == pytest.approx(agreement.numpy(), abs=0.01)


def test_published_embedder_is_served_in_the_place_of_the_tuned(released: Path, checkpoints: Checkpoints) -> None:
    """Its vectors, of the lungs that the five find, and its own model version."""
    images = parity_inputs(per_class=1)[:2]
    options = ServerOptions(released, networks=Networks.published, grpc_port=0, http_port=0, metrics_port=0)
    with embedded_triton(options) as server, TritonClient(TritonSettings(server.grpc)) as client:
        assert client.model_version == model_version(released, Networks.published)
        served = client.infer(images)
    networks = load_networks(*checkpoints)
    with torch.inference_mode():
        _, lungs, _ = networks["lung_segmentation"](torch.from_numpy(images))
        expected, tuned = (networks[name](lungs)[0].numpy() for name in ("published", "embedder"))
    assert cosine(served["EMBEDDING"], expected) > 0.9999
    assert cosine(served["EMBEDDING"], tuned) < 0.99


def test_the_student_is_not_served_with_the_published_embedder() -> None:
    assert networks_of(Segmentation.student, EmbedderName.tuned) is Networks.student
    assert networks_of(Segmentation.ensemble, EmbedderName.published) is Networks.published
    with pytest.raises(UsageError, match=r"--segmentation student with --embedder published.*leave one of them out"):
        networks_of(Segmentation.student, EmbedderName.published)


def test_release_takes_away_what_came_of_older_weights(
    released: Path, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student of other teachers, or an int8 graph of other weights, must not outlive them."""
    import cxr_retrieval_build.release as module

    target = tmp_path / "repository"
    shutil.copytree(released, target)
    monkeypatch.setattr(module, "export", copying(released))
    (target / "lung_segmentation" / "1" / "model.int8.onnx").write_bytes(b"of older weights")
    release(*checkpoints[:2], None, None, target, Console(stderr=True))
    for missing, int8 in ((Networks.student, False), (Networks.ensemble, True)):
        with pytest.raises(SetupError, match="lung_segmentation: no weights"):
            graph_file(target, "lung_segmentation", missing, int8=int8)
    with pytest.raises(SetupError, match=r"embedder: no weights.*published\.onnx"):
        graph_file(target, "embedder", Networks.published)
    with pytest.raises(SetupError, match="student"):
        derive_embedded(target, tmp_path / "models", Precision.fp32, Networks.student, 1)
    told = read_config(target / "cxr_retrieval").parameters
    assert [told[name].string_value for name in ("student_model_version", "published_model_version")] == ["", ""]
    assert model_version(target) == model_version(released)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_never_passes(bad: float) -> None:
    good = np.ones((2, 64), np.float32)
    broken = good.copy()
    broken[1, 3] = bad
    result = measure("embedder", EMBEDDING.name, "OpenVINO", good, broken)
    assert not result.passed
    with pytest.raises(SetupError, match="differs from PyTorch"):
        require_parity([result])


def test_tolerances_bind_on_maximum_and_cosine() -> None:
    good = np.eye(2, 64, dtype=np.float32)
    assert measure("m", EMBEDDING.name, "r", good, good).passed
    assert not measure("m", EMBEDDING.name, "r", good, good + 0.02).passed
    mask = np.zeros((1, 1, 16, 16), np.uint8)
    mask[..., :8] = 255
    assert not measure("m", LUNG_MASK.name, "r", mask, np.roll(mask, 1, axis=-1)).passed
    assert measure("m", LUNG_MASK.name, "r", mask * 0, mask * 0).passed, "both empty is equal"
    assert set(TOLERANCES) == {spec.name for leaf in LEAVES for spec in leaf.outputs}


@pytest.mark.parametrize("value", [1e6, np.inf, np.nan, 0.1])
def test_weights_that_fp16_cannot_hold_are_refused(value: float) -> None:
    """Too large, no number, or not rounded before the network was compared with anything."""
    tensor = numpy_helper.from_array(np.full(512, value, np.float32), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    with pytest.raises(SetupError, match=r"weight w does not fit fp16.*as_shipped"):
        with_small_weights(onnx.helper.make_model(graph))


def test_no_two_convolutions_read_one_bias() -> None:
    """The same function; what else reads that tensor keeps it."""
    weight, bias = np.ones((3, 3, 1, 1), np.float32), np.arange(3, dtype=np.float32)
    nodes = [
        onnx.helper.make_node("Conv", [x, "w", "b"], [y], name=y) for x, y in (("x", "first"), ("first", "second"), ("second", "third"))
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, 3, 2, 2)) for name in ("x", "third")]
    tensors = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    own = with_own_biases(copy.deepcopy(model))
    onnx.checker.check_model(own, full_check=True)
    assert [node.input[2] for node in own.graph.node] == ["b", "second_bias", "third_bias"]
    assert [node.input[1] for node in own.graph.node] == ["w"] * 3
    x = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    answers: list[Any] = [onnxruntime.InferenceSession(one.SerializeToString()).run(None, {"x": x}) for one in (model, own)]
    assert np.array_equal(answers[0][0], answers[1][0])


def test_version_line_must_be_there(tmp_path: Path, repository: Path) -> None:
    shutil.copytree(repository, tmp_path / "r", ignore=shutil.ignore_patterns("*.onnx"))
    config = tmp_path / "r" / "cxr_retrieval" / "config.pbtxt"
    announce_versions(tmp_path / "r", {Networks.ensemble: "0123456789ab"})
    assert model_version(tmp_path / "r") == "0123456789ab"
    config.write_text(config.read_text().replace('model_version"', 'other"'))
    with pytest.raises(SetupError, match="no single model_version"):
        announce_versions(tmp_path / "r", {Networks.ensemble: "x"})


def test_absent_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint"):
        load_networks(tmp_path / "s.pt", tmp_path / "e.pt")
