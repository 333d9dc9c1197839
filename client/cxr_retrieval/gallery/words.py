"""How clinical notes become words: the same for what is stored and for what is looked for, whatever Milvus it is.

Analyzers of Milvus are not asked to: Milvus Lite's folds no diacritics, and no two of them split alike.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

NOTES: Final = "clinical_notes"
WORDS_FIELD: Final = "notes_words"
"""Where a gallery has it: the words of a case's notes in their order, a space before, between and after them (`spaced`)."""
MAX_WORDS: Final = 32_768
"""Bytes of UTF-8 in that field. Notes have 8,192 at most, and few become longer; what does not fit is not found."""

_WORD: Final = re.compile(r"[^\W_]+")


def words_of(text: str) -> tuple[str, ...]:
    """Its words: letters and digits in a row, without case and diacritics. `Ödem, re. > li. (covid_19)` is odem, re, li, covid, 19."""
    bare = text.lower() if text.isascii() else "".join(c for c in _decomposed(_decomposed(text)) if not unicodedata.combining(c))
    words: list[str] = []
    room = MAX_WORDS - 1
    for word in _WORD.findall(bare):
        room -= len(word.encode()) + 1
        if room < 0:
            break
        words.append(word)
    return tuple(words)


def spaced(words: tuple[str, ...]) -> str:
    """In which a run of whole words is found as a part: ` a b ` in ` x a b y `."""
    return f" {' '.join(words)} "


def _decomposed(text: str) -> str:
    return unicodedata.normalize("NFKD", text.casefold())
