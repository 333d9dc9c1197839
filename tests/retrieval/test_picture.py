"""The overlay, and the page in a real browser."""

from __future__ import annotations

import shutil
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cxr_retrieval.gallery.store import Case, Neighbour
from cxr_retrieval.gallery.thumbnails import Thumbnail
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.phantoms import make_phantom, write_phantoms
from cxr_retrieval.retrieval.calibration import Trust
from cxr_retrieval.retrieval.gate import Ood
from cxr_retrieval.retrieval.picture import Thumbnails, colour_bar, facts_line, montage, overlay, write_html, write_montage, write_png
from cxr_retrieval.retrieval.query import Explanation, QueryResult
from cxr_retrieval.retrieval.voting import weighted_vote
from cxr_retrieval.settings import ThumbnailKind


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
        Neighbour(
            Case(str(i), name, label, None, None, None, folder / "images" / f"{name}.png", facts, "", ""),
            similarity,
            similarity,
            similarity,
        )
        for i, (name, label, facts, similarity) in enumerate(
            [
                (phantoms[0].image_id, "covid19", {"age": 61.0, "went_icu": True, "wbc": 11.25, "clinical_notes": "x", "crp": 12}, 0.99),
                (phantoms[1].image_id, "control", {"location": "<script>alert(1)</script>"}, 0.9),
                ("gone", "covid19", {}, 0.8),
            ]
        )
    )
    vote = weighted_vote([(hit.case.label, hit.similarity) for hit in neighbours])
    explanation = Explanation(square, box, mask, attention)
    own = (
        Neighbour(Case("c5e0wn", "of-last-week", "control", "P", "north", None, neighbours[1].case.path, {}, "", ""), 0.999, 1.0, 0.996),
    )
    return QueryResult(
        "film <1>.png",
        "0123456789ab",
        vote,
        neighbours,
        own,
        {"read": 1.0, "total": 2.0},
        ("a warning",),
        Ood(0.1, False, None),
        explanation,
        Trust(0.69, ("covid19", "control"), "control cannot be excluded"),
        0.25,
    )


def thumbnails_of(squares: Mapping[str, NDArray[np.uint8]]) -> Thumbnails:
    """A gallery that keeps these pictures."""
    return lambda keys: {key: Thumbnail(key, ThumbnailKind.lungs, "", squares[key]) for key in keys if key in squares}


def test_overlay_colours_only_the_lungs_and_draws_their_outline(result: QueryResult) -> None:
    explanation = result.explanation
    assert explanation.attention is not None
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


def test_the_same_attention_has_the_same_colour_in_every_film() -> None:
    """Two films alike, one of low attention throughout, one with a hot spot: the first has none, and the rest of the second is like it."""
    square, lungs = np.full((256, 256), 96, np.uint8), np.zeros((256, 256), np.uint8)
    lungs[40:220, 30:230] = 255
    low = np.where(lungs > 0, np.linspace(0.2, 0.45, 256), 0).astype(np.float32)
    spot = low.copy()
    spot[100:120, 60:90] = 0.9
    dim, bright = overlay(square, lungs, low), overlay(square, lungs, spot)
    inner = np.s_[41:219, 31:229]
    assert (dim[inner] == 96).all(), "not stretched: what is low in the film stays low in the picture"
    hot = spot == np.float32(0.9)
    assert (bright[hot] == bright[100, 60]).all()
    assert np.abs(bright[hot].astype(int) - 96).max() > 60
    assert (bright[~hot] == dim[~hot]).all(), "a hot spot elsewhere changes nothing here"
    other = overlay(square, lungs, np.where(lungs > 0, np.float32(0.9), np.float32(0)))
    assert (other[inner] == bright[100, 60]).all(), "nor does what else the film holds"


def test_overlay_takes_attention_beyond_its_range_for_the_nearest_in_it() -> None:
    """Runtimes round; 1 + a rounding must not run off the colours."""
    square, lungs = np.full((64, 64), 96, np.uint8), np.full((64, 64), 255, np.uint8)
    pictures = [overlay(square, lungs, np.full((64, 64), value, np.float32)) for value in (-0.01, 0.0, 1.0, 1.01)]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[2] == pictures[3]).all()
    assert (pictures[1] != pictures[2]).any()


def test_colour_bar_is_the_key_to_the_overlay() -> None:
    """Every shade of the bar is what the overlay gives that value over the bar's grey."""
    bar = colour_bar(101, 3)
    assert bar.shape == (3, 101, 3)
    assert (bar == bar[0]).all()
    grey, lungs = np.full((5, 5), bar[0, 0, 0], np.uint8), np.full((5, 5), 255, np.uint8)
    for percent in (0, 25, 50, 51, 75, 100):
        middle = overlay(grey, lungs, np.full((5, 5), percent / 100, np.float32))[2, 2]
        assert np.abs(bar[1, percent].astype(int) - middle).max() <= 1, percent
    assert (bar[0, :51] == bar[0, 0]).all(), "up to 0.5 there is no colour"
    brightness = bar[0, 51:].astype(int).sum(axis=1)
    assert (np.diff(brightness) >= 0).all(), "and from there it grows, in grey print as well"


