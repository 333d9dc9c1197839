"""The commands as a user runs them, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.radiograph.phantoms import make_phantom, write_dicom
from fhir_bundles import PRIVATE, hospital, written
from tests_support import Served, leftovers, run_cxr


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = Served(tmp_path_factory.mktemp("served"), "--segmentation", "student")
    yield running
    if running.process.poll() is None:
        running.stop(signal.SIGTERM)


def test_ingest_query_evaluate_through_serve(served: Served, phantom_manifest: Path, tmp_path: Path) -> None:
    ingested = run_cxr("ingest", "--manifest", phantom_manifest, "--json", *served.servers)
    assert ingested.returncode == 0, ingested.stderr
    assert json.loads(ingested.stdout)["stored"] == 9
    again = run_cxr("ingest", "--manifest", phantom_manifest, phantom_manifest.parent / "images", *served.servers)
    assert again.stdout == "0 stored, 9 unchanged, 0 failed; the gallery holds 9 cases\n"

    write_dicom(make_phantom(31, "covid19"), tmp_path / "film.dcm")
    page, picture = tmp_path / "film.html", tmp_path / "film.png"
    asked = run_cxr("query", tmp_path / "film.dcm", "--top-k", "4", "--json", "--html", page, "--picture", picture, *served.servers)
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["image_id"] == f"film-{hashlib.sha256((tmp_path / 'film.dcm').read_bytes()).hexdigest()[:16]}"
    assert len(answer["neighbours"]) == 4
    assert page.stat().st_size > 100_000
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = run_cxr("query", tmp_path / "film.dcm", "--where", 'sex == "F"', *served.servers)
    assert shown.returncode == 0, shown.stderr
    assert "Not for diagnosis" in " ".join(shown.stdout.split())
    assert "sex M" not in shown.stdout
    assert re.search(r"^of these \d cases: intensive care: \d of \d known", shown.stdout, re.MULTILINE)
    said = 'invented "synthetic phantom"'
    noted = run_cxr("query", tmp_path / "film.dcm", "--where", "age > 0 and not went_icu", "--text", said, "--json", *served.servers)
    assert noted.returncode == 0, noted.stderr
    assert {hit["metadata"]["went_icu"] for hit in json.loads(noted.stdout)["neighbours"]} == {False}
    none = run_cxr("query", tmp_path / "film.dcm", "--text", "-invented", *served.servers)
    assert none.returncode == 2
    assert "that meets '--text -invented'" in none.stderr

    evaluated = run_cxr("evaluate", "--gallery", phantom_manifest, "--queries", phantom_manifest, "--json", *served.servers)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["queries"] == {"n": 9, "patients": 9}
    assert "9 of 9 vectors from the store" in evaluated.stderr
    table = run_cxr("evaluate", "--gallery", phantom_manifest, "--queries", phantom_manifest, *served.servers)
    assert "phantom-north" in table.stdout

    listed = run_cxr("info", "--collections", "--json", *served.servers)
    assert list(json.loads(listed.stdout)["collections"].values()) == ["9 rows, the gallery"]


def test_ingest_says_what_it_doubts_and_where_facts_came_from(served: Served, phantom_manifest: Path, tmp_path: Path) -> None:
    image = sorted((phantom_manifest.parent / "images").iterdir())[0]
    (tmp_path / "m.csv").write_text(
        f"image_id,path,label,patient_id,date,temperature,pO2_saturation\ndoubted,{image},control,MRN-4711,2020-03-20,101.3,92\n"
    )
    bundle = written(tmp_path / "bundle.json", hospital())
    result = run_cxr("ingest", "--manifest", tmp_path / "m.csv", "--fhir", bundle, "--json", *served.servers)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    doubt = "column temperature: 101.3 is outside 30 to 43 °C; Fahrenheit (then name the unit, '[degF]')?"
    assert (told["doubts"], told["doubted"]) == ([{"image_id": "doubted", "doubt": doubt}], 1)
    assert told["misnamed"] == {"pO2_saturation": "spo2"}
    assert told["fhir"] == {"patients": 2, "films": 1, "warnings": []}
    assert f"warning doubted: {doubt}" in result.stderr
    assert "to be the standard feature it would be called spo2" in result.stderr
    assert "1 films are of a patient in the FHIR bundles, which tell of 2" in result.stderr
    assert not [word for word in PRIVATE if word in result.stdout + result.stderr]
    run_cxr("gallery", "remove", "--image", "doubted", *served.servers)


def test_cases_leave_the_gallery_and_the_log_says_so(
    served: Served, phantom_manifest: Path, tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    """By image, by patient, and by a manifest that no longer lists them; what another source holds stays."""
    images = sorted((phantom_manifest.parent / "images").glob("*.png"))[:4]
    for image in images:
        shutil.copy(image, tmp_path)
    rows = [f"r{i},{image.name},control,p{i},pruned-north" for i, image in enumerate(images)]
    log = tmp_path / "audit.jsonl"

    def ingest(lines: list[str], *options: str) -> str:
        (tmp_path / "m.csv").write_text("image_id,path,label,patient_id,source\n" + "\n".join(lines) + "\n")
        result = run_cxr("ingest", "--manifest", tmp_path / "m.csv", "--audit", log, *options, *served.servers)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert ingest(rows).startswith("4 stored, 0 unchanged, 0 failed; ")
    assert ingest(rows[1:]).startswith("0 stored, 3 unchanged, 0 failed; "), "without --prune nothing goes"
    assert ingest(rows[1:], "--prune").startswith("0 stored, 3 unchanged, 0 failed, 1 pruned; ")
    assert ingest([rows[1].replace(",control,", ",covid19,"), *rows[2:]]).startswith("0 stored, 2 unchanged, 0 failed, 1 corrected; ")
    milvus = served.servers[2:]
    looked = run_cxr("gallery", "remove", "--patient", "p1", "--source", "pruned-north", "--dry-run", "--audit", log, *milvus)
    assert "1 cases would be removed" in looked.stdout
    removed = run_cxr("gallery", "remove", "--patient", "p1", "--reason", "consent withdrawn", "--audit", log, *milvus)
    assert removed.returncode == 0, removed.stderr
    assert "1 cases removed" in removed.stdout
    again = run_cxr("gallery", "remove", "--patient", "p1", "--audit", log, *milvus)
    assert again.returncode == 1
    assert "no case to remove" in again.stderr
    asked = run_cxr("query", images[0], "--audit", log, *served.servers)
    assert asked.returncode == 0, asked.stderr
    assert run_cxr("gallery", "remove", "--image", "r2", "--image", "r3", "--audit", log, *milvus).returncode == 0
    told = [json.loads(line) for line in log.read_text().splitlines()]
    keys = [[key for keys in line["removed"].values() for key in keys] for line in told if "removed" in line]
    r0, r1, r2, r3 = (pseudonyms.image(f"r{i}") for i in range(4))
    assert keys == [[r0], [r1], [], sorted([r2, r3])]
    assert pseudonyms.originals([r0, r1, r2]).keys() == {r0}, (
        "what was removed is forgotten; another model version may hold what was pruned"
    )
    stored = [line["cases"] for line in told if line["action"] == "ingest" and "cases" in line]
    assert stored == [{"stored": sorted([r0, r1, r2, r3])}, {"corrected": [r1]}]
    assert not [word for word in ("p1", "r1", str(tmp_path), images[0].name) if f'"{word}' in log.read_text()], (
        "no patient, no path in the log"
    )
    film = f"film-{hashlib.sha256(images[0].read_bytes()).hexdigest()[:16]}"
    shown = run_cxr("audit", "show", log, "--case", film)
    lines = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [(line["action"], line["film"], line["state"]) for line in lines] == [("query", film, "begun"), ("query", film, "done")]
    assert all(line["model_version"] and line["user"] and line["time"] for line in lines)
    head = run_cxr("audit", "verify", log).stdout.split()[-1]
    assert run_cxr("audit", "verify", log, "--head", head).returncode == 0
    log.write_text(log.read_text().replace("consent withdrawn", "by mistake"))
    edited = run_cxr("audit", "verify", log)
    assert edited.returncode == 1
    assert "was edited" in edited.stderr
    refused = run_cxr("query", images[0], "--audit", tmp_path, *served.servers)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "the audit log cannot be written" in refused.stderr
    assert run_cxr("query", images[0], "--where", 'source == "pruned-north"', *served.servers).returncode == 2


def test_a_bad_file_in_a_batch_gives_exit_code_1(served: Served, phantom_manifest: Path, tmp_path: Path) -> None:
    good = next((phantom_manifest.parent / "images").glob("*.png"))
    (tmp_path / "good.png").write_bytes(good.read_bytes())
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "m.csv").write_text("image_id,path,label,source\ng,good.png,control,t\nb,bad.png,control,t\n")
    result = run_cxr("ingest", "--manifest", tmp_path / "m.csv", *served.servers)
    assert result.returncode == 1
    assert "1 stored, 0 unchanged, 1 failed" in result.stdout
    assert "failed b: bad.png: the file is empty" in result.stderr


def test_bad_query_gives_exit_code_1_and_bad_filter_2(served: Served, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"nothing")
    assert run_cxr("query", tmp_path / "x.png", *served.servers).returncode == 1
    write_dicom(make_phantom(31, "control"), tmp_path / "film.dcm")
    result = run_cxr("query", tmp_path / "film.dcm", "--where", "nonsense >", *served.servers)
    assert result.returncode == 2
    assert "names an unknown field: nonsense" in result.stderr
    assert result.stderr.splitlines()[-2:] == ["  nonsense >", "  ^^^^^^^^"], "the wrong word is marked"


def test_milvus_down(served: Served, tmp_path: Path) -> None:
    write_dicom(make_phantom(31, "control"), tmp_path / "film.dcm")
    result = run_cxr("query", tmp_path / "film.dcm", *served.servers[:2], "--milvus", "http://127.0.0.1:1", "--timeout", "5")
    assert result.returncode == 2
    assert "no Milvus answers at http://127.0.0.1:1" in result.stderr


def test_two_servers_cannot_share_a_port(served: Served, tmp_path: Path) -> None:
    port = served.servers[1].rsplit(":", 1)[1]
    result = run_cxr("serve", "--no-store", "--grpc-port", port)
    assert result.returncode == 2
    assert f"grpc port 127.0.0.1:{port} cannot be used" in result.stderr


def test_sigterm_leaves_nothing_behind(served: Served) -> None:
    """Runs last in this module: it ends the shared server."""
    started = time.monotonic()
    assert served.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 30
    assert leftovers(served.process.pid) == set()
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and f"{served.process.pid}" == parent_of(pid)]


def test_ctrl_c_ends_serve_with_success(tiny: Path, tmp_path: Path) -> None:
    running = Served(tmp_path, "--repository", str(tiny), "--precision", "fp32")
    assert len(leftovers(running.process.pid)) > 1, "a folder and shared memory"
    assert running.stop(signal.SIGINT) == 0
    assert leftovers(running.process.pid) == set()


def test_demo_twice(instant: Path, tmp_path: Path) -> None:
    """The first run draws and ingests; the second finds everything unchanged and gives the same answer.

    With networks that answer at once: `make demo` runs what ships.
    """
    first = run_cxr("demo", "--json", "--repository", instant, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = run_cxr("demo", "--json", "--repository", instant, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    a, b = json.loads(first.stdout), json.loads(second.stdout)
    assert [n["image_id"] for n in a["neighbours"]] == [n["image_id"] for n in b["neighbours"]]
    assert a["prediction"]["label"] == b["prediction"]["label"]
    assert "drawing phantoms" in first.stderr
    assert "drawing phantoms" not in second.stderr
    for name in ("query.png", "query.html", "query.dcm"):
        assert (tmp_path / "cxr-demo" / name).stat().st_size > 10_000


def parent_of(pid: str) -> str:
    try:
        return (Path("/proc") / pid / "stat").read_text().rsplit(")", 1)[1].split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return ""
