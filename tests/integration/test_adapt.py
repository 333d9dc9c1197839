"""`cxr adapt` as a hospital whose films look like no other's would run it: real Triton, real Milvus Lite."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_retrieval.archive.audit import entries
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.cli.adapt import shares_of
from cxr_retrieval.errors import UsageError
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, PhantomLabel, make_phantom, write_phantoms
from cxr_retrieval.retrieval.query import query
from cxr_retrieval.serving.server import Endpoints, embedded_milvus
from cxr_retrieval.settings import MilvusSettings
from tests_support import run_cxr

EACH = 27
SHARES = ("--share", "control=0.5", "--share", "covid19=0.5")


def striped(number: int, label: PhantomLabel) -> Image.Image:
    """A film of a scanner that draws stripes: what is COVID-19 looks like another pneumonia. Three films of each phantom, moved a little."""
    pixels = np.roll(make_phantom(300 + number // 3, label).pixels, 5 * (number % 3), axis=1) / 255.0
    stripes = 0.12 * np.sin(np.arange(len(pixels)) / 3)[:, None]
    return Image.fromarray(np.clip(255 * (pixels + stripes), 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """54 films of two labels, one of them twice, and a picture that is no film."""
    folder = tmp_path_factory.mktemp("st-mary")
    for label in ("control", "covid19"):
        for seed in range(EACH):
            striped(seed, label).save(folder / f"{label}-{seed:02d}.png", compress_level=1)
    (folder / "again.png").write_bytes((folder / "control-00.png").read_bytes())
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300), np.uint8)).save(folder / "noise.png")
    return folder


@pytest.fixture(scope="module")
def reach(student_server: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Both servers, in the gallery 36 phantoms."""
    folder = tmp_path_factory.mktemp("gallery")
    manifest = write_phantoms(folder, [make_phantom(seed, label) for label in PHANTOM_LABELS for seed in range(12)])
    with embedded_milvus(folder / "gallery.db", "127.0.0.1", 0) as uri:
        there = ("--triton", student_server.grpc, "--milvus", uri, "--audit", str(folder / "audit.jsonl"))
        done = run_cxr("ingest", "--manifest", manifest, *there)
        assert done.returncode == 0, done.stderr
        yield there


@pytest.fixture
def asked(reach: tuple[str, ...], reader: FilmReader, student: TritonClient, pseudonyms: Pseudonyms) -> Callable[..., dict[str, Any]]:
    """As `cxr query --json`, with the gallery opened anew."""

    def ask(film: Path, **options: Any) -> dict[str, Any]:
        with Store(MilvusSettings(reach[3]), student.model_version, pseudonyms) as store:
            return query(film, reader, student, store, **options).as_json()

    return ask