def test_overlay_without_lungs_is_the_plain_picture() -> None:
    square = np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8)
    shown = overlay(square, np.zeros_like(square), np.zeros((256, 256), np.float32))
    assert (shown == square[..., None]).all()


def test_facts_in_words() -> None:
    assert (
        facts_line({"age": 61.0, "sex": "F", "went_icu": True, "survival": False, "spo2": 88.5})
        == "age 61, sex F, SpO2 88.5 %, ICU yes, survived no"
    )
    assert facts_line({}) == ""


def test_montage_has_room_for_all(result: QueryResult, reader: FilmReader, tmp_path: Path) -> None:
    assert montage(result, reader, thumbnails_of({})).width > 1200
    write_montage(result, tmp_path / "m.png", reader, thumbnails_of({}))
    with Image.open(tmp_path / "m.png") as image:
        assert image.size == montage(result, reader, thumbnails_of({})).size


def test_montage_has_room_for_every_word_of_the_warnings(result: QueryResult, reader: FilmReader) -> None:
    """However many there are: the neighbours move down, and nothing else changes."""
    few, many = (
        np.asarray(montage(replace(result, warnings=("a warning that goes on for a while " * 8,) * times), reader, lambda _: {}))
        for times in (1, 9)
    )
    grown = len(many) - len(few)
    assert grown > 100
    from_bottom = 370  # the row of neighbours
    assert (many[-from_bottom:] == few[-from_bottom:]).all()
    coloured = (many == (255, 190, 90)).all(axis=2)
    rows = np.flatnonzero(coloured.any(axis=1))
    assert rows.max() > rows.min() + 9 * 4 * 17, "nine warnings of four lines"
    assert rows.max() < len(many) - from_bottom, "and none over the neighbours"
    assert np.flatnonzero(coloured.any(axis=0)).max() < many.shape[1] - 2


def test_page_in_a_browser(result: QueryResult, reader: FilmReader, tmp_path: Path) -> None:
    """Chromium parses it, decodes every picture, loads nothing else, and runs no text as script."""
    browser = shutil.which("chromium")
    assert browser, "chromium is a test requirement: `make test` installs it on Debian"
    page = tmp_path / "page.html"
    write_html(result, page, reader, thumbnails_of({}))
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
    assert '<title>{"n":7,"ok":7,"outside":0,"wide":true}</title>' in dom
    text = page.read_text("utf-8")
    assert "film &lt;1&gt;.png" in text
    assert "<script>" not in text
    assert "http" not in text.replace("http://www.w3.org", "")
    for words in ("0.5 no colour below", "where the network looked", "Bright is no proof of disease, and dark no proof of health"):
        assert words in text
    for fact in ("<dt>white blood cells</dt><dd>11.25 ×10⁹/L</dd>", "<dt>crp</dt><dd>12</dd>", "<dt>notes</dt><dd>x</dd>"):
        assert fact in text, "laboratory values, own columns, notes: all that is known"
    apart = text[text.index("not in the vote") :]
    assert "c5e0wn" in apart
    assert "c5e0wn" not in text[: text.index("not in the vote")]
    assert "of-last-week" not in text, "cases go by their pseudonyms"
    assert result.neighbours[0].case.image_id not in text
    assert str(result.neighbours[0].case.path) not in text
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    for words in ("Research use only. Not for diagnosis.", "a warning", "not a probability of disease", "0123456789ab"):
        assert words in text


def test_neighbours_without_a_file_are_shown_as_the_gallery_keeps_them(result: QueryResult, reader: FilmReader) -> None:
    """Three ways: no path known and a thumbnail, a file that is gone and a thumbnail, neither; the picture says so."""
    (first, second, third) = result.neighbours
    pathless = replace(first, case=replace(first.case, path=None))
    told = replace(result, neighbours=(pathless, second, third))
    bright = np.full((256, 256), 250, np.uint8)
    tile = np.s_[-330:-110, 12:268]
    plain, kept = (
        np.asarray(montage(told, reader, thumbnails_of(squares)).convert("L"))[tile] for squares in ({}, {first.case.key: bright})
    )
    assert plain.mean() < 60
    assert kept.mean() > 200
    both = np.asarray(montage(told, reader, thumbnails_of({third.case.key: bright})).convert("L"))
    assert both[-330:-110, 2 * 268 + 12 : 2 * 268 + 268].mean() > 200


def test_pictures_are_their_owners_alone_whatever_was_there(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(b"x" * 100_000)
    picture.chmod(0o644)
    write_png(np.zeros((8, 8), np.uint8), picture)
    assert stat.S_IMODE(picture.stat().st_mode) == 0o600
    with Image.open(picture) as image:
        assert image.size == (8, 8)
