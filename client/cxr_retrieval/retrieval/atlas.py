"""A map of a whole gallery: where each case lies in the plane, and what the others say of it, by the vote that a query gets.

Computed once (`draw`) and kept in a file of this user's; cases that come later are placed among those that lie there (`follow`). The file
holds pseudonyms, points and labels, and no id; it has rights 0600, is there whole or not at all, and one that is not just as it was
written is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cxr_retrieval.cases.pseudonyms import DIGITS
from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE, VECTOR_SIZE, comparable
from cxr_retrieval.gallery.projection import NEIGHBOURS, Advance, Floats, Nearest, place, project
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.retrieval.voting import DEFAULT_K, neighbour_weight, weighted_vote
from cxr_retrieval.settings import MilvusSettings

MOST_CASES: Final = 100_000
"""Of a larger gallery a part is drawn: the first by pseudonym, which is as good as chance."""
PASSES: Final = 3
"""How often `draw` advances over all cases: reading them, comparing them, laying them out."""
STALE: Final = 0.2
"""Share of cases new or gone since the layout was computed, above which it should be computed anew."""
_FORMAT: Final = "cxr-map 1"
_HEAD_BYTES: Final = 2**20
_ROW: Final = np.dtype([("key", "u1", DIGITS // 2), ("point", "<f4", 2), ("vote", "<i4"), ("placed", "u1")])
"""The pseudonym; the point; the number of the voted label, −1: there was no other case to vote; whether it was placed later."""


@dataclass(frozen=True)
class Atlas:
    """A map.

    Attributes:
        keys: Pseudonyms of its cases, in order.
        points: `[n, 2]`, each coordinate in [−1, 1].
        votes: For each case the label that its nearest cases of other patients vote for, itself left out; None: there are none.
        placed: `[n]`, which cases came after the layout was computed.
        drawn: How many cases it was computed from, those included that have gone since.
        made: The day.
    """

    keys: Sequence[str]
    points: Floats
    votes: Sequence[str | None]
    placed: NDArray[np.bool_]
    drawn: int
    made: str

    @property
    def changed(self) -> float:
        """Share of cases new or gone since it was computed."""
        there = len(self.keys) - int(self.placed.sum())
        return (len(self.keys) - there + self.drawn - there) / max(self.drawn, 1)

    @property
    def is_stale(self) -> bool:
        """Whether it should be computed anew."""
        return self.changed > STALE


@dataclass(frozen=True)
class _Held:
    """What the gallery holds, in order of key: embeddings `[n, d]`, and by what films are told to be of one patient, or one picture."""

    keys: list[str]
    vectors: Floats
    labels: list[str]
    patients: NDArray[np.int64]
    pixels: NDArray[np.int64]

    @staticmethod
    def read(store: Store, advance: Advance) -> _Held:
        rows: list[dict[str, Any]] = []
        for row in store.rows(["key", "embedding", "label", "patient_id", "pixels"]):
            rows.append({**row, "embedding": np.array(row["embedding"], np.float32)})
            advance(1)
        rows.sort(key=lambda row: str(row["key"]))
        del rows[MOST_CASES:]
        vectors = comparable(np.array([row["embedding"] for row in rows], np.float32).reshape(-1, VECTOR_SIZE), DEFAULT_BALANCE)
        return _Held(
            [row["key"] for row in rows],
            vectors,
            [row["label"] for row in rows],
            _codes([row.get("patient_id") or row["key"] for row in rows]),
            _codes([row["pixels"] or row["key"] for row in rows]),
        )

    def votes(self, wanted: Sequence[int], nearest: Nearest, among: NDArray[np.int64]) -> list[str | None]:
        """Of the cases `wanted`, each with its nearest `among` these, as `query` has it: no own films, and not the same picture."""
        found: list[str | None] = []
        for case, numbers, similarities in zip(wanted, nearest.numbers, nearest.similarities, strict=True):
            others = self._others(case, among[numbers])
            if others.sum() < min(DEFAULT_K, len(among) - 1) and len(numbers) < len(among) - 1:  # most of the nearest are its patient's own
                alike = self.vectors[among] @ self.vectors[case]
                numbers = np.argsort(-alike, kind="stable")
                similarities, others = alike[numbers], self._others(case, among[numbers])
            voting = zip(among[numbers[others]][:DEFAULT_K], similarities[others], strict=False)
            ballots = [(self.labels[other], float(similarity)) for other, similarity in voting]
            found.append(weighted_vote(ballots).label if ballots else None)
        return found

    def _others(self, case: int, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (self.patients[numbers] != self.patients[case]) & (self.pixels[numbers] != self.pixels[case])


def draw(store: Store, advance: Advance = lambda _: None) -> Atlas:
    """Computes a map: minutes of one core for 50,000 cases.

    Args:
        advance: Is told PASSES times of each case; what it raises ends the work.

    Raises:
        UsageError: The gallery is empty.
        SetupError: The library for it is not installed.
        StoreError: Milvus cannot serve.
    """
    held = _Held.read(store, advance)
    if not held.keys:
        raise UsageError("there is nothing to map", expected="cases in the gallery", got="none", next_step="run `cxr ingest` first")
    everybody = np.arange(len(held.keys))
    nearest = Nearest.of(held.vectors, held.vectors, min(NEIGHBOURS, len(held.keys) - 1), advance, themselves=True)
    points = project(held.vectors, nearest, advance)
    votes = held.votes(range(len(held.keys)), nearest, everybody)
    return Atlas(
        held.keys, points, votes, np.zeros(len(held.keys), np.bool_), len(held.keys), datetime.now(timezone.utc).date().isoformat()
    )


def follow(atlas: Atlas, store: Store, advance: Advance = lambda _: None) -> Atlas:
    """The same map of the cases that the gallery holds now: those gone are left out, new ones placed at the weighted mean of their
    DEFAULT_K nearest, their patient's own films among them.

    Raises:
        StoreError: Milvus cannot serve.
    """
    held = _Held.read(store, advance)
    known = {key: number for number, key in enumerate(atlas.keys)}
    before = np.array([known.get(key, -1) for key in held.keys], np.int64)
    old, new = np.flatnonzero(before >= 0), np.flatnonzero(before < 0)
    points = np.zeros((len(held.keys), 2), np.float32)
    placed = np.ones(len(held.keys), np.bool_)
    points[old], placed[old] = atlas.points[before[old]], atlas.placed[before[old]]
    votes = [atlas.votes[number] if number >= 0 else None for number in before.tolist()]
    if len(old) and len(new):
        nearest = Nearest.of(held.vectors[new], held.vectors[old], min(NEIGHBOURS, len(old)))
        few = Nearest(nearest.numbers[:, :DEFAULT_K], nearest.similarities[:, :DEFAULT_K])
        points[new] = place(points[old], few, weights(few.similarities))
        for number, vote in zip(new, held.votes(new.tolist(), nearest, old), strict=True):
            votes[number] = vote
    return Atlas(held.keys, points, votes, placed, atlas.drawn, atlas.made)


def kept_at(folder: Path, milvus: MilvusSettings, store: Store) -> Path:
    """Where the map of this gallery is kept: galleries of other weights, keys or servers have other files."""
    which = hashlib.sha256(repr((milvus.uri, milvus.database, store.pseudonyms.fingerprint)).encode()).hexdigest()
    return folder.expanduser() / f"{store.collection}-{which[:16]}.map"


def keep(atlas: Atlas, path: Path, store: Store) -> None:
    """Writes the file.

    Raises:
        SetupError: It cannot be written.
    """
    labels = sorted({vote for vote in atlas.votes if vote is not None})
    number = {label: place for place, label in enumerate(labels)}
    rows = np.zeros(len(atlas.keys), _ROW)
    rows["key"] = np.frombuffer(bytes.fromhex("".join(atlas.keys)), np.uint8).reshape(-1, DIGITS // 2)
    rows["point"], rows["placed"] = atlas.points, atlas.placed
    rows["vote"] = [-1 if vote is None else number[vote] for vote in atlas.votes]
    body = rows.tobytes()
    head = {
        **_about(store),
        "cases": len(rows),
        "drawn": atlas.drawn,
        "made": atlas.made,
        "labels": labels,
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(json.dumps(head).encode() + b"\n" + body)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise SetupError(
            f"{path}: the map cannot be kept", got=error.strerror or str(error), next_step="make room, or give another --maps"
        ) from error


def read(path: Path, store: Store) -> Atlas | None:
    """The map that is kept of this gallery; None: there is none.

    Raises:
        SetupError: What lies there is none, or not as it was written.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("no regular file")
            head = file.readline(_HEAD_BYTES)
            body = file.read(MOST_CASES * _ROW.itemsize + 1)
        return _parsed(head, body, store)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        got = error.strerror if isinstance(error, OSError) and error.strerror else str(error)[:100]
        raise SetupError(
            f"{path}: this map cannot be read",
            expected="the file as `cxr gallery map` wrote it",
            got=got,
            next_step="compute it anew: `cxr gallery map`",
        ) from error


