"""`cxr reindex` from the gallery of networks that answer at once to that of the shipped weights with the small network for the lungs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chaos.instant import instant_repository
from chaos.world import milvus_service
from cxr_retrieval.archive.audit import entries, verify
from cxr_retrieval.archive.embedding import ingest
from cxr_retrieval.archive.reindex import compare_on_gallery, compare_on_manifest, reindex
from cxr_retrieval.cases.manifest import ManifestRow, read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.errors import InferenceError, StoreError, UsageError
from cxr_retrieval.gallery.aliases import ALIAS, list_galleries
from cxr_retrieval.gallery.balance import PARTS, side_by_side
from cxr_retrieval.gallery.store import Store, drop_gallery, make_entry, remove_cases
from cxr_retrieval.gallery.thumbnails import Thumbnail
from cxr_retrieval.gallery.words import WORDS_FIELD
from cxr_retrieval.inference.triton import TRUSTED_S, TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.phantoms import Phantom
from cxr_retrieval.serving.server import Endpoints, ServerOptions, embedded_triton
from cxr_retrieval.settings import MilvusSettings, ThumbnailKind, TritonSettings
from tests_support import ENVIRONMENT, cxr_command, run_cxr
from vectors import make_former_gallery

COPIES = 12


@pytest.fixture(scope="module")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusSettings]:
    """In a process of its own: with what training imports, faiss, with which Milvus Lite searches, is patched in this one."""
    folder = tmp_path_factory.mktemp("milvus")
    service, port = milvus_service(folder, folder / "gallery.db")
    with service:
        yield MilvusSettings(f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def drawn(phantoms: list[Phantom], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """108 films of nine phantoms, two of each patient, each a little different; and their manifest."""
    folder = tmp_path_factory.mktemp("drawn")
    lines = ["image_id,path,label,patient_id,source,age"]
    for number, phantom in enumerate(phantoms):
        for copy in range(COPIES):
            pixels = phantom.pixels.copy()
            pixels[:4, : 3 * copy + 4] = 255
            name = f"{number}-{copy}"
            Image.fromarray(pixels).save(folder / f"{name}.png", compress_level=1)
            lines.append(f"{name},{name}.png,{phantom.label},p{number}-{copy // 2},north,{40 + copy}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def embedded(
    drawn: Path, reader: FilmReader, quick_client: TritonClient, milvus: MilvusSettings, pseudonyms: Pseudonyms
) -> list[dict[str, Any]]:
    """All films' rows by the former networks."""
    with Store(milvus, quick_client.model_version, pseudonyms, create=True) as store:
        ingest(read_manifest(drawn / "manifest.csv").rows, reader, quick_client, store, lambda _: None, gate=False)
        found = list(store.rows(["*"]))
    drop_gallery(milvus, store.collection)
    return found


@pytest.fixture
def films(drawn: Path, tmp_path: Path) -> list[ManifestRow]:
    """The test's own copies."""
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    return list(read_manifest(tmp_path / "manifest.csv").rows)


@pytest.fixture
def gallery(
    films: list[ManifestRow],
    embedded: list[dict[str, Any]],
    reader: FilmReader,
    quick_client: TritonClient,
    milvus: MilvusSettings,
    pseudonyms: Pseudonyms,
) -> Iterator[Store]:
    """Of the former networks, with all films in it; none of the shipped ones."""
    with Store(milvus, quick_client.model_version, pseudonyms, create=True) as store:
        store.put(embedded)
        assert ingest(films, reader, quick_client, store, lambda _: None, gate=False).unchanged == len(films), (
            "and the local table has their new paths"
        )
        yield store
    for name in list_galleries(milvus):
        drop_gallery(milvus, name)


def rows(store: Store) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in store.rows(["*"])}


def facts(store: Store) -> dict[str, dict[str, Any]]:
    return {key: {name: value for name, value in row.items() if name != "embedding"} for key, row in rows(store).items()}


