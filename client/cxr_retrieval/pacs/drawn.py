"""What of an answer is seen in an archive's viewer: the film with the lungs' outline and attention, and a strip with what it says.

Text is in Pillow's own face, which knows Latin letters; others become boxes, and stand readable in the report beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cxr_retrieval.contract import IMAGE_SIZE
from cxr_retrieval.retrieval.picture import DISCLAIMER, overlay
from cxr_retrieval.retrieval.query import QueryResult

SCALE: Final = 3
"""Pixels a side for each of the networks' own, none of them smoothed: it is what they saw."""
WIDTH: Final = SCALE * IMAGE_SIZE
_MARGIN, _SIZE, _LINE = 14, 18, 25
_INK, _WARNING, _PAPER = (232, 236, 241), (255, 190, 90), (18, 22, 28)


def drawn(result: QueryResult, version: str) -> NDArray[np.uint8]:
    """`[rows, WIDTH, 3]` uint8 RGB: the film's box SCALE times as large, centred, and the strip below it.

    Args:
        version: Of this software.
    """
    seen = result.explanation
    shown = overlay(seen.square, seen.lung_mask, seen.attention).transpose(2, 0, 1)
    film = np.asarray(seen.box.crop(shown), np.uint8).transpose(1, 2, 0).repeat(SCALE, 0).repeat(SCALE, 1)
    strip = _strip(result, version)
    left, rows = (WIDTH - film.shape[1]) // 2, len(film)
    canvas = np.zeros((rows + len(strip), WIDTH, 3), np.uint8)
    canvas[:rows, left : left + film.shape[1]] = film
    canvas[rows:] = strip
    return canvas


def _strip(result: QueryResult, version: str) -> NDArray[np.uint8]:
    font = ImageFont.load_default(_SIZE)
    lines = [(line, colour) for words, colour in _said(result, version) for line in _wrapped(words, font)]
    strip = Image.new("RGB", (WIDTH, 2 * _MARGIN + _LINE * len(lines)), _PAPER)
    draw = ImageDraw.Draw(strip)
    for number, (line, colour) in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + _LINE * number), line, colour, font=font)
    return np.asarray(strip)


def _said(result: QueryResult, version: str) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Each text with its colour."""
    yield DISCLAIMER, _WARNING
    if result.prediction.label is None:
        yield f"no label, refused: {result.sentence}", _WARNING
    else:
        yield result.sentence, _INK
        if result.trust.abstained:
            yield f"do not rely on the label: {result.trust.abstained}", _WARNING
    yield "outline: the lungs as found; colour: attention, where bright is no proof of disease, dark none of health", _INK
    yield f"cxr-retrieval {version}, model {result.model_version}", _INK


def _wrapped(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Iterator[str]:
    """Lines that fit between the margins; a word that does not fit is cut."""
    room, space = WIDTH - 2 * _MARGIN, font.getlength(" ")
    line, length = "", 0.0
    for word in (part for whole in words.split() for part in _parts(whole, room, font)):
        wide = font.getlength(word)
        if line and length + space + wide > room:
            yield line
            line, length = word, wide
        else:
            line, length = f"{line} {word}".lstrip(), length + space + wide
    yield line


def _parts(word: str, room: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The word itself, or as many pieces of one length as it takes."""
    count = int(font.getlength(word) // room) + 1
    size = -(-len(word) // count)
    return [word[start : start + size] for start in range(0, len(word), size)]
