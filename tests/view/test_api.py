"""The page's HTTP interface on the real Triton and a real gallery: answers, films, pictures, and what cannot be done."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from starlette.testclient import TestClient

from chaos.proxy import Proxy
from cxr_retrieval.archive.audit import entries
from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.gallery.thumbnails import Thumbnail
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.phantoms import Phantom, make_phantom, write_dicom
from cxr_retrieval.retrieval.query import query
from cxr_retrieval.serving.access import Access
from cxr_retrieval.serving.server import Endpoints
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, ThumbnailKind, TritonSettings
from cxr_retrieval.view.room import ReadingRoom
from cxr_retrieval.view.servers import Servers
from cxr_retrieval.view.web import application
from cxr_retrieval.view.worklist import Results
from tests_support import KEY_FILE, free_ports

MOST = 2 * 2**20
PLANTED = "Doe^Jane-planted-77"


@dataclass(frozen=True)
class Page:
    """The application over real servers, and what it was given."""

    client: TestClient
    room: ReadingRoom
    audit: Path

    def post(self, path: str, *, status: int = 200, **sent: Any) -> Any:
        answer = self.client.post(path, headers={"X-CXR-View": "1"}, **sent)
        assert answer.status_code == status, answer.text
        return answer.json()

    def get(self, path: str, *, status: int = 200) -> Any:
        answer = self.client.get(path)
        assert answer.status_code == status, answer.text
        return answer.json()

    def film(self, path: Path) -> str:
        return self.post("/api/films", content=path.read_bytes(), status=201)["film"]

    def picture(self, path: str) -> NDArray[np.uint8]:
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "image/png"
        return np.asarray(Image.open(io.BytesIO(answer.content)))

    def greys(self, film: str) -> tuple[dict[str, Any], NDArray[np.uint16]]:
        answer = self.client.get(f"/api/films/{film}/greys")
        assert answer.status_code == 200, answer.text
        about = json.loads(answer.headers["x-cxr-film"])
        return about, np.frombuffer(answer.content, "<u2").reshape(about["height"], about["width"])


def results_of(folder: Path, dicom: Path) -> Path:
    path = folder / "results.jsonl"
    told = {"prediction": {"label": "covid19", "confidence": 0.8, "scores": {"covid19": 0.8}}, "warnings": ["w"], "image_id": "film-x"}
    failed = {"input": str(folder / "gone.dcm"), "status": "failed", "error": "gone"}
    path.write_text(
        json.dumps({"input": str(dicom), "status": "answered", "source": "hospital-z", **told}) + "\n" + json.dumps(failed) + "\n"
    )
    return path


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asked") / f"{PLANTED}.dcm"
    write_dicom(make_phantom(77, "covid19"), path)
    return path


@pytest.fixture(scope="module")
def page(server: Endpoints, served_gallery: str, dicom: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened(server, served_gallery, dicom, tmp_path_factory.mktemp("page")) as one:
        yield one


@pytest.fixture
def fresh(server: Endpoints, served_gallery: str, dicom: Path, tmp_path: Path) -> Iterator[Page]:
    """One that nobody has asked anything."""
    with opened(server, served_gallery, dicom, tmp_path) as one:
        yield one


@contextmanager
def opened(server: Endpoints, served_gallery: str, dicom: Path, folder: Path) -> Generator[Page]:
    servers = Servers(TritonSettings(server.grpc), MilvusSettings(served_gallery), PseudonymSettings(KEY_FILE))
    with closing(ReadingRoom(servers, [Results(results_of(folder, dicom))], folder / "audit.jsonl", "phantom-north")) as room:
        client = TestClient(application(room, Access(), (), 8080, MOST), "http://127.0.0.1:8080", raise_server_exceptions=False)
        yield Page(client, room, folder / "audit.jsonl")


@pytest.fixture
def gallery(served_gallery: str, triton: TritonClient, pseudonyms: Pseudonyms) -> Iterator[Store]:
    with Store(MilvusSettings(served_gallery), triton.model_version, pseudonyms) as store:
        yield store


def without_times(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "timings_ms"}


def test_an_answer_is_that_of_the_command_and_more(
    page: Page, gallery: Store, reader: FilmReader, triton: TritonClient, dicom: Path
) -> None:
    film = page.film(dicom)
    answer = page.post("/api/queries", json={"film": film, "top_k": 4})
    published = without_times(query(dicom, reader, triton, gallery, top_k=4).as_json())
    assert film == published["image_id"]
    for shown, known in zip(answer["neighbours"], published["neighbours"], strict=True):
        assert {name: shown[name] for name in known} == known | {"similarity": pytest.approx(known["similarity"], abs=1e-4)}
        assert shown["film"] == f"case-{shown['key']}"
        assert shown["facts"]["age"] == str(int(known["metadata"]["age"]))
    same = published.keys() - {"neighbours", "prediction", "ood"}
    assert {name: answer[name] for name in same} == {name: published[name] for name in same}
    assert answer["prediction"]["label"] == published["prediction"]["label"]
    assert answer["status"] == "answered"
    assert answer["sentence"].endswith(f"weighted share {answer['prediction']['confidence']:.2f}"), "not measured for phantoms"
    assert any(line.startswith("intensive care: ") for line in answer["told"])
    assert page.get(f"/api/queries/{answer['id']}") == answer
    recent = page.get("/api/worklist?list=recent&descending=1")["rows"][0]
    assert (recent["answer"], recent["film"], recent["label"]) == (answer["id"], film, answer["prediction"]["label"])
    assert page.get("/api/status")["gallery"]["cases"] == 9


def test_what_is_asked_is_written_down_and_names_nobody(page: Page, dicom: Path) -> None:
    film = page.film(dicom)
    page.post("/api/queries", json={"film": film, "patient": PLANTED})
    begun, done = list(entries(page.audit))[-2:]
    assert (begun["action"], begun["film"], begun["state"], done["state"], done["answer"]) == ("query", film, "begun", "done", "answered")
    assert PLANTED not in page.audit.read_text()
    assert PLANTED not in json.dumps(page.get("/api/worklist?list=recent")), "the page alone knows what a dropped file was called"


def test_pictures_of_a_film_and_of_a_case_fit_each_other(page: Page, dicom: Path) -> None:
    film = page.film(dicom)
    answer = page.post("/api/queries", json={"film": film, "top_k": 1})
    for name in (film, answer["neighbours"][0]["film"]):
        about, stored = page.greys(name)
        over, small = page.picture(f"/api/films/{name}/explanation"), page.picture(f"/api/films/{name}/thumbnail")
        assert over.shape == (*small.shape, 3)
        assert over.shape[1] / over.shape[0] == pytest.approx(about["width"] / about["height"], abs=0.01)
        lungs = over[..., 1]
        assert set(np.unique(lungs)) == {0, 255}
        assert 0.1 < (lungs > 0).mean() < 0.6
        assert over[lungs == 0, 0].max() == 0, "no attention outside"
        assert over[lungs > 0, 0].max() > 128
        own = about["intercept"] + about["slope"] * stored.astype(float)
        grey = np.clip(255 * (own - about["low"]) / (about["high"] - about["low"]), 0, 255)
        grey = np.asarray(
            Image.fromarray(((255 - grey) if about["inverted"] else grey).astype(np.uint8)).resize((small.shape[1], small.shape[0]))
        )
        assert np.abs(grey.astype(float) - small).mean() < 4, "the same film"
    assert page.greys(film)[0]["inverted"] is True
    assert page.greys(film)[1].max() > 255, "of twelve bits"


def test_a_stored_case_is_asked_about_without_itself(page: Page, phantoms: list[Phantom]) -> None:
    cases = page.post("/api/cases", json={"where": 'label == "covid19"', "limit": 2})["cases"]
    assert len(cases) == 2
    assert {case["label"] for case in cases} == {"covid19"}
    answer = page.post("/api/queries", json={"film": cases[0]["film"], "top_k": 3})
    assert [hit["key"] for hit in answer["earlier_films"]] == [cases[0]["key"]]
    assert cases[0]["key"] not in {hit["key"] for hit in answer["neighbours"]}
    assert {phantom.image_id for phantom in phantoms} >= {case["image_id"] for case in cases}


def test_a_line_of_results_is_asked_about_by_its_path(page: Page) -> None:
    listed = page.get("/api/worklist?list=0&sort=status")
    assert [row["status"] for row in listed["rows"]] == ["answered", "failed"]
    assert listed["rows"][0]["name"] == f"{PLANTED}.dcm"
    answer = page.post("/api/queries", json={"film": listed["rows"][0]["film"]})
    assert "the gallery holds no film of hospital-z" in answer["warnings"][-1]
    gone = page.post("/api/queries", json={"film": listed["rows"][1]["film"]}, status=422)["error"]
    assert gone["what"] == "gone.dcm: cannot be read"


def test_the_hospital_of_dropped_films(page: Page, dicom: Path) -> None:
    film = page.film(dicom)
    ours = page.post("/api/queries", json={"film": film})
    assert ours["source"] == "phantom-north"
    assert not any("holds no film" in warning for warning in ours["warnings"])
    theirs = page.post("/api/queries", json={"film": film, "source": 'elsewhere" or label != "'})
    assert "the gallery holds no film of elsewhere" in theirs["warnings"][-1]


def test_a_case_whose_file_is_gone_or_another_is_shown_as_the_gallery_keeps_it(
    fresh: Page, gallery: Store, phantom_manifest: Path, tmp_path: Path, reader: FilmReader
) -> None:
    row, other = read_manifest(phantom_manifest).rows[:2]
    key = gallery.pseudonyms.image(row.image_id)
    path = gallery.pseudonyms.originals([key])[key].path  # the manifest's, or that of a copy which another test has ingested since
    original, name = reader.read(path), f"case-{key}"
    shutil.move(path, tmp_path / "kept.png")
    try:
        gone = fresh.get(f"/api/films/{name}/greys", status=422)["error"]
        assert gone["what"] == "no picture of this case: its file is no longer where it was"
        shutil.copy(other.path, path)
        changed = fresh.get(f"/api/films/{name}/thumbnail", status=422)["error"]
        assert "its file has changed since it was ingested" in changed["message"]
        assert "--thumbnails" in changed["next_step"]
        lungs = np.where(np.arange(256) < 128, original.square, 0).astype(np.uint8)
        for kind, square in ((ThumbnailKind.lungs, lungs), (ThumbnailKind.full, original.square)):
            gallery.keep_thumbnails([Thumbnail(key, kind, kind.value * 8, square)])
            assert (fresh.greys(name)[1] + fresh.greys(name)[0]["intercept"] == square).all()
            whole = kind is ThumbnailKind.full
            asked = fresh.post("/api/queries", json={"film": name}, status=200 if whole else 422)
            assert whole or "only the lungs are kept" in asked["error"]["what"]
            fresh.client.get(f"/api/films/{name}/explanation").raise_for_status() if whole else fresh.get(
                f"/api/films/{name}/explanation", status=422
            )
    finally:
        gallery.remove_thumbnails([key])
        shutil.move(tmp_path / "kept.png", path)
    assert fresh.greys(name)[1].shape == original_shape(path)


def original_shape(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.height, image.width


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 422, "the file is empty"),
        (b"x" * (MOST + 1), 413, "too large"),
        (b"%PDF-1.7 no film", 422, "got a PDF"),
    ],
)
def test_a_file_that_is_no_film(page: Page, body: bytes, status: int, words: str) -> None:
    taken = page.client.post("/api/films", content=body, headers={"X-CXR-View": "1"})
    if taken.status_code == 201:
        taken = page.client.post("/api/queries", json=taken.json(), headers={"X-CXR-View": "1"})
    assert taken.status_code == status
    assert words in taken.json()["error"]["message"]
    assert "Next:" in taken.json()["error"]["message"]


def test_a_stream_without_a_length_is_cut_off(page: Page) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 65536

    assert page.client.post("/api/films", content=endless(), headers={"X-CXR-View": "1"}).status_code == 413


@pytest.mark.parametrize(
    "question",
    [b"", b"[]", b"{", b'{"film": 3}', b'{"film": "film-0123456789abcdef", "top_k": "4"}', b'{"film": "f", "top_k": true}', b"\xff"],
)
def test_a_malformed_question(page: Page, question: bytes) -> None:
    refused = page.post("/api/queries", content=question, status=422)["error"]
    assert refused["what"] == "the question is malformed"


@pytest.mark.parametrize(
    ("question", "status", "words"),
    [
        ({"top_k": 0}, 422, "out of range"),
        ({"top_k": 10_000}, 422, "out of range"),
        ({"where": "agee > 3"}, 422, "unknown field"),
        ({"where": "age > 300"}, 422, "no case to compare with"),
        ({"where": "x" * 9000}, 422, "too long"),
        ({"text": "x" * 9000}, 422, "too long"),
        ({"text": "pneumothorax"}, 422, "no case to compare with"),
        ({"error_rate": 0.9}, 422, "error rate"),
        ({"film": "film-0000000000000000"}, 404, "no longer in memory"),
        ({"film": f"case-{'0' * 32}"}, 404, "no longer holds this case"),
        ({"film": "line-7-0"}, 422, "no such list"),
        ({"film": "line-0-99"}, 422, "no such line"),
        ({"film": "../../etc/passwd"}, 422, "no film has such a name"),
    ],
)
def test_a_question_that_cannot_be_answered(page: Page, dicom: Path, question: dict[str, Any], status: int, words: str) -> None:
    asked = {"film": page.film(dicom), **question}
    assert words in page.post("/api/queries", json=asked, status=status)["error"]["message"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/queries/999999", 404),
        ("/api/films/..%2f..%2fetc%2fpasswd/greys", 404),
        ("/api/films/film-1/thumbnail", 422),
        ("/api/cases", 405),
        ("/api/worklist?list=9", 422),
        ("/api/worklist?list=recent&sort=patient", 422),
        ("/api/nothing", 404),
    ],
)
def test_what_is_not_there(page: Page, path: str, status: int) -> None:
    assert page.get(path, status=status)["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"limit": 100_000}, "out of range"),
        ({"limit": -1}, "out of range"),
        ({"limit": "9"}, "malformed"),
        ({"where": "agee > 1"}, "agee"),
        ({"text": "-"}, "no word"),
    ],
)
def test_cases_that_cannot_be_listed(page: Page, asked: dict[str, Any], words: str) -> None:
    assert words in page.post("/api/cases", json=asked, status=422)["error"]["message"]


def told(page: Page, **typed: Any) -> dict[str, Any]:
    """What the page says of a filter, once it has read the gallery."""
    for _ in range(100):
        said = page.post("/api/clause", json=typed)
        if said["cases"] is not None:
            return said
        time.sleep(0.05)
    raise AssertionError("the gallery is not read")


def test_a_filter_is_understood_counted_and_completed(page: Page) -> None:
    said = told(page, where='label == "covid19" and age > 0', typed="went", text="synthetic")
    assert said["standing"] == ['label == "covid19"', "age > 0"]
    assert said["conditions"] is None, "went alone means nothing"
    assert said["wrong"]["of"] == "typed"
    assert said["wrong"]["span"] == [0, 4]
    assert (said["cases"], said["meet"]) == (9, 3)
    assert said["completion"] == {"start": 0, "end": 4, "suggestions": [{"text": "went_icu", "about": "flag", "cases": 9}]}
    whole = told(page, where="age > 0", typed="went_icu or not went_icu")
    assert whole["conditions"] == ["age > 0", "(went_icu == true or not (went_icu == true))"]
    assert whole["wrong"] is None
    assert told(page, text='"open')["wrong"]["of"] == "text"
    assert "too long" in page.post("/api/clause", json={"typed": "x" * 9000}, status=422)["error"]["message"]
    some = page.post("/api/cases", json={"where": whole["conditions"][0], "text": "-synthetic"})["cases"]
    assert some == []


def test_addresses_of_nothing_are_a_page(page: Page) -> None:
    missing = page.client.get("/patients/7")
    assert missing.status_code == 404
    assert "Everything is on one page" in missing.text
    assert page.client.get("/assets/../room.py").status_code == 404
    assert page.client.get("/assets/%2e%2e/room.py").status_code == 404


def test_servers_that_are_away_and_come_back(server: Endpoints, served_gallery: str, dicom: Path, tmp_path: Path) -> None:
    """A proxy stands where Triton was to be; it opens late."""
    (port,) = free_ports(1)
    late = TritonSettings(f"127.0.0.1:{port}", timeout_s=5)
    servers = Servers(late, MilvusSettings(served_gallery), PseudonymSettings(KEY_FILE))
    with closing(ReadingRoom(servers, [], tmp_path / "audit.jsonl")) as room:
        client = TestClient(application(room, Access(), (), 8080, MOST), "http://127.0.0.1:8080")
        away = Page(client, room, tmp_path)
        film = away.film(dicom)
        for error in (away.get("/api/status", status=503)["error"], away.post("/api/queries", json={"film": film}, status=503)["error"]):
            assert error["kind"] == "ServerDownError"
            assert error["may_pass"] is True
            assert "cxr serve" in error["next_step"]
        assert away.greys(film)[0]["width"] > 0, "a film can be looked at all the same"
        with Proxy(port, int(server.grpc.rpartition(":")[2])):
            assert away.post("/api/queries", json={"film": film})["neighbours"]


def test_what_should_never_happen_says_so_and_names_nobody(
    page: Page, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError(PLANTED)

    monkeypatch.setattr(page.room, "status", broken)
    error = page.get("/api/status", status=500)["error"]
    assert "ZeroDivisionError at test_api.py" in error["message"]
    assert "unexpected: ZeroDivisionError at test_api.py" in capsys.readouterr().err
    assert PLANTED not in error["message"]
