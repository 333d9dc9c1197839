"""Other spaces than the ensemble's, from a manifest to an answer: networks trained, built, served beside the ensemble, asked by film and by words."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.cases.pseudonyms import open_pseudonyms
from cxr_retrieval.contract import CARD_PARAMETER, MODEL_VERSION_PARAMETER, MULTILABEL_MODEL, MULTIMODAL_TEXT_MODEL, TOKENIZER_PARAMETER
from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.retrieval.retriever import Retriever
from cxr_retrieval.serving.choices import Networks
from cxr_retrieval.serving.repository import derive_further, read_config
from cxr_retrieval.serving.server import Endpoints, ServerOptions, embedded_milvus, embedded_triton
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, SpaceName, TritonSettings
from cxr_retrieval_build.multilabel import build_multilabel
from cxr_retrieval_build.multimodal import build_multimodal
from cxr_retrieval_training.config import MultilabelConfig, MultimodalConfig
from cxr_retrieval_training.multilabel import network
from cxr_retrieval_training.multilabel.train_multilabel import train_multilabel
from cxr_retrieval_training.multimodal.train_multimodal import train_multimodal
from small_densenet import SmallDenseNet
from tests_support import KEY_FILE, Viewed, run_cxr

FILMS = 40
SAID = {
    "above": ("Bright opacity in the upper zone.", "There is an upper opacity.", "Upper zone opacity, bright."),
    "below": ("Pleural effusion.", "There is an effusion.", "Fluid at the base, effusion."),
}
DENIED = {"above": ("No upper opacity.", "Upper zone without opacity."), "below": ("No effusion.", "No evidence of effusion.")}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a bright blot above, below, both or neither; notes that tell and deny it, of every fifth none."""
    folder = tmp_path_factory.mktemp("films")
    random = np.random.default_rng(4)
    rows = []
    for number in range(FILMS):
        there = {"above": bool(number & 1), "below": bool(number & 2)}
        picture = random.normal(90, 8, (64, 64))
        for name, row in (("above", 8), ("below", 40)):
            column = int(random.integers(4, 44))
            picture[row : row + 16, column : column + 16] += 90 * there[name]
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        notes = [str(random.choice((SAID if one else DENIED)[name])) for name, one in there.items()]
        rows.append(
            {
                "image_id": f"film-{number}",
                "path": f"{number}.png",
                "label": "|".join(name for name, one in there.items() if one) or "control",
                "patient_id": str(number),
                "source": "made up",
                "split": "val" if number >= 32 else "train",
                "clinical_notes": " ".join(notes) if number % 5 else "",
            }
        )
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def models(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `multilabel` and `multimodal`, built; the network is a DenseNet of fewer layers."""
    out, cpu = tmp_path_factory.mktemp("models"), torch.device("cpu")
    rows = read_manifest(manifest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "densenet121", SmallDenseNet)
        train_multilabel(MultilabelConfig(image_size=64, epochs=8, batch_size=8, least_films=3), rows, out / "findings", cpu)
        built = build_multilabel(out / "findings" / "multilabel.pt", out / "multilabel")
        config = MultimodalConfig(width=64, text_size=32, text_layers=1, epochs=40, batch_size=8, learning_rate=3e-3)
        train_multimodal(config, rows, out / "findings" / "multilabel.pt", out / "reports", cpu)
        both = build_multimodal(out / "reports" / "multimodal.pt", out / "multimodal")
    assert max(built["parity"].values()) < 1e-4
    assert max(gap for found in both["parity"].values() for gap in found.values()) < 1e-4
    return out


@pytest.fixture(scope="module")
def reach(instant: Path, models: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """A server with both, and a gallery of each space."""
    options = ServerOptions(
        instant, grpc_port=0, http_port=0, metrics_port=0, multilabel=models / "multilabel", multimodal=models / "multimodal"
    )
    with embedded_triton(options) as triton, embedded_milvus(tmp_path_factory.mktemp("gallery") / "gallery.db", "127.0.0.1", 0) as uri:
        there = ("--triton", triton.grpc, "--milvus", uri)
        for space in ("findings", "reports"):
            done = run_cxr("ingest", "--manifest", manifest, "--no-gate", "--space", space, *there)
            assert done.returncode == 0, done.stderr
            assert f"{FILMS} stored" in done.stdout
        yield there


def asked(*words: str | Path) -> dict[str, Any]:
    done = run_cxr("query", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_films_are_found_by_their_findings(reach: tuple[str, ...], manifest: Path) -> None:
    found = asked(manifest.parent / "3.png", "--space", "findings", "--no-gate", "--top-k", "5", *reach)
    assert found["space"] == "findings"
    assert "balance" not in found
    assert found["model_version"].startswith("findings_")
    assert [hit["label"] for hit in found["neighbours"]] == ["above|below"] * 5
    assert found["prediction"]["findings"] == {"above": pytest.approx(1), "below": pytest.approx(1)}
    assert (found["prediction"]["calibrated"], found["prediction"]["set"]) == (None, None)
    assert "film-3" not in {hit["image_id"] for hit in found["neighbours"]}
    assert "film-3" in {hit["image_id"] for hit in found["earlier_films"]}
    some = asked(manifest.parent / "3.png", "--space", "findings", "--no-gate", "--where", 'label == "control"', *reach)
    assert {hit["label"] for hit in some["neighbours"]} == {"control"}


def test_an_evaluation_in_the_space(reach: tuple[str, ...], manifest: Path) -> None:
    done = run_cxr("evaluate", "--gallery", manifest, "--queries", manifest, "--space", "findings", "--json", *reach)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["space"] == "findings"
    assert found["overall"]["recall_at"]["1"] > 0.9
    assert found["findings"]["acg_p"] > 0.8
    assert f"{FILMS} of {FILMS} vectors from the store" in done.stderr
    wrong = run_cxr("evaluate", "--gallery", manifest, "--queries", manifest, "--space", "findings", "--feedback", *reach)
    assert (wrong.returncode, "--space findings with --calibration or --feedback" in wrong.stderr) == (UsageError.exit_code, True)


def test_clusters_in_the_space(reach: tuple[str, ...], manifest: Path) -> None:
    done = run_cxr("cluster", "--space", "findings", "--neighbours", "4", "--json", *reach[reach.index("--milvus") :])
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["clusters"]) >= 2
    found = asked(manifest.parent / "1.png", "--space", "findings", "--no-gate", "--method", "cluster", "--top-k", "5", *reach)
    assert found["method"] == "cluster"
    assert {hit["label"] for hit in found["neighbours"]} == {"above"}


def test_words_find_films(reach: tuple[str, ...], tmp_path: Path) -> None:
    """Without a film; also cases that have no notes. The audit log has no word of it."""
    log = tmp_path / "audit.jsonl"
    found = asked("--text", "No upper opacity. Pleural effusion.", "--top-k", "8", "--audit", log, *reach)
    assert found["image_id"] is None
    assert found["text"] == "No upper opacity. Pleural effusion."
    assert [hit["label"] for hit in found["neighbours"]].count("below") >= 6
    assert found["prediction"]["label"] == "below"
    assert (found["prediction"]["calibrated"], found["prediction"]["abstained"]) == (None, None)
    assert found["ood"] == {"score": None, "refused": False, "reason": None}
    contract = {"image_id", "model_version", "prediction", "neighbours", "timings_ms", "warnings"}
    assert contract <= found.keys()
    assert any("clinical_notes" not in hit["metadata"] for hit in asked("--text", "effusion", "--top-k", "20", *reach)["neighbours"])
    other = asked("--text", "Bright opacity in the upper zone. No effusion.", "--top-k", "8", *reach)
    assert [hit["label"] for hit in other["neighbours"]].count("above") >= 6
    assert "effusion" not in log.read_text()
    told = run_cxr("query", "--text", "effusion", "--top-k", "3", *reach)
    assert "cases whose films are most like 'effusion'" in " ".join(told.stdout.split())
    assert "Research use only" in told.stdout


def test_reports_are_found(reach: tuple[str, ...], manifest: Path) -> None:
    """Cases without one come last."""
    found = asked("--text", "No effusion. No upper opacity.", "--match", "report", "--top-k", str(FILMS), *reach)
    told = ["clinical_notes" in hit["metadata"] for hit in found["neighbours"]]
    assert told == sorted(told, reverse=True)
    assert found["neighbours"][0]["label"] == "control"
    assert found["neighbours"][-1]["similarity"] == pytest.approx(-1)
    by_film = asked(manifest.parent / "2.png", "--space", "reports", "--match", "report", "--no-gate", "--top-k", "5", *reach)
    assert [hit["label"] for hit in by_film["neighbours"]].count("below") >= 4


def test_film_and_words_are_weighed(reach: tuple[str, ...], manifest: Path) -> None:
    film, text = manifest.parent / "1.png", "Effusion. No upper opacity."
    alone = asked("--text", text, "--top-k", "6", *reach)
    for weight, expected in ((1.0, alone), (0.0, None)):
        both = asked(film, "--text", text, "--text-weight", str(weight), "--no-gate", "--include-own", "--top-k", "6", *reach)
        if expected is not None:
            assert [hit["image_id"] for hit in both["neighbours"]] == [hit["image_id"] for hit in expected["neighbours"]]
        else:
            assert both["neighbours"][0]["image_id"] == "film-1"
    half = asked(film, "--text", text, "--text-weight", "0.5", "--no-gate", "--include-own", "--top-k", str(FILMS), *reach)
    shares = {weight: _similarities(film, text, weight, reach) for weight in (0.0, 1.0)}
    for hit in half["neighbours"]:
        mean = (shares[0.0][hit["image_id"]] + shares[1.0][hit["image_id"]]) / 2
        assert hit["similarity"] == pytest.approx(mean, abs=1e-5)


def _similarities(film: Path, text: str, weight: float, reach: tuple[str, ...]) -> dict[str, float]:
    found = asked(film, "--text", text, "--text-weight", str(weight), "--no-gate", "--include-own", "--top-k", str(FILMS), *reach)
    return {hit["image_id"]: hit["similarity"] for hit in found["neighbours"]}


def test_another_report_of_a_film_is_another_vector(reach: tuple[str, ...], manifest: Path, tmp_path: Path) -> None:
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    rows[1]["clinical_notes"] = "Fluid at the base, effusion."
    other = manifest.with_name("other.csv")
    with other.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    words = ("--text", rows[1]["clinical_notes"], "--match", "report", "--where", 'image_id == "film-1"', *reach)
    before = asked(*words)["neighbours"][0]["similarity"]
    done = run_cxr("ingest", "--manifest", other, "--no-gate", "--space", "reports", *reach)
    assert f"1 stored, {FILMS - 1} unchanged" in done.stdout
    assert asked(*words)["neighbours"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    assert before < 0.999
    again = run_cxr("ingest", "--manifest", manifest, "--no-gate", "--space", "reports", *reach)
    assert f"1 stored, {FILMS - 1} unchanged" in again.stdout


def test_from_python(reach: tuple[str, ...], manifest: Path) -> None:
    servers = TritonSettings(reach[1]), MilvusSettings(reach[3]), PseudonymSettings(KEY_FILE)
    with Retriever(*servers, space=SpaceName.findings) as retriever:
        found = retriever.query(manifest.parent / "2.png", gate=False, top_k=3)
        assert [hit.case.label for hit in found.neighbours] == ["below"] * 3
        with pytest.raises(UsageError, match="cannot be asked in words; expected one of the space reports; got findings"):
            retriever.query_text("effusion")
    with Retriever(*servers, space=SpaceName.reports) as retriever:
        answer = retriever.query_text("No upper opacity. Pleural effusion.", top_k=4, where='label != "control"')
        assert repr(answer) == f"<TextAnswer: below, share {answer.prediction.confidence:.2f}, 4 neighbours, model {answer.model_version}>"
        for wrong in ("", " ", "word " * 500):
            with pytest.raises(UsageError, match="no such question"):
                retriever.query_text(wrong)


def test_it_is_exported_and_imported(reach: tuple[str, ...], manifest: Path, tmp_path: Path) -> None:
    found = asked(manifest.parent / "0.png", "--space", "findings", "--no-gate", "--top-k", "1", *reach)
    version, file = found["model_version"], tmp_path / "gallery.parquet"
    milvus = reach[reach.index("--milvus") :]
    done = run_cxr("gallery", "export", file, "--model-version", version, *milvus)
    assert done.returncode == 0, done.stderr
    assert run_cxr("gallery", "drop", f"cxr_{version}", *milvus).returncode == 0
    gone = run_cxr("query", manifest.parent / "0.png", "--space", "findings", *reach)
    assert (gone.returncode, f"no gallery for model version {version}" in " ".join(gone.stderr.split())) == (2, True)
    done = run_cxr("gallery", "import", file, *milvus)
    assert done.returncode == 0, done.stderr
    again = asked(manifest.parent / "0.png", "--space", "findings", "--no-gate", "--top-k", "1", *reach)
    assert [hit["image_id"] for hit in again["neighbours"]] == [hit["image_id"] for hit in found["neighbours"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("film.png", "--space", "findings"), "the server has no model multilabel. Next: serve one: `cxr serve --multilabel FOLDER`"),
        (("--text", "effusion"), "the server has no model multimodal_image"),
    ],
)
def test_a_server_without_the_network_says_so(words: tuple[str, ...], said: str, quick: Endpoints, tmp_path: Path) -> None:
    key = tmp_path / "key"
    with open_pseudonyms(PseudonymSettings(key, tmp_path / "table.sqlite"), create=True):
        done = run_cxr("query", *words, "--triton", quick.grpc, "--milvus", tmp_path / "none.db", "--pseudonym-key", key)
    assert (done.returncode, said in " ".join(done.stderr.split())) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to ask with; expected IMAGE, or --text"),
        (("--text", "effusion", "--html", "page.html"), "--html without a film"),
        (("film.png", "--text-weight", "0.5"), "--text-weight without both"),
        (("--text", "effusion", "--text-weight", "0.5"), "--text-weight without both"),
    ],
)
def test_questions_that_are_none(words: tuple[str, ...], said: str) -> None:
    done = run_cxr("query", *words)
    assert (done.returncode, said in " ".join(done.stderr.split())) == (2, True), done.stderr


def test_a_gallery_of_films_is_asked_as_ever(reach: tuple[str, ...], manifest: Path) -> None:
    """None was ingested here; the alias `cxr` points to no gallery of another space."""
    done = run_cxr("query", manifest.parent / "0.png", *reach)
    assert (done.returncode, "no gallery for model version" in " ".join(done.stderr.split())) == (2, True)
    done = run_cxr("cluster", *reach[reach.index("--milvus") :])
    assert "points to none" in " ".join(done.stderr.split())


def test_cards_say_what_it_was_made_of(models: Path) -> None:
    card = (models / "multilabel" / "CARD.md").read_text("utf-8")
    assert "Research use only. Not for diagnosis" in card
    assert "- Findings: above, below." in card
    assert "## What confounds it" in card
    config = read_config(models / "multimodal" / MULTIMODAL_TEXT_MODEL)
    assert json.loads(config.parameters[CARD_PARAMETER].string_value)["with_report"] == {"train": 25, "val": 7}
    assert config.parameters[TOKENIZER_PARAMETER].string_value
    other = read_config(models / "multimodal" / "multimodal_image")
    assert other.parameters[MODEL_VERSION_PARAMETER] == config.parameters[MODEL_VERSION_PARAMETER]
    both = (models / "multimodal" / MULTIMODAL_TEXT_MODEL / "CARD.md").read_text("utf-8")
    assert "Below it, frozen: a network for above, below" in both
    with pytest.raises(SetupError, match="already exists"):
        build_multilabel(models / "findings" / "multilabel.pt", models / "multilabel")


def test_what_is_no_such_network_is_not_served(models: Path, instant: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "multilabel", tmp_path / "harmed")
    (tmp_path / "harmed" / "CARD.md").unlink()
    with pytest.raises(SetupError, match=r"no CARD\.md.*cxr build multilabel"):
        derive_further(MULTILABEL_MODEL, tmp_path / "harmed", instant, tmp_path / "models", Networks.ensemble, 1)
    with pytest.raises(SetupError, match="no multilabel model with a card"):
        derive_further(MULTILABEL_MODEL, models / "multimodal" / "multimodal_image", instant, tmp_path / "models", Networks.ensemble, 1)


def test_the_page_finds_films_by_words(reach: tuple[str, ...], manifest: Path, tmp_path: Path) -> None:
    """In Chromium: the field is there where a server understands words; what is found can be asked about like any stored case."""
    assert run_cxr("ingest", "--manifest", manifest, "--no-gate", *reach).returncode == 0
    chromium = shutil.which("chromium")
    assert chromium, "chromium is a test requirement: `make test` installs it on Debian"
    with Viewed(*reach, "--audit", tmp_path / "audit.jsonl") as running, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"{running.url}#/cases")
        page.get_by_label("Films like these words").fill("No upper opacity. Pleural effusion.")
        page.get_by_role("button", name="Show").click()
        expect(page.locator(".shares")).to_contain_text("by weight of similarity", timeout=20_000)
        cards = page.locator(".card")
        expect(cards).to_have_count(FILMS, timeout=20_000)
        expect(cards.first).to_contain_text("below")
        expect(cards.first).to_contain_text("similarity 0.")
        if folder := os.environ.get("CXR_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / "words.png")
        page.get_by_label("Films like these words").fill("")
        page.get_by_role("button", name="Show").click()
        expect(page.locator(".shares")).to_have_count(0, timeout=20_000)
        browser.close()
        running.stop()
    assert "effusion" not in (tmp_path / "audit.jsonl").read_text()
