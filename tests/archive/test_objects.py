"""Films in a real S3-compatible storage."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cxr_retrieval.archive.inputs import Input, Unusable, find_inputs
from cxr_retrieval.archive.objects import ObjectReader
from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.errors import ImageError, StorageDownError
from cxr_retrieval.radiograph.decoding import DecodingLimits, FilmReader
from cxr_retrieval.radiograph.files import is_object, object_key, object_path
from cxr_retrieval.radiograph.phantoms import Phantom, write_dicom
from cxr_retrieval.serving.server import Endpoints, embedded_milvus
from object_storage import ObjectStorage, object_storage
from tests_support import ENVIRONMENT, cxr_command, until

IMPATIENT = Patience(threading.Event(), 0)
FILMS = ("a/Müller Ä.png", "a/b/two.png", "a/%41.png", "c/three.png")


@pytest.fixture(scope="module")
def storage(phantoms: list[Phantom], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStorage]:
    with object_storage(tmp_path_factory.mktemp("weed")) as running:
        for key, phantom in zip(FILMS, phantoms, strict=False):
            stream = io.BytesIO()
            Image.fromarray(phantom.pixels).save(stream, "png")
            running.put(f"archive/{key}", stream.getvalue())
        dicom = tmp_path_factory.mktemp("dicom") / "film"
        write_dicom(phantoms[0], dicom)
        running.put("archive/a/IM0001", dicom.read_bytes())
        running.put("archive/a/notes", b"x" * 200)
        running.put("archive/a/.hidden.png", b"x")
        running.put("archive/a/page.txt", b"x")
        running.put("archive/a/page.png", b"no picture")
        yield running


@pytest.fixture
def reader(storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectReader]:
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    with ObjectReader(DecodingLimits(workers=1), IMPATIENT) as opened:
        yield opened


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=5))
def test_any_key_comes_back(parts: list[str]) -> None:
    key = "/".join(parts)
    if not all(key.split("/")):
        with pytest.raises(ImageError, match="names no object"):
            object_path(f"s3://bucket/{key}")
        return
    path = object_path(f"s3://bucket/{key}")
    assert object_key(path) == f"bucket/{key}"
    assert is_object(path)
    assert path == Path(str(path)).absolute() == path.resolve()


def test_what_lies_there(reader: ObjectReader, storage: ObjectStorage, tmp_path: Path, phantoms: list[Phantom]) -> None:
    found = list(find_inputs(["s3://archive/a/"], reader))
    here = ("Müller Ä.png", "b/two.png", "%41.png", "IM0001", "page.png")
    assert sorted(one.name for one in found) == sorted(f"s3://archive/a/{name}" for name in here)
    local = tmp_path / "same.png"
    Image.fromarray(phantoms[0].pixels).save(local)
    (film,) = [one for one in found if "Müller" in one.name]
    assert isinstance(film, Input)
    ours, theirs = reader.submit(film.path).result(), FilmReader(DecodingLimits(workers=1)).read(local)
    assert ours.pixels == theirs.pixels
    assert reader.submit(object_path("s3://archive/a/IM0001")).result().format == "DICOM"
    with pytest.raises(ImageError, match=r"^page\.png: not an image"):
        reader.submit(object_path("s3://archive/a/page.png")).result()
    assert not list(Path(reader._folder.name).iterdir()), "what was fetched is gone"  # pyright: ignore[reportPrivateUsage]


def test_what_is_not_there(reader: ObjectReader, storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="is not there"):
        reader.submit(object_path("s3://archive/none.png")).result()
    for name in ("s3://nobucket/x/", "s3://archive/nothing/"):
        (missing,) = find_inputs([name], reader)
        assert isinstance(missing, Unusable)
    (local,) = find_inputs(["s3://archive/a/"], FilmReader(DecodingLimits(workers=1)))
    assert isinstance(local, Unusable)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with ObjectReader(DecodingLimits(workers=1), IMPATIENT) as stranger, pytest.raises(ImageError, match="the storage refuses it"):
        stranger.submit(object_path("s3://archive/c/three.png")).result()


def test_a_storage_that_goes_away_is_waited_for(reader: ObjectReader, storage: ObjectStorage) -> None:
    storage.stop()
    with pytest.raises(StorageDownError, match="does not answer"):
        reader.submit(object_path("s3://archive/c/three.png")).result()
    told: list[str] = []
    with ObjectReader(DecodingLimits(workers=1), Patience(threading.Event(), 120, told.append)) as patient:
        film = patient.submit(object_path("s3://archive/c/three.png"))
        until(lambda: bool(told))
        storage.start()
        assert film.result(120).format == "PNG"
    assert "Storage is back" in told[-1]


def test_an_archive_and_a_manifest(storage: ObjectStorage, quick: Endpoints, tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, **storage.environment}

    def cxr(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(cxr_command(*arguments), capture_output=True, text=True, env=environment, timeout=200, check=False)

    manifest = tmp_path / "m.csv"
    rows = [f"case-{number},s3://archive/{key},control" for number, key in enumerate(("a/b/two.png", "c/three.png", "c/none.png"))]
    manifest.write_text("\n".join(["image_id,path,label", *rows]), "utf-8")
    with embedded_milvus(tmp_path / "g.db", "127.0.0.1", 0) as uri:
        reach = ("--triton", quick.grpc, "--milvus", uri, "--no-gate")
        done = cxr("ingest", "--manifest", manifest, *reach)
        assert "2 stored, 0 unchanged, 1 failed" in done.stdout, done.stderr
        assert "2 unchanged" in cxr("ingest", "--manifest", manifest, *reach).stdout
        out = tmp_path / "out.jsonl"
        done = cxr("batch", "s3://archive/a/", "--out", out, *reach)
        assert done.returncode == 1, done.stderr
        lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        assert {line["input"] for line in lines if line["status"] == "failed"} == {"s3://archive/a/page.png"}
        assert len(lines) >= 5
    shutil.rmtree(tmp_path / "g.db", ignore_errors=True)
