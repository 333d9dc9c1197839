"""Films with several findings: what is stated of each, the loss beside its formula, a training found again after a kill, its page."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import densenet121

from cxr_retrieval.cases.manifest import Manifest, read_manifest
from cxr_retrieval.errors import ManifestError, UsageError
from cxr_retrieval_training.checkpoints import save_checkpoint
from cxr_retrieval_training.config import MultilabelConfig
from cxr_retrieval_training.multilabel import network as network_
from cxr_retrieval_training.multilabel import train_multilabel as training
from cxr_retrieval_training.multilabel.cases import films_of, findings_in, held_out
from cxr_retrieval_training.multilabel.network import FindingsNetwork, start_from
from cxr_retrieval_training.multilabel.train_multilabel import criterion, load_multilabel, train_multilabel
from small_densenet import SmallDenseNet

CONFIG = MultilabelConfig(image_size=64, epochs=5, batch_size=8, least_films=3)
CPU = torch.device("cpu")


def write(folder: Path, rows: Sequence[dict[str, str]]) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image_id", "path", *columns])
        writer.writeheader()
        writer.writerows({"image_id": str(i), "path": f"{i}.png", **row} for i, row in enumerate(rows))
    return read_manifest(folder / "manifest.csv")


@pytest.fixture(scope="module")
def small() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_, "densenet121", SmallDenseNet)
        yield


@pytest.fixture(scope="module")
def blots(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Pictures with a bright blot above, one below, both or none."""
    folder = tmp_path_factory.mktemp("blots")
    random = np.random.default_rng(0)
    rows = []
    for number in range(72):
        above, below = bool(number & 1), bool(number & 2)
        picture = random.normal(90, 8, (64, 64))
        for there, row in ((above, 8), (below, 40)):
            column = int(random.integers(4, 44))
            picture[row : row + 16, column : column + 16] += 90 * there
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        names = [name for name, there in (("above", above), ("below", below)) if there]
        label = "|".join(names) or "control"
        rows.append(
            {
                "label": label,
                "one": names[0] if names else "control",
                "split": "val" if number >= 48 else "train",
                "patient_id": str(number),
            }
        )
    return write(folder, rows)


