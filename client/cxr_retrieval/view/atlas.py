"""The map of the gallery: computed in a thread of its own where there is none yet, coloured by what is known of its cases, and brushed."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.features import FEATURE
from cxr_retrieval.cases.fields import CLINICAL_FIELDS, Value
from cxr_retrieval.errors import CxrError, GoneError, UsageError
from cxr_retrieval.gallery.completion import Snapshot
from cxr_retrieval.gallery.store import Case, Store
from cxr_retrieval.retrieval.atlas import MOST_CASES, PASSES, Atlas, draw, follow, keep, kept_at, read, weights
from cxr_retrieval.retrieval.summary import Summary, summarise
from cxr_retrieval.view.census import Census
from cxr_retrieval.view.servers import Servers

MOST_CORNERS: Final = 1000
"""Of a region."""
COLOURS: Final = 12
"""Values of a text that have a colour each; the rest are "other values"."""
_OTHER: Final = COLOURS + 1
_FEW: Final = 0.5
"""Share of the known cases that those values must have, or colours would say little of the field."""
_SHADES: Final = 254
"""Of a scale of numbers; 0 is unknown in every field."""
_BINS: Final = 5
_AGREEMENT: Final = "agreement"
_VOTE: Final = "vote"
_TITLES: Final = {
    _AGREEMENT: "agreement of the vote with the label",
    _VOTE: "label by vote",
}
_NAMED: Final = 3
"""Sources, in a sentence."""
_LOOK_S: Final = 10.0
_DOING: Final = ("reading the gallery", "comparing its cases", "laying them out")


class _ClosingError(CxrError):
    """The page's server ends: what is under way is left."""


@dataclass(frozen=True)
class Entry:
    """Of a legend: a value, or a part of a scale. `low`, `high`: its codes; `agree`: cases that the vote of their nearest agrees with."""

    name: str
    low: int
    high: int
    cases: int
    voted: int
    agree: int


@dataclass(frozen=True)
class Coloured:
    """A field as colours: `codes` `[n]` uint8. `kind`: text, flag, or number, of which `ends` are the ends of the scale."""

    codes: NDArray[np.uint8]
    kind: str
    ends: tuple[float, float] | None
    entries: tuple[Entry, ...]


