"""`cxr batch` as an operator meets it: real Triton, real Milvus Lite, and what kills them."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import cast

import pytest
from PIL import Image
from pymilvus import MilvusClient

from cxr_retrieval.archive.audit import entries, film_pseudonym, verify
from cxr_retrieval.archive.batch import BatchOptions, run_batch
from cxr_retrieval.archive.embedding import ingest
from cxr_retrieval.archive.inputs import Input, Unusable, find_inputs
from cxr_retrieval.archive.journal import Journal
from cxr_retrieval.archive.pipeline import here
from cxr_retrieval.archive.watching import Answered
from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.errors import ServerDownError, StoreDownError, UsageError
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, PARTS
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.phantoms import Phantom, write_dicom
from cxr_retrieval.retrieval.query import query
from cxr_retrieval.serving.server import Endpoints, ServerOptions, embedded_milvus, embedded_triton
from cxr_retrieval.settings import MilvusSettings, TritonSettings
from tests_support import ENVIRONMENT, cxr_command, run_cxr, write_dicomdir

COPIES = 40


@contextmanager
def filled(folder: Path, manifest: Path, server: Endpoints, *options: str) -> Generator[str]:
    """A gallery of the manifest's cases as this server embeds them."""
    with embedded_milvus(folder / "gallery.db", "127.0.0.1", 0) as uri:
        done = run_cxr("ingest", *options, "--manifest", manifest, "--triton", server.grpc, "--milvus", uri)
        assert done.returncode == 0, done.stderr
        yield uri


