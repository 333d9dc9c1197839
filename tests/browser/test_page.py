"""The page in Debian's Chromium, over the real command and real servers: what a reader does, by mouse and by keys, and what goes wrong.

With CXR_SCREENSHOTS=<folder> it also draws each page on a laptop and on a wall, dark and light (`make screenshots`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from browsing import LAPTOP, WALL, Opened, ask, ask_for, eventually, keys_of, serious
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.serving.server import Endpoints, embedded_milvus
from cxr_retrieval.settings import MilvusSettings
from tests_support import ENVIRONMENT, Viewed, free_ports, until

TOKEN = "planted-token-5d20c8a1f3"


@pytest.fixture(scope="module")
def results(film: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety lines of a batch; those of one film lead to it."""
    path = tmp_path_factory.mktemp("results") / "results.jsonl"
    lines: list[dict[str, Any]] = []
    for number in range(90):
        label = ("control", "covid19", "non_covid_pneumonia")[number % 3]
        prediction = {"label": label, "confidence": 0.35 + number / 150, "scores": {label: 1.0}}
        told = {"image_id": f"film-{number:016d}", "prediction": prediction, "warnings": ["lungs not found reliably"] * (number % 7 == 0)}
        lines.append({"input": f"{film.parent}/night-{number:02d}.dcm" if number else str(film), "status": "answered", **told})
    lines.append({"input": "x/broken.dcm", "status": "failed", "error": "broken.dcm: the file is damaged"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def viewed(server: Endpoints, served_gallery: str, results: Path) -> Iterator[Viewed]:
    with Viewed("--triton", server.grpc, "--milvus", served_gallery, "--results", results) as running:
        yield running
        running.stop()
        assert "unexpected" not in running.said


def drawn(page: Page, which: int = 0) -> list[int]:
    """Red, green and blue over the film, on a grid of 40 × 40."""
    return (
        page.locator(".stage canvas")
        .nth(which)
        .evaluate(
            """canvas => { const small = new OffscreenCanvas(40, 40).getContext('2d');
        small.drawImage(canvas, 0, 0, 40, 40); return [...small.getImageData(0, 0, 40, 40).data].filter((_, i) => i % 4 < 3); }"""
        )
    )


def colour(pixels: list[int]) -> int:
    return sum(max(pixels[i : i + 3]) - min(pixels[i : i + 3]) for i in range(0, len(pixels), 3))


def test_a_film_is_dropped_and_answered(viewed: Viewed, opened: Opened, film: Path) -> None:
    page = opened(viewed.url)
    expect(page.get_by_text("Research use only. Not for diagnosis.")).to_be_visible()
    page.evaluate(
        """bytes => { const files = new DataTransfer(); files.items.add(new File([new Uint8Array(bytes)], 'dropped.dcm'));
        for (const kind of ['dragover', 'drop']) dispatchEvent(new DragEvent(kind, {dataTransfer: files, bubbles: true, cancelable: true})); }""",
        list(film.read_bytes()),
    )
    expect(page.locator(".verdict")).to_be_visible()
    answer = page.evaluate("fetch('/api/queries/' + location.hash.split('/').pop()).then(answer => answer.json())")
    label, neighbours = answer["prediction"]["label"], answer["neighbours"]
    alike = sum(hit["label"] == label for hit in neighbours)
    expect(page.locator(".sentence")).to_contain_text(f"{alike} of 9 nearest cases")
    expect(page.locator(".sentence")).to_contain_text(f"weighted share {answer['prediction']['confidence']:.2f}.")
    expect(page.locator(".bars dt")).to_have_count(len(answer["prediction"]["scores"]))
    expect(page.locator(".card")).to_have_count(9)
    expect(page.locator(".card").first).to_contain_text(f"{neighbours[0]['similarity']:.3f}")
    expect(page.locator(".card").first).to_contain_text(neighbours[0]["source"])
    expect(page.locator(".warnings")).to_contain_text("only 9 of 10 neighbours")
    expect(page.locator(".viewer strong")).to_have_text("dropped.dcm")
    eventually(page, "[...document.querySelectorAll('.thumb img')].filter(image => image.naturalWidth > 99).length === 9")
    expect(page.get_by_role("status").filter(has_text="nearest cases")).to_have_count(1)
    page.reload()
    expect(page.locator(".sentence")).to_contain_text(f"{alike} of 9 nearest cases")


def test_the_page_is_light(viewed: Viewed, opened: Opened, film: Path) -> None:
    """Without pictures; nothing of it comes from elsewhere (`opened`)."""
    page = opened(viewed.url)
    ask(page, film)
    parts: list[dict[str, Any]] = page.evaluate(
        "performance.getEntriesByType('resource').map(e => ({name: e.name, bytes: e.decodedBodySize}))"
    )
    own = sum(part["bytes"] for part in parts if "/assets/" in part["name"])
    assert 20_000 < own < 200_000


def test_overlays_and_the_window_change_what_is_drawn(viewed: Viewed, opened: Opened, film: Path) -> None:
    page = opened(viewed.url)
    ask(page, film)
    expect(page.locator("canvas[data-over]")).to_be_visible()
    both = colour(drawn(page))
    page.get_by_label("Opacity").fill("0.2")
    faint = colour(drawn(page))
    page.get_by_label("Attention", exact=True).uncheck()
    outline = colour(drawn(page))
    page.keyboard.press("c")
    assert both > faint > outline > colour(drawn(page)) == 0
    expect(page.get_by_label("Lung outline")).not_to_be_checked()
    plain = drawn(page)
    page.get_by_role("slider", name="Level").focus()
    page.keyboard.press("End")
    assert sum(drawn(page)) != sum(plain)
    page.get_by_role("button", name="Reset").click()
    assert drawn(page) == plain
    canvas = page.locator(".stage canvas")
    canvas.focus()
    for keys in (["Shift+ArrowUp"], ["+", "+", "ArrowLeft"]):
        for key in keys:
            page.keyboard.press(key)
        assert drawn(page) != plain, keys
        page.keyboard.press("r")
        assert drawn(page) == plain, keys
    box = canvas.bounding_box()
    assert box
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.wheel(0, -300)
    assert drawn(page) != plain
    page.mouse.dblclick(box["x"] + 100, box["y"] + 100)
    assert drawn(page) == plain
    page.mouse.down(button="right")
    page.mouse.move(box["x"] + 160, box["y"] + 180)
    page.mouse.up(button="right")
    assert drawn(page) != plain


def test_a_filter_and_what_is_wrong_with_one(viewed: Viewed, opened: Opened, film: Path) -> None:
    page = opened(viewed.url)
    ask(page, film)
    page.keyboard.press("/")
    expect(page.locator("#where")).to_be_focused()
    page.keyboard.type("agee > 60")
    page.keyboard.press("Enter")
    expect(page.locator("#where-wrong")).to_contain_text("unknown field: agee")
    expect(page.locator("#where-wrong")).to_contain_text("did you mean age?")
    expect(page.locator("#where")).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".card")).to_have_count(9)
    page.locator("#where").fill('label != "covid19"')
    expect(page.locator("#where-wrong")).to_have_count(0)
    expect(page.locator(".meet")).to_have_text("6 of 9 cases")
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(6)
    expect(page.locator(".chip")).to_have_text(['label != "covid19"×'])
    page.get_by_role("spinbutton", name="Cases").fill("2")
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".card")).to_have_count(2)
    page.get_by_role("button", name='Without label != "covid19"').click()
    expect(page.locator(".meet")).to_have_text("all 9 cases")
    page.get_by_label("Words in notes").fill('"invented facts" -synthetic')
    expect(page.locator(".meet")).to_have_text("0 of 9 cases")
    page.get_by_label("Words in notes").fill('"invented facts')
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator("#where-wrong")).to_contain_text("not closed")


