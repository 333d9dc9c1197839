"""`cxr calibrate` on a real Milvus Lite gallery of made-up vectors, as a hospital would run it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cxr_retrieval.archive.audit import entries, verify
from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.gallery.balance import VECTOR_SIZE
from cxr_retrieval.gallery.store import Store, make_entry
from cxr_retrieval.retrieval.calibration import ballot_of, read_calibration, trust
from cxr_retrieval.retrieval.voting import weighted_vote
from cxr_retrieval.settings import MilvusSettings
from tests_support import run_cxr
from vectors import with_unit_parts

VERSION = "0123456789ab"
OWN, LEARNT = 240, 60


@pytest.fixture
def gallery(tmp_path: Path, pseudonyms: Pseudonyms) -> Path:
    """Of two labels, 240 cases of a hospital, two of each patient, and 60 that the networks have learnt from; one case in eight looks like the other label."""
    random = np.random.default_rng(1)
    centres = random.normal(size=(2, VECTOR_SIZE))
    rows: list[ManifestRow] = []
    vectors: list[NDArray[np.float32]] = []
    for number in range(OWN + LEARNT):
        label, learnt = number // 2 % 2, number >= OWN
        looks = label if learnt or random.random() > 1 / 8 else 1 - label
        vectors.append(with_unit_parts(centres[looks] + random.normal(size=VECTOR_SIZE)))
        source, split = ("public", "train") if learnt else ("st-mary", None)
        name = f"case-{number}"
        rows.append(
            ManifestRow(tmp_path, name, tmp_path / f"{name}.png", ("control", "flu")[label], f"patient-{number // 2}", source, split, {})
        )
    folder = tmp_path / "gallery.db"
    with Store(MilvusSettings(str(folder)), VERSION, pseudonyms, create=True) as store:
        entries_ = [make_entry(row, f"{number:064x}", pseudonyms) for number, row in enumerate(rows)]
        store.upsert(entries_, [f"{number:064x}" for number in range(len(rows))], vectors)
        store.publish()
    (tmp_path / "own.csv").write_text(
        "image_id,path,label\n"
        + "".join(f"{row.image_id},{row.path.name},{row.label}\n" for row in rows[: OWN // 2])
        + "stranger,s.png,flu\n"
    )
    return folder


def test_a_gallery_is_calibrated_on_its_own_cases(gallery: Path, tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    reach = ("--milvus", gallery, "--audit", tmp_path / "audit.jsonl")

    def kept() -> str:
        with Store(MilvusSettings(str(gallery)), VERSION, pseudonyms) as store:
            return store.calibration

    tried = run_cxr("calibrate", "--dry-run", *reach)
    assert tried.returncode == 0, tried.stderr
    assert "calibrated on 240 cases (control 120, flu 120) of 120 patients; nothing is changed" in tried.stdout
    assert "60 cases of split train do not count" in tried.stderr
    assert kept() == ""

    done = run_cxr("calibrate", "--json", *reach)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["changed"], told["before"], told["learnt_from"]) == (True, None, LEARNT)
    after = told["after"]
    assert 0.75 < after["overall"]["accuracy"] < 0.95
    assert after["per_source"].keys() == {"st-mary"}
    assert after["overall"]["coverage"] == pytest.approx(0.9, abs=0.06)
    calibration = read_calibration(kept())
    assert (calibration.model_version, calibration.labels, calibration.gallery) == (VERSION, ("control", "flu"), OWN + LEARNT)
    assert not [word for word in ("case-", "patient-", str(tmp_path)) if word in kept()], "no identity goes into the gallery"

    first = kept()
    again = run_cxr("calibrate", "--json", *reach)
    assert json.loads(again.stdout)["changed"] is False
    assert json.loads(again.stdout)["before"]["without"] == 0
    assert kept() == first

    with Store(MilvusSettings(str(gallery)), VERSION, pseudonyms) as store:
        hits = store.search(store.vectors()[1][0], 10)
        neighbours = [(hit.case.label, hit.similarity, hit.case.source or "") for hit in hits]
        vote = weighted_vote([(label, similarity) for label, similarity, _ in neighbours])
        found = trust(vote, ballot_of(neighbours), VERSION, store.calibration, gallery=store.size)
        assert found.calibrated is not None
        assert 0.5 < found.calibrated < 1

    forgotten = run_cxr("calibrate", "--reset", *reach)
    assert "has forgotten its own calibration" in forgotten.stdout
    assert kept() == ""
    assert "nothing to forget" in run_cxr("calibrate", "--reset", *reach).stdout
    lines = list(entries(tmp_path / "audit.jsonl"))
    assert {line["action"] for line in lines} == {"calibrate"}
    assert [(line["changed"], line["cases"]) for line in lines if "changed" in line] == [(True, 240), (True, 240), (False, 240)]
    assert verify(tmp_path / "audit.jsonl").flaw is None


def test_which_cases_are_asked_about(gallery: Path, tmp_path: Path) -> None:
    """By manifest or by clause; too few are refused with their numbers, and nothing is kept."""
    reach = ("--milvus", gallery, "--audit", tmp_path / "audit.jsonl")
    listed = run_cxr("calibrate", "--dry-run", "--manifest", tmp_path / "own.csv", *reach)
    assert "calibrated on 120 cases" in listed.stdout, listed.stderr
    assert "1 cases of the manifest are not in the gallery" in listed.stderr
    learnt = run_cxr("calibrate", "--where", 'source == "public"', *reach)
    assert learnt.returncode == 2
    assert "got 0 (none)" in learnt.stderr
    few = run_cxr("calibrate", "--include-train", "--where", 'source == "public"', *reach)
    assert few.returncode == 2
    assert "expected 100 with a vote of 10 others" in few.stderr
    assert "got 60 (control 30, flu 30)" in few.stderr
    wrong = run_cxr("calibrate", "--where", 'hospital == "public"', *reach)
    assert wrong.returncode == 2
    assert "unknown field: hospital" in wrong.stderr
    assert "Traceback" not in learnt.stderr + few.stderr + wrong.stderr