class Sheet:
    """A map with the facts of its cases, as they were at one moment; never changed. `number` tells it from others of this process."""

    def __init__(self, number: int, atlas: Atlas, held: Snapshot) -> None:
        row = {held_row["key"]: place for place, held_row in enumerate(held.rows)}
        mapped = [place for place, key in enumerate(atlas.keys) if key in row]
        self.number, self.atlas, self.held = number, atlas, held
        self.keys = [atlas.keys[place] for place in mapped]
        self.points = np.ascontiguousarray(atlas.points[mapped], "<f4")
        self._rows = [row[key] for key in self.keys]
        self._votes = [atlas.votes[place] for place in mapped]
        self._place = {key: place for place, key in enumerate(self.keys)}
        labels = [held.rows[place]["label"] for place in self._rows]
        self._voted = np.array([vote is not None for vote in self._votes], np.bool_)
        self._agree = np.array([vote == label for vote, label in zip(self._votes, labels, strict=True)], np.bool_)
        self.coloured = lru_cache(maxsize=32)(self._coloured)

    @cached_property
    def fields(self) -> list[dict[str, str]]:
        """What it can be coloured by: {name, title, kind}."""
        first = [("label", "text"), ("source", "text"), (_AGREEMENT, "text"), (_VOTE, "text")]
        known = [(one.name, one.kind) for one in self.held.fields() if one.known and one.name not in ("label", "source")]
        named = [*first, *((name, kind) for name, kind in known if kind != "text" or self._has_few(name))]
        return [{"name": name, "title": _title(name), "kind": kind} for name, kind in named]

    def _has_few(self, field: str) -> bool:
        about = self.held.describe(field, limit=COLOURS)
        return sum(one.cases for one in about.values) >= _FEW * about.field.known

    def told(self, source: str | None) -> list[str]:
        """What the gallery holds, in sentences; and of the hospital `source`, whether it knows it."""
        count = len(self.keys)
        sources = Counter(self.held.rows[place].get("source") for place in self._rows)
        most = [f"{name or 'unknown'} ({_share(cases, count)})" for name, cases in sources.most_common(_NAMED)]
        more = f" and {len(sources) - _NAMED:,} more" if len(sources) > _NAMED else ""
        lines = [f"{count:,} cases of {len(sources):,} source{'' if len(sources) == 1 else 's'}: {', '.join(most)}{more}."]
        if self._voted.any():
            lines.append(f"The vote of its nearest cases of other patients agrees with the label of {self._agreeing(self._voted)}.")
        if source is not None:
            own = np.array([self.held.rows[place].get("source") == source for place in self._rows], np.bool_)
            lines.append(self._of_hospital(source, own))
        return lines

    def _of_hospital(self, source: str, own: NDArray[np.bool_]) -> str:
        if not own.any():
            return f"It holds no case of {source}: it does not know your hospital, and answers between hospitals have been less reliable."
        known = f"{int(own.sum()):,} ({_share(int(own.sum()), len(own))}) are of {source}, your hospital"
        voted = own & self._voted
        return f"{known}; there the vote agrees with the label of {self._agreeing(voted)}." if voted.any() else f"{known}."

    def _agreeing(self, among: NDArray[np.bool_]) -> str:
        agree, voted = int((self._agree & among).sum()), int(among.sum())
        return f"{agree:,} of {voted:,} ({_share(agree, voted)})"

    def _coloured(self, field: str) -> Coloured:
        """The field, in codes and a legend.

        Raises:
            UsageError: It cannot be coloured by.
        """
        kinds = {one["name"]: one["kind"] for one in self.fields}
        if field not in kinds:
            raise UsageError(f"the map has no field {field[:60]}", expected=", ".join(kinds), next_step="choose another one")
        values = self._values(field)
        if kinds[field] == "number":
            return self._scaled([value if isinstance(value, int | float) else None for value in values])
        return self._listed([None if value is None else _word(value) for value in values], kinds[field])

    def _values(self, field: str) -> Sequence[Value | None]:
        if field == _VOTE:
            return self._votes
        if field == _AGREEMENT:
            words = zip(self._voted, self._agree, strict=True)
            return [None if not voted else "agrees" if agree else "disagrees" for voted, agree in words]
        values = self.held.values(field)
        return [values[place] for place in self._rows]

    def _listed(self, words: list[str | None], kind: str) -> Coloured:
        counted = Counter(word for word in words if word is not None)
        names = sorted(counted, key=lambda word: (-counted[word], word))[:COLOURS]
        code = {name: place for place, name in enumerate(names, start=1)}
        codes = np.array([0 if word is None else code.get(word, _OTHER) for word in words], np.uint8)
        others = len(counted) - len(names)
        entries = [self._entry(name, place, place, codes) for name, place in code.items()]
        return Coloured(
            codes,
            kind,
            None,
            (*entries, *([self._entry(f"{others} other values", _OTHER, _OTHER, codes)] if others else ()), *self._unknown(codes)),
        )

    def _scaled(self, values: list[float | None]) -> Coloured:
        numbers = np.array([np.nan if value is None else value for value in values], np.float64)
        low, high = (float(end) for end in np.nanpercentile(numbers, [1, 99]))
        shares = np.clip((numbers - low) / max(high - low, 1e-12), 0, 1)
        codes = np.where(np.isnan(numbers), 0, 1 + np.rint(np.nan_to_num(shares) * (_SHADES - 1))).astype(np.uint8)
        edges = _round_edges(low, high) if high > low else []
        first = [1, *(2 + math.floor((edge - low) / (high - low) * (_SHADES - 1) - 0.5) for edge in edges), _SHADES + 1]
        part = np.searchsorted(edges, numbers, side="right")  # a code stands for values of one part only
        part[codes == 0] = 0
        codes = np.where(codes == 0, 0, np.clip(codes, np.take(first, part), np.take(first, part + 1) - 1)).astype(np.uint8)
        entries = [
            self._entry(name, first[place], first[place + 1] - 1, codes)
            for place, name in enumerate(_ranges(edges) if edges else [f"{low:.4g}"])
        ]
        return Coloured(codes, "number", (low, high), (*entries, *self._unknown(codes)))

    def _unknown(self, codes: NDArray[np.uint8]) -> list[Entry]:
        return [self._entry("unknown", 0, 0, codes)] if (codes == 0).any() else []

    def _entry(self, name: str, low: int, high: int, codes: NDArray[np.uint8]) -> Entry:
        of = (codes >= low) & (codes <= high)
        return Entry(name, low, high, int(of.sum()), int((of & self._voted).sum()), int((of & self._agree).sum()))

    def inside(self, corners: Sequence[Sequence[float]]) -> list[str]:
        """Keys of the cases in a region, whose corners are points of the map; those nearest its middle first."""
        x, y = self.points[:, 0].astype(np.float64), self.points[:, 1].astype(np.float64)
        odd = np.zeros(len(x), np.bool_)
        for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):  # crossings of the ray to the right
            if ay != by:
                odd ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * (bx - ax) / (by - ay))
        found = np.flatnonzero(odd)
        middle = np.mean(np.array(corners, np.float64), axis=0)
        order = np.argsort(np.hypot(x[found] - middle[0], y[found] - middle[1]), kind="stable")
        return [self.keys[place] for place in found[order]]

    def summary(self, keys: Sequence[str]) -> Summary:
        """What is known of these cases."""
        return summarise(self._case(self._rows[self._place[key]]) for key in keys)

    def _case(self, place: int) -> Case:
        row = self.held.rows[place]
        facts = {name: row[name] for name in CLINICAL_FIELDS if name in row}
        return Case(row["key"], row["key"], row["label"], row.get("patient_id"), row.get("source"), row.get("split"), None, facts, "", "")

    def marks(self, neighbours: Sequence[tuple[str, float]]) -> dict[str, Any]:
        """Where a query with these (key, similarity) lies: at their mean, weighted as they vote; None where the map has none of them."""
        known = [(rank, self._place[key], alike) for rank, (key, alike) in enumerate(neighbours, start=1) if key in self._place]
        points = self.points[[place for _, place, _ in known]]
        shares = weights(np.array([alike for _, _, alike in known], np.float32)) if known else np.zeros(0, np.float32)
        query = [float(part) for part in shares @ points / shares.sum()] if known else None
        places = [{"rank": rank, "x": float(x), "y": float(y)} for (rank, _, _), (x, y) in zip(known, points, strict=True)]
        return {"query": query, "neighbours": places}


