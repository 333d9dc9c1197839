"""Films and reports in one subspace: losses beside their formulas, what becomes of missing reports, negation, folds, refusals; the grammar."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cxr_retrieval.cases.manifest import Manifest, ManifestRow, read_manifest
from cxr_retrieval.contract import FINDING_FEATURE_SIZE, TEXT_LENGTH
from cxr_retrieval.errors import InferenceError, ManifestError, UsageError
from cxr_retrieval.inference.tokens import read_tokenizer, tokens_of
from cxr_retrieval.radiograph.phantoms import PHANTOM_FINDINGS, Shown
from cxr_retrieval_training.checkpoints import save_checkpoint
from cxr_retrieval_training.config import MultilabelConfig, MultimodalConfig
from cxr_retrieval_training.multilabel.train_multilabel import CHECKPOINT, load_multilabel
from cxr_retrieval_training.multimodal import train_multimodal as training
from cxr_retrieval_training.multimodal.cases import Cases, names_in, read_reports, texts_in, without
from cxr_retrieval_training.multimodal.losses import distance, likeness, ranking
from cxr_retrieval_training.multimodal.network import TextBranch
from cxr_retrieval_training.multimodal.page import retrieved
from cxr_retrieval_training.multimodal.train_multimodal import fit, load_multimodal, train_multimodal
from findings_phantoms import report

CPU = torch.device("cpu")
CONFIG = MultimodalConfig(width=64, text_size=32, text_layers=1, text_heads=2, epochs=25, batch_size=16, learning_rate=3e-3)
NAMES = ("effusion", "nodule", "pneumothorax")


def made_up(count: int, seed: int = 0, patients: int | None = None) -> Cases:
    """Films whose features hold, beside noise, which of three findings they show; reports by the grammar; the label trained on is one of these."""
    random = np.random.default_rng(seed)
    truth = random.random((count, 3)) < 0.4
    directions = np.random.default_rng(99).normal(size=(3, FINDING_FEATURE_SIZE))
    features = truth @ directions + 0.7 * random.normal(size=(count, FINDING_FEATURE_SIZE))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    labels = np.zeros((count, 4), np.float32)
    for row, there in zip(labels, truth, strict=True):
        row[int(random.choice(np.flatnonzero(there))) if there.any() else 3] = 1
    texts = tuple(
        report([Shown(name, "left", "lower", "small") for name, one in zip(NAMES, there, strict=True) if one], random) for there in truth
    )
    who = [str(number if patients is None else number % patients) for number in range(count)]
    rows = tuple(ManifestRow(Path(), f"{seed}-{i}", Path(f"{i}.png"), "", one, "made up", None, {}) for i, one in enumerate(who))
    return Cases(rows, features, labels, truth, texts)


# ------------------------------------------------------------------------------------------------------ reports, words


def test_a_report_tells_what_is_there_and_denies_only_what_is_not() -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        names = [name for name in PHANTOM_FINDINGS if random.random() < 0.3]
        text = report([Shown(name, "right", "upper", "large") for name in names], random)
        assert text
        denied = " ".join(
            one for one in text.lower().split(". ") if one.startswith(("no ", "there is no ", "lungs without")) or "not seen" in one
        )
        for name, word in (("effusion", "effusion"), ("nodule", "nodule"), ("pneumothorax", "pneumothorax")):
            assert (word in denied) <= (name not in names), text
            if name in ("nodule", "pneumothorax"):
                assert (name not in names) or word in text.lower().replace("nodular", "nodule"), text


def test_some_findings_are_left_out_of_the_text() -> None:
    shown = [Shown("nodule", "left", "lower", "small")]
    said = ["nod" in report(shown, np.random.default_rng(seed), 0.3).lower() for seed in range(200)]
    assert 0.6 < np.mean(said) < 0.8


def test_words_that_name_the_diagnosis_are_hidden() -> None:
    text = "COVID-19 pneumonia, SARS-CoV-2 PCR positive; bilateral opacities, coronavirus."
    assert without(text, ["covid", "sars", "pcr", "positive", "corona"]) == "pneumonia, ; bilateral opacities, ."
    assert without(text, []) == text
    row = ManifestRow(Path(), "a", Path("a.png"), "x", None, None, None, {"notes": "Confirmed COVID"})
    assert texts_in([row], "notes", ["covid"]) == ("Confirmed",)
    assert texts_in([row], "other", ["covid"]) == ("",)


def test_a_tokenizer_says_the_same_in_service(tmp_path: Path) -> None:
    cases = made_up(40)
    learnt = fit(cases, CONFIG.model_copy(update={"epochs": 1}), None)
    again = read_tokenizer(learnt.tokenizer.to_str())
    texts = [*cases.texts, "", "Völlig Anderes", "nodule " * 500]
    tokens = tokens_of(again, texts)
    np.testing.assert_array_equal(tokens, tokens_of(learnt.tokenizer, texts))
    assert tokens.shape == (len(texts), TEXT_LENGTH)
    assert not tokens[len(cases.texts)].any()
    assert tokens[-1].all()
    assert tokens_of(again, ["Nodule"]).tolist() == tokens_of(again, ["nodule"]).tolist()
    with pytest.raises(InferenceError, match="tokenizer cannot be read"):
        read_tokenizer("{}")


def test_reports_alone(tmp_path: Path) -> None:
    path = tmp_path / "reports.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["findings", "impression", "Problems", "split"])
        writer.writerows([["Big heart.", "Cardiomegaly.", "Cardiomegaly;Rare" if i == 0 else "Cardiomegaly", "train"] for i in range(20)])
        writer.writerows(
            [["Clear lungs.", "", "normal", "train"], ["Left out", "", "Cardiomegaly", "val"], ["", "", "Cardiomegaly", "train"]]
        )
    found = read_reports(path, [])
    assert found.terms == ("Cardiomegaly",)
    assert found.texts[0] == "Big heart. Cardiomegaly."
    assert (len(found.texts), found.given.sum()) == (21, 20)
    path.write_text("text\nBig heart.\n")
    with pytest.raises(ManifestError, match="no column findings, impression, Problems"):
        read_reports(path, [])


# -------------------------------------------------------------------------------------------------------------- losses


def test_the_losses_are_those_of_their_formulas() -> None:
    random = torch.Generator().manual_seed(3)
    images, texts = (torch.nn.functional.normalize(torch.randn(5, 7, generator=random), dim=1) for _ in range(2))
    assert distance(images, texts).item() == pytest.approx((2 - 2 * (images * texts).sum(dim=1)).mean().item(), rel=1e-5)
    labels = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]])
    expected = [[1, 0.5, 0, 0, 0], [0.5, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    np.testing.assert_allclose(likeness(labels).numpy(), expected)
    there = ~torch.eye(5, dtype=torch.bool)
    similarity, wanted = images @ images.T, likeness(labels)
    total = 0.0
    for row in range(5):
        others = [n for n in range(5) if n != row]
        target = np.exp(10 * wanted[row, others].numpy())
        said = np.exp(similarity[row, others].numpy() / 0.1)
        total -= float((target / target.sum() * np.log(said / said.sum())).sum()) / 5
    assert ranking(similarity, wanted, there, 0.1, 10.0).item() == pytest.approx(total, rel=1e-4)
    assert ranking(similarity, wanted, torch.zeros_like(there), 0.1, 10.0).item() == 0


def test_what_lies_after_the_end_of_a_text_changes_nothing() -> None:
    torch.manual_seed(0)
    branch = TextBranch(50, 32, 2, 4, 0.1).eval()
    tokens = torch.zeros(3, TEXT_LENGTH, dtype=torch.int32)
    tokens[0, :3], tokens[1, :9] = torch.tensor([4, 5, 6]), torch.arange(2, 11)
    with torch.inference_mode():
        whole, short = branch(tokens), branch(tokens[:, :9])
        turned = branch(tokens.flip(1)[:, -9:])
    torch.testing.assert_close(whole[:2], short[:2], atol=1e-5, rtol=0)
    assert torch.isfinite(whole[2]).all()
    assert (whole[1] - turned[1]).abs().max() > 1e-3  # the order of words counts
    torch.testing.assert_close(torch.linalg.vector_norm(whole, dim=1), torch.ones(3))


# ------------------------------------------------------------------------------------------------------------- training


def test_smaller_shares_of_reports_are_part_of_greater_ones() -> None:
    cases = made_up(200)
    told = {share: np.array([bool(text) for text in cases.with_share(share, 1).texts]) for share in (0.0, 0.25, 0.5, 1.0)}
    assert (told[0.0].sum(), told[1.0].sum()) == (0, 200)
    assert 30 < told[0.25].sum() < 70
    assert (told[0.25] <= told[0.5]).all()


@pytest.fixture(scope="module")
def learnt() -> training.Learnt:
    return fit(made_up(240), CONFIG, None)


def test_words_find_films(learnt: training.Learnt) -> None:
    """Of films that were not learnt from, in every direction; the reports' findings are found though only one of a film's is a label."""
    gallery, queries = made_up(240), made_up(80, seed=1)
    found = {one.name: one for one in retrieved(gallery, queries, learnt.images, learnt.texts)}
    for name in ("image_image", "image_text", "text_image", "both_image", "text_text"):
        assert found[name].acg_p.mean() > found["chance"].acg_p.mean() + 0.25, name
        assert found[name].recall[:, 2].mean() > 0.8, name
    assert 0 < found["chance"].precision.mean() < 0.3


def test_no_effusion_is_not_effusion(learnt: training.Learnt) -> None:
    said = learnt.texts(
        [
            "There is a small effusion on the left.",
            "No effusion.",
            "No evidence of pneumothorax or effusion.",
            "Fluid in the left pleural space.",
        ]
    )
    similar = said @ said.T
    assert similar[0, 3] > similar[0, 1] + 0.1
    assert similar[1, 2] > similar[1, 0] + 0.1
    films = made_up(200, seed=2)
    there = films.truth[:, 0]
    by_text = learnt.images(films.features) @ said.T
    assert by_text[there, 0].mean() > by_text[~there, 0].mean() + 0.1
    assert by_text[there, 1].mean() < by_text[~there, 1].mean()


def test_films_without_a_report_take_part(learnt: training.Learnt) -> None:
    """A network that never saw a report finds films by films, and says the same of a film as one that could not."""
    silent = fit(made_up(240).with_share(0.0, 1), CONFIG, None)
    gallery, queries = made_up(240), made_up(80, seed=1)
    found = {one.name: one for one in retrieved(gallery, queries, silent.images, silent.texts)}
    assert found["image_image"].acg_p.mean() > found["chance"].acg_p.mean() + 0.15
    nobody = retrieved(gallery.with_share(0.0, 1), queries, learnt.images, learnt.texts)
    assert {one.name for one in nobody} == found.keys() - {"image_text", "text_text"}  # there is none to find


def test_whole_patients_are_asked_about() -> None:
    cases = made_up(90, patients=30)
    parts = training.parts_of(cases[np.arange(90) < 60], cases[np.arange(90) >= 60], CONFIG.model_copy(update={"folds": 5}))
    asked = [row.image_id for _, queries in parts for row in queries.rows]
    assert sorted(asked) == sorted(row.image_id for row in cases.rows)
    for gallery, queries in parts:
        assert not set(gallery.patients.tolist()) & set(queries.patients.tolist())
    with pytest.raises(UsageError, match="fewer patients with a report than folds"):
        training.parts_of(cases[np.arange(90) < 1], cases[np.arange(90) == 30], CONFIG.model_copy(update={"folds": 5}))


# ------------------------------------------------------------------------------------------------------ the whole command


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("films")
    cases = made_up(60)
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "path", "label", "split", "patient_id", "clinical_notes", "main"])
        for number, (text, there) in enumerate(zip(cases.texts, cases.truth, strict=True)):
            names = [name for name, one in zip(NAMES, there, strict=True) if one]
            split = "val" if number >= 40 else "train"
            writer.writerow([number, f"{number}.png", "|".join(names) or "control", split, number, text, (names or ["control"])[0]])
    return read_manifest(folder / "manifest.csv")


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A network below, of which the features are made up; where its checkpoint would be."""
    features = {str(number): row for number, row in enumerate(made_up(60).features)}
    network = torch.nn.Linear(1, 1)
    about = {
        "config": MultilabelConfig().model_dump(mode="json"),
        "findings": ["a"],
        "column": "label",
        "data_sha256": "0",
        "date": "",
        "epoch": 1,
    }

    def loaded(rows: Sequence[ManifestRow], what: str) -> NDArray[np.float32]:
        return np.stack([features[row.image_id] for row in rows])

    monkeypatch.setattr(training, "load_multilabel", lambda path: (network, about))
    monkeypatch.setattr(training, "load_images", loaded)
    monkeypatch.setattr(training, "look", lambda network, images, device, what: (images, None))
    return tmp_path / CHECKPOINT


