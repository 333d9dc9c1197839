"""Named collections: what is kept, for whom, beside whom; over the page's HTTP interface, too."""

from __future__ import annotations

import csv
import io
import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from cxr_retrieval.archive.audit import entries
from cxr_retrieval.errors import GoneError, SetupError, UsageError
from cxr_retrieval.gallery.store import Case
from cxr_retrieval.radiograph.phantoms import make_phantom, write_dicom
from cxr_retrieval.serving.access import Access
from cxr_retrieval.serving.server import Endpoints
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, TritonSettings
from cxr_retrieval.view.pins import MOST_NAME, MOST_NOTE, Collections, Pin, as_csv
from cxr_retrieval.view.room import ReadingRoom
from cxr_retrieval.view.servers import Servers
from cxr_retrieval.view.web import application
from tests_support import KEY_FILE

CASE = f"case-{'a' * 32}"
FILM = "film-0123456789abcdef"


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Collections]:
    with closing(Collections(tmp_path / "folder" / "collections.sqlite")) as opened:
        yield opened


def test_what_is_kept_is_there_again(kept: Collections, tmp_path: Path) -> None:
    """For this user alone, and made only when something is kept."""
    file = tmp_path / "folder" / "collections.sqlite"
    assert kept.all() == []
    assert not file.exists()
    teaching, doubts = kept.create("  Teaching "), kept.create("Doubts")
    kept.pin(teaching.id, CASE, "bilateral\nbasal")
    kept.pin(teaching.id, FILM, "", {"label": "covid19", "confidence": 0.7, "sentence": "7 of 10", "image_id": "never kept"})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with closing(Collections(file)) as again:
        assert [(one.name, one.pins) for one in again.all()] == [("Doubts", 0), ("Teaching", 2)]
        found, pins = again.one(teaching.id)
        assert found.name == "Teaching"
        assert [(pin.film, pin.note, dict(pin.told)) for pin in pins] == [
            (CASE, "bilateral\nbasal", {}),
            (FILM, "", {"label": "covid19", "confidence": 0.7, "sentence": "7 of 10"}),
        ]
        again.pin(teaching.id, CASE, "another note")
        again.unpin(teaching.id, FILM)
        again.rename(teaching.id, "Rounds")
        again.remove(doubts.id)
    assert [(one.name, one.pins) for one in kept.all()] == [("Rounds", 1)]
    assert kept.one(teaching.id)[1][0].note == "another note"
    assert kept.create("Doubts").id > doubts.id, "a number is never given twice: the audit log has it"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "needs a name"),
        (" \t ", "needs a name"),
        ("x" * (MOST_NAME + 1), "too long"),
        ("a\x00b", "cannot be seen"),
        ("a\nb", "cannot be seen"),
        ("a\u202eb", "cannot be seen"),
        ("\ud800", "cannot be seen"),
        ("Taken", "of this name"),
    ],
)
def test_names_that_are_refused(kept: Collections, name: str, words: str) -> None:
    one, other = kept.create("Taken"), kept.create("Other")
    for attempt in (lambda: kept.create(name), lambda: kept.rename(other.id, name)):
        with pytest.raises(UsageError, match=words):
            attempt()
    assert kept.rename(one.id, "Taken").name == "Taken"


def test_what_cannot_be_pinned_or_found(kept: Collections) -> None:
    number = kept.create("one").id
    for film in ("", "case-1", "line-0-1", f"{CASE}x", "../etc", f"{FILM}\n"):
        with pytest.raises(UsageError, match="cannot be kept"):
            kept.pin(number, film, "")
    for note in ("x" * (MOST_NOTE + 1), "a\x07"):
        with pytest.raises(UsageError, match="the note"):
            kept.pin(number, CASE, note)
    for missing in (lambda: kept.one(99), lambda: kept.pin(99, CASE, ""), lambda: kept.remove(99), lambda: kept.rename(99, "n")):
        with pytest.raises(GoneError, match="no such collection"):
            missing()


def test_many_at_once_lose_nothing(kept: Collections, tmp_path: Path) -> None:
    """Two connections, as of two processes, each with several threads."""
    number = kept.create("busy").id
    with closing(Collections(tmp_path / "folder" / "collections.sqlite")) as beside, ThreadPoolExecutor(6) as pool:
        pinned = [pool.submit(opened.pin, number, f"film-{i:016x}", str(i)) for i in range(20) for opened in (kept, beside)]
        for one in pinned:
            one.result()
    assert {pin.film for pin in kept.one(number)[1]} == {f"film-{i:016x}" for i in range(20)}


@pytest.mark.parametrize(
    "statement",
    [
        "PRAGMA user_version = 7",
        "DROP TABLE pin",
        "UPDATE pin SET film = '../../etc/passwd'",
        "UPDATE pin SET told = '{'",
        "UPDATE pin SET told = '[]'",
        "UPDATE pin SET note = x'00ff'",
        "UPDATE collection SET name = x'00'",
    ],
)
def test_a_file_that_somebody_else_wrote(tmp_path: Path, statement: str) -> None:
    file = tmp_path / "collections.sqlite"
    with closing(Collections(file)) as kept:
        number = kept.create("one").id
        kept.pin(number, CASE, "")
    with closing(sqlite3.connect(file)) as base:
        base.execute(statement)
        base.commit()
    with closing(Collections(file)) as kept, pytest.raises(SetupError, match=r"the file of collections cannot be used.*--collections"):
        kept.one(number)


