"""What a reader does with collections: each change stands in the audit log before it is made. Nothing here knows HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cxr_retrieval.archive.audit import audited
from cxr_retrieval.errors import GoneError
from cxr_retrieval.gallery.store import Case
from cxr_retrieval.view.pins import Collections, as_csv, kept_film
from cxr_retrieval.view.servers import Servers


class Shelf:
    """All collections; errors as of `Collections`.

    Args:
        audit: Log of who changed and exported what. It has a collection's number: its name is the reader's own words.
        told: A case as the page has it.
    """

    def __init__(self, path: Path, servers: Servers, audit: Path, told: Callable[[Case], dict[str, Any]]) -> None:
        self._kept = Collections(path)
        self._servers, self._audit, self._told = servers, audit, told

    def close(self) -> None:
        """Closes the file."""
        self._kept.close()

    def all(self) -> list[dict[str, Any]]:
        """By name: id, name, made, pins (how many)."""
        return [asdict(one) for one in self._kept.all()]

    def one(self, number: int) -> dict[str, Any]:
        """One of them, and what it holds (`held`): film, note, time, `answer`, and `case`, which is null of one that the gallery holds no
        longer.

        Raises:
            ServiceError: The gallery cannot be asked.
        """
        found, pins = self._kept.one(number)
        with self._servers.reached() as reached:
            cases = reached.store.cases([pin.key for pin in pins if pin.key])
        held = [
            {
                "film": pin.film,
                "note": pin.note,
                "added": pin.added,
                "answer": dict(pin.told) or None,
                "case": self._told(cases[pin.key]) if pin.key in cases else None,
            }
            for pin in pins
        ]
        return {**asdict(found), "held": held}

    def create(self, name: str) -> dict[str, Any]:
        """A new one."""
        with audited(self._audit, "collection create", {}) as operation:
            found = self._kept.create(name)
            operation.outcome["collection"] = found.id
        return asdict(found)

    def rename(self, number: int, name: str) -> dict[str, Any]:
        """Gives it another name."""
        with audited(self._audit, "collection rename", {"collection": number}):
            return asdict(self._kept.rename(number, name))

    def remove(self, number: int) -> None:
        """Takes it away with what it holds; the cases themselves stay."""
        with audited(self._audit, "collection remove", {"collection": number}):
            self._kept.remove(number)

    def pin(self, number: int, film: str, note: str, answer: Mapping[str, Any] | None = None) -> None:
        """Puts a stored case in, or a film with its answer.

        Raises:
            GoneError: The gallery does not hold this case.
        """
        film = kept_film(film)
        key = film.removeprefix("case-") if film.startswith("case-") else None
        if key is not None:
            with self._servers.reached() as reached:
                if key not in reached.store.cases([key]):
                    raise GoneError("the gallery no longer holds this case", next_step="ask again")
        with audited(self._audit, "collection pin", {"collection": number, "film": key or film}):
            self._kept.pin(number, film, note, answer)

    def unpin(self, number: int, film: str) -> None:
        """Takes it out."""
        film = kept_film(film)
        with audited(self._audit, "collection unpin", {"collection": number, "film": film.removeprefix("case-")}):
            self._kept.unpin(number, film)

    def table(self, number: int) -> str:
        """One of them as CSV: pseudonyms, facts, notes."""
        _, pins = self._kept.one(number)
        with self._servers.reached() as reached, audited(self._audit, "collection export", {"collection": number}) as operation:
            cases = reached.store.cases([pin.key for pin in pins if pin.key])
            operation.note(dict.fromkeys(sorted(cases), "exported"))
            return as_csv(pins, cases)