def test_a_filter_is_completed_by_keys(viewed: Viewed, opened: Opened, film: Path) -> None:
    page = opened(viewed.url)
    ask(page, film)
    page.keyboard.press("/")
    page.keyboard.type("lab")
    option = page.get_by_role("option")
    expect(option).to_have_text(["label text9"])
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#where")).to_have_value("label ")
    page.keyboard.type("== co")
    expect(option).to_have_text(['"control" 3', '"covid19" 3'])
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#where")).to_have_attribute("aria-activedescendant", "where-1")
    page.keyboard.press("Enter")
    expect(page.locator("#where")).to_have_value('label == "covid19" ')
    expect(page.locator(".meet")).to_have_text("3 of 9 cases")
    page.keyboard.press("Escape")
    expect(option).to_have_count(0)
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(3)
    page.locator("#where").fill("age > 0")
    page.keyboard.press("Enter")
    expect(page.locator(".chip")).to_have_count(2)
    page.locator("#where").press("Backspace")
    expect(page.locator("#where")).to_have_value("age > 0")
    expect(page.locator(".chip")).to_have_count(1)


def test_two_films_are_compared(viewed: Viewed, opened: Opened, film: Path) -> None:
    page = opened(viewed.url)
    ask(page, film)
    page.locator(".card").nth(2).click()
    expect(page.locator("canvas[data-over]")).to_have_count(2)
    expect(page.locator(".about")).to_contain_text("Invented facts of a synthetic phantom.")
    mine, theirs = drawn(page, 0), drawn(page, 1)
    page.locator(".stage canvas").first.focus()
    page.keyboard.press("+")
    assert drawn(page, 0) != mine
    assert drawn(page, 1) != theirs
    page.keyboard.press("l")
    expect(page.get_by_label("Move both together")).not_to_be_checked()
    assert drawn(page, 1) == theirs, "on its own it stands as it did"
    page.keyboard.press("r")
    page.keyboard.press("Shift+ArrowUp")
    assert drawn(page, 1) == theirs
    page.keyboard.press("l")
    assert drawn(page, 1) != theirs, "window and level go along"
    page.keyboard.press("n")
    expect(page.locator(".where-in")).to_have_text("case 4 of 9")
    page.keyboard.press("p")
    expect(page.locator(".where-in")).to_have_text("case 3 of 9")
    page.keyboard.press("Escape")
    expect(page.locator(".card")).to_have_count(9)
    page.go_back()
    expect(page.locator(".where-in")).to_have_text("case 3 of 9")
    page.get_by_role("button", name="Ask about this case").click()
    expect(page.locator(".neighbours h2")).to_have_text("Of this patient, or this very picture: not in the vote")