def test_files_that_are_no_collections(tmp_path: Path) -> None:
    file = tmp_path / "collections.sqlite"
    file.write_bytes(b"no database, but long enough to be looked at" * 40)
    file.chmod(0o600)
    with closing(Collections(file)) as kept, pytest.raises(SetupError, match="cannot be used"):
        kept.all()
    file.unlink()
    file.write_bytes(b"")
    file.chmod(0o644)
    with closing(Collections(file)) as kept, pytest.raises(SetupError, match=r"others can read.*chmod 600"):
        kept.all()


@given(st.text(max_size=20), st.text(max_size=20))
def test_a_table_comes_back_as_it_went_and_runs_no_formula(note: str, value: str) -> None:
    case = Case("a" * 32, "planted-id", "covid19", "b" * 32, None, None, None, {"age": 61.0, "went_icu": True, "own": value}, "", "")
    pins = [
        Pin(CASE, note, {}, "2026"),
        Pin(f"case-{'c' * 32}", "", {}, "2026"),
        Pin(FILM, "", {"label": "control", "confidence": 0.5}, "2026"),
    ]
    text = as_csv(pins, {case.key: case})
    held, gone, film = csv.DictReader(io.StringIO(text, newline=""))
    assert held["note"].removeprefix("'") == note.removeprefix("'")
    assert held["own"].removeprefix("'") == value.removeprefix("'")
    assert not held["note"].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert (held["film"], held["state"], held["age"], held["went_icu"], held["patient"]) == ("a" * 32, "case", "61", "yes", "b" * 32)
    assert (gone["state"], gone["label"]) == ("gone", "")
    assert (film["film"], film["state"], film["label"], film["confidence"]) == (FILM, "answer", "control", "0.5")
    assert "planted-id" not in text


def test_over_http(server: Endpoints, served_gallery: str, tmp_path: Path) -> None:
    servers = Servers(TritonSettings(server.grpc), MilvusSettings(served_gallery), PseudonymSettings(KEY_FILE))
    write_dicom(make_phantom(79, "control"), tmp_path / "film.dcm")
    audit = tmp_path / "audit.jsonl"
    with closing(ReadingRoom(servers, [], audit)) as room:
        client = TestClient(application(room, Access(), (), 8080, 2**21), "http://127.0.0.1:8080", headers={"X-CXR-View": "1"})

        def asked(method: str, path: str, status: int, **sent: Any) -> Any:
            answer = client.request(method, path, **sent)
            assert answer.status_code == status, answer.text
            return answer.json() if answer.content else None

        film = asked("POST", "/api/films", 201, content=(tmp_path / "film.dcm").read_bytes())["film"]
        answer = asked("POST", "/api/queries", 200, json={"film": film, "top_k": 2})
        hit = answer["neighbours"][0]
        number = asked("POST", "/api/collections", 201, json={"name": "Planted name"})["id"]
        assert (tmp_path / "collections.sqlite").exists(), "beside the log"
        here = f"/api/collections/{number}"
        asked("POST", f"{here}/pins", 204, json={"film": hit["film"], "note": "look here"})
        asked("POST", f"{here}/pins", 204, json={"answer": answer["id"]})
        for sent, status in (
            ({"film": "line-0-0"}, 422),
            ({"film": f"case-{'0' * 32}"}, 404),
            ({"answer": 99_999}, 404),
            ({"film": hit["film"], "note": "x" * 501}, 422),
            ({"film": 3}, 422),
        ):
            assert asked("POST", f"{here}/pins", status, json=sent)["error"]["message"]
        held = asked("GET", here, 200)
        assert (held["name"], held["pins"]) == ("Planted name", 2)
        case, asked_film = held["held"]
        assert (case["case"]["key"], case["case"]["label"], case["note"], case["answer"]) == (hit["key"], hit["label"], "look here", None)
        assert (asked_film["film"], asked_film["case"]) == (film, None)
        assert asked_film["answer"]["label"] == answer["prediction"]["label"]
        assert asked("GET", "/api/collections", 200)["collections"] == [{name: held[name] for name in ("id", "name", "made", "pins")}]
        table = client.get(f"{here}/table")
        assert table.headers["content-disposition"] == f'attachment; filename="collection-{number}.csv"'
        assert [row["film"] for row in csv.DictReader(io.StringIO(table.text))] == [hit["key"], film]
        assert asked("POST", here, 200, json={"name": "Another"})["name"] == "Another"
        asked("DELETE", f"{here}/pins/{film}", 204)
        asked("DELETE", f"{here}/pins/Doe%5EJane", 422)
        assert asked("GET", here, 200)["pins"] == 1
        asked("DELETE", here, 204)
        asked("GET", here, 404)
        asked("POST", "/api/collections", 422, json={"name": "\x1b[31m"})
        done = [line["action"] for line in entries(audit) if line.get("state") == "done" and line["action"].startswith("collection")]
        assert done == [f"collection {what}" for what in ("create", "pin", "pin", "export", "rename", "unpin", "remove")]
        said = audit.read_text()
        assert not any(words in said for words in ("Planted name", "Another", "look here", "Doe"))
        assert hit["key"] in said
