"""What becomes of patients, from a manifest to an answer: trained, built, served beside the ensemble by a real Triton, asked; and refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf import text_format

from chaos.instant import VERSION
from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.contract import CARD_PARAMETER, FEATURE_SIZE, MODEL_VERSION_PARAMETER
from cxr_retrieval.errors import InferenceError, ManifestError, SetupError, UsageError
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.phantoms import make_phantom, write_phantoms
from cxr_retrieval.retrieval.outcome import OutcomeModel
from cxr_retrieval.serving.choices import Networks
from cxr_retrieval.serving.repository import derive_further, read_config
from cxr_retrieval.serving.server import Endpoints, ServerOptions, embedded_milvus, embedded_triton
from cxr_retrieval_training.outcome.cases import choose, look_at
from tests_support import run_cxr

FILMS = 20
CHOICE = ("--fact", "age", "--fact", "spo2", "--outcome", "went_icu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty phantoms of as many patients, half of whom came to intensive care; of every third the saturation is not known."""
    path = write_phantoms(tmp_path_factory.mktemp("films"), [make_phantom(seed, "covid19") for seed in range(FILMS)])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "went_icu": "YN"[i % 2], "spo2": "" if i % 3 == 0 else row["spo2"]} for i, row in enumerate(rows))
    return path


