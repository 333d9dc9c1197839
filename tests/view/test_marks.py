"""Marks and saved answers over the page's HTTP interface, on the real Triton and a real gallery; what is written down of them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cxr_retrieval.archive.audit import entries, verify
from cxr_retrieval.errors import UsageError
from cxr_retrieval.radiograph.phantoms import make_phantom, write_dicom
from cxr_retrieval.serving.access import Access
from cxr_retrieval.serving.server import Endpoints
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, TritonSettings
from cxr_retrieval.view.marks import changed, parsed
from cxr_retrieval.view.room import ReadingRoom
from cxr_retrieval.view.servers import Servers
from cxr_retrieval.view.web import application
from tests_support import KEY_FILE, run_cxr

PLANTED = "Doe^Jane-planted-78"


@dataclass(frozen=True)
class Page:
    client: TestClient
    audit: Path
    film: str

    def asked(self, method: str, path: str, status: int = 200, **sent: Any) -> Any:
        answer = self.client.request(method, path, headers={"X-CXR-View": "1"}, **sent)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    def ask(self, **question: Any) -> Any:
        return self.asked("POST", "/api/queries", json={"film": self.film, "top_k": 4, **question})

    def mark(self, number: int, status: int = 200, **said: bool) -> Any:
        marks = [{"key": key, "relevant": relevant} for key, relevant in said.items()]
        return self.asked("POST", f"/api/queries/{number}/marks", status, json={"marks": marks})


@pytest.fixture(scope="module")
def page(server: Endpoints, served_gallery: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("marks")
    servers = Servers(TritonSettings(server.grpc), MilvusSettings(served_gallery), PseudonymSettings(KEY_FILE))
    write_dicom(make_phantom(78, "covid19"), folder / f"{PLANTED}.dcm")
    with closing(ReadingRoom(servers, [], folder / "audit.jsonl")) as room:
        client = TestClient(application(room, Access(), (), 8080, 2**21), "http://127.0.0.1:8080", raise_server_exceptions=False)
        film = client.post("/api/films", content=(folder / f"{PLANTED}.dcm").read_bytes(), headers={"X-CXR-View": "1"}).json()["film"]
        yield Page(client, folder / "audit.jsonl", film)


def keys(hits: list[dict[str, Any]]) -> list[str]:
    return [hit["key"] for hit in hits]


def test_another_balance_of_the_same_question(page: Page) -> None:
    """Its marks hold, none is written down anew, and both cosines say why a case is where it is."""
    first = page.ask()
    assert first["balance"] == page.asked("GET", "/api/status")["balance"] == 0.25
    for balance in (1, 0.0):
        turned = page.asked("POST", f"/api/queries/{first['id']}/balance", json={"balance": balance})
        assert (turned["balance"], turned["round"], turned["asked"]) == (balance, 0, first["asked"])
        assert turned["came"] == [key for key in keys(turned["neighbours"]) if key not in keys(first["neighbours"])]
        assert keys(turned["went"]) == [key for key in keys(first["neighbours"]) if key not in keys(turned["neighbours"])]
        for hit in turned["neighbours"]:
            assert hit["similarity"] == pytest.approx(hit["visual"] if balance else hit["semantic"], abs=1e-6)
        assert page.ask(balance=balance)["neighbours"] == turned["neighbours"]
    key = keys(first["neighbours"])[0]
    marked = page.mark(first["id"], **{key: False})
    turned = page.asked("POST", f"/api/queries/{marked['id']}/balance", json={"balance": 0.5})
    assert (turned["round"], keys(turned["marked"])) == (1, [key])
    assert [line["action"] for line in entries(page.audit)][-2:] == ["query", "query"], "no mark was made"
    for wrong in (1.5, -0.1, "0.5", True, 10**400):
        page.asked("POST", f"/api/queries/{first['id']}/balance", 422, json={"balance": wrong})
    page.asked("POST", "/api/queries/999999/balance", 404, json={"balance": 0.5})


def test_two_rounds_of_marks(page: Page, tmp_path: Path) -> None:
    """Each is written down before its answer is given; what was taken back is no pair, and a later mark replaces the earlier."""
    first = page.ask(where='label != "control"')
    assert (first["round"], first["marked"], first["came"], first["went"]) == (0, [], [], [])
    a, b, *_ = keys(first["neighbours"])
    second = page.mark(first["id"], **{a: False, b: True})
    assert (second["round"], second["film"], second["asked"]) == (1, first["film"], first["asked"])
    assert {hit["label"] for hit in second["neighbours"]} <= {"covid19", "non_covid_pneumonia"}, "the same clause holds"
    assert keys(second["neighbours"])[0] == b
    assert a not in keys(second["neighbours"])
    assert [(hit["key"], hit["relevant"], hit["film"]) for hit in second["marked"]] == [(a, False, f"case-{a}"), (b, True, f"case-{b}")]
    assert second["came"] == [key for key in keys(second["neighbours"]) if key not in keys(first["neighbours"])]
    assert keys(second["went"]) == [key for key in keys(first["neighbours"]) if key not in {*keys(second["neighbours"]), a}]
    assert second["prediction"]["calibrated"] is None
    assert "a reader's marks moved the question" in second["sentence"]
    third = page.mark(second["id"], **{a: True})
    assert third["round"] == 2
    begun, noted, done = list(entries(page.audit))[-3:]
    assert [line["action"] for line in (begun, noted, done)] == ["mark"] * 3
    assert (begun["state"], begun["film"], begun["round"], begun["asked"]) == ("begun", page.film, 2, None)
    assert begun["model_version"] == third["model_version"]
    assert noted["cases"] == {"relevant": [a], "taken back": [b]}
    assert done["state"] == "done"
    assert PLANTED not in page.audit.read_text()
    assert verify(page.audit).flaw is None
    told = run_cxr("audit", "pairs", page.audit, "--out", tmp_path / "pairs.csv")
    assert told.stdout == f"{tmp_path / 'pairs.csv'}: 1 pairs, 1 of them relevant\n"
    with (tmp_path / "pairs.csv").open(newline="") as file:
        (pair,) = csv.DictReader(file)
    assert pair == {"anchor": page.film, "case": a, "relevant": "1", "model_version": third["model_version"], "time": noted["time"]}
    cleared = page.mark(third["id"])
    assert (cleared["round"], cleared["marked"]) == (0, [])
    assert keys(cleared["neighbours"]) == keys(first["neighbours"])
    assert cleared["sentence"] == first["sentence"]


def test_marks_of_a_stored_case_lead_back_to_it(page: Page) -> None:
    case = page.asked("POST", "/api/cases", json={"limit": 1})["cases"][0]
    answer = page.ask(film=case["film"])
    page.mark(answer["id"], **{answer["neighbours"][0]["key"]: True})
    assert list(entries(page.audit))[-1]["asked"] == case["key"]


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        ("no list", "malformed"),
        ([3], "malformed"),
        ([{"key": "a" * 32}], "malformed"),
        ([{"key": "a" * 32, "relevant": 1}], "malformed"),
        ([{"key": PLANTED, "relevant": True}], "names no case"),
        ([{"key": "0" * 32, "relevant": True}], "was not shown"),
        ([{"key": "0" * 32, "relevant": True}] * 201, "too many marks"),
    ],
)
def test_marks_that_cannot_be_meant(page: Page, marks: Any, words: str) -> None:
    """None of them is written down."""
    number, before = page.ask()["id"], page.audit.read_bytes()
    error = page.asked("POST", f"/api/queries/{number}/marks", 422, json={"marks": marks})["error"]
    assert words in error["message"]
    assert page.audit.read_bytes() == before


def test_answers_that_are_no_longer_here(page: Page) -> None:
    assert "no longer in memory" in page.mark(999_999, 404)["error"]["message"]
    assert "no longer in memory" in page.asked("GET", "/api/queries/999999/page", 404)["error"]["message"]


def test_an_answer_is_saved_as_one_file(page: Page) -> None:
    """With its marks, sentence, warnings and pictures; nothing is fetched, nobody named."""
    first = page.ask(source="elsewhere")
    a, b, *_ = keys(first["neighbours"])
    answer = page.mark(first["id"], **{a: False, b: True})
    saved = page.client.get(f"/api/queries/{answer['id']}/page")
    assert saved.headers["content-disposition"] == f'attachment; filename="answer-{answer["id"]}.html"'
    text = saved.text
    assert answer["sentence"].replace("'", "&#39;") in text
    assert "the gallery holds no film of elsewhere" in text
    assert "Research use only. Not for diagnosis." in text
    assert (text.count("✓ marked relevant"), text.count("✗ marked not relevant")) == (1, 1)
    assert text.count("data:image/png;base64,") == 3 + len(answer["neighbours"]) + 1
    assert set(re.findall(r'(?:src|href)="([^"]{5})', text)) == {"data:"}
    assert "://" not in text
    for name in (PLANTED, *(hit["image_id"] for hit in answer["neighbours"])):
        assert name not in text
    assert list(entries(page.audit))[-1]["action"] == "page save"


def test_what_is_said_of_marks() -> None:
    one, two, three = (f"{number:032x}" for number in (1, 2, 3))
    before = parsed([{"key": one, "relevant": True}, {"key": two, "relevant": True}])
    after = parsed([{"key": one, "relevant": True}, {"key": two, "relevant": False}, {"key": three, "relevant": False}])
    assert changed(before, after) == {two: "not relevant", three: "not relevant"}
    assert changed(after, before) == {two: "relevant", three: "taken back"}
    assert changed(before, before) == {}
    with pytest.raises(UsageError, match="too many"):
        parsed([{"key": one, "relevant": True}] * 201)


def test_pairs_are_not_taken_from_a_log_that_was_edited(page: Page, tmp_path: Path) -> None:
    edited = tmp_path / "audit.jsonl"
    edited.write_text(page.audit.read_text().replace('"relevant": ["', '"not relevant": ["', 1))
    refused = run_cxr("audit", "pairs", edited, "--out", tmp_path / "pairs.csv")
    assert refused.returncode == 1
    assert "was edited" in refused.stderr
    assert not (tmp_path / "pairs.csv").exists()


def test_pairs_of_lines_that_hold_anything(tmp_path: Path) -> None:
    from cxr_retrieval.archive.pairs import Pair, pairs

    case, film = "a" * 32, "film-0123456789abcdef"
    mark: dict[str, Any] = {"action": "mark", "film": film, "model_version": "v", "time": "t", "cases": {"relevant": [case]}}
    assert pairs([mark]) == [Pair(film, case, 1, "v", "t")]
    assert pairs([{**mark, "asked": "b" * 32}]) == [Pair("b" * 32, case, 1, "v", "t")]
    strange: list[Any] = [
        {"action": "query"},
        {"film": 3},
        {"film": PLANTED},
        {"cases": [case]},
        {"cases": {"relevant": case}},
        {"cases": None},
    ]
    assert pairs([{**mark, **other} for other in strange]) == []
    assert pairs([{**mark, "cases": {"relevant": [3, None, PLANTED, [case]]}}]) == []
    assert json.dumps(pairs([mark, {**mark, "cases": {"not relevant": [case]}, "time": "u"}])[0].__dict__) == json.dumps(
        {"anchor": film, "case": case, "relevant": 0, "model_version": "v", "time": "u"}
    )