def test_the_page_tells_what_missing_reports_cost(manifest: Manifest, looked: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"epochs": 2, "shares": (0.0, 0.5)})
    page = train_multimodal(config, manifest, looked, tmp_path / "out", CPU, "main", "label")
    told = json.loads((tmp_path / "out" / "multimodal.json").read_text())
    assert told["figures"].keys() == {"0.0", "0.5", "1.0"}
    assert told["labels"] == ["control", "effusion", "nodule", "pneumothorax"]
    assert (told["films"], told["with_report"]) == ({"train": 40, "val": 20}, {"train": 40, "val": 20})
    text = page.read_text()
    assert "| film and text → film |" in text
    assert "| 50 % |" in text
    assert (tmp_path / "out" / "shares.png").is_file()
    network, _, about = load_multimodal(tmp_path / "out" / "multimodal.pt")
    assert about["judged_by"] == "label"
    assert network.classifier.out_features == 4
    again = train_multimodal(config.model_copy(update={"folds": 3, "shares": (1.0,)}), manifest, looked, tmp_path / "folds", CPU)
    assert "in 3 folds, whole patients each" in again.read_text()


def test_what_cannot_be_learnt_is_refused(manifest: Manifest, looked: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="too few train films with a report in column other; expected 16 or more; got 0"):
        train_multimodal(CONFIG, manifest, looked, tmp_path / "out", CPU, text_column="other")
    with pytest.raises(ManifestError, match="nothing to tell apart in column nowhere"):
        train_multimodal(CONFIG, manifest, looked, tmp_path / "out", CPU, "nowhere")
    assert names_in(manifest, "main") == ("control", "effusion", "nodule", "pneumothorax")


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other.pt", {"state": {}})
    with pytest.raises(UsageError, match="no checkpoint of a multimodal network"):
        load_multimodal(tmp_path / "other.pt")
    with pytest.raises(UsageError, match="no checkpoint of a multi-label network"):
        load_multilabel(tmp_path / "other.pt")
