"""What a reader looks at: the lung contour and attention over the query, its neighbours, and one self-contained HTML page.

Cases are named by the beginning of their pseudonyms, never by an id or a path. Pictures, though, are shown as films are: what is burned
into one can be read there. Files are readable by their owner alone.
"""

from __future__ import annotations

import base64
import io
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from jinja2 import Environment, FileSystemLoader
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cxr_retrieval.cases.features import FEATURE
from cxr_retrieval.cases.fields import Value
from cxr_retrieval.cases.pseudonyms import SHOWN_DIGITS
from cxr_retrieval.errors import CxrError, SetupError
from cxr_retrieval.gallery.store import Neighbour
from cxr_retrieval.gallery.thumbnails import Thumbnail
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.retrieval.query import QueryResult

Thumbnails = Callable[[Sequence[str]], Mapping[str, Thumbnail]]
"""Keys → stored pictures of these cases: `Store.thumbnails`."""

DISCLAIMER: Final = "Research use only. Not for diagnosis."

_HEAT: Final = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float32)
"""Five anchors of the "inferno" colour map (perceptually uniform, readable in grey)."""
_NEUTRAL: Final = 0.5
"""Attention that is each film's own average with the default networks (`contract.ATTENTION`); what lies below is not coloured."""
_OPACITY: Final = 0.6
_BAR_GREY: Final = 96.0
_SCALE: Final = ((0.0, "0"), (_NEUTRAL, "0.5 no colour below"), (1.0, "1"))
"""The numbers under the colour bar."""
_CONTOUR: Final = (64, 224, 208)
_INK, _MUTED, _PAPER = (232, 236, 241), (150, 160, 172), (18, 22, 28)
_WARNING: Final = (255, 190, 90)
_TILE: Final = 256
_TEMPLATES: Final = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_BRIEF_FACTS: Final = ("age", "sex", "spo2", "temperature", "went_icu", "intubated", "survival")
"""What a table or a caption has room for; the page shows all that is known."""


def overlay(square: NDArray[np.uint8], lung_mask: NDArray[np.uint8], attention: NDArray[np.float32] | None) -> NDArray[np.uint8]:
    """Attention as colour and the lungs' outline over a radiograph.

    The same attention has the same colour and opacity in every film (`_tinted`; `colour_bar` is the key to it).

    Args:
        square: `[256, 256]` uint8. lung_mask: the same, 0 or 255. attention: the same, in [0, 1]; None: the contour alone.

    Returns:
        `[256, 256, 3]` uint8 RGB.
    """
    inside = lung_mask > 0
    shown = _tinted(square.astype(np.float32), np.zeros_like(square, np.float32) if attention is None else attention * inside)
    shown[_outline(inside)] = _CONTOUR
    return shown.astype(np.uint8)


def colour_bar(width: int, height: int) -> NDArray[np.uint8]:
    """`[height, width, 3]` RGB: how attention 0 (left) to 1 (right) is shown over an even grey."""
    values = np.broadcast_to(np.linspace(0, 1, width, dtype=np.float32), (height, width))
    return _tinted(np.full((height, width), _BAR_GREY, np.float32), values).astype(np.uint8)


def _tinted(grey: NDArray[np.float32], attention: NDArray[np.float32]) -> NDArray[np.float32]:
    """Grey values 0…255 `[rows, columns]` with attention of [0, 1] over them, `[rows, columns, 3]`: no colour up to `_NEUTRAL`, from there
    opacity grows in proportion up to `_OPACITY` at 1.
    """
    value = np.clip(attention, 0, 1)
    place = value * (len(_HEAT) - 1)
    below = np.clip(place.astype(int), 0, len(_HEAT) - 2)
    colour = _HEAT[below] + (place - below)[..., None] * (_HEAT[below + 1] - _HEAT[below])
    alpha = (_OPACITY * np.clip((value - _NEUTRAL) / (1 - _NEUTRAL), 0, 1))[..., None]
    return (1 - alpha) * grey[..., None] + alpha * colour