def test_all_of_it_by_keys(viewed: Viewed, opened: Opened, film: Path) -> None:
    page = opened(viewed.url)
    page.keyboard.press("?")
    expect(page.locator("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).not_to_be_visible()
    page.keyboard.press("g")
    page.keyboard.press("w")
    expect(page.get_by_role("heading", name="Worklist")).to_be_visible()
    page.get_by_role("button", name="results.jsonl").press("Enter")
    page.get_by_role("button", name=film.name).press("Enter")
    expect(page.locator(".verdict")).to_be_visible()
    page.keyboard.press("5")
    expect(page.locator(".where-in")).to_have_text("case 5 of 9")
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.press("s")
    page.get_by_role("button", name=re.compile("Ask about case")).first.press("Enter")
    expect(page.locator(".verdict")).to_be_visible()
    reached: set[str] = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.className + ' ' + document.activeElement.tagName + ' ' + (document.activeElement.id || '')"
            )
        )
        shown = page.evaluate(
            "document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle !== 'none'"
        )
        assert shown, "what has the focus is seen to have it"
    assert {"card A ", " CANVAS ", " INPUT where", " SUMMARY "} <= reached


def test_marks_rank_anew(viewed: Viewed, opened: Opened, film: Path) -> None:
    """By mouse and by keys: what was marked stays marked, what came and went is said, and undone it is as it was."""
    page = opened(viewed.url)
    ask(page, film)
    near = ask_for(page, 4)
    expect(page.locator(".answer-tools [role=status]")).to_have_text("Mark cases ✓ or ✗, then rank anew.")
    first = keys_of(near)
    page.get_by_role("button", name=re.compile("^Not relevant: case")).first.click()
    near.nth(2).locator(".card").focus()
    page.keyboard.press("y")
    expect(page.locator(".answer-tools [role=status]")).to_have_text("1 marked relevant, 1 not.")
    page.keyboard.press("y")
    expect(page.locator(".answer-tools [role=status]")).to_have_text("0 marked relevant, 1 not.")
    page.keyboard.press("u")
    expect(page.locator(".answer-tools [role=status]")).to_have_text("1 marked relevant, 1 not.")
    page.get_by_role("button", name="Re-rank").click()
    expect(page.locator(".answer-tools [role=status]")).to_contain_text("Round 1:")
    expect(page.locator(".sentence")).to_contain_text("a reader's marks moved the question")
    expect(page.locator(".warnings")).to_contain_text("how often such an answer is right is not known")
    second = keys_of(near)
    assert len(second) == 4
    assert first[0] not in second
    assert second[0] == first[2]
    expect(page.locator(f"[data-case='{first[0]}'].aside .mark.no[aria-pressed=true]")).to_be_visible()
    expect(page.locator(f"[data-case='{first[2]}'] .mark.yes[aria-pressed=true]")).to_be_visible()
    expect(page.locator(".came")).to_have_count(len(set(second) - set(first)))
    page.locator(".aside .card").click()
    expect(page.locator(".where-in")).to_have_text("marked, and no longer among the nearest")
    page.keyboard.press("x")
    expect(page.locator(".mark.no")).to_have_attribute("aria-pressed", "false")
    page.keyboard.press("y")
    page.keyboard.press("a")
    expect(page.locator(".answer-tools [role=status]")).to_contain_text("Round 2:")
    expect(page.locator(".answer-tools [role=status]")).to_contain_text("2 marked relevant, 0 not.")
    third = keys_of(near)
    page.get_by_role("button", name="Clear marks").click()
    page.get_by_role("button", name="Re-rank").click()
    came, went = len(set(first) - set(third)), len(set(third) - set(first))
    changed = f"{came} came, {went} went. " if came or went else ""  # the marks may have led to the same cases
    expect(page.locator(".answer-tools [role=status]")).to_have_text(f"{changed}Mark cases ✓ or ✗, then rank anew.")
    until(lambda: keys_of(near) == first)


