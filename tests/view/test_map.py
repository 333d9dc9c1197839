"""The map over HTTP, on a real gallery of made-up vectors: computed, kept, coloured, brushed, followed, and what keeps it from being there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from clusters import SOURCES, Clusters, fill
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.phantoms import make_phantom, write_dicom
from cxr_retrieval.serving.access import Access
from cxr_retrieval.serving.server import Endpoints, embedded_milvus
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, TritonSettings
from cxr_retrieval.view import census
from cxr_retrieval.view.room import ReadingRoom
from cxr_retrieval.view.servers import Servers
from cxr_retrieval.view.web import application
from tests_support import KEY_FILE, free_ports

CASES = 120
HEADERS = {"X-CXR-View": "1"}
WHOLE = [[-2, -2], [2, -2], [2, 2], [-2, 2]]


@pytest.fixture(scope="module")
def milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded_milvus(tmp_path_factory.mktemp("map") / "gallery.db", "127.0.0.1", 0) as uri:
        yield uri


@pytest.fixture(scope="module")
def filled(milvus: str, triton: TritonClient, pseudonyms: Pseudonyms) -> Clusters:
    with Store(MilvusSettings(milvus), triton.model_version, pseudonyms, create=True) as store:
        return fill(store, CASES)


@contextmanager
def opened(server: str, milvus: str, folder: Path, source: str | None = None) -> Generator[TestClient]:
    servers = Servers(TritonSettings(server, timeout_s=10), MilvusSettings(milvus, timeout_s=10), PseudonymSettings(KEY_FILE))
    with closing(ReadingRoom(servers, [], folder / "audit.jsonl", source)) as room:
        yield TestClient(application(room, Access(), (), 8080, 2**20), "http://127.0.0.1:8080", headers=HEADERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def page(server: Endpoints, milvus: str, filled: Clusters, folder: Path) -> Iterator[TestClient]:
    with opened(server.grpc, milvus, folder, "north") as client:
        yield client


def mapped(client: TestClient, wanted: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
    """The map, once it is there and as it is wanted; every state before says how far it is."""
    for _ in range(600):
        answer = client.get("/api/map")
        assert answer.status_code == 200, answer.text
        state = answer.json()
        if state["map"] and not state["doing"] and wanted(state["map"]):
            return state["map"]
        if state["doing"]:
            assert 0 <= state["doing"]["share"] <= 1
        time.sleep(0.05)
    raise AssertionError("there is no map")


def refused(client: TestClient) -> dict[str, Any]:
    """Why there is none."""
    for _ in range(600):
        answer = client.get("/api/map")
        if answer.status_code != 200:
            return answer.json()["error"]
        time.sleep(0.05)
    raise AssertionError("nothing is wrong")


def points(client: TestClient, number: int) -> Any:
    answer = client.get(f"/api/map/{number}/points")
    assert answer.headers["content-type"] == "application/octet-stream"
    return np.frombuffer(answer.content, "<f4").reshape(-1, 2)


def coloured(client: TestClient, number: int, field: str) -> tuple[Any, dict[str, Any]]:
    answer = client.get(f"/api/map/{number}/colours", params={"field": field})
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, np.uint8), json.loads(answer.headers["x-cxr-legend"])


def brushed(client: TestClient, number: int, corners: object, status: int = 200, **more: int) -> dict[str, Any]:
    answer = client.post(f"/api/map/{number}/cases", content=json.dumps({"corners": corners, **more}))
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def test_it_is_computed_and_kept_and_needs_no_library_then(
    page: TestClient, server: Endpoints, milvus: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = mapped(page)
    assert (found["cases"], found["drawn"], found["placed"], found["stale"], found["part"]) == (CASES, CASES, 0, False, False)
    places = points(page, found["id"])
    assert places.shape == (CASES, 2)
    assert np.abs(places).max() == pytest.approx(1)
    (kept,) = (folder / "maps").iterdir()
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with opened(server.grpc, milvus, folder) as another:
        again = mapped(another)
        assert (points(another, again["id"]) == places).all()
    kept.write_bytes(b"harmed")
    with opened(server.grpc, milvus, folder) as third:
        error = refused(third)
        assert (error["kind"], error["what"].startswith(str(kept))) == ("SetupError", True)
        third.post("/api/map", json={"anew": True})
        for _ in range(200):
            error = refused(third)
            if "openTSNE" in error["message"]:
                break
            time.sleep(0.05)
        assert "pip install 'cxr-retrieval[map]'" in error["next_step"]
        monkeypatch.undo()
        third.post("/api/map", json={"anew": True})
        for _ in range(200):
            if third.get("/api/map").status_code == 200:
                break
            time.sleep(0.05)
        assert (points(third, mapped(third)["id"]) == places).all()


def test_it_says_what_the_gallery_holds_and_whether_it_knows_a_hospital(
    page: TestClient, server: Endpoints, milvus: str, folder: Path
) -> None:
    said = mapped(page)["told"]
    assert said[0].startswith("120 cases of 3 sources: ")
    assert "agrees with the label of" in said[1]
    assert "are of north, your hospital; there the vote agrees" in said[2]
    with opened(server.grpc, milvus, folder, "nowhere") as another:
        assert mapped(another)["told"][2].startswith("It holds no case of nowhere: it does not know your hospital")


def test_every_field_is_a_colour(page: TestClient) -> None:
    found = mapped(page)
    fields = {one["name"]: one["kind"] for one in found["fields"]}
    assert fields["age"] == "number"
    assert fields["went_icu"] == "flag"
    assert {"label", "source", "agreement", "vote", "sex", 'extra["ward"]'} <= fields.keys()
    for field, kind in fields.items():
        codes, legend = coloured(page, found["id"], field)
        assert len(codes) == CASES
        assert legend["kind"] == kind
        assert sum(entry["cases"] for entry in legend["entries"]) == CASES
        for entry in legend["entries"]:
            assert entry["cases"] == ((codes >= entry["low"]) & (codes <= entry["high"])).sum()
            assert entry["agree"] <= entry["voted"] <= entry["cases"]
    names = [entry["name"] for entry in coloured(page, found["id"], "age")[1]["entries"]]
    assert names[0].startswith("under ")
    assert names[-2].endswith(" and more")
    assert names[-1] == "unknown"
    agreement = {entry["name"]: entry for entry in coloured(page, found["id"], "agreement")[1]["entries"]}
    assert agreement["agrees"]["agree"] == agreement["agrees"]["cases"]
    assert agreement["disagrees"]["agree"] == 0
    refused_ = page.get(f"/api/map/{found['id']}/colours", params={"field": "patient_id"})
    assert (refused_.status_code, "no field patient_id" in refused_.json()["error"]["message"]) == (422, True)


def test_a_region_has_its_cases_and_their_summary(page: TestClient, filled: Clusters) -> None:
    number = mapped(page)["id"]
    places = points(page, number)
    first = brushed(page, number, WHOLE, limit=50)
    assert first["total"] == first["summary"]["n"] == CASES
    assert sum(first["summary"]["features"]["label"]["counts"].values()) == CASES
    assert any(line.startswith("intensive care: ") for line in first["told"])
    keys = [case["key"] for case in first["cases"]]
    for offset in (50, 100):
        keys += [case["key"] for case in brushed(page, number, WHOLE, limit=50, offset=offset)["cases"]]
    assert sorted(keys) == sorted(filled.keys)
    assert first["cases"][0]["film"] == f"case-{keys[0]}"
    hollow = [[-2, -2], [2, -2], [2, 2], [-2, 2], [-2, 0.01], [1.9, 0.01], [1.9, -0.01], [-2, -0.01]]  # all but a slot in the middle
    inside = brushed(page, number, hollow)["total"]
    assert inside == CASES - int((np.abs(places[:, 1]) < 0.01).sum())
    assert brushed(page, number, [[5, 5], [6, 5], [6, 6]])["total"] == 0


@pytest.mark.parametrize(
    ("corners", "words"),
    [
        ([], "no region"),
        ([[0, 0]] * 1001, "no region"),
        ([[0, 0], [1, 1]], "no region"),
        ("x", "malformed"),
        ([1, 2, 3], "malformed"),
        ([[0, 0], [0, 1], [0, float("nan")]], "malformed"),
        ([[0, 0], [0, 1], [0, float("inf")]], "malformed"),
        ([[0, 0], [0, 1], [0, True]], "malformed"),
        ([[0, 0], [0, 1], [0, "1"]], "malformed"),
    ],
)
def test_what_is_no_region(page: TestClient, corners: object, words: str) -> None:
    assert words in brushed(page, mapped(page)["id"], corners, 422)["message"]


def test_a_map_that_is_not_the_latest_is_gone(page: TestClient) -> None:
    number = mapped(page)["id"] + 1
    for answer in (
        page.get(f"/api/map/{number}/points"),
        page.get(f"/api/map/{number}/colours"),
        page.get(f"/api/map/{number}/queries/1"),
        page.post(f"/api/map/{number}/cases", json={"corners": WHOLE}),
    ):
        assert (answer.status_code, answer.json()["error"]["kind"]) == (404, "GoneError")


def test_a_film_lies_between_its_neighbours(page: TestClient, tmp_path: Path) -> None:
    number = mapped(page)["id"]
    write_dicom(make_phantom(77, "covid19"), tmp_path / "film.dcm")
    film = page.post("/api/films", content=(tmp_path / "film.dcm").read_bytes()).json()["film"]
    answer = page.post("/api/queries", json={"film": film}).json()
    marks = page.get(f"/api/map/{number}/queries/{answer['id']}").json()
    near = np.array([[place["x"], place["y"]] for place in marks["neighbours"]])
    assert [place["rank"] for place in marks["neighbours"]] == list(range(1, 11))
    assert (near.min(axis=0) <= marks["query"]).all()
    assert (marks["query"] <= near.max(axis=0)).all()
    assert page.get(f"/api/map/{number}/queries/999").status_code == 404


def test_cases_that_come_later_are_placed(
    page: TestClient, milvus: str, triton: TritonClient, pseudonyms: Pseudonyms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when many have come, it says that it is stale, until it is computed anew."""
    monkeypatch.setattr(census, "_LOOK_AGAIN_S", 0.05)
    before = mapped(page)
    with Store(MilvusSettings(milvus), triton.model_version, pseudonyms) as store:
        fill(store, 6, start=CASES)
        some = mapped(page, lambda found: found["cases"] == CASES + 6)
        assert (some["placed"], some["stale"], some["drawn"]) == (6, False, CASES)
        assert some["id"] > before["id"]
        fill(store, 30, start=CASES + 6)
        many = mapped(page, lambda found: found["cases"] == CASES + 36)
        assert (many["placed"], many["stale"]) == (36, True)
    page.post("/api/map", json={"anew": True})
    anew = mapped(page, lambda found: found["drawn"] == CASES + 36)
    assert (anew["placed"], anew["stale"]) == (0, False)
    assert {entry["name"] for entry in coloured(page, anew["id"], "source")[1]["entries"]} == set(SOURCES[:3])


def test_an_empty_gallery_and_servers_that_are_away(
    server: Endpoints, triton: TritonClient, pseudonyms: Pseudonyms, tmp_path: Path
) -> None:
    with embedded_milvus(tmp_path / "gallery.db", "127.0.0.1", 0) as uri:
        Store(MilvusSettings(uri), triton.model_version, pseudonyms, create=True).close()
        with opened(server.grpc, uri, tmp_path) as client:
            assert "cxr ingest" in refused(client)["next_step"]
    (port,) = free_ports(1)
    with opened(server.grpc, f"http://127.0.0.1:{port}", tmp_path) as client:
        error = refused(client)
        assert (error["kind"], "cxr serve" in error["next_step"]) == ("StoreDownError", True)


def test_the_end_of_the_page_ends_the_work(server: Endpoints, milvus: str, filled: Clusters, tmp_path: Path) -> None:
    with opened(server.grpc, milvus, tmp_path) as client:
        client.get("/api/map")
        started = time.monotonic()
    assert time.monotonic() - started < 30
    assert not (tmp_path / "maps").exists()