@pytest.fixture(scope="module")
def run(small: object, blots: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "several"
    assert train_multilabel(CONFIG, blots, out, CPU) == out / "multilabel.md"
    return out


# ------------------------------------------------------------------------------------------------------- what is stated


def test_what_is_uncertain_is_neither(tmp_path: Path) -> None:
    rows = [
        {"label": "a|b", "uncertain": "b", "split": "train"},
        {"label": "No Finding", "uncertain": "", "split": "train"},
        {"label": "b", "uncertain": "", "split": "train"},
    ]
    manifest = write(tmp_path, rows)
    config = CONFIG.model_copy(update={"least_films": 1})
    assert findings_in(manifest, "label", config) == ("a", "b")
    np.testing.assert_array_equal(films_of(manifest, "train", "label", ("a", "b")).stated, [[1, np.nan], [0, 0], [0, 1]])


def test_rare_findings_are_not_learnt_unless_asked_for(tmp_path: Path) -> None:
    rows = [{"label": label, "split": "train"} for label in ("a", "a", "a|rare", "control", "NORMAL", "no_finding")]
    manifest = write(tmp_path, rows)
    assert findings_in(manifest, "label", CONFIG) == ("a",)
    assert findings_in(manifest, "label", CONFIG, ["rare"]) == ("rare",)


@pytest.mark.parametrize(
    ("column", "wanted", "said"),
    [
        ("raw", [], "nothing in column raw; expected findings.*label"),
        ("label", ["c"], r"no train film has c; expected a \(3\)"),
        ("few", [], "nothing to tell apart in column few; expected findings that 3 train films have"),
        ("all", [], "nothing to tell apart in column all"),
    ],
)
def test_columns_that_cannot_be_learnt_from(column: str, wanted: list[str], said: str, tmp_path: Path) -> None:
    rows = [
        {"label": label, "few": few, "all": "x", "split": "train"} for label, few in (("a", "z"), ("a", ""), ("a", ""), ("control", ""))
    ]
    with pytest.raises(ManifestError, match=said):
        findings_in(write(tmp_path, rows), column, CONFIG, wanted)


def test_a_split_without_labels_is_refused(tmp_path: Path) -> None:
    manifest = write(tmp_path, [{"label": "a", "raw": "a", "split": "train"}, {"label": "a", "raw": "", "split": "val"}])
    with pytest.raises(ManifestError, match="no val film with something in column raw"):
        films_of(manifest, "val", "raw", ("a",))


def test_whole_patients_are_held_out(tmp_path: Path) -> None:
    rows = [{"label": "a", "split": "train", "patient_id": str(number // 3)} for number in range(300)]
    films = films_of(write(tmp_path, rows), "train", "label", ("a",))
    out = held_out(films)
    assert 0.04 < out.mean() < 0.2
    assert not {row.patient for row, one in zip(films.rows, out, strict=True) if one} & {
        row.patient for row, one in zip(films.rows, out, strict=True) if not one
    }
    with pytest.raises(UsageError, match="too few patients"):
        held_out(films[np.arange(300) < 1])


# --------------------------------------------------------------------------------------------------- network and loss


def test_the_loss_is_that_of_the_formula() -> None:
    """−(w₊ y log p + w₋ (1 − y) log(1 − p)), the rarer side weighed more; what is uncertain moves nothing."""
    stated = np.array([[1, 0], [0, 0], [0, 1], [0, np.nan]], np.float32)
    logits = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 2.0], [0.1, 5.0]], requires_grad=True)
    loss = criterion("weighted", stated)(logits, torch.from_numpy(stated))
    p, y = torch.sigmoid(logits.detach()).numpy(), stated
    share = np.array([1 / 4, 1 / 3])
    each = -((1 - share) * y * np.log(p) + share * (1 - y) * np.log(1 - p))
    assert loss.item() == pytest.approx(np.nansum(each) / 7, rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[3, 1] == 0
    assert (logits.grad != 0).sum() == 7
    plain = criterion("plain", stated)(logits, torch.from_numpy(stated))
    assert plain.item() == pytest.approx(np.nansum(-(y * np.log(p) + (1 - y) * np.log(1 - p))) / 7, rel=1e-5)


def test_exposure_changes_nothing(small: object) -> None:
    torch.manual_seed(2)
    network = FindingsNetwork(3, 64).eval()
    film = torch.randint(20, 100, (2, 1, 256, 256), dtype=torch.uint8)
    with torch.inference_mode():
        features, said = network(film)
        brighter, _ = network(film + film)
        flat, _ = network(torch.zeros_like(film))
    torch.testing.assert_close(features, brighter, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.linalg.vector_norm(features, dim=1), torch.ones(2))
    assert torch.isfinite(flat).all()
    assert ((said > 0) & (said < 1)).all()


def test_it_is_densenet_121(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision has it, with 6,953,856 numbers before its classifier, of which 6,272 look at two more colours."""
    monkeypatch.setattr(network_, "densenet121", densenet121)
    network = FindingsNetwork(2, 128)
    assert sum(one.numel() for one in network.body.parameters()) == 6_953_856 - 6_272
    with torch.inference_mode():
        features, said = network.eval()(torch.randint(0, 256, (1, 1, 256, 256), dtype=torch.uint8))
    assert (features.shape, said.shape) == ((1, 1024), (1, 2))


def test_it_begins_where_a_state_dict_of_torchvision_ends(small: object, tmp_path: Path) -> None:
    torch.manual_seed(5)
    whole = SmallDenseNet()
    torch.save(whole.state_dict(), tmp_path / "imagenet.pt")
    network = FindingsNetwork(2, 64)
    start_from(network, tmp_path / "imagenet.pt")
    grey = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(network.body.eval()(grey), whole.features.eval()(grey.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    torch.save({"features.conv0.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match="not a torchvision DenseNet-121"):
        start_from(network, tmp_path / "other.pt")


# ----------------------------------------------------------------------------------------------------------- trainings


def test_blots_are_told_and_found(run: Path) -> None:
    found = json.loads((run / "multilabel.json").read_text())["figures"]
    assert [(one["finding"], one["with"], one["without"]) for one in found["areas"]] == [("above", 12, 12), ("below", 12, 12)]
    assert all(one["auc"] > 0.9 for one in found["areas"])
    by = {(row["run"], row["k"]): row for row in found["retrieval"]}
    assert by["several", 10]["acg_p"] > by["by chance", 10]["acg_p"] + 0.3
    assert by["by chance", 10]["acg_p_ci"][0] < by["by chance", 10]["acg_p"] < by["by chance", 10]["acg_p_ci"][1]
    page = (run / "multilabel.md").read_text()
    assert "Research use only" in page
    assert "| above | 12 | 12 |" in page
    assert (run / "roc.png").is_file()


def test_the_checkpoint_holds_the_network(run: Path, blots: Manifest, tmp_path: Path) -> None:
    network, about = load_multilabel(run / "multilabel.pt")
    assert about["findings"] == ["above", "below"]
    with np.load(run / "vectors-val.npz") as file:
        kept = dict(file)
    pictures = training.load_images(films_of(blots, "val", "label", ("above", "below")).rows)
    features, said = training.look(network, pictures, CPU, "")
    np.testing.assert_allclose(features, kept["features"], atol=1e-5)
    np.testing.assert_allclose(said, kept["findings"], atol=1e-5)
    save_checkpoint(tmp_path / "other.pt", {"model": {}})
    with pytest.raises(UsageError, match="no checkpoint of a multi-label network"):
        load_multilabel(tmp_path / "other.pt")


def test_a_killed_training_ends_as_an_uninterrupted_one(
    run: Path, small: object, blots: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two saved states; what it had done since is done again."""
    monkeypatch.setattr(training, "_SAVE_EVERY", 3)
    log, done = training.append_log, 0

    def killed(out: Path, record: dict[str, object]) -> None:
        nonlocal done
        log(out, record)
        done += 1
        if done == 14:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "append_log", killed)
    with pytest.raises(KeyboardInterrupt):
        train_multilabel(CONFIG, blots, tmp_path / "several", CPU)
    train_multilabel(CONFIG, blots, tmp_path / "several", CPU)
    whole, again = (load_multilabel(folder / "multilabel.pt")[0].state_dict() for folder in (run, tmp_path / "several"))
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_runs_side_by_side(run: Path, small: object, blots: Manifest, tmp_path: Path) -> None:
    """One label of each film, exclusively; judged beside another run by its own labels."""
    short = CONFIG.model_copy(update={"loss": "softmax", "epochs": 1})
    train_multilabel(short, blots, tmp_path / "single", CPU, "one", beside=[run])
    told = json.loads((tmp_path / "single" / "multilabel.json").read_text())
    assert told["findings"] == ["above", "below", "control"]
    assert {row["run"] for row in told["figures"]["retrieval"]} == {"single", "several", "by chance"}
    with np.load(tmp_path / "single" / "vectors-val.npz") as file:
        said = file["findings"]
    np.testing.assert_allclose(said.sum(axis=1), 1, atol=1e-5)
    with pytest.raises(UsageError, match=r"several labels, and loss = softmax.*above\|below"):
        train_multilabel(short, blots, tmp_path / "refused", CPU)
    with pytest.raises(UsageError, match="no vectors of a run"):
        train_multilabel(short, blots, tmp_path / "refused", CPU, "one", beside=[tmp_path])
    np.savez(tmp_path / "single" / "vectors-val.npz", image_ids=np.array(["other"]), features=np.zeros((1, 1024)))
    with pytest.raises(UsageError, match="the run single has not looked at"):
        train_multilabel(short, blots, tmp_path / "third", CPU, "one", beside=[tmp_path / "single"])