def test_the_balance_is_turned(viewed: Viewed, opened: Opened, film: Path) -> None:
    """The slider asks anew, says what came and what went, and holds for the next film; the way back is one press."""
    page = opened(viewed.url)
    ask(page, film)
    near = ask_for(page, 3)
    first = keys_of(near)
    slider = page.get_by_role("slider", name=re.compile("^Balance of what was learnt"))
    expect(slider).to_have_value("0.25")
    expect(page.get_by_role("button", name="As measured, 0.25")).to_be_disabled()
    slider.focus()
    page.keyboard.press("End")
    expect(page.locator(".balance output")).to_have_text("1.00")
    expect(page.locator(".warnings")).to_contain_text("it was measured at a balance of 0.25, and this is 1")
    second = keys_of(near)
    expect(page.locator(".came")).to_have_count(len(set(second) - set(first)))
    expect(page.locator(".went")).to_have_count(len(set(first) - set(second)))
    similarity = page.locator(".near .similarity").first.inner_text()
    page.locator(".near .card").first.click()
    expect(page.locator(".about")).to_contain_text(f"looks {float(similarity):.2f}")
    page.go_back()
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".came")).to_have_count(0)
    expect(slider).to_have_value("1")
    page.get_by_role("button", name="As measured, 0.25").click()
    expect(page.locator(".warnings")).not_to_contain_text("measured at a balance")
    expect(slider).to_have_value("0.25")
    assert keys_of(near) == first