def test_a_hospital_is_learnt_used_and_forgotten(
    films: Path, reach: tuple[str, ...], asked: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    film = films / "covid19-05.png"
    before = asked(film, source="st-mary")
    assert before["prediction"]["label"] == "non_covid_pneumonia", "what the stripes do"
    assert "holds no film of st-mary" in " ".join(before["warnings"])
    assert "site" not in before

    tried = run_cxr("adapt", films, "--source", "st-mary", *SHARES, "--dry-run", "--json", *reach)
    assert tried.returncode == 0, tried.stderr
    told = json.loads(tried.stdout)
    assert (told["films"] + told["unusable"], told["copies"], told["dry_run"]) == (2 * EACH + 1, 1, True)
    assert told["films"] > 2 * EACH - 4, "stripes themselves are doubted now and then"
    assert "noise.png" in tried.stderr
    assert "site" not in asked(film, source="st-mary"), "nothing was kept"

    done = run_cxr("adapt", films, "--source", "st-mary", *SHARES, *reach)
    assert done.returncode == 0, done.stderr
    assert f"learnt from {told['films']} films of st-mary, {told['unusable']} unusable, 1 copies" in done.stdout
    assert "--source st-mary answers by it from now on" in done.stdout
    assert "get another label than their nearest cases vote for" in done.stdout

    after = asked(film, source="st-mary")
    assert after["prediction"]["label"] == "covid19"
    assert after["prediction"]["scores"].keys() == {"control", "covid19"}
    assert sum(after["prediction"]["scores"].values()) == pytest.approx(1)
    assert after["site"]["name"] == "st-mary"
    assert after["site"]["evidence"].keys() == {"control", "covid19"}
    assert after["prediction"]["calibrated"] is None
    assert "rests on films without labels" in " ".join(after["warnings"])
    assert after["neighbours"] == before["neighbours"], "the cases that are shown are the same"
    html = tmp_path / "film.html"
    said = run_cxr("query", film, "--source", "st-mary", "--html", html, *reach)
    assert "Vote of the profile of st-mary" in html.read_text("utf-8")
    assert "istance-weighted vote" not in html.read_text("utf-8")
    refused = asked(films / "noise.png", source="st-mary")
    assert refused["prediction"]["label"] is None
    assert "site" not in refused, "nobody voted"
    assert "beside what is usual in st-mary" in " ".join(said.stdout.split())

    assert "site" not in asked(film), "who does not say where a film comes from is answered as before"
    narrowed = asked(film, source="st-mary", where='label != ""')
    assert "site" not in narrowed
    assert "the profile of st-mary did not vote: a clause says which cases count" in narrowed["warnings"]

    out = tmp_path / "answers.jsonl"
    batch = run_cxr("batch", *sorted(films.glob("co*-0?.png")), "--source", "st-mary", "--out", out, *reach)
    assert batch.returncode in (0, 1), batch.stderr
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    voted = Counter((Path(line["input"]).name.split("-")[0], line["prediction"]["label"]) for line in lines)
    assert voted["covid19", "covid19"] + voted["control", "control"] > 20 * 0.8, voted
    assert all(line["site"]["name"] == "st-mary" for line in lines)

    stored = run_cxr("ingest", films / "control-01.png", "--label", "control", "--source", "st-mary", *reach)
    assert "the profile of st-mary was learnt without these cases" in " ".join(stored.stderr.split()), stored.stderr

    undone = run_cxr("adapt", "--source", "st-mary", "--undo", *reach)
    assert "the profile of st-mary is forgotten; 0 left" in undone.stdout, undone.stderr
    assert asked(film, source="st-mary")["prediction"]["label"] == before["prediction"]["label"]
    again = run_cxr("adapt", "--source", "st-mary", "--undo", *reach)
    assert again.returncode == 2
    assert "st-mary has no profile in this gallery" in again.stderr
    log = [line["action"] for line in entries(Path(reach[-1])) if line["action"] == "adapt"]
    assert len(log) >= 4, "what was learnt and what was forgotten is on record"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["control=1", "control=2"], "--share control comes twice"),
        (["control=much", "covid19=1"], "'control=much' says nothing"),
        (["control=nan", "covid19=1"], "says nothing"),
        (["=1", "covid19=1"], "says nothing"),
        (["control=0.5", "covid19"], "numbers for all labels, or for none"),
    ],
)
def test_shares_that_say_nothing_are_refused(given: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        shares_of(given)


def test_shares_are_taken_as_they_are_given() -> None:
    assert shares_of(["control=70", "covid19=30"]) == {"control": 70.0, "covid19": 30.0}
    assert shares_of(["control", "covid19"]) == {"control": 1.0, "covid19": 1.0}


def test_too_few_films_teach_nothing(films: Path, reach: tuple[str, ...]) -> None:
    """And films or --undo must be given, not both."""
    some = sorted(films.glob("control-0*.png"))
    done = run_cxr("adapt", *some, "--source", "st-john", "--share", "control", "--share", "covid19", *reach)
    assert done.returncode == 2
    assert (
        f"too few films of st-john to learn from; expected 50 usable ones, better 200, drawn from all that it takes; got {len(some)}"
        in done.stderr
    )
    gout = run_cxr("adapt", some[0], "--source", "st-john", "--share", "control", "--share", "gout", *reach)
    assert "no case has the label gout; expected control, covid19, non_covid_pneumonia" in " ".join(gout.stderr.split())
    for options, words in (((), "nothing to learn from"), ((str(some[0]), "--undo"), "--undo with films")):
        assert words in run_cxr("adapt", *options, "--source", "st-john", *reach).stderr