def arguments(milvus: MilvusSettings, server: Endpoints, log: Path) -> list[str | Path]:
    return ["reindex", "--triton", server.grpc, "--milvus", milvus.uri, "--audit", log]


def the_gallery(milvus: MilvusSettings) -> list[str]:
    return [name for name, aliases in list_galleries(milvus).items() if ALIAS in aliases]


def test_the_other_versions_gallery_is_filled_compared_and_switched_to(
    gallery: Store,
    films: list[ManifestRow],
    student_server: Endpoints,
    student: TritonClient,
    quick: Endpoints,
    milvus: MilvusSettings,
    reader: FilmReader,
    tmp_path: Path,
    pseudonyms: Pseudonyms,
) -> None:
    log = tmp_path / "audit.jsonl"
    done = run_cxr(*arguments(milvus, student_server, log), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["cases"], result["embedded"], result["missing"], result["answers"]) == (len(films), len(films), [], True)
    compared = result["comparison"]
    assert (compared["queries"], compared["gallery"]) == (len(films), len(films))
    for side in ("former", "latter"):
        assert 0 <= compared[side]["recall_at"]["1"] <= compared[side]["recall_at"]["10"] <= 1
    assert 0 < compared["kept"]["neighbours"] <= 1
    assert the_gallery(milvus) == [gallery.collection], "not without --switch"

    with Store(milvus, student.model_version, pseudonyms) as new:
        assert facts(new) == facts(gallery)
        squares = np.stack([reader.read(row.path).square for row in films[:8]])[:, None]
        expected = side_by_side(student.infer(squares, PARTS))
        stored = new.embeddings([pseudonyms.image(row.image_id) for row in films[:8]])
        for row, vector in zip(films, expected, strict=False):
            assert stored[pseudonyms.image(row.image_id)] == pytest.approx(vector, abs=5e-3)
    again = run_cxr(
        *arguments(milvus, student_server, log), "--switch", "--compare", tmp_path / "manifest.csv", "--former-triton", quick.grpc
    )
    assert again.returncode == 0, again.stderr
    assert f"{len(films)} kept; the gallery from now on" in again.stdout
    assert "recall@10" in again.stdout
    assert "neighbours kept" in again.stdout
    assert the_gallery(milvus) == [f"cxr_{student.model_version}"]
    back = run_cxr("gallery", "use", gallery.collection.removeprefix("cxr_"), "--milvus", milvus.uri, "--audit", log)
    assert back.returncode == 0, back.stderr
    assert f"cxr gallery use {student.model_version}" in back.stdout
    assert the_gallery(milvus) == [gallery.collection]
    for one, version in ((quick, gallery.collection), (student_server, f"cxr_{student.model_version}")):
        asked = run_cxr("query", films[0].path, "--json", "--no-gate", "--triton", one.grpc, "--milvus", milvus.uri)
        assert f"cxr_{json.loads(asked.stdout)['model_version']}" == version, asked.stderr
    assert [(line["action"], line["state"]) for line in entries(log)] == [
        (action, state) for action in ("reindex", "reindex", "gallery use") for state in ("begun", "done")
    ]
    assert verify(log).flaw is None