def _parsed(head: bytes, body: bytes, store: Store) -> Atlas:
    told = json.loads(head)
    _require(isinstance(told, dict) and told.keys() == {*_about(store), "cases", "drawn", "made", "labels", "sha256"}, "no map")
    _require({name: told[name] for name in _about(store)} == _about(store), "a map of another gallery")
    _require(told["sha256"] == hashlib.sha256(body).hexdigest(), "another digest than it says")
    _require(
        type(told["cases"]) is int and len(body) == told["cases"] * _ROW.itemsize and len(body) <= MOST_CASES * _ROW.itemsize,
        "another number of cases",
    )
    rows = np.frombuffer(body, _ROW)
    labels: Any = told["labels"]
    drawn: Any = told["drawn"]
    made: Any = told["made"]
    _require(isinstance(labels, list) and all(isinstance(label, str) for label in labels), "labels that are none")
    _require(isinstance(made, str) and bool(datetime.fromisoformat(made)), "no day")
    _require(type(drawn) is int and drawn >= int((rows["placed"] == 0).sum()), "fewer cases drawn than there are")
    _require(bool((rows["placed"] <= 1).all() and (rows["vote"] >= -1).all() and (rows["vote"] < len(labels)).all()), "votes that are none")
    _require(bool((np.abs(rows["point"]) <= 1).all()), "points outside the map")  # NaN is not, either
    keys = [key.tobytes().hex() for key in rows["key"]]
    _require(all(one < other for one, other in pairwise(keys)), "cases out of order")
    votes = [None if vote < 0 else labels[vote] for vote in rows["vote"].tolist()]
    return Atlas(keys, rows["point"].astype(np.float32), votes, rows["placed"] == 1, drawn, made)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _about(store: Store) -> dict[str, str]:
    return {"format": _FORMAT, "collection": store.collection, "fingerprint": store.pseudonyms.fingerprint}


def weights(similarities: Floats) -> Floats:
    """As votes are weighted."""
    return np.vectorize(neighbour_weight, otypes=[np.float32])(similarities)


def _codes(texts: Sequence[str]) -> NDArray[np.int64]:
    number = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return np.array([number[text] for text in texts], np.int64)
