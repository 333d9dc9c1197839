"""Bulk work on a real Ray cluster of several nodes: the same results as without one, whatever is killed meanwhile."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_retrieval.archive.pipeline import KEPT_AT_ONCE
from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.phantoms import Phantom
from cxr_retrieval.serving.server import Endpoints, embedded_milvus
from cxr_retrieval.settings import MilvusSettings, TritonSettings
from ray_nodes import RayCluster, ray_cluster
from tests_support import ENVIRONMENT, cxr_command, run_cxr, until

COPIES = 90
NAME = "planted-7f3a"
"""In every file's name, as a patient's might be."""
OF_THE_RUN = {"trace_id", "timings_ms"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, pseudonyms: Pseudonyms) -> Iterator[RayCluster]:
    """`pseudonyms`: every node has the key of these."""
    with ray_cluster(tmp_path_factory.mktemp("ray"), 2) as running:
        yield running


@pytest.fixture(scope="module")
def archive(phantoms: list[Phantom], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """810 films, each a little different, a copy of one, and a page that is none."""
    folder = tmp_path_factory.mktemp("archive")
    for number, phantom in enumerate(phantoms):
        for copy in range(COPIES):
            pixels = phantom.pixels[::2, ::2].copy()
            pixels[:4, : copy + 4] = 255
            Image.fromarray(pixels).save(folder / f"{NAME}-{number}-{copy:02}.png", compress_level=1)
    shutil.copy(folder / f"{NAME}-3-00.png", folder / f"{NAME}-same.png")
    (folder / f"{NAME}-page.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def gallery(quick: Endpoints, phantom_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded_milvus(tmp_path_factory.mktemp("milvus") / "gallery.db", "127.0.0.1", 0) as uri:
        done = run_cxr("ingest", "--no-gate", "--manifest", phantom_manifest, "--triton", quick.grpc, "--milvus", uri)
        assert done.returncode == 0, done.stderr
        yield uri


def lines(out: Path) -> dict[str, dict[str, Any]]:
    """Input → its result, without what is another each time; an input that has two fails."""
    found: dict[str, dict[str, Any]] = {}
    for text in out.read_text("utf-8").splitlines():
        line = json.loads(text)
        assert line["input"] not in found
        found[line["input"]] = {name: value for name, value in line.items() if name not in OF_THE_RUN}
    return found


def written(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def batch(archive: Path, out: Path, *options: str | Path) -> list[str]:
    return cxr_command("batch", archive, "--no-gate", "--out", out, "--timeout", "20", *options)


def on(cluster: RayCluster) -> Sequence[str]:
    return ("--engine", "ray", "--address", cluster.address)


@pytest.fixture(scope="module")
def expected(archive: Path, quick: Endpoints, gallery: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process answers."""
    out = tmp_path_factory.mktemp("local") / "results.jsonl"
    done = subprocess.run(
        batch(archive, out, "--triton", quick.grpc, "--milvus", gallery), capture_output=True, text=True, env=environment(), timeout=200
    )
    assert done.returncode == 1, done.stderr
    return lines(out)


def environment(cluster: RayCluster | None = None) -> dict[str, str]:
    return dict(cluster.environment if cluster else ENVIRONMENT)


def same_but_for_copies(some: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]) -> None:
    """Which of two equal films is called the copy depends on which was answered first."""
    assert some.keys() == others.keys()
    for name, line in some.items():
        other = others[name]
        assert {**line, "same_as": None} == {**other, "same_as": None}
    assert Counter("same_as" in line for line in some.values()) == Counter("same_as" in line for line in others.values())


def test_answers_are_those_of_one_process(
    cluster: RayCluster, archive: Path, quick: Endpoints, gallery: str, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    done = subprocess.run(
        batch(archive, out, "--triton", quick.grpc, "--milvus", gallery, *on(cluster), "--json"),
        capture_output=True,
        text=True,
        env=environment(cluster),
        timeout=200,
    )
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["answered"], summary["failed"], summary["copies"]) == (811, 1, 1)
    same_but_for_copies(lines(out), expected)
    again = subprocess.run(
        batch(archive, out, "--triton", quick.grpc, "--milvus", gallery), capture_output=True, text=True, env=environment(), timeout=200
    )
    assert "812 inputs: 811 answered, 1 failed" in again.stdout, "the journal is that of any engine: nothing is left to do"
    assert NAME not in everything_that_ray_wrote(cluster)