def test_killed_in_the_middle_it_goes_on(
    gallery: Store,
    films: list[ManifestRow],
    student_server: Endpoints,
    student: TritonClient,
    milvus: MilvusSettings,
    tmp_path: Path,
    pseudonyms: Pseudonyms,
) -> None:
    log = tmp_path / "audit.jsonl"
    process = subprocess.Popen(
        cxr_command(*arguments(milvus, student_server, log)), env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    name = f"cxr_{student.model_version}"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if name in list_galleries(milvus):
            with Store(milvus, student.model_version, pseudonyms, fill=True) as new:
                if new.count():
                    break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Store(milvus, student.model_version, pseudonyms, fill=True) as new:
        assert 0 < new.count() < len(films), "in the middle"
    with pytest.raises(StoreError, match="is not filled yet"):
        Store(milvus, student.model_version, pseudonyms)
    asked = run_cxr("query", films[0].path, "--triton", student_server.grpc, "--milvus", milvus.uri)
    assert (asked.returncode, asked.stdout) == (2, ""), "nobody is answered from half a gallery"
    used = run_cxr("gallery", "use", student.model_version, "--milvus", milvus.uri, "--audit", log)
    assert "is not filled yet" in used.stderr
    done = run_cxr(*arguments(milvus, student_server, log), "--json", "--sample", "0")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kept"] > 0
    assert result["kept"] + result["embedded"] == len(films)
    with Store(milvus, student.model_version, pseudonyms) as new:
        assert facts(new) == facts(gallery)
    assert verify(log).flaw is None


def test_what_happens_meanwhile_is_caught_up_and_every_answer_is_of_one_version(
    gallery: Store,
    films: list[ManifestRow],
    student: TritonClient,
    quick_client: TritonClient,
    milvus: MilvusSettings,
    reader: FilmReader,
    tmp_path: Path,
    pseudonyms: Pseudonyms,
) -> None:
    """Queries, an ingest, a correction and a removal, all in the former gallery while the new one is filled."""
    late = tmp_path / "late.csv"
    picture = np.asarray(Image.open(films[0].path)).copy()
    picture[-4:] = 255
    Image.fromarray(picture).save(tmp_path / "late.png")
    corrected = films[3].image_id
    late.write_text(
        f"image_id,path,label,patient_id,source\nlate,late.png,control,new,north\n{corrected},{corrected}.png,covid19,p0-1,north\n"
    )
    known = rows(gallery)
    probes = np.array([row["embedding"] for row in known.values()], np.float32)[:20]
    begun, ended = threading.Event(), threading.Event()

    def ask() -> int:
        asked = 0
        with Store(milvus, quick_client.model_version, pseudonyms) as store:
            while not ended.is_set():
                for hits in store.search_many(probes, 3):
                    assert hits[0].similarity == pytest.approx(1, abs=1e-3), "its own vector, as this version made it"
                asked += len(probes)
        return asked

    def change() -> None:
        begun.wait()
        with Store(milvus, quick_client.model_version, pseudonyms) as store:
            ingest(read_manifest(late).rows, reader, quick_client, store, lambda _: None, gate=False)
        remove_cases(milvus, pseudonyms, f'key in ["{pseudonyms.image(films[-1].image_id)}", "{pseudonyms.image(films[5].image_id)}"]')

    with ThreadPoolExecutor(3) as pool, Store(milvus, student.model_version, pseudonyms, fill=True) as new:
        asking, changing = [pool.submit(ask) for _ in range(2)], pool.submit(change)
        try:
            with pytest.raises(StoreError, match="is not filled yet"):
                Store(milvus, student.model_version, pseudonyms)
            first = reindex(gallery, new, reader, student, advance=lambda _: begun.set())
            changing.result()
            second = reindex(gallery, new, reader, student)
        finally:
            ended.set()
        assert all(one.result() > 0 for one in asking)
        assert facts(new) == facts(gallery)
        assert pseudonyms.image("late") in facts(new)
        assert facts(new)[pseudonyms.image(corrected)]["label"] == "covid19"
        assert pseudonyms.image(films[-1].image_id) not in facts(new)
        assert new.filling
        new.filled()
        assert not new.filling
        assert (first.problems, second.problems, second.cases) == ((), (), len(films) - 1)
        third = reindex(gallery, new, reader, student)
        assert (third.embedded, third.corrected, third.kept) == (0, 0, len(films) - 1)


def test_what_leaves_meanwhile_neither_stays_nor_is_missing(
    gallery: Store,
    films: list[ManifestRow],
    student: TritonClient,
    milvus: MilvusSettings,
    reader: FilmReader,
    monkeypatch: pytest.MonkeyPatch,
    pseudonyms: Pseudonyms,
) -> None:
    """Consent withdrawn between the reading of a row and its writing, and, of another case, between row and picture."""
    unread, unwritten = pseudonyms.image(films[0].image_id), pseudonyms.image(films[1].image_id)
    with Store(milvus, student.model_version, pseudonyms, fill=True, beside=gallery) as new:
        look, put = gallery.thumbnails, new.put

        def before_the_picture(keys: Sequence[str]) -> dict[str, Thumbnail]:
            if unread in keys:
                remove_cases(milvus, pseudonyms, f'key == "{unread}"')
            return look(keys)

        def before_the_writing(rows: Sequence[Mapping[str, Any]]) -> None:
            if unwritten in [row["key"] for row in rows]:
                remove_cases(milvus, pseudonyms, f'key == "{unwritten}"')
            put(rows)

        monkeypatch.setattr(gallery, "thumbnails", before_the_picture)
        monkeypatch.setattr(new, "put", before_the_writing)
        report = reindex(gallery, new, reader, student)
        assert (report.removed, report.cases, report.problems) == (1, len(films) - 2, ())
        assert facts(new) == facts(gallery)


def test_stored_pictures_need_no_files(
    gallery: Store,
    films: list[ManifestRow],
    student: TritonClient,
    quick_client: TritonClient,
    milvus: MilvusSettings,
    reader: FilmReader,
    pseudonyms: Pseudonyms,
) -> None:
    """Whole ones; of one that shows the lungs alone the file is needed."""
    expected = side_by_side(student.infer(np.stack([reader.read(row.path).square for row in films[:5]])[:, None], PARTS))
    ingest(films[:4], reader, quick_client, gallery, lambda _: None, thumbnails=ThumbnailKind.full, gate=False)
    ingest(films[4:5], reader, quick_client, gallery, lambda _: None, thumbnails=ThumbnailKind.lungs, gate=False)
    for row in films[:5]:
        row.path.unlink()
    with Store(milvus, student.model_version, pseudonyms, fill=True, beside=gallery) as new:
        report = reindex(gallery, new, reader, student)
        assert [problem.image_id for problem in report.problems] == [pseudonyms.image(films[4].image_id)]
        stored = new.embeddings([pseudonyms.image(row.image_id) for row in films[:4]])
        for row, vector in zip(films[:4], expected, strict=False):
            assert stored[pseudonyms.image(row.image_id)] == pytest.approx(vector, abs=5e-3)


def test_cases_without_their_picture_are_named_and_the_switch_is_refused(
    gallery: Store,
    films: list[ManifestRow],
    student_server: Endpoints,
    student: TritonClient,
    milvus: MilvusSettings,
    tmp_path: Path,
    pseudonyms: Pseudonyms,
) -> None:
    log = tmp_path / "audit.jsonl"
    films[0].path.unlink()
    films[1].path.write_bytes(films[20].path.read_bytes())
    lost, other = pseudonyms.image(films[0].image_id), pseudonyms.image(films[1].image_id)
    refused = run_cxr(*arguments(milvus, student_server, log), "--switch", "--json")
    assert refused.returncode == 1
    result = json.loads(refused.stdout)
    assert (result["answers"], result["switched"], result["embedded"]) == (False, False, len(films) - 2)
    assert {one["key"] for one in result["missing"]} == {lost, other}
    assert "another picture than when it was ingested" in refused.stderr
    assert "the new gallery does not answer yet" in refused.stderr
    assert the_gallery(milvus) == [gallery.collection]
    taken = run_cxr(*arguments(milvus, student_server, log), "--switch", "--allow-missing", "--sample", "0")
    assert taken.returncode == 1, "they are still missing"
    assert "2 missing; the gallery from now on" in taken.stdout
    assert the_gallery(milvus) == [f"cxr_{student.model_version}"]
    assert {key for line in entries(log) if line["state"] == "done" for key in line["missing"]} == {lost, other}


def test_a_gallery_is_not_filled_from_itself(gallery: Store, quick: Endpoints, milvus: MilvusSettings, tmp_path: Path) -> None:
    refused = run_cxr(*arguments(milvus, quick, tmp_path / "audit.jsonl"))
    assert refused.returncode == 2
    assert "cannot be filled from itself" in refused.stderr
    assert not [name for name, aliases in list_galleries(milvus).items() if any("filling" in alias for alias in aliases)]


def test_the_former_versions_server_must_be_of_that_version(
    gallery: Store, student_server: Endpoints, milvus: MilvusSettings, tmp_path: Path
) -> None:
    refused = run_cxr(
        *arguments(milvus, student_server, tmp_path / "audit.jsonl"),
        "--compare",
        tmp_path / "manifest.csv",
        "--former-triton",
        student_server.grpc,
    )
    assert refused.returncode == 2
    assert "this is not the server of the former version" in refused.stderr


def test_a_gallery_of_the_former_layout_is_carried_over(
    films: list[ManifestRow],
    embedded: list[dict[str, Any]],
    reader: FilmReader,
    quick_client: TritonClient,
    milvus: MilvusSettings,
    pseudonyms: Pseudonyms,
    tmp_path: Path,
) -> None:
    """One vector of 64 numbers a case, as galleries were before there was a balance: the way that its refusal names."""
    make_former_gallery(milvus, pseudonyms, "one_vector", embedded)
    pseudonyms.remember([make_entry(row, "", pseudonyms).original for row in films])  # where their files are by now
    with pytest.raises(StoreError, match="`cxr reindex`"):
        Store(milvus, "one_vector", pseudonyms)
    with (
        Store(milvus, "one_vector", pseudonyms, outdated=True) as former,
        Store(milvus, quick_client.model_version, pseudonyms, fill=True, beside=former) as new,
    ):
        report = reindex(former, new, reader, quick_client)
        assert (report.embedded, report.problems) == (len(films), ())
        new.filled()
        carried = {key: {name: value for name, value in row.items() if name != WORDS_FIELD} for key, row in facts(new).items()}
        assert carried == facts(former)
        expected = {row["key"]: row["embedding"] for row in embedded}
        for key, vector in new.embeddings(list(expected)).items():
            assert vector == pytest.approx(expected[key], abs=5e-3)
        compared = compare_on_gallery(former, new, sample=20, k=3)
        assert compared["queries"] == 20
        with pytest.raises(UsageError, match="leave --former-triton out"):
            compare_on_manifest(films[:2], former, new, reader, quick_client, quick_client, k=3)
    for name in list_galleries(milvus):
        drop_gallery(milvus, name)


def test_weights_that_change_under_a_client_are_refused(tiny: Path, tmp_path: Path) -> None:
    """A server restarted with others, on the same port, between two requests: its vectors do not reach the former's gallery."""
    picture = np.arange(256, dtype=np.uint8)[:, None].repeat(256, 1)[None, None]
    options = ServerOptions(tiny, grpc_port=0, http_port=0, metrics_port=0)
    with embedded_triton(options) as first, TritonClient(TritonSettings(first.grpc, timeout_s=30)) as client:
        port = int(first.grpc.rsplit(":")[-1])
        client.embed(picture)
        first.process.kill()
        first.process.wait()
        other = ServerOptions(instant_repository(tmp_path), grpc_port=port, http_port=0, metrics_port=0)
        with embedded_triton(other):
            time.sleep(TRUSTED_S)  # no real network is loaded faster; these are
            with pytest.raises(InferenceError, match="serves other weights than before"):
                client.embed(picture)


def test_nothing_is_compared_with_nothing(gallery: Store, student: TritonClient, milvus: MilvusSettings, pseudonyms: Pseudonyms) -> None:
    with (
        Store(milvus, student.model_version, pseudonyms, fill=True, beside=gallery) as new,
        pytest.raises(Exception, match="nothing to compare"),
    ):
        compare_on_gallery(gallery, new, sample=10, k=10)


def test_same_version_is_an_error_of_the_library_too(gallery: Store, quick_client: TritonClient, reader: FilmReader) -> None:
    with pytest.raises(UsageError, match="cannot be filled from itself"):
        reindex(gallery, gallery, reader, quick_client)
