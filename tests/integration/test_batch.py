"""`cxr batch` as an operator meets it: real Triton, real Milvus Lite, and what kills them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from PIL import Image
from pymilvus import MilvusClient

from cxr_retrieval.archive.batch import BatchOptions, run_batch
from cxr_retrieval.archive.embedding import ingest
from cxr_retrieval.archive.inputs import find_inputs
from cxr_retrieval.archive.journal import Journal
from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.errors import ServerDownError, StoreDownError
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.phantoms import Phantom
from cxr_retrieval.retrieval.query import query
from cxr_retrieval.serving.server import Endpoints, ServerOptions, embedded_milvus, embedded_triton
from cxr_retrieval.settings import MilvusSettings, TritonSettings
from tests_support import ENVIRONMENT, cxr_command, run_cxr

COPIES = 40


@pytest.fixture(scope="module")
def gallery(server: Endpoints, phantom_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded_milvus(tmp_path_factory.mktemp("milvus") / "gallery.db", "127.0.0.1", 0) as uri:
        done = run_cxr("ingest", "--manifest", phantom_manifest, "--triton", server.grpc, "--milvus", uri)
        assert done.returncode == 0, done.stderr
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
    return ["batch", archive, "--out", out, "--triton", triton, "--milvus", milvus, "--timeout", "20"]


def test_answers_are_those_of_query(
    archive: Path, server: Endpoints, gallery: str, triton: TritonClient, reader: FilmReader, tmp_path: Path
) -> None:
    some = tmp_path / "films"
    some.mkdir()
    for number in range(9):
        shutil.copy(archive / f"{number}-0.png", some)
    shutil.copy(archive / "3-0.png", some / "the same.png")
    (some / "page.png").write_text("no picture")
    out = tmp_path / "results.jsonl"
    done = run_cxr(*arguments(some, out, server.grpc, gallery), "--attention", tmp_path / "drawn")
    assert done.returncode == 1, done.stderr
    assert "11 inputs: 10 answered, 1 failed, 1 of them copies of another" in done.stdout
    found = {Path(str(line["input"])).name: line for line in results(out)}
    assert found["page.png"]["status"] == "failed"
    assert "not an image this system reads" in str(found["page.png"]["error"])
    assert found["the same.png"]["same_as"] == str(some / "3-0.png")
    with Store(MilvusSettings(gallery), triton.model_version) as store:
        for number in range(9):
            line = found[f"{number}-0.png"]
            single = query(some / f"{number}-0.png", reader, triton, store).as_json()
            assert {*single, "input", "status", "attention", "trace_id"} == line.keys()
            for key in ("image_id", "model_version", "earlier_films", "warnings"):
                assert line[key] == single[key]
            assert [hit["image_id"] for hit in line["neighbours"]] == [hit["image_id"] for hit in single["neighbours"]]  # pyright: ignore
            assert line["prediction"]["label"] == single["prediction"]["label"]  # pyright: ignore
            with Image.open(str(line["attention"])) as drawn:
                assert drawn.mode == "RGB"


def test_a_client_killed_again_and_again_answers_each_film_once(archive: Path, server: Endpoints, gallery: str, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    kills = 0
    while kills < 4:
        process = subprocess.Popen(
            cxr_command(*arguments(archive, out, server.grpc, gallery)),
            env=ENVIRONMENT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        size = out.stat().st_size if out.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and (out.stat().st_size if out.exists() else 0) <= size:
            time.sleep(0.01)
        time.sleep(0.003 * kills)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    done = run_cxr(*arguments(archive, out, server.grpc, gallery))
    assert done.returncode == 0, done.stderr
    count = Counter(str(line["input"]) for line in results(out))
    assert len(count) == 9 * COPIES
    assert set(count.values()) == {1}
    assert {line["status"] for line in results(out)} == {"answered"}


def test_ctrl_c_keeps_what_is_in_flight_and_says_how_to_go_on(archive: Path, server: Endpoints, gallery: str, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    process = subprocess.Popen(
        cxr_command(*arguments(archive, out, server.grpc, gallery)),
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
    harm: Callable[[subprocess.Popen[bytes]], None], archive: Path, repository: Path, gallery: str, tmp_path: Path
) -> None:
    """Nothing fails for it: the same journal ends with every film answered, by the server that came back on the same port."""
    told: list[str] = []
    options = ServerOptions(repository, grpc_port=0, http_port=0, metrics_port=0)
    with ExitStack() as stack:
        first = ExitStack()
        stack.enter_context(first)
        server = first.enter_context(embedded_triton(options))
        port = int(server.grpc.rsplit(":")[-1])
        reader = stack.enter_context(FilmReader())
        client = stack.enter_context(TritonClient(TritonSettings(server.grpc, timeout_s=5)))
        store = stack.enter_context(Store(MilvusSettings(gallery), client.model_version))
        journal = stack.enter_context(Journal(tmp_path / "results.jsonl", {}))
        some = sorted(str(path) for path in archive.glob("*-?.png"))
        list(journal.add(find_inputs(some)))
        answered = threading.Semaphore(0)

        with ThreadPoolExecutor(1) as pool:  # not the other way round: a server dies with the thread that started it
            running = pool.submit(
                run_batch,
                journal,
                reader,
                client,
                BatchOptions(store, 10, "", include_own=False, attention=None),
                stop=threading.Event(),
                advance=lambda count: answered.release(),
                tell=told.append,
            )
            answered.acquire()
            harm(server.process)
            while not told and not running.done():
                time.sleep(0.05)
            end(server.process, signal.SIGKILL)
            first.close()
            stack.enter_context(embedded_triton(ServerOptions(repository, grpc_port=port, http_port=0, metrics_port=0)))
            running.result()
        assert journal.counts() == {"pending": 0, "answered": len(some), "refused": 0, "failed": 0}
    assert "Triton is away" in told[0]
    assert "Triton is back" in told[-1]


def test_an_ingest_waits_for_triton_and_stores_each_case_once(archive: Path, repository: Path, tmp_path: Path) -> None:
    some = sorted(archive.glob("*-?.png"))
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("image_id,path,label\n" + "".join(f"{path.stem},{path},control\n" for path in some))
    told: list[str] = []
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        server = first.enter_context(embedded_triton(ServerOptions(repository, grpc_port=0, http_port=0, metrics_port=0)))
        port = int(server.grpc.rsplit(":")[-1])
        reader = stack.enter_context(FilmReader())
        client = stack.enter_context(TritonClient(TritonSettings(server.grpc, timeout_s=5)))
        store = stack.enter_context(Store(MilvusSettings(str(tmp_path / "g.db")), client.model_version, create=True))
        begun = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            rows = read_manifest(manifest).rows
            running = pool.submit(ingest, rows, reader, client, store, lambda _: begun.set(), tell=told.append)
            begun.wait()
            end(server.process, signal.SIGKILL)
            while not told and not running.done():
                time.sleep(0.05)
            first.close()
            stack.enter_context(embedded_triton(ServerOptions(repository, grpc_port=port, http_port=0, metrics_port=0)))
            report = running.result()
        assert (report.stored, report.problems, report.pending) == (len(some), (), 0)
        assert store.count() == len(some)
        again = ingest(rows, reader, client, store, lambda _: None)
        assert (again.stored, again.unchanged) == (0, len(some))
    assert "Triton is back" in told[-1]


def test_an_ingest_has_a_milvus_that_was_started_anew_load_its_gallery(
    phantom_manifest: Path, reader: FilmReader, triton: TritonClient, tmp_path: Path
) -> None:
    """Milvus Lite forgets at its start what was loaded; `release_collection` stands for that."""
    with (
        embedded_milvus(tmp_path / "g.db", "127.0.0.1", 0) as uri,
        Store(MilvusSettings(uri), triton.model_version, create=True) as store,
        closing(MilvusClient(uri)) as beside,
    ):
        rows = read_manifest(phantom_manifest).rows
        beside.release_collection(store.collection)
        with pytest.raises(StoreDownError, match="started anew"):
            store.held(["0"])
        assert ingest(rows, reader, triton, store, lambda _: None).stored == len(rows)


def test_patience_ends(archive: Path, repository: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(embedded_triton(ServerOptions(repository, grpc_port=0, http_port=0, metrics_port=0)))
        reader = stack.enter_context(FilmReader())
        client = stack.enter_context(TritonClient(TritonSettings(server.grpc, timeout_s=5)))
        journal = stack.enter_context(Journal(tmp_path / "results.jsonl", {}))
        list(journal.add(find_inputs([str(archive)])))
        end(server.process, signal.SIGKILL)
        options = BatchOptions(None, 10, "", include_own=False, attention=None)
        with pytest.raises(ServerDownError, match="no Triton server answers"):
            run_batch(journal, reader, client, options, stop=threading.Event(), advance=lambda _: None, tell=lambda _: None, patience_s=2)
        assert journal.counts()["failed"] == 0


def test_a_full_disk_is_said_and_costs_nothing(archive: Path, server: Endpoints, gallery: str, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: writing fails in the middle of a line."""
    out = tmp_path / "results.jsonl"
    limited = [
        "bash",
        "-c",
        'ulimit -f 400; trap "" XFSZ; exec "$@"',
        "batch",
        *cxr_command(*arguments(archive, out, server.grpc, gallery)),
    ]
    full = subprocess.run(limited, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert "cannot be written or read" in full.stderr
    assert "Traceback" not in full.stderr
    done = run_cxr(*arguments(archive, out, server.grpc, gallery))
    assert done.returncode == 0, done.stderr
    assert len({line["input"] for line in results(out)}) == len(results(out)) == 9 * COPIES