@pytest.fixture(scope="module")
def run(manifest: Path, quick: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `cxr train outcome`."""
    out = tmp_path_factory.mktemp("outcome") / "run"
    done = run_cxr("train", "outcome", "--manifest", manifest, "--out", out, *CHOICE, "--triton", quick.grpc)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "outcome.md")
    return out


@pytest.fixture(scope="module")
def model(run: Path) -> Path:
    """Folder of `cxr build outcome`."""
    done = run_cxr("build", "outcome", run / "outcome.pt", run / "model")
    assert done.returncode == 0, done.stderr
    parity = json.loads(done.stdout)["parity"]
    assert parity.keys() == {"ONNX Runtime", "OpenVINO"}
    assert max(parity.values()) < 1e-4
    return run / "model"


@pytest.fixture(scope="module")
def reach(instant: Path, model: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """A server with the model, and a gallery of the same phantoms."""
    options = ServerOptions(instant, grpc_port=0, http_port=0, metrics_port=0, outcome=model)
    with embedded_triton(options) as triton, embedded_milvus(tmp_path_factory.mktemp("gallery") / "gallery.db", "127.0.0.1", 0) as uri:
        there = ("--triton", triton.grpc, "--milvus", uri)
        done = run_cxr("ingest", "--manifest", manifest, "--no-gate", *there)
        assert done.returncode == 0, done.stderr
        yield there


def test_the_page_says_what_so_few_can_show(run: Path) -> None:
    page = (run / "outcome.md").read_text("utf-8")
    assert "10 of 20 films came to it, 10 of 20 patients" in page
    assert "So few patients (10 of the rarer kind)" in page
    assert re.search(r"\| film and facts \| Deep & Cross \| 0\.\d{3} \[0\.\d{3}, [01]\.\d{3}\] \|.*\| served \|", page)
    assert {path.name for path in run.glob("*.png")} == {"roc-went_icu.png", "calibration-went_icu.png"}
    found = json.loads((run / "outcome.json").read_text("utf-8"))
    assert (found["model_version"], found["facts"], found["known"]) == (VERSION, ["age", "spo2"], [1.0, 0.65])


def test_the_card(model: Path) -> None:
    card = (model / "CARD.md").read_text("utf-8")
    assert "Research use only. Not for diagnosis" in card
    assert "## went_icu: 10 of 20 films, 10 of 20 patients" in card
    assert "## What confounds it" in card
    config = read_config(model)
    assert (config.platform, config.parameters[MODEL_VERSION_PARAMETER].string_value) == ("onnxruntime_onnx", VERSION)


def test_an_answer_tells_what_becomes_of_such_patients(reach: tuple[str, ...], manifest: Path, tmp_path: Path) -> None:
    film = manifest.parent / "images" / "phantom-covid19-0003.png"
    page = tmp_path / "film.html"
    asked = run_cxr("query", film, "--no-gate", "--outcome", "--fact", "age=67", "--html", page, "--json", *reach)
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    one = answer["outcomes"]["went_icu"]
    assert one["rests_on"] == "both"
    assert one["probability"] == one["probabilities"]["both"]
    assert all(0 < value < 1 for value in one["probabilities"].values())
    assert (one["neighbours"]["known"], one["neighbours"]["unknown"]) == (10, 0)
    assert one["neighbours"]["true"] == sum(hit["metadata"]["went_icu"] for hit in answer["neighbours"])
    assert (one["measured"]["films"], one["measured"]["patients"], one["measured"]["with_it"]) == (20, 20, 10)
    assert answer["timings_ms"].keys() >= {"infer", "outcome", "total"}
    assert "intensive care: " in page.read_text("utf-8")

    said = run_cxr("query", film, "--no-gate", "--outcome", *reach)
    told = " ".join(said.stdout.split())
    assert re.search(
        r"intensive care: \d+% by the film alone; of the 10 nearest it came to \d of 10 known\. Learnt from 20 films of 20 patients, area",
        told,
    )
    assert "outcomes" not in json.loads(run_cxr("query", film, "--no-gate", "--json", *reach).stdout)

    wrong = run_cxr("query", film, "--outcome", "--fact", "wbc=7", *reach)
    assert wrong.returncode == 2
    assert "does not know wbc; expected of age, spo2 what is known" in " ".join(wrong.stderr.split())


def test_it_goes_on_where_it_was(run: Path, manifest: Path, quick_client: TritonClient, tmp_path: Path) -> None:
    """Films that were looked at are not looked at again: they may be gone. Half a file of them is none."""
    shutil.copy(run / "features.npz", tmp_path / "features.npz")
    shutil.copy(manifest, tmp_path / "manifest.csv")
    rows, _, _ = choose(read_manifest(tmp_path / "manifest.csv"), ["covid19"], ["age"], ["went_icu"])
    told: list[int] = []
    assert look_at(rows, quick_client, tmp_path, told.append).shape == (FILMS, FEATURE_SIZE)
    assert told == [FILMS]
    (tmp_path / "features.npz").write_bytes((run / "features.npz").read_bytes()[:999])
    with pytest.raises(ManifestError, match="phantom-covid19-0000 cannot be used"):
        look_at(rows, quick_client, tmp_path)


def test_a_server_without_the_model_says_so(quick: Endpoints, quick_client: TritonClient) -> None:
    with pytest.raises(InferenceError, match=r"the server has no model outcome\. Next: serve one that `cxr build outcome` wrote"):
        OutcomeModel.served_by(quick_client)


def test_facts_need_a_model() -> None:
    asked = run_cxr("query", "film.png", "--fact", "age=3")
    assert (asked.returncode, "--fact without --outcome" in asked.stderr) == (UsageError.exit_code, True)


@dataclass
class Announcing:
    """A client of a server whose outcome model says this."""

    said: dict[str, str]
    model_version: str = VERSION
    asked: list[str] = field(default_factory=list)

    def parameters(self, model: str) -> dict[str, str]:
        self.asked.append(model)
        return self.said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda known: known.pop(CARD_PARAMETER), "has no card"),
        (lambda known: known.update({CARD_PARAMETER: "{}"}), "has no card"),
        (lambda known: known.update({MODEL_VERSION_PARAMETER: "abc"}), "features of other weights"),
    ],
)
def test_a_model_that_says_nothing_of_itself_is_not_asked(change: Any, said: str, model: Path) -> None:
    known = {key: value.string_value for key, value in read_config(model).parameters.items()}
    assert OutcomeModel.served_by(cast(TritonClient, Announcing(dict(known)))).outcomes == ("went_icu",)
    change(known)
    with pytest.raises(InferenceError, match=said):
        OutcomeModel.served_by(cast(TritonClient, Announcing(known)))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "CARD.md").unlink(), "no CARD.md"),
        (lambda folder: shutil.rmtree(folder / "1"), "no 1/model.onnx"),
        (lambda folder: _without_card(folder), "no outcome model with a card"),
    ],
)
def test_what_is_no_outcome_model_is_not_served(harm: Any, said: str, model: Path, instant: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    harm(folder)
    with pytest.raises(SetupError, match=said):
        derive_further("outcome", folder, instant, tmp_path / "models", Networks.ensemble, 1)


def test_one_of_other_weights_is_not_served(model: Path, repository: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=f"other weights; expected .*; got {VERSION}"):
        derive_further("outcome", model, repository, tmp_path / "models", Networks.ensemble, 1)


def _without_card(folder: Path) -> None:
    config = read_config(folder)
    del config.parameters[CARD_PARAMETER]
    (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
