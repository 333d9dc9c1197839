"""Named collections of cases, and of films with their answers, kept on this machine from one run of the page to the next.

A case stands in them by its key, a film by its pseudonym with what the vote said; no picture, no id, no path. Names and notes are the
reader's own words.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from cxr_retrieval.cases.features import FEATURE
from cxr_retrieval.cases.tables import Layout, PrivateTable
from cxr_retrieval.errors import GoneError, UsageError
from cxr_retrieval.gallery.store import Case

MOST_COLLECTIONS: Final = 200
MOST_PINS: Final = 2000
"""In one collection."""
MOST_NAME: Final = 80
"""Characters of a collection's name."""
MOST_NOTE: Final = 500
"""Characters of a note."""
_FILM: Final = re.compile(r"case-[0-9a-f]{32}|film-[0-9a-f]{16}")
_TOLD: Final = ("label", "confidence", "sentence", "model_version")
"""What is kept of an answer."""
_LAYOUT: Final = Layout(
    "the file of collections",
    "give --collections",
    "collections show which cases somebody looked at",
    1,
    (
        "CREATE TABLE collection (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, made TEXT NOT NULL)",
        "CREATE TABLE pin (collection INTEGER NOT NULL, film TEXT NOT NULL, note TEXT NOT NULL, told TEXT NOT NULL, added TEXT NOT NULL, "
        "PRIMARY KEY (collection, film)) WITHOUT ROWID",
    ),
)
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes the beginning of a formula to be."""


@dataclass(frozen=True)
class Collection:
    """`made`: when, UTC. `pins`: how many it holds."""

    id: int
    name: str
    made: str
    pins: int


@dataclass(frozen=True)
class Pin:
    """A case or a film in a collection; `told`: of a film's answer _TOLD, of a case nothing."""

    film: str
    note: str
    told: Mapping[str, Any]
    added: str

    @property
    def key(self) -> str | None:
        """Of a case."""
        return self.film[5:] if self.film.startswith("case-") else None


class Collections:
    """All of them; safe for threads and beside other processes.

    Every method raises SetupError where the file cannot be used, and GoneError where it is asked for a collection that is not there.
    """

    def __init__(self, path: Path) -> None:
        self._table = PrivateTable(path, _LAYOUT)

    def close(self) -> None:
        """Closes the file."""
        self._table.close()

    def all(self) -> list[Collection]:
        """By name."""
        with self._table.reading() as base:
            rows = base.execute(f"{_COLLECTIONS} GROUP BY id ORDER BY name, id").fetchall()
            return [_collection(row) for row in rows]

    def one(self, number: int) -> tuple[Collection, list[Pin]]:
        """One of them, with what it holds in the order in which it was pinned."""
        with self._table.reading() as base:
            found = _found(base, number)
            rows = base.execute("SELECT film, note, told, added FROM pin WHERE collection = ? ORDER BY added, film", (number,)).fetchall()
            return found, [_pin(row) for row in rows]

    def create(self, name: str) -> Collection:
        """A new one.

        Raises:
            UsageError: The name is empty, too long or taken, holds what cannot be seen, or there are too many.
        """
        with self._table.writing() as base:
            if base.execute("SELECT count(*) FROM collection").fetchone()[0] >= MOST_COLLECTIONS:
                raise UsageError("too many collections", expected=f"at most {MOST_COLLECTIONS}", next_step="delete one")
            wanted = _free_name(base, name, 0)
            cursor = base.execute("INSERT INTO collection (name, made) VALUES (?, ?)", (wanted, _now()))
            return _found(base, int(cursor.lastrowid or 0))

    def rename(self, number: int, name: str) -> Collection:
        """Raises as `create`."""
        with self._table.writing(create=False) as base:
            _found(base, number)
            base.execute("UPDATE collection SET name = ? WHERE id = ?", (_free_name(base, name, number), number))
            return _found(base, number)

    def remove(self, number: int) -> None:
        """With what it holds; the cases themselves stay."""
        with self._table.writing(create=False) as base:
            _found(base, number)
            base.execute("DELETE FROM pin WHERE collection = ?", (number,))
            base.execute("DELETE FROM collection WHERE id = ?", (number,))

    def pin(self, number: int, film: str, note: str, answer: Mapping[str, Any] | None = None) -> None:
        """Puts a case, or a film with its answer, into a collection; what is there already gets the new note and answer.

        Raises:
            UsageError: No such film can be kept, the note is too long or holds what cannot be seen, or the collection is full.
        """
        film = kept_film(film)
        note = _visible(note, "the note", MOST_NOTE, lines=True)
        told = json.dumps({name: (answer or {}).get(name) for name in _TOLD} if answer else {}, ensure_ascii=False)
        with self._table.writing(create=False) as base:
            if _found(base, number).pins >= MOST_PINS:
                raise UsageError("the collection is full", expected=f"at most {MOST_PINS}", next_step="begin another one")
            base.execute(
                "INSERT INTO pin VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET note = excluded.note, told = excluded.told",
                (number, film, note, told, _now()),
            )

    def unpin(self, number: int, film: str) -> None:
        """Takes it out; nothing happens where it is not there."""
        with self._table.writing(create=False) as base:
            _found(base, number)
            base.execute("DELETE FROM pin WHERE collection = ? AND film = ?", (number, film))