def test_cases_and_films_are_pinned(viewed: Viewed, opened: Opened, film: Path) -> None:
    page = opened(viewed.url, expecting="422")
    ask(page, film)
    page.locator(".neighbours .card").first.focus()
    page.keyboard.press("b")
    sheet = page.get_by_role("dialog")
    sheet.get_by_label("Into").select_option("A new collection …")
    sheet.get_by_label("Its name").fill("Teaching <b>& =1+1</b>")
    sheet.get_by_label("Note").fill("the typical one")
    sheet.get_by_role("button", name="Pin", exact=True).click()
    expect(page.locator(".pin-sheet form")).to_have_count(0)
    page.get_by_role("button", name="Pin this film …").click()
    expect(sheet.get_by_label("Into")).to_have_value(re.compile(r"\d+"))
    sheet.get_by_role("button", name="Pin", exact=True).click()
    expect(page.locator(".pin-sheet form")).to_have_count(0)
    page.keyboard.press("g")
    page.keyboard.press("c")
    page.get_by_role("link", name=re.compile("Teaching")).click()
    expect(page.locator(".collection h2")).to_have_text("Teaching <b>& =1+1</b>")
    expect(page.locator(".collection .card")).to_have_count(2)
    expect(page.locator(".collection .note")).to_have_text("the typical one")
    expect(page.locator(".collection .card").last).to_contain_text("voted")
    eventually(page, "[...document.querySelectorAll('.collection .thumb img')].filter(image => image.naturalWidth > 99).length === 2")
    assert serious(page) == []
    with page.expect_download() as waited:
        page.get_by_role("link", name="Export as CSV").click()
    text = Path(waited.value.path()).read_text("utf-8")
    assert len(text.splitlines()) == 3
    assert "the typical one" in text
    page.get_by_role("button", name="Rename …").click()
    page.get_by_label("Its new name").fill("Rounds\u202e")
    page.get_by_role("button", name="Rename", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("characters that cannot be seen")
    page.get_by_role("button", name="Look again").click()
    page.get_by_role("button", name=re.compile("^Take case")).click()
    expect(page.locator(".collection .card")).to_have_count(1)
    page.get_by_role("button", name="Delete …").click()
    page.get_by_role("button", name=re.compile("Really delete")).click()
    expect(page.get_by_text("None yet.")).to_be_visible()


def test_an_answer_is_saved_and_printed(viewed: Viewed, opened: Opened, browser: Browser, film: Path, tmp_path: Path) -> None:
    """As a file that asks nothing of anybody, and on A4 from either page."""
    page = opened(viewed.url)
    ask(page, film)
    page.get_by_role("button", name=re.compile("^Relevant: case")).first.click()
    page.keyboard.press("a")
    expect(page.locator(".answer-tools [role=status]")).to_contain_text("Round 1:")
    with page.expect_download() as waited:
        page.get_by_role("link", name="Save as HTML").click()
    waited.value.save_as(tmp_path / waited.value.suggested_filename)
    (saved,) = tmp_path.glob("answer-*.html")
    alone = browser.new_context(java_script_enabled=False)
    asked: list[str] = []
    alone.on("request", lambda request: asked.append(request.url))
    kept = alone.new_page()
    kept.goto(saved.as_uri())
    expect(kept.get_by_text("✓ marked relevant")).to_have_count(1)
    expect(kept.get_by_text("Research use only. Not for diagnosis.")).to_be_visible()
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    for name, of in (("saved", kept), ("page", page)):
        printed = of.pdf(prefer_css_page_size=True)
        sizes = {tuple(round(float(side)) for side in found) for found in re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", printed)}
        assert sizes == {(595, 842)}, "A4 in points"
        assert 1 <= len(re.findall(rb"/Type /Page\b", printed)) <= 3
        if folder := os.environ.get("CXR_SCREENSHOTS"):
            (Path(folder) / f"{name}.pdf").write_bytes(printed)
        of.emulate_media(media="print")
        assert of.get_by_text("Research use only. Not for diagnosis.").first.is_visible()
        shown = of.locator("body").inner_text()
        assert "film-" in shown
        assert not any(words in shown for words in ("Re-rank", "Save as HTML", film.name))
    alone.close()


def test_a_worklist_is_sorted_and_paged(viewed: Viewed, opened: Opened) -> None:
    page = opened(viewed.url + "#/worklist")
    page.get_by_role("button", name="results.jsonl").click()
    expect(page.locator(".count")).to_have_text("91 films")
    page.get_by_role("button", name="Share").click()
    expect(page.locator("th[aria-sort=ascending]")).to_contain_text("Share")
    page.get_by_role("button", name="Share").click()
    expect(page.locator("tbody tr").first).to_contain_text("night-89.dcm")
    page.get_by_role("button", name="Warnings").click()
    page.get_by_role("button", name="Warnings").click()
    expect(page.locator("tbody tr").first).to_contain_text("lungs not found reliably")
    page.get_by_role("button", name="Label").click()
    expect(page.locator("tbody tr").first).to_contain_text("control")
    page.get_by_role("button", name="Next").click()
    expect(page.locator("tbody tr").last).to_contain_text("the file is damaged")
    expect(page.locator(".pager span")).to_have_text("51 to 91 of 91")


def test_a_wrong_file_is_explained_and_the_next_one_answered(viewed: Viewed, opened: Opened, film: Path, tmp_path: Path) -> None:
    page = opened(viewed.url, expecting="422")
    (tmp_path / "letter.pdf").write_bytes(b"%PDF-1.7")
    page.set_input_files("input[type=file]", tmp_path / "letter.pdf")
    trouble = page.get_by_role("alert").filter(has_text="letter.pdf")
    for words in ("No answer about letter.pdf", "DICOM, PNG, JPEG or TIFF", "a PDF", "give a frontal chest radiograph"):
        expect(trouble).to_contain_text(words)
    ask(page, film)
    expect(page.get_by_text("No answer about")).to_have_count(0)


def test_a_token_is_asked_for_and_a_server_that_is_away_explained(opened: Opened, film: Path) -> None:
    triton, milvus = free_ports(2)
    servers = ("--triton", f"127.0.0.1:{triton}", "--milvus", f"http://127.0.0.1:{milvus}", "--timeout", "5")
    with Viewed(*servers, environment=ENVIRONMENT | {"CXR_VIEW_TOKEN": TOKEN}) as alone:
        page = opened(alone.url, expecting="401|503|404")
        page.get_by_label("Token of this page").fill("planted-but-wrong-token")
        page.keyboard.press("Enter")
        expect(page.locator("#token-wrong")).to_contain_text("this is not the token")
        assert serious(page) == []
        page.get_by_label("Token of this page").fill(TOKEN)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Drop a chest radiograph here")).to_be_visible()
        assert TOKEN not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        expect(page.get_by_role("alert")).to_contain_text("No Triton server answers")
        expect(page.get_by_role("alert")).to_contain_text("cxr serve")
        page.set_input_files("input[type=file]", film)
        expect(page.get_by_role("alert").filter(has_text=film.name)).to_contain_text("cxr serve")
        assert serious(page) == []
        page.goto(alone.url + "nothing")
        expect(page.get_by_role("heading")).to_have_text("There is nothing at this address")


def test_a_gallery_that_is_not_there_and_one_that_is_empty(
    opened: Opened, server: Endpoints, triton: TritonClient, pseudonyms: Pseudonyms, tmp_path: Path
) -> None:
    with embedded_milvus(tmp_path / "gallery.db", "127.0.0.1", 0) as uri, Viewed("--triton", server.grpc, "--milvus", uri) as alone:
        page = opened(alone.url, expecting="503")
        expect(page.get_by_role("alert")).to_contain_text("run `cxr ingest` first")
        Store(MilvusSettings(uri), triton.model_version, pseudonyms, create=True).close()
        page.get_by_role("button", name="Try again", exact=True).click()
        expect(page.get_by_role("alert")).to_contain_text("The gallery is empty")


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_axe_finds_no_serious_fault(viewed: Viewed, opened: Opened, film: Path, theme: str) -> None:
    page = opened(viewed.url)
    page.evaluate("theme => localStorage.setItem('theme', theme)", theme)
    page.reload()
    assert serious(page) == []
    ask(page, film)
    page.get_by_text("More", exact=True).click()
    assert serious(page) == []
    page.keyboard.press("?")
    assert serious(page) == []
    page.keyboard.press("Escape")
    page.locator("#where").press_sequentially("age > 0 and l")
    expect(page.get_by_role("option")).not_to_have_count(0)
    assert serious(page) == []
    page.locator(".card").first.click()
    expect(page.locator(".about .facts")).to_be_visible()
    assert serious(page) == []
    page.keyboard.press("b")
    expect(page.get_by_role("dialog")).to_be_visible()
    assert serious(page) == []
    page.keyboard.press("Escape")
    for name in ("Worklist", "Stored cases", "Collections"):
        page.get_by_role("link", name=name).click()
        expect(page.get_by_role("heading", name=name)).to_be_visible()
        assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.whole
@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize(("name", "viewport"), [("laptop", LAPTOP), ("wall", WALL)])
def test_screenshots(viewed: Viewed, opened: Opened, film: Path, name: str, viewport: dict[str, int], theme: str) -> None:
    folder = Path(os.environ["CXR_SCREENSHOTS"])

    def shot(what: str) -> None:
        page.wait_for_load_state("networkidle")
        page.screenshot(path=folder / f"{what}-{name}-{theme}.png")

    page = opened(viewed.url, viewport=viewport)
    page.evaluate("theme => localStorage.setItem('theme', theme)", theme)
    page.reload()
    shot("welcome")
    ask(page, film)
    shot("query")
    near = ask_for(page, 4)
    for which, key in enumerate("xyy"):
        near.nth(which).locator(".card").focus()
        page.keyboard.press(key)
    page.keyboard.press("a")
    expect(page.locator(".answer-tools [role=status]")).to_contain_text("Round 1:")
    shot("marks")
    for _ in range(2):
        page.keyboard.press("b")
        sheet = page.get_by_role("dialog")
        expect(sheet.get_by_role("button", name="Pin", exact=True)).to_be_enabled()
        if sheet.get_by_label("Its name").count():
            sheet.get_by_label("Its name").fill(f"Teaching {name} {theme}")
        sheet.get_by_label("Note").fill("Consolidation below the hilum; compare with the next film.")
        shot("pin")
        sheet.get_by_role("button", name="Pin", exact=True).click()
        expect(page.locator(".pin-sheet form")).to_have_count(0)
        page.locator(".neighbours .card").first.focus()
    page.keyboard.press("g")
    page.keyboard.press("c")
    page.locator(".collections aside a").first.click()
    expect(page.locator(".collection .card").first).to_be_visible()
    shot("collections")
    page.go_back()
    page.go_back()
    page.keyboard.press("3")
    expect(page.locator("canvas[data-over]")).to_have_count(2)
    shot("compare")
    page.keyboard.press("g")
    page.keyboard.press("w")
    page.get_by_role("button", name="results.jsonl").click()
    shot("worklist")
    page.keyboard.press("g")
    page.keyboard.press("s")
    shot("cases")
    page.locator("#where").fill('sex == "F" and age >= 40')
    page.keyboard.press("Enter")
    expect(page.locator(".chip")).to_have_count(2)
    page.locator("#where").fill("s")
    expect(page.get_by_role("option")).not_to_have_count(0)
    shot("filter")