@pytest.fixture(scope="module")
def gallery(student_server: Endpoints, phantom_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with filled(tmp_path_factory.mktemp("milvus"), phantom_manifest, student_server) as uri:
        yield uri


@pytest.fixture(scope="module")
def quick_gallery(quick: Endpoints, phantom_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with filled(tmp_path_factory.mktemp("milvus"), phantom_manifest, quick, "--no-gate") as uri:
        yield uri


@pytest.fixture(scope="module")
def archive(phantoms: list[Phantom], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """360 films: nine phantoms, each 40 times and each a little different."""
    folder = tmp_path_factory.mktemp("archive")
    for number, phantom in enumerate(phantoms):
        for copy in range(COPIES):
            pixels = phantom.pixels.copy()
            pixels[:4, : copy + 4] = 255
            Image.fromarray(pixels).save(folder / f"{number}-{copy}.png", compress_level=1)
    return folder


def results(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def arguments(archive: Path, out: Path, triton: str, milvus: str) -> list[str | Path]:
    return ["batch", archive, "--no-gate", "--out", out, "--triton", triton, "--milvus", milvus, "--timeout", "20"]


def test_clauses_and_words_choose_the_cases(archive: Path, quick: Endpoints, quick_gallery: str, tmp_path: Path) -> None:
    """A wrong one ends the run before a film is read, and leaves no results."""
    film, out = archive / "0-0.png", tmp_path / "results.jsonl"
    asked = arguments(film, out, quick.grpc, quick_gallery)
    wrong = run_cxr(*asked, "--where", "went_icuu")
    assert wrong.returncode == 2
    assert "did you mean went_icu?" in wrong.stderr
    assert not out.exists()
    done = run_cxr(*asked, "--where", "not went_icu", "--text", '"synthetic phantom" -tube')
    assert done.returncode == 0, done.stderr
    (line,) = results(out)
    neighbours = cast("list[dict[str, dict[str, object]]]", line["neighbours"])
    assert {hit["metadata"]["went_icu"] for hit in neighbours} == {False}
    for differs in (("--where", "not went_icu"), ("--where", "not went_icu", "--text", '"synthetic phantom" -tube', "--balance", "0.3")):
        other = run_cxr(*asked, *differs)
        assert other.returncode == 2
        assert "was begun with other options" in other.stderr
    assert line["balance"] == DEFAULT_BALANCE


def test_answers_are_those_of_query(
    archive: Path,
    student_server: Endpoints,
    gallery: str,
    student: TritonClient,
    reader: FilmReader,
    tmp_path: Path,
    pseudonyms: Pseudonyms,
) -> None:
    some = tmp_path / "films"
    some.mkdir()
    for number in range(9):
        shutil.copy(archive / f"{number}-0.png", some)
    shutil.copy(archive / "3-0.png", some / "the same.png")
    (some / "page.png").write_text("no picture")
    out = tmp_path / "results.jsonl"
    log = tmp_path / "audit.jsonl"
    reach = ("--triton", student_server.grpc, "--milvus", gallery)
    done = run_cxr("batch", some, "--out", out, *reach, "--attention", tmp_path / "drawn", "--audit", log)
    assert done.returncode == 1, done.stderr
    assert "11 inputs: 10 answered, 1 failed, 1 of them copies of another" in done.stdout
    found = {Path(str(line["input"])).name: line for line in results(out)}
    assert found["page.png"]["status"] == "failed"
    assert "not an image this system reads" in str(found["page.png"]["error"])
    alike = {"3-0.png", "the same.png"}
    ((second, first),) = [(name, line.pop("same_as")) for name, line in found.items() if "same_as" in line]
    assert {second, Path(str(first)).name} == alike, "whichever was answered first"
    audited = list(entries(log))
    named = [(name, what) for line in audited for what, names in line.get("cases", {}).items() for name in names]
    films = {film_pseudonym(path) for path in some.glob("?-0.png")}
    assert {name for name, what in named if what == "answered"} == films
    assert [name for name, what in named if what == "failed"] == ["input-10"]
    assert {(line["action"], line["model_version"]) for line in audited} == {("batch", student.model_version)}
    assert (audited[0]["state"], audited[-1]["state"], audited[-1]["after"]["answered"]) == ("begun", "done", 10)
    assert verify(log).flaw is None
    with Store(MilvusSettings(gallery), student.model_version, pseudonyms) as store:
        for number in range(9):
            line = found[f"{number}-0.png"]
            single = query(some / f"{number}-0.png", reader, student, store).as_json()
            assert {*single, "input", "status", "attention", "trace_id"} == line.keys()
            for key in ("image_id", "model_version", "earlier_films", "warnings"):
                assert line[key] == single[key]
            assert [hit["image_id"] for hit in line["neighbours"]] == [hit["image_id"] for hit in single["neighbours"]]  # pyright: ignore
            assert line["prediction"]["label"] == single["prediction"]["label"]  # pyright: ignore
            with Image.open(str(line["attention"])) as drawn:
                assert drawn.mode == "RGB"


def test_a_client_killed_again_and_again_answers_each_film_once(
    archive: Path, quick: Endpoints, quick_gallery: str, tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    kills = 0
    while kills < 3:
        process = subprocess.Popen(
            cxr_command(*arguments(archive, out, quick.grpc, quick_gallery)),
            env=ENVIRONMENT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        size = out.stat().st_size if out.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and (out.stat().st_size if out.exists() else 0) <= size:
            time.sleep(0.01)
        time.sleep(0.004 * kills)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    done = run_cxr(*arguments(archive, out, quick.grpc, quick_gallery))
    assert done.returncode == 0, done.stderr
    count = Counter(str(line["input"]) for line in results(out))
    assert len(count) == 9 * COPIES
    assert set(count.values()) == {1}
    assert {line["status"] for line in results(out)} == {"answered"}


@pytest.fixture(scope="module")
def export(phantoms: list[Phantom], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a hospital hands over: loose files, a ZIP with a folder in it, a medium with a DICOMDIR, and what does not belong there."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "cd" / "DICOM").mkdir(parents=True)
    for number, phantom in enumerate(phantoms):
        write_dicom(phantom, folder / f"{number}.dcm")
    with zipfile.ZipFile(folder / "study.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in (0, 1, 2):
            archive.write(folder / f"{number}.dcm", f"../study/IM{number}")
            (folder / f"{number}.dcm").unlink()
        archive.writestr("readme.txt", "no film")
        archive.writestr("inner.zip", b"PK\x05\x06" + bytes(18))
    for number in (3, 4, 5):
        (folder / f"{number}.dcm").rename(folder / "cd" / "DICOM" / f"IM{number}")
    write_dicomdir(folder / "cd" / "DICOMDIR", [["DICOM", f"IM{number}"] for number in (3, 4, 5, 9)])
    (folder / "elsewhere.dcm").symlink_to("/etc/hostname")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._6.dcm").write_text("not taken")
    return folder


FOUND = [*(f"study.zip!/../study/IM{n}" for n in (0, 1, 2)), *(f"cd/DICOM/IM{n}" for n in (3, 4, 5)), *(f"{n}.dcm" for n in (6, 7, 8))]


def test_every_kind_of_input_is_answered_once_whatever_is_killed(
    export: Path, student_server: Endpoints, gallery: str, phantoms: list[Phantom], tmp_path: Path
) -> None:
    """A folder, what it holds named again, a list on stdin; killed at its first line, so that members are taken up again from the journal."""
    out = tmp_path / "results.jsonl"
    (tmp_path / "list").write_text(f"{export}/6.dcm\n{export}/none.dcm\n")
    ways = [export, export / "cd" / "DICOMDIR", f"{export}/**/*.zip", "-"]
    command = cxr_command(
        "batch", *ways, "--out", out, "--triton", student_server.grpc, "--milvus", gallery, "--attention", tmp_path / "drawn"
    )
    with (tmp_path / "list").open("rb") as listed:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdin=listed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (out.exists() and out.stat().st_size):
            time.sleep(0.01)
        process.kill()
        process.wait()
    with (tmp_path / "list").open("rb") as listed:
        done = subprocess.run(command, env=ENVIRONMENT, stdin=listed, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "13 inputs: 9 answered, 4 failed" in done.stdout
    assert "inputs found" in done.stderr
    found = {str(line["input"]): line for line in results(out)}
    assert len(found) == len(results(out)) == 13
    wrong = {name: str(line["error"]) for name, line in found.items() if line["status"] == "failed"}
    assert set(wrong) == {f"{export}/{name}" for name in ("study.zip!/inner.zip", "elsewhere.dcm", "cd/DICOM/IM9", "none.dcm")}
    assert "a ZIP within study.zip" in wrong[f"{export}/study.zip!/inner.zip"]
    for name, phantom in zip(FOUND, phantoms, strict=True):
        line = found[f"{export}/{name}"]
        assert line["prediction"]["label"] == phantom.label  # pyright: ignore
        assert Path(str(line["attention"])).parent == tmp_path / "drawn"
    assert len(list((tmp_path / "drawn").iterdir())) == 9
    table = tmp_path / "embeddings.csv"
    with (tmp_path / "list").open("rb") as listed:
        again = subprocess.run([*command, "--embed-only"], env=ENVIRONMENT, stdin=listed, capture_output=True, text=True, check=False)
        assert again.returncode == 2
        parts = ["batch", export, "--out", table, "--format", "csv", "--embed-only", "--triton", student_server.grpc]
        assert run_cxr(*parts).returncode == 1
    with table.open(encoding="utf-8", newline="") as file:
        rows = {row["input"]: row for row in csv.DictReader(file)}
    for part in PARTS:
        held = {name: json.loads(row[part.name.lower()]) for name, row in rows.items() if row[part.name.lower()]}
        assert held.keys() == {f"{export}/{name}" for name in FOUND}
        assert {len(vector) for vector in held.values()} == {part.shape[0]}


def test_overlays_drawn_into_the_archive_are_no_inputs(export: Path, student_server: Endpoints, gallery: str, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "all", symlinks=True)
    shutil.rmtree(tmp_path / "all" / "cd")
    command = ["batch", tmp_path / "all", "--out", tmp_path / "all" / "results.jsonl", "--attention", tmp_path / "all" / "drawn"]
    for _ in range(2):
        done = run_cxr(*command, "--triton", student_server.grpc, "--milvus", gallery)
        assert "8 inputs: 6 answered, 2 failed" in done.stdout, done.stderr
    assert len(list((tmp_path / "all" / "drawn").iterdir())) == 6


def test_an_ingest_takes_the_same_inputs(
    export: Path, student_server: Endpoints, phantoms: list[Phantom], tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    """Films are called after their bytes; DICOM's patient is theirs, so that a patient's own film does not vote; a copy is no further case."""
    shutil.copy(export / "6.dcm", tmp_path / "copy.dcm")
    reach = ("--triton", student_server.grpc, "--milvus", str(tmp_path / "g.db"))
    command = ("ingest", export, tmp_path / "copy.dcm", *reach, "--source", "north", "--split", "train")
    first = run_cxr(*command, "--label", "control")
    assert first.returncode == 1, first.stderr
    assert first.stdout == "9 stored, 1 unchanged, 2 failed; the gallery holds 9 cases\n"
    assert f"failed {export}/study.zip!/inner.zip: inner.zip: a ZIP within study.zip" in first.stderr
    again = run_cxr(*command, "--label", "control")
    assert again.stdout == "0 stored, 10 unchanged, 2 failed; the gallery holds 9 cases\n"
    other = run_cxr(*command, "--label", "covid19")
    assert other.stdout == "0 stored, 1 unchanged, 2 failed, 9 corrected; the gallery holds 9 cases\n"
    with Store(MilvusSettings(str(tmp_path / "g.db")), version(student_server), pseudonyms) as store:
        cases = store.vectors()[0]
    with zipfile.ZipFile(export / "study.zip") as archive:
        films = [archive.read(f"../study/IM{number}") for number in (0, 1, 2)]
    films += [path.read_bytes() for path in (*export.glob("[678].dcm"), *export.glob("cd/DICOM/*"))]
    assert {case.image_id for case in cases} == {f"film-{hashlib.sha256(film).hexdigest()[:16]}" for film in films}
    assert {case.patient_id for case in cases} == {pseudonyms.patient(phantom.image_id) for phantom in phantoms}
    originals = pseudonyms.originals([case.key for case in cases]).values()
    members = {one.member for one in originals if one.path == export / "study.zip"}
    assert members == {f"../study/IM{number}" for number in (0, 1, 2)}
    assert {one.patient_id for one in originals} == {phantom.image_id for phantom in phantoms}
    assert {(case.label, case.source, case.split) for case in cases} == {("covid19", "north", "train")}
    asked = run_cxr("query", export / "7.dcm", "--json", *reach)
    assert pseudonyms.patient(phantoms[7].image_id) not in [hit["metadata"]["patient_id"] for hit in json.loads(asked.stdout)["neighbours"]]


def version(server: Endpoints) -> str:
    with TritonClient(TritonSettings(server.grpc)) as client:
        return client.model_version


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to ingest; expected --manifest, or PATHs with --label"),
        (("films",), "films without a label"),
        (("films", "--label", "x", "--prune"), "--prune without --manifest"),
        (("--manifest", "m.csv", "--label", "x"), "--label with --manifest"),
    ],
)
def test_an_ingest_that_lacks_something_says_so_at_once(arguments: tuple[str, ...], said: str) -> None:
    done = run_cxr("ingest", *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_first_answers_do_not_wait_for_the_search(archive: Path, reader: FilmReader, quick: Endpoints, tmp_path: Path) -> None:
    """The second half of the inputs is found only after films of the first half were answered; a search that fails is an error at the end."""
    some = sorted(str(path) for path in archive.glob("*-?.png"))
    answered, looked = threading.Event(), list[tuple[int, bool]]()

    def slowly() -> Iterator[Input | Unusable]:
        yield from find_inputs(some[:45], reader)
        time.sleep(0.6)  # for the page to end
        yield from find_inputs(some[45:46], reader)
        assert answered.wait(120)
        yield from find_inputs(some, reader)

    options = BatchOptions(None, 10, None, include_own=False, attention=None, gate=False)
    with TritonClient(TritonSettings(quick.grpc)) as triton, Journal(tmp_path / "results.jsonl", {}) as journal:
        complete = run_batch(
            journal,
            here(reader, triton),
            triton.model_version,
            options,
            stop=threading.Event(),
            advance=lambda _: answered.set(),
            tell=lambda _: None,
            inputs=slowly(),
            found=lambda count, every: looked.append((count, every)),
        )
        assert complete
        assert journal.counts()["answered"] == len(some)
    assert looked[0] == (46, False)
    assert looked[-1] == (len(some) + 46, True)

    def broken() -> Iterator[Input | Unusable]:
        yield from find_inputs(some[:1], reader)
        raise UsageError("stdin holds no list of names")

    with (
        TritonClient(TritonSettings(quick.grpc)) as triton,
        Journal(tmp_path / "broken.jsonl", {}) as journal,
        pytest.raises(UsageError, match="stdin holds no list"),
    ):
        run_batch(
            journal,
            here(reader, triton),
            triton.model_version,
            options,
            stop=threading.Event(),
            advance=lambda _: None,
            tell=lambda _: None,
            inputs=broken(),
        )


def test_ctrl_c_keeps_what_is_in_flight_and_says_how_to_go_on(archive: Path, quick: Endpoints, quick_gallery: str, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    process = subprocess.Popen(
        cxr_command(*arguments(archive, out, quick.grpc, quick_gallery)),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "give the same command again" in talk
    assert f"{len(results(out))} answered" in said
    assert 0 < len(results(out)) < 9 * COPIES


def end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    os.killpg(process.pid, how)


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda process: end(process, signal.SIGKILL), id="killed"),
        pytest.param(lambda process: end(process, signal.SIGSTOP), id="stalled"),
    ],
)
def test_a_triton_that_goes_away_is_waited_for(
    harm: Callable[[subprocess.Popen[bytes]], None],
    archive: Path,
    instant: Path,
    quick_gallery: str,
    tmp_path: Path,
    pseudonyms: Pseudonyms,
) -> None:
    """Nothing fails for it: the same journal ends with every film answered, by the server that came back on the same port."""
    told: list[str] = []
    options = ServerOptions(instant, grpc_port=0, http_port=0, metrics_port=0)
    with ExitStack() as stack:
        first = ExitStack()
        stack.enter_context(first)
        server = first.enter_context(embedded_triton(options))
        port = int(server.grpc.rsplit(":")[-1])
        reader = stack.enter_context(FilmReader())
        client = stack.enter_context(TritonClient(TritonSettings(server.grpc, timeout_s=5)))
        store = stack.enter_context(Store(MilvusSettings(quick_gallery), client.model_version, pseudonyms))
        journal = stack.enter_context(Journal(tmp_path / "results.jsonl", {}))
        some = sorted(str(path) for path in archive.glob("*-?.png"))
        list(journal.add(find_inputs(some, reader)))
        answered = threading.Event()

        with ThreadPoolExecutor(1) as pool:  # not the other way round: a server dies with the thread that started it
            running = pool.submit(
                run_batch,
                journal,
                here(reader, client),
                client.model_version,
                BatchOptions(store, 10, None, include_own=False, attention=None, gate=False),
                stop=threading.Event(),
                advance=lambda _: None,
                tell=told.append,
                watch=lambda event: answered.set() if isinstance(event, Answered) else None,
            )
            answered.wait()
            harm(server.process)
            while not told and not running.done():
                time.sleep(0.05)
            end(server.process, signal.SIGKILL)
            first.close()
            stack.enter_context(embedded_triton(ServerOptions(instant, grpc_port=port, http_port=0, metrics_port=0)))
            running.result()
        assert journal.counts() == {"pending": 0, "answered": len(some), "refused": 0, "failed": 0}
    assert "Triton is away" in told[0]
    assert "Triton is back" in told[-1]


def test_an_ingest_waits_for_triton_and_stores_each_case_once(archive: Path, instant: Path, tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    some = sorted(archive.glob("*-?.png"))
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("image_id,path,label\n" + "".join(f"{path.stem},{path},control\n" for path in some))
    told: list[str] = []
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        server = first.enter_context(embedded_triton(ServerOptions(instant, grpc_port=0, http_port=0, metrics_port=0)))
        port = int(server.grpc.rsplit(":")[-1])
        reader = stack.enter_context(FilmReader())
        client = stack.enter_context(TritonClient(TritonSettings(server.grpc, timeout_s=5)))
        store = stack.enter_context(Store(MilvusSettings(str(tmp_path / "g.db")), client.model_version, pseudonyms, create=True))
        begun = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            rows = read_manifest(manifest).rows
            running = pool.submit(
                ingest,
                rows,
                reader,
                client,
                store,
                lambda _: None,
                tell=told.append,
                watch=lambda event: begun.set() if isinstance(event, Answered) else None,
                gate=False,
            )
            begun.wait()
            end(server.process, signal.SIGKILL)
            while not told and not running.done():
                time.sleep(0.05)
            first.close()
            stack.enter_context(embedded_triton(ServerOptions(instant, grpc_port=port, http_port=0, metrics_port=0)))
            report = running.result()
        assert (report.stored, report.problems, report.pending) == (len(some), (), 0)
        assert store.count() == len(some)
        again = ingest(rows, reader, client, store, lambda _: None, gate=False)
        assert (again.stored, again.unchanged) == (0, len(some))
    assert "Triton is back" in told[-1]


def test_an_ingest_has_a_milvus_that_was_started_anew_load_its_gallery(
    phantom_manifest: Path, reader: FilmReader, student: TritonClient, tmp_path: Path, pseudonyms: Pseudonyms
) -> None:
    """Milvus Lite forgets at its start what was loaded; `release_collection` stands for that."""
    with (
        embedded_milvus(tmp_path / "g.db", "127.0.0.1", 0) as uri,
        Store(MilvusSettings(uri), student.model_version, pseudonyms, create=True) as store,
        closing(MilvusClient(uri)) as beside,
    ):
        rows = read_manifest(phantom_manifest).rows
        beside.release_collection(store.collection)
        with pytest.raises(StoreDownError, match="started anew"):
            store.held(["0"])
        assert ingest(rows, reader, student, store, lambda _: None).stored == len(rows)


def test_patience_ends(archive: Path, instant: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(embedded_triton(ServerOptions(instant, grpc_port=0, http_port=0, metrics_port=0)))
        reader = stack.enter_context(FilmReader())
        client = stack.enter_context(TritonClient(TritonSettings(server.grpc, timeout_s=5)))
        journal = stack.enter_context(Journal(tmp_path / "results.jsonl", {}))
        list(journal.add(find_inputs([str(archive)], reader)))
        end(server.process, signal.SIGKILL)
        options = BatchOptions(None, 10, None, include_own=False, attention=None, gate=False)
        with pytest.raises(ServerDownError, match="no Triton server answers"):
            run_batch(
                journal,
                here(reader, client),
                client.model_version,
                options,
                stop=threading.Event(),
                advance=lambda _: None,
                tell=lambda _: None,
                patience_s=2,
            )
        assert journal.counts()["failed"] == 0


def test_a_full_disk_is_said_and_costs_nothing(archive: Path, quick: Endpoints, quick_gallery: str, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: writing fails in the middle of a line."""
    out, some = tmp_path / "results.jsonl", archive / "[0-3]-*.png"
    limited = [
        "bash",
        "-c",
        'ulimit -f 400; trap "" XFSZ; exec "$@"',
        "batch",
        *cxr_command(*arguments(some, out, quick.grpc, quick_gallery)),
    ]
    full = subprocess.run(limited, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert "cannot be written or read" in full.stderr
    assert "Traceback" not in full.stderr
    done = run_cxr(*arguments(some, out, quick.grpc, quick_gallery))
    assert done.returncode == 0, done.stderr
    assert len({line["input"] for line in results(out)}) == len(results(out)) == 4 * COPIES
