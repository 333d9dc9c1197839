"""The overlay, and the page in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr_retrieval.image import letterbox
from cxr_retrieval.phantoms import make_phantom, write_phantoms
from cxr_retrieval.picture import facts_line, montage, overlay, write_html, write_montage
from cxr_retrieval.retrieve import Explanation, QueryResult
from cxr_retrieval.store import Case, Neighbour
from cxr_retrieval.voting import weighted_vote


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> QueryResult:
    """A made-up answer over phantoms; one neighbour's file is gone, one text holds markup."""
    folder = tmp_path_factory.mktemp("pictures")
    phantoms = [make_phantom(1, "covid19"), make_phantom(2, "control")]
    write_phantoms(folder, phantoms)
    square, box = letterbox(phantoms[0].pixels)
    mask = letterbox(phantoms[0].lung_mask)[0]
    attention = np.linspace(0, 1, 256 * 256, dtype=np.float32).reshape(256, 256) * (mask > 0)
    neighbours = tuple(
        Neighbour(Case(str(i), name, label, None, None, None, folder / "images" / f"{name}.png", facts, ""), similarity)
        for i, (name, label, facts, similarity) in enumerate(
            [
                (phantoms[0].image_id, "covid19", {"age": 61.0, "went_icu": True, "clinical_notes": "x"}, 0.99),
                (phantoms[1].image_id, "control", {"location": "<script>alert(1)</script>"}, 0.9),
                ("gone", "covid19", {}, 0.8),
            ]
        )
    )
    vote = weighted_vote([(hit.case.label, hit.similarity) for hit in neighbours])
    explanation = Explanation(square, box, mask, attention)
    return QueryResult("film <1>.png", "0123456789ab", vote, neighbours, {"read": 1.0, "total": 2.0}, ("a warning",), explanation)


def test_overlay_colours_only_the_lungs_and_draws_their_outline(result: QueryResult) -> None:
    explanation = result.explanation
    shown = overlay(explanation.square, explanation.lung_mask, explanation.attention)
    assert shown.shape == (256, 256, 3)
    outside = explanation.lung_mask == 0
    assert (shown[outside] == explanation.square[outside][:, None]).all()
    turquoise = (shown == (64, 224, 208)).all(axis=2)
    assert turquoise.any()
    assert not (turquoise & outside).any()
    inside = ~outside & ~turquoise
    middle = float(np.median(explanation.attention[inside]))
    low, high = (inside & (explanation.attention < middle)), (inside & (explanation.attention > middle))
    colourfulness = np.abs(np.diff(shown.astype(int), axis=2)).max(axis=2)
    assert colourfulness[high].mean() > colourfulness[low].mean()


def test_overlay_without_lungs_is_the_plain_picture() -> None:
    square = np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8)
    shown = overlay(square, np.zeros_like(square), np.zeros((256, 256), np.float32))
    assert (shown == square[..., None]).all()


def test_facts_in_words() -> None:
    assert (
        facts_line({"age": 61.0, "sex": "F", "went_icu": True, "survival": False, "spo2": 88.5})
        == "age 61, sex F, SpO2 88.5, ICU yes, survived no"
    )
    assert facts_line({}) == ""


def test_montage_has_room_for_all(result: QueryResult, tmp_path: Path) -> None:
    assert montage(result).width > 1200
    write_montage(result, tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as image:
        assert image.size == montage(result).size


def test_page_in_a_browser(result: QueryResult, tmp_path: Path) -> None:
    """Chromium parses it, decodes every picture, loads nothing else, and runs no text as script."""
    browser = shutil.which("chromium")
    assert browser, "chromium is a test requirement: `make test` installs it on Debian"
    page = tmp_path / "page.html"
    write_html(result, page)
    probe = (
        "<script>onload=()=>{const i=[...document.images];document.title=JSON.stringify({n:i.length,ok:i.filter(x=>x.naturalWidth>50).length,"
        "outside:performance.getEntriesByType('resource').filter(e=>!e.name.startsWith('data:')).length,"
        "wide:document.documentElement.scrollWidth<=innerWidth})}</script></body>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text("utf-8").replace("</body>", probe), "utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,900", "--dump-dom", probed.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert '<title>{"n":5,"ok":5,"outside":0,"wide":true}</title>' in dom
    text = page.read_text("utf-8")
    assert "film &lt;1&gt;.png" in text
    assert "<script>" not in text
    assert "http" not in text.replace("http://www.w3.org", "")
    for words in ("Research use only. Not for diagnosis.", "a warning", "not a probability of disease", "0123456789ab"):
        assert words in text
