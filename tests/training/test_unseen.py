"""Sources left out one after another: who lends, who is asked, what adapting changes; and the whole command on phantoms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_retrieval.cases.manifest import Manifest
from cxr_retrieval.errors import UsageError
from cxr_retrieval.evaluation.metrics import LabelledSet
from cxr_retrieval_training.config import EmbedderConfig, config_path, load_config
from cxr_retrieval_training.report import unseen
from cxr_retrieval_training.report.balance import Described
from cxr_retrieval_training.report.unseen import asked_about, in_source, leave_sources_out, votes
from tests_support import phantoms_to_train_on

LABELS = ("control", "covid19")


def films(source: str, split: str, each: int, usual: tuple[float, float], random: np.random.Generator, lead: float = 0.3) -> Described:
    """Films that lie, all of them, where `usual` says, and by `lead` to the side of their own label; two of each patient."""
    names, patients, vectors = [], [], []
    for number, label in enumerate(LABELS):
        for i in range(each):
            names.append(f"{source}-{split}-{label}-{i}")
            patients.append(f"{source}/{split}-{label}-{i // 2}")
            vectors.append([usual[0], usual[1] + lead * (2 * number - 1), 0.15 * random.normal(), 0.15 * random.normal()])
    found = np.array(vectors, np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    known = LabelledSet(names, found, [label for label in LABELS for _ in range(each)], patients, [source] * len(names))
    return Described(known, found, found)


@pytest.fixture(scope="module")
def known() -> tuple[Described, Described]:
    """Train and val of a source that was learnt from and of one that was not: there, everything looks like COVID-19."""
    random = np.random.default_rng(0)
    train = films("seen", "train", 60, (1.0, 0.0), random).beside(films("strange", "train", 60, (1.0, 0.8), random))
    return train, films("seen", "val", 20, (1.0, 0.0), random).beside(films("strange", "val", 20, (1.0, 0.8), random))


def test_adapting_undoes_what_is_usual(known: tuple[Described, Described]) -> None:
    """And with films of its own in the gallery a hospital needs no adapting."""
    found = asked_about("strange", *known)
    assert found["labels"] == list(LABELS)
    assert found["shares"] == {"control": 0.5, "covid19": 0.5}
    first, *_, last = found["own"]
    assert first["own"] == 0
    assert first["as_it_is"] == pytest.approx(0.5, abs=0.1), "COVID-19 for every film"
    assert first["adapted"] > 0.8
    assert len(first["adapted_draws"]) == 5
    assert first["adapted_ci"][0] <= first["adapted"] <= first["adapted_ci"][1]
    assert last["own"] == 30, "of 100 of each label there are not enough"
    assert last["as_it_is"] > 0.8


def test_who_lends_is_not_asked(known: tuple[Described, Described]) -> None:
    """120 train films of 60 patients, of whom 30 or more lend their films without labels; val's 40 films are asked about in any case."""
    rows = asked_about("strange", *known)["own"]
    assert all(40 < row["n"] <= 160 for row in rows)
    asked_in_one_draw = 160 - 60 - 60  # at least: a patient has two films, and sixty films are drawn
    assert rows[0]["n"] >= asked_in_one_draw


def test_an_own_patients_film_never_votes(known: tuple[Described, Described]) -> None:
    train, _ = known
    one = train[np.array([0])]
    voted = votes(train, train[np.arange(60)], one, {"control": 1.0, "covid19": 1.0})
    twin = train.beside(one)
    again = votes(twin, train[np.arange(60)], one, {"control": 1.0, "covid19": 1.0})
    assert {way: labels.tolist() for way, labels in voted.items()} == {way: labels.tolist() for way, labels in again.items()}


def test_whether_training_was_long_enough(known: tuple[Described, Described]) -> None:
    train, val = known
    mine = [np.array(part.known.sources) == "seen" for part in (train, val)]
    assert in_source(train[mine[0]], val[mine[1]])["balanced_accuracy"] > 0.8


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return phantoms_to_train_on(tmp_path_factory.mktemp("unseen"), 8)


CONFIG = EmbedderConfig.model_validate(
    load_config(config_path("unseen"), EmbedderConfig).model_dump()
    | {
        "init": "random",
        "lungs_only": False,
        "images_per_class": 3,
        "lesion_images": 0,
        "appearance_size": 4,
        "learned_size": 8,
        "validate_every": 1,
        "members": [{"stages": [{"image_size": 64, "iterations": 1, "learning_rate": 1e-3, "losses": {"multi_similarity": 1.0}}]}],
    }
)


def test_the_whole_command_goes_on_where_it_stopped(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEAST": 2, "OWN": (0, 1), "UNLABELLED": 4, "_ASKED": 1, "FOLDS": 2}.items():
        monkeypatch.setattr(unseen, name, value)
    cpu = torch.device("cpu")
    page = leave_sources_out(CONFIG, manifest, tmp_path / "none.pt", tmp_path, cpu, (), ["phantom-south"]).read_text("utf-8")
    found = json.loads((tmp_path / "unseen.json").read_text("utf-8"))
    assert list(found["sources"]) == ["phantom-north", "phantom-south"]
    for one in found["sources"].values():
        for row in one["own"]:
            assert all(0 <= row[way] <= 1 for way in unseen.WAYS)
    assert found["in_source"]["n"] == 6
    in_folds = found["folds"]["phantom-south"]
    south = [row for row in manifest.rows if row.source == "phantom-south"]
    assert in_folds["n"] == len(south), "each film once"
    assert "## phantom-south, 2 folds" in page
    assert "## phantom-north" in page
    assert "Research use only" in page
    with Image.open(tmp_path / "unseen.png") as picture:
        assert min(picture.size) > 200

    def never(*_: object) -> None:
        raise AssertionError("what is trained is not trained again")

    monkeypatch.setattr(unseen, "train_embedder", never)
    again = leave_sources_out(CONFIG, manifest, tmp_path / "none.pt", tmp_path, cpu, ["phantom-north"]).read_text("utf-8")
    assert again.count("\n## ") == 1


def test_what_cannot_be_asked_about_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UsageError, match="elsewhere cannot be asked about"):
        leave_sources_out(CONFIG, manifest, tmp_path / "none.pt", tmp_path, cpu, ["elsewhere"])
    for change in ({"leave_out_source": "phantom-north"}, {"appearance_size": 0}, {"retrieve_with": "features"}):
        with pytest.raises(UsageError, match="this config cannot be used here"):
            leave_sources_out(CONFIG.model_copy(update=change), manifest, tmp_path / "none.pt", tmp_path, cpu)