def everything_that_ray_wrote(cluster: RayCluster) -> str:
    """Logs of every process of the cluster."""
    files = [path for path in cluster.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any("worker" in path.name for path in files)
    return "".join(path.read_text("utf-8", "replace") for path in files)


def test_nothing_is_lost_and_nothing_comes_twice(
    cluster: RayCluster, archive: Path, quick: Endpoints, gallery: str, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Workers are killed, then a node, then who gave the command; a node comes back."""
    out = tmp_path / "results.jsonl"
    command = batch(archive, out, "--triton", quick.grpc, "--milvus", gallery, *on(cluster))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(cluster)) as driver:
        until(lambda: written(out) >= KEPT_AT_ONCE or driver.poll() is not None, 120)
        for stage in ("Read", "Embed"):
            for process in cluster.processes(stage)[:1]:
                process.kill()
        before = written(out)
        until(lambda: written(out) > before or driver.poll() is not None, 120)
        cluster.kill_worker(0)
        before = written(out)
        until(lambda: written(out) > before or driver.poll() is not None, 120)
        killed_early = driver.poll() is None
        driver.kill()
        told = driver.communicate()[1]
    assert killed_early or written(out) == 812, told
    assert len(lines(out)) == written(out)
    cluster.add_worker()
    done = subprocess.run(command, capture_output=True, text=True, env=environment(cluster), timeout=200)
    assert done.returncode == 1, done.stderr
    same_but_for_copies(lines(out), expected)


def test_networks_of_the_workers_and_a_cluster_of_this_machine(
    cluster: RayCluster, archive: Path, student_server: Endpoints, tmp_path: Path
) -> None:
    """The same embeddings as Triton's; Ctrl-C ends it, and what is done stays."""
    some = tmp_path / "films"
    some.mkdir()
    for film in sorted(archive.glob("*-0*.png")):
        shutil.copy(film, some)
    served, held = tmp_path / "served.jsonl", tmp_path / "held.jsonl"
    done = subprocess.run(
        batch(some, served, "--embed-only", "--triton", student_server.grpc), capture_output=True, text=True, env=environment(), timeout=200
    )
    assert done.returncode == 0, done.stderr
    own = ("--engine", "ray", "--inference", "openvino", "--segmentation", "student")
    done = subprocess.run(batch(some, held, "--embed-only", *own), capture_output=True, text=True, env=environment(), timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Ray" not in done.stderr, "what Ray says of itself is nothing for who asks"
    same, other = lines(served), lines(held)
    assert same.keys() == other.keys()
    for name, line in same.items():
        for part in ("embedding", "appearance"):
            np.testing.assert_allclose(line.pop(part), other[name].pop(part), atol=2e-4)
        assert line == other[name]


def test_a_gallery_filled_on_a_cluster(
    cluster: RayCluster, quick: Endpoints, phantom_manifest: Path, gallery: str, pseudonyms: Pseudonyms, tmp_path: Path
) -> None:
    with embedded_milvus(tmp_path / "gallery.db", "127.0.0.1", 0) as uri:
        command = cxr_command("ingest", "--no-gate", "--manifest", phantom_manifest, "--triton", quick.grpc, "--milvus", uri, *on(cluster))
        done = subprocess.run(command, capture_output=True, text=True, env=environment(cluster), timeout=200)
        assert done.returncode == 0, done.stderr
        rows = len(read_manifest(phantom_manifest).rows)
        assert f"{rows} stored, 0 unchanged, 0 failed" in done.stdout
        again = subprocess.run(command, capture_output=True, text=True, env=environment(cluster), timeout=200)
        assert f"0 stored, {rows} unchanged" in again.stdout
        filled = [contents(address, quick, pseudonyms) for address in (gallery, uri)]
        assert filled[0] == filled[1]
        films = tmp_path / "films"
        films.mkdir()
        (listed, *_) = read_manifest(phantom_manifest).rows
        shutil.copy(listed.path, films / f"{NAME}.png")
        (films / f"{NAME}-page.png").write_text("no picture")
        command = cxr_command("ingest", films, "--label", "control", "--no-gate", "--triton", quick.grpc, "--milvus", uri, *on(cluster))
        done = subprocess.run(command, capture_output=True, text=True, env=environment(cluster), timeout=200)
        assert "1 stored, 0 unchanged, 1 failed" in done.stdout, done.stderr


def contents(uri: str, quick: Endpoints, pseudonyms: Pseudonyms) -> dict[str, tuple[object, ...]]:
    with TritonClient(TritonSettings(quick.grpc)) as client, Store(MilvusSettings(uri), client.model_version, pseudonyms) as store:
        cases, vectors = store.vectors()
    return {case.image_id: (case.label, case.file, *np.round(vector, 5)) for case, vector in zip(cases, vectors, strict=True)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--address", "127.0.0.1:1"), "expected --engine ray beside them"),
        (("--inference", "openvino"), "expected --engine ray beside them"),
        (("--engine", "ray", "--segmentation", "student"), "--segmentation is of networks in the workers"),
        (("--engine", "ray", "--address", "ray://127.0.0.1:10001"), "a Ray client cannot conduct bulk work"),
        (("--engine", "ray", "--inference", "tensorrt"), "the Ray cluster has no GPUs"),
    ],
)
def test_what_cannot_be(options: Sequence[str], said: str, archive: Path, quick: Endpoints, tmp_path: Path) -> None:
    film = sorted(archive.glob("*.png"))[0]
    done = run_cxr("batch", film, "--embed-only", "--out", tmp_path / "out.jsonl", "--triton", quick.grpc, *options)
    assert done.returncode == 2
    assert said in done.stderr.replace("\n", " ")


def test_no_cluster_there(archive: Path, quick: Endpoints, tmp_path: Path) -> None:
    film = sorted(archive.glob("*.png"))[0]
    asked = ("batch", film, "--out", tmp_path / "out.jsonl", "--triton", quick.grpc, "--engine", "ray")
    done = run_cxr(*asked, "--embed-only", "--address", "127.0.0.1:1")
    assert done.returncode == 2
    assert "no Ray cluster at 127.0.0.1:1" in done.stderr
    done = run_cxr(*asked, "--milvus", tmp_path / "gallery.db")
    assert done.returncode == 2
    assert "a gallery of Milvus Lite cannot be asked by several workers" in done.stderr


def test_a_node_with_another_key(cluster: RayCluster, archive: Path, quick: Endpoints, tmp_path: Path) -> None:
    """Nothing is opened by it, and so nothing read."""
    film = sorted(archive.glob("*.png"))[0]
    theirs = {**environment(cluster), "CXR_PSEUDONYM_KEY": "0123456789abcdef" * 4}
    theirs.pop("CXR_PSEUDONYM_KEY_FILE")
    done = subprocess.run(
        batch(film, tmp_path / "out.jsonl", "--embed-only", "--triton", quick.grpc, *on(cluster)),
        capture_output=True,
        text=True,
        env=theirs,
        timeout=200,
    )
    assert done.returncode == 2
    assert "no pseudonym key" in done.stderr or "has another pseudonym key" in done.stderr


def test_interrupted(cluster: RayCluster, archive: Path, quick: Endpoints, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    command = batch(archive, out, "--embed-only", "--triton", quick.grpc, *on(cluster))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(cluster)) as driver:
        until(lambda: written(out) >= 1 or driver.poll() is not None, 120)
        driver.send_signal(signal.SIGINT)
        _, told = driver.communicate(timeout=60)
    assert driver.returncode == 130 or written(out) == 812, told
    assert "Traceback" not in told
    assert len(lines(out)) == written(out)