def kept_film(film: str) -> str:
    """A film's name, if it is one that a collection can hold.

    Raises:
        UsageError: It is not.
    """
    if not _FILM.fullmatch(film):
        raise UsageError("this film cannot be kept", expected="a stored case, or the film of an answer", next_step="ask about it first")
    return film


def as_csv(pins: Sequence[Pin], cases: Mapping[str, Case]) -> str:
    """A line each: what it is, what is known of it, the note. `cases`: by key; one that the gallery no longer holds is `gone`.

    A cell that a spreadsheet would run as a formula begins with an apostrophe.
    """
    held = [cases.get(pin.key or "") for pin in pins]
    met = {name for case in held if case is not None for name in case.metadata}
    facts = [*(name for name in FEATURE if name in met), *sorted(name for name in met if name not in FEATURE)]
    out = io.StringIO(newline="")
    written = csv.writer(out)
    written.writerow(["film", "state", "label", "confidence", "source", "patient", "note", "pinned", *map(_cell, facts)])
    for pin, case in zip(pins, held, strict=True):
        state = "answer" if pin.key is None else "gone" if case is None else "case"
        label = case.label if case is not None else pin.told.get("label")
        about = [pin.key or pin.film, state, label, pin.told.get("confidence"), case and case.source, case and case.patient_id]
        known = [None if case is None else case.metadata.get(name) for name in facts]
        written.writerow(map(_cell, [*about, pin.note, pin.added, *known]))
    return out.getvalue()


_COLLECTIONS: Final = "SELECT id, name, made, count(film) FROM collection LEFT JOIN pin ON collection = id"


def _found(base: sqlite3.Connection, number: int) -> Collection:
    row = base.execute(f"{_COLLECTIONS} WHERE id = ? GROUP BY id", (number,)).fetchone()
    if row is None:
        raise GoneError("there is no such collection", expected="one of those listed", next_step="look at the list")
    return _collection(row)


def _collection(row: Sequence[Any]) -> Collection:
    """Whoever could write the file may have written anything."""
    number, name, made, pins = row
    if not (isinstance(name, str) and isinstance(made, str)):
        raise sqlite3.DatabaseError("a collection in it is damaged")
    return Collection(int(number), name[:MOST_NAME], made[:40], int(pins))


def _pin(row: Sequence[Any]) -> Pin:
    film, note, told, added = row
    try:
        if not (_FILM.fullmatch(film) and isinstance(note, str) and isinstance(added, str)):
            raise ValueError("no pin")
        known = json.loads(told)
        shown = {name: known.get(name) for name in _TOLD if isinstance(known.get(name), (str, float))}
    except (ValueError, TypeError, AttributeError) as error:
        raise sqlite3.DatabaseError("a pin in it is damaged") from error
    return Pin(film, note[:MOST_NOTE], shown, added[:40])


def _free_name(base: sqlite3.Connection, name: str, number: int) -> str:
    """The name as it is kept, if no other collection than this one has it."""
    name = _visible(name, "the name", MOST_NAME)
    if not name:
        raise UsageError("a collection needs a name", expected=f"1 to {MOST_NAME} characters")
    if base.execute("SELECT 1 FROM collection WHERE name = ? AND id != ?", (name, number)).fetchone():
        raise UsageError("there is a collection of this name", expected="another name", next_step="choose one, or use that collection")
    return name


def _visible(text: str, what: str, most: int, *, lines: bool = False) -> str:
    """In composed form, without space around it."""
    text = unicodedata.normalize("NFC", text).strip()
    if len(text) > most:
        raise UsageError(f"{what} is too long", expected=f"at most {most} characters", got=str(len(text)))
    if not all(part.isprintable() for part in (text.split("\n") if lines else [text])):
        raise UsageError(f"{what} holds characters that cannot be seen", expected="letters, digits, punctuation, spaces")
    return text


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = "" if value is None else f"{value:.10g}" if isinstance(value, float) else str(value)
    return f"'{text}" if isinstance(value, str) and text.startswith(_FORMULA) else text


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