def montage(result: QueryResult, reader: FilmReader, thumbnails: Thumbnails) -> Image.Image:
    """One picture: the query, the query with contour and attention, the vote, and the neighbours with their facts."""
    squares = _squares(result.neighbours, reader, thumbnails)
    columns = 5
    rows = -(-len(result.neighbours) // columns)
    gap, caption = 12, 74
    width = columns * (_TILE + gap) + gap
    warned = [line for warning in result.warnings for line in textwrap.wrap(f"! {warning}", 76, subsequent_indent="  ")]
    warned_from = gap + 84 + 44 * max(3, len(result.prediction.scores)) + 34
    top = max(2 * gap + int(1.45 * _TILE) + 92, warned_from + 18 * len(warned) + gap)  # a warning is never cut
    canvas = Image.new("RGB", (width, top + rows * (_TILE + caption + gap) + 30), _PAPER)
    draw = ImageDraw.Draw(canvas)
    title, text, small = (ImageFont.load_default(size) for size in (24, 17, 13))
    large = int(1.45 * _TILE)
    shown = overlay(result.explanation.square, result.explanation.lung_mask, result.explanation.attention)
    canvas.paste(_square(Image.fromarray(result.explanation.square), large), (gap, gap))
    canvas.paste(_square(Image.fromarray(shown), large), (2 * gap + large, gap))
    draw.text((gap, gap + large + 6), f"query  {result.image_id}", _INK, font=text)
    draw.text((2 * gap + large, gap + large + 6), "lung contour and attention", _INK, font=text)
    canvas.paste(Image.fromarray(colour_bar(large, 10)), (2 * gap + large, gap + large + 32))
    for value, words in _SCALE:
        draw.text((2 * gap + large + value * (large - 1), gap + large + 46), words, _MUTED, font=small, anchor=_anchor(value))
    draw.text((2 * gap + large, gap + large + 64), "bright is no proof of disease, dark none of health", _MUTED, font=small)
    left = 4 * gap + 2 * large
    if result.prediction.label is None:
        draw.text((left, gap + 4), "no label: refused", _WARNING, font=title)
        reason = f"{result.ood.reason}. The cases below are the nearest, for information only; they did not vote."
        draw.multiline_text((left, gap + 38), "\n".join(textwrap.wrap(reason, 56)), _INK, font=text)
    else:
        draw.text((left, gap + 4), result.prediction.label.replace("_", " "), _INK, font=title)
        draw.text((left, gap + 38), f"{result.prediction.confidence:.0%}, {result.voter}", _MUTED, font=text)
    for line, (label, share) in enumerate(result.prediction.scores.items()):
        y = gap + 84 + 44 * line
        draw.text((left, y), f"{label.replace('_', ' ')}  {share:.0%}", _INK, font=text)
        draw.rectangle((left, y + 24, left + 360, y + 32), (44, 52, 62))
        draw.rectangle((left, y + 24, left + int(360 * share), y + 32), _CONTOUR)
    for line, words in enumerate(warned):
        draw.text((left, warned_from + 18 * line), words, _WARNING, font=small)
    for number, hit in enumerate(result.neighbours):
        x = gap + (number % columns) * (_TILE + gap)
        y = top + (number // columns) * (_TILE + caption + gap)
        canvas.paste(_square(Image.fromarray(squares[hit.case.key]), _TILE), (x, y))
        draw.text((x, y + _TILE + 3), f"{number + 1}. {hit.case.label.replace('_', ' ')}"[:30], _INK, font=text)
        draw.text((x, y + _TILE + 25), f"similarity {hit.similarity:.4f}   {hit.case.key[:SHOWN_DIGITS]}", _MUTED, font=small)
        for line, words in enumerate(textwrap.wrap(facts_line(hit.case.metadata), 36)[:2]):
            draw.text((x, y + _TILE + 41 + 16 * line), words, _MUTED, font=small)
    draw.text((gap, canvas.height - 24), f"{DISCLAIMER}  Model {result.model_version}.", _MUTED, font=small)
    return canvas


def write_montage(result: QueryResult, path: Path, reader: FilmReader, thumbnails: Thumbnails) -> None:
    """Writes `montage` as PNG.

    Args:
        reader: Reads the neighbours' files where the local table leads to them.
        thumbnails: Asked for the others.

    Raises:
        SetupError: The file cannot be written.
    """
    buffer = io.BytesIO()
    montage(result, reader, thumbnails).save(buffer, "PNG")
    _write(path, buffer.getvalue())


def write_png(pixels: NDArray[np.uint8], path: Path) -> None:
    """Writes a picture `[rows, columns]` or `[rows, columns, 3]`.

    Raises:
        SetupError: The file cannot be written.
    """
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    _write(path, buffer.getvalue())


def write_html(result: QueryResult, path: Path, reader: FilmReader, thumbnails: Thumbnails) -> None:
    """Writes `html_page`.

    Raises:
        SetupError: The file cannot be written.
    """
    _write(path, html_page(result, reader, thumbnails).encode())


def html_page(result: QueryResult, reader: FilmReader, thumbnails: Thumbnails) -> str:
    """One page that needs no other file and no network, on a screen or on A4; arguments as of `write_montage`."""
    marks = {one.hit.case.key: one.relevant for one in result.marked}
    beside = {hit.case.key for hit in (*result.neighbours, *result.own)}
    return _TEMPLATES.get_template("query.html.j2").render(
        result=result,
        disclaimer=DISCLAIMER,
        query_image=_data_uri(np.asarray(result.explanation.box.crop(result.explanation.square))),
        overlay_image=_overlay_uri(result),
        colour_bar=_data_uri(colour_bar(256, 10)),
        scale=[words for _, words in _SCALE],
        neighbours=_shown(result.neighbours, reader, thumbnails),
        own=_shown(result.own, reader, thumbnails),
        marks=marks,
        marked=_shown([one.hit for one in result.marked if one.hit.case.key not in beside], reader, thumbnails),
    )


def fragment(result: QueryResult) -> str:
    """The answer as HTML that stands in a notebook, without the neighbours' pictures."""
    return _TEMPLATES.get_template("notebook.html.j2").render(
        result=result, disclaimer=DISCLAIMER, overlay_image=_overlay_uri(result), facts_line=facts_line, digits=SHOWN_DIGITS
    )


def _overlay_uri(result: QueryResult) -> str:
    """`overlay` without the bars of the letterbox."""
    seen = result.explanation
    drawn = overlay(seen.square, seen.lung_mask, seen.attention)
    return _data_uri(np.asarray(seen.box.crop(drawn.transpose(2, 0, 1)).transpose(1, 2, 0)))


def _shown(hits: Sequence[Neighbour], reader: FilmReader, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    squares = _squares(hits, reader, thumbnails)
    return [
        {
            "rank": rank,
            "hit": hit,
            "name": hit.case.key[:SHOWN_DIGITS],
            "image": _data_uri(squares[hit.case.key]),
            "facts": _facts(hit),
        }
        for rank, hit in enumerate(hits, start=1)
    ]


def _facts(hit: Neighbour) -> dict[str, str]:
    return {**named_facts(hit.case.metadata), **({"source": hit.case.source} if hit.case.source else {})}


def facts_line(metadata: Mapping[str, Value]) -> str:
    """The most telling clinical facts that are known, on one line."""
    brief = {name: metadata[name] for name in _BRIEF_FACTS if name in metadata}
    return ", ".join(f"{name} {value}" for name, value in named_facts(brief).items())


def named_facts(metadata: Mapping[str, Value]) -> dict[str, str]:
    """Every fact under the name a reader knows: those in brief first, then the other clinical fields, then the user's own columns."""
    order = [*_BRIEF_FACTS, *(name for name in FEATURE if name not in _BRIEF_FACTS)]
    names = [*(name for name in order if name in metadata), *(name for name in metadata if name not in FEATURE)]
    return {FEATURE[name].title if name in FEATURE else name: _plain(name, metadata[name]) for name in names}


def _plain(name: str, value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:.10g}" + (FEATURE[name].shown if name in FEATURE and name != "age" else "")


def _squares(hits: Sequence[Neighbour], reader: FilmReader, thumbnails: Thumbnails) -> dict[str, NDArray[np.uint8]]:
    """Key → the case's picture: from its file, else as it is kept in the gallery, else a tile with a cross that says why there is none."""
    found: dict[str, NDArray[np.uint8]] = {}
    missing: dict[str, str] = {}
    for hit in hits:
        if hit.case.path is None:
            missing[hit.case.key] = "no picture kept"
            continue
        try:
            found[hit.case.key] = reader.submit(hit.case.path, hit.case.member).result().square
        except CxrError:
            missing[hit.case.key] = "file not found"
    kept = thumbnails(list(missing)) if missing else {}
    return found | {key: kept[key].square if key in kept else _empty_tile(why) for key, why in missing.items()}


def _empty_tile(why: str) -> NDArray[np.uint8]:
    tile = Image.new("L", (_TILE, _TILE), 24)
    draw = ImageDraw.Draw(tile)
    draw.line((80, 80, 176, 176), fill=90, width=3)
    draw.line((176, 80, 80, 176), fill=90, width=3)
    draw.text((_TILE / 2, 196), why, fill=150, font=ImageFont.load_default(17), anchor="ma")
    return np.asarray(tile)


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask's inner border, one pixel wide."""
    padded = np.pad(mask, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~core


def _anchor(value: float) -> str:
    """How a number stands under the colour bar, as Pillow names it: flush with its ends, centred between."""
    return {0.0: "la", 1.0: "ra"}.get(value, "ma")


def _square(image: Image.Image, side: int) -> Image.Image:
    return image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def _data_uri(pixels: NDArray[np.generic]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write(path: Path, data: bytes) -> None:
    """With rights 0600, whatever they were before: pages and pictures show patients."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.truncate(0)
            file.write(data)
    except OSError as error:
        raise SetupError(f"{path}: cannot be written", got=error.strerror or str(error), next_step="give another path") from error