class MapRoom:
    """One for all who look; safe for threads. Begins to work when it is first asked.

    Args:
        folder: Where maps are kept.
        source: The hospital that dropped films come from.
    """

    def __init__(self, servers: Servers, census: Census, folder: Path, source: str | None) -> None:
        self._servers, self._census, self._folder, self._source = servers, census, folder, source
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._working: threading.Thread | None = None
        self._sheet: Sheet | None = None
        self._problem: CxrError | None = None
        self._done, self._all = 0, 0

    def close(self) -> None:
        """Leaves what is under way."""
        self._closed.set()
        with self._lock:
            working = self._working
        if working is not None:
            working.join()

    def state(self) -> dict[str, Any]:
        """How far it is; the map as soon as there is one, also while another is made.

        Returns:
            `map`: {id, cases, drawn, made, placed, changed, stale, part, fields, told} or None; `doing`: {what, share} or None.

        Raises:
            CxrError: Why there is none.
        """
        held = self._census.now()
        with self._lock:
            if self._sheet is None and self._problem is not None:
                raise self._problem
            if self._sheet is None or (held is not None and held is not self._sheet.held):
                self._start(anew=False)
            sheet, working = self._sheet, self._working is not None
            part = min(PASSES - 1, PASSES * self._done // max(self._all, 1))
            doing = {"what": _DOING[part], "share": min(1.0, self._done / max(self._all, 1))} if working else None
            why = None if self._problem is None else str(self._problem)
        return {"map": None if sheet is None else self._about(sheet), "doing": doing, "problem": why}

    def again(self, *, anew: bool) -> None:
        """Tries once more after a failure; or computes the map `anew`."""
        with self._lock:
            self._start(anew=anew)

    def sheet(self, number: int) -> Sheet:
        """The map that has this number.

        Raises:
            GoneError: There is a newer one.
        """
        sheet = self._sheet
        if sheet is None or sheet.number != number:
            raise GoneError("this map is no longer the latest", expected="the one that the page shows now", next_step="reload the page")
        return sheet

    def _about(self, sheet: Sheet) -> dict[str, Any]:
        atlas = sheet.atlas
        return {
            "id": sheet.number,
            "cases": len(sheet.keys),
            "drawn": atlas.drawn,
            "made": atlas.made,
            "placed": int(atlas.placed.sum()),
            "changed": atlas.changed,
            "stale": atlas.is_stale,
            "part": len(sheet.held) > MOST_CASES or not sheet.held.whole,
            "fields": sheet.fields,
            "told": sheet.told(self._source),
        }

    def _start(self, *, anew: bool) -> None:
        if self._working is None and not self._closed.is_set():
            self._problem, self._done, self._all = None, 0, 0
            self._working = threading.Thread(target=self._work, args=(anew,), name="cxr-map", daemon=True)
            self._working.start()

    def _work(self, anew: bool) -> None:
        sheet = problem = None
        try:
            with self._servers.reached() as reached:
                sheet = self._made(reached.store, anew=anew)
        except _ClosingError:
            pass
        except CxrError as error:
            problem = error
        finally:
            with self._lock:
                self._working, self._problem = None, problem
                self._sheet = sheet or self._sheet

    def _made(self, store: Store, *, anew: bool) -> Sheet:
        held = self._read(store)
        path = kept_at(self._folder, self._servers.milvus, store)
        there = sorted(row["key"] for row in held.rows)[:MOST_CASES]
        before = self._sheet
        atlas = None if anew else before.atlas if before else read(path, store)
        self._all = PASSES * len(held)
        if atlas is None or not 2 * len(set(there).intersection(atlas.keys)) >= atlas.drawn:  # none, or one of another gallery
            atlas = draw(store, self._advance)
            keep(atlas, path, store)
        elif there != list(atlas.keys):
            self._all = len(held)
            atlas = follow(atlas, store, self._advance)
            keep(atlas, path, store)
        return Sheet(1 if before is None else before.number + 1, atlas, held)

    def _read(self, store: Store) -> Snapshot:
        """The census, once it is taken."""
        waited = 0.0
        while (held := self._census.now()) is None:
            if self._closed.wait(0.1):
                raise _ClosingError("closing")
            waited += 0.1
            if waited > _LOOK_S:
                store.count()  # says so if Milvus is away, as the census does not
                waited = 0.0
        return held

    def _advance(self, cases: int) -> None:
        if self._closed.is_set():
            raise _ClosingError("closing")
        self._done += cases


def _title(field: str) -> str:
    return _TITLES.get(field) or (FEATURE[field].title if field in FEATURE else field)


def _word(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _share(part: int, whole: int) -> str:
    share = 100 * part / max(whole, 1)
    return "under 1 %" if 0 < share < 0.5 else f"{share:.0f} %"


def _round_edges(low: float, high: float) -> list[float]:
    """Round numbers between both, that make at most one part more of them than _BINS."""
    rough = (high - low) / _BINS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [step * number for number in range(math.floor(low / step) + 1, math.ceil(high / step))]


def _ranges(edges: list[float]) -> list[str]:
    told = [f"{edge:.10g}" for edge in edges]
    return [f"under {told[0]}", *(f"{low} to {high}" for low, high in pairwise(told)), f"{told[-1]} and more"]
