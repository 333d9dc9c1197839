"""By what a gallery's vectors are searched: which index fits how many cases and which server, how hard it looks, and another in its place.

| cases | index | why |
|---|---|---|
| up to FLAT_UP_TO | FLAT | compares with every case: exact, with filters too, and at that size as quick as an index |
| up to HNSW_UP_TO, or nobody knows | HNSW | a graph in memory; the shortest answers at a recall of 0.99 |
| up to HNSW_SQ_UP_TO, from Milvus 2.6 on | HNSW_SQ | the same over vectors in 8 bits, the best compared again in 16: less memory |
| more | DISKANN | the graph lies on the server's SSD, an eighth of the vectors in memory |

Figures: docs/galleries.md. Milvus Lite compares with every case whatever it is told, and keeps FLAT.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pymilvus.exceptions import MilvusException

from cxr_retrieval.errors import StoreError, UsageError
from cxr_retrieval.gallery.milvus import connected, is_lite, release_of
from cxr_retrieval.interruption import uninterrupted
from cxr_retrieval.settings import IndexName, MilvusSettings

FLAT_UP_TO: Final = 20_000
HNSW_UP_TO: Final = 20_000_000
HNSW_SQ_UP_TO: Final = 100_000_000
FIELD: Final = "embedding"
METRIC: Final = "COSINE"
RECALL: Final = "cxr.recall"
"""Property of a collection with the recall@10 that its searches are to reach; missing: `DEFAULT_RECALL`."""
DEFAULT_RECALL: Final = 0.99
_WIDEST: Final = 32_768
"""Candidates that Milvus takes at most; a search for more cases than that is refused by it anyway."""
STALLED_S: Final = 1800.0
"""So long without an index for one more case: it will not come. A server tries again for ever what it cannot build, and tells its log
alone; what it can build grows by segments, of which one of a million cases takes two cores some ten minutes.
"""
_HNSW_SQ_SINCE: Final = (2, 6)
_LOOK_EVERY_S: Final = 0.5
LOAD_S: Final = 3600.0
"""For a server to have a gallery in memory again: it reads the whole index."""
_BREADTH: Final[tuple[tuple[float, int, float], ...]] = (
    (0.75, 32, 1.5),
    (0.9, 64, 2.0),
    (0.95, 128, 4.0),
    (0.99, 256, 4.0),
    (0.995, 512, 8.0),
    (0.999, 2048, 16.0),
)
"""Recall, and the candidates that a graph must hold for it: at least so many, and so many for each case wanted (docs/galleries.md)."""


@dataclass(frozen=True)
class Index:
    """An index as Milvus names it. `parameters`: of its building."""

    type: str
    parameters: Mapping[str, int | str]

    def __str__(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        return f"{self.type} ({told})" if told else self.type

    def search(self, top_k: int, recall: float = DEFAULT_RECALL) -> dict[str, int | float]:
        """How hard it is to look for `top_k` cases, so that `recall` of them are found: more is surer, and takes longer."""
        if self.type == "HNSW":
            return {"ef": breadth(top_k, recall)}
        if self.type == "HNSW_SQ":
            return {"ef": breadth(top_k, recall), "refine_k": 2.0}
        if self.type == "DISKANN":
            return {"search_list": breadth(top_k, recall)}
        return {}


INDEXES: Final[Mapping[IndexName, Index]] = {
    IndexName.flat: Index("FLAT", {}),
    IndexName.hnsw: Index("HNSW", {"M": 32, "efConstruction": 256}),
    IndexName.hnsw_sq: Index("HNSW_SQ", {"M": 32, "efConstruction": 256, "sq_type": "SQ8", "refine": "true", "refine_type": "FP16"}),
    IndexName.diskann: Index("DISKANN", {}),
}
FLAT: Final = INDEXES[IndexName.flat]
_BY_TYPE: Final = {index.type: index for index in INDEXES.values()}


def breadth(top_k: int, recall: float) -> int:
    """Candidates that a search in a graph holds at once (HNSW's ef, DISKANN's search_list), never fewer than `top_k`.

    Args:
        recall: In (0, 1); beyond the last row of the table, that row holds.
    """
    least, each = next(((least, each) for known, least, each in _BREADTH if recall <= known), _BREADTH[-1][1:])
    return max(min(max(least, round(each * top_k)), _WIDEST), top_k)


def checked_recall(recall: float) -> float:
    """The recall itself.

    Raises:
        UsageError: Not in [0.5, 1).
    """
    if not 0.5 <= recall < 1.0:
        raise UsageError(
            "a recall that no index can be asked for",
            expected="0.5 to 0.999; comparing with every case finds all (--index flat)",
            got=str(recall),
            next_step="correct --recall",
        )
    return recall


def fitting(wanted: IndexName, cases: int | None, release: tuple[int, int], *, lite: bool) -> Index:
    """What a gallery gets.

    Args:
        wanted: `auto`: by size; any other is taken as it is.
        cases: That it holds, or is about to; None: nobody knows.
        release: Major and minor version of the server (`milvus.release_of`).
        lite: Whether it is Milvus Lite.

    Raises:
        UsageError: This Milvus has no such index.
    """
    if lite:
        if wanted not in (IndexName.auto, IndexName.flat):
            raise UsageError(
                f"Milvus Lite has no index {wanted.value}",
                expected="flat: it compares with every case",
                next_step="leave --index out, or give a Milvus server by --milvus",
            )
        return FLAT
    has_sq = release >= _HNSW_SQ_SINCE
    if wanted is IndexName.hnsw_sq and not has_sq:
        raise UsageError(
            "this Milvus server has no index HNSW_SQ",
            expected="Milvus {}.{} or later".format(*_HNSW_SQ_SINCE),
            got="{}.{}".format(*release),
            next_step="give --index hnsw, or another server",
        )
    return INDEXES[by_size(cases, has_sq=has_sq) if wanted is IndexName.auto else wanted]


def by_size(cases: int | None, *, has_sq: bool) -> IndexName:
    """What `auto` means; the table is on top of this file."""
    if cases is None or FLAT_UP_TO < cases <= HNSW_UP_TO:
        return IndexName.hnsw
    if cases <= FLAT_UP_TO:
        return IndexName.flat
    return IndexName.hnsw_sq if has_sq and cases <= HNSW_SQ_UP_TO else IndexName.diskann


def outgrown(index: Index, cases: int) -> bool:
    """Whether a gallery compares with every case that by now is so large that an index would answer sooner."""
    return index == FLAT and cases > 2 * FLAT_UP_TO


def describe(client: Any, collection: str, timeout_s: float) -> Index | None:
    """The index that a collection has; None: none at all, so that it cannot be searched."""
    names = client.list_indexes(collection, FIELD, timeout=timeout_s)
    if not names:
        return None
    about = client.describe_index(collection, names[0], timeout=timeout_s)
    known = str(about["index_type"])
    told = _BY_TYPE[known].parameters if known in _BY_TYPE else ()
    return Index(known, {name: _value(str(about[name])) for name in told if name in about})


def add(client: Any, index: Index) -> Any:
    """What `create_collection` and `create_index` take."""
    parameters = client.prepare_index_params()
    parameters.add_index(FIELD, index_type=index.type, metric_type=METRIC, params=dict(index.parameters))
    return parameters


@dataclass(frozen=True)
class Rebuilt:
    """What became of a gallery's index.

    Attributes:
        before: What it had; None: none.
        after: What it has.
        recall: That its searches are to reach from now on.
        whole: Whether all cases are in it; not if it was stopped, and then Milvus goes on by itself.
        seconds: That it took.
    """

    before: Index | None
    after: Index
    recall: float
    cases: int
    whole: bool
    seconds: float


def rebuild(
    settings: MilvusSettings,
    collection: str,
    wanted: IndexName | None,
    recall: float | None,
    stop: threading.Event,
    *,
    begun: Callable[[Index | None, Index, int], None] = lambda before, after, cases: None,
    advance: Callable[[int], None] = lambda _: None,
    stalled_s: float = STALLED_S,
) -> Rebuilt:
    """Gives a gallery another index, and waits until that is whole; safe to interrupt and to repeat.

    Meanwhile the gallery does not answer: Milvus takes an index away only from what is not in memory. The index that it has already is not
    built again, but waited for. One that Milvus cannot build is taken back, and the gallery has the former one again. Whoever opens
    a gallery after an interruption, before its index is whole, is answered, and may miss cases.

    Args:
        wanted: None: the one that it has.
        recall: That its searches are to reach; None: as before.
        begun: Told what it has, what it gets, and how many cases there are.
        advance: Told how many more are in the index.
        stalled_s: How long nothing may move before it is taken back.

    Raises:
        UsageError: This Milvus has no such index, or there is no such gallery.
        StoreError: Not reachable, or it cannot build it.
    """
    started = time.monotonic()
    with connected(settings) as client:
        if not client.has_collection(collection, timeout=settings.timeout_s):
            raise UsageError(
                f"no gallery {collection}", expected="one that `cxr info --collections` lists", next_step="correct the version"
            )
        lite = is_lite(client)
        about = client.describe_collection(collection, timeout=settings.timeout_s)
        aimed = recall if recall is not None else float(about.get("properties", {}).get(RECALL) or DEFAULT_RECALL)
        client.flush(collection, timeout=settings.timeout_s)
        cases = int(client.get_collection_stats(collection, timeout=settings.timeout_s)["row_count"])
        before = FLAT if lite else describe(client, collection, settings.timeout_s)
        after = before if wanted is None and before else fitting(wanted or IndexName.auto, cases, release_of(client), lite=lite)
        begun(before, after, cases)
        if recall is not None:
            client.alter_collection_properties(collection, {RECALL: f"{recall:g}"}, timeout=settings.timeout_s)
        whole = True
        if not lite:
            if before != after:
                _exchange(client, collection, after, settings.timeout_s)
            whole = awaited(client, collection, settings.timeout_s, stop, advance, stalled_s)
            if whole is None:
                if before is not None and before != after:
                    _exchange(client, collection, before, settings.timeout_s)
                    if awaited(client, collection, settings.timeout_s, stop):  # in memory without it, a gallery answers, and misses cases
                        client.load_collection(collection, timeout=LOAD_S)
                raise StoreError(
                    f"Milvus does not build {after} over {collection}",
                    expected="more cases in the index as time passes",
                    got=f"none for {stalled_s:g} s; its log says why, to nobody else",
                    next_step=f"give another --index; the gallery has {before} again" if before else "give another --index",
                )
            if whole:
                client.load_collection(collection, timeout=LOAD_S)
        return Rebuilt(before, after, aimed, cases, whole, time.monotonic() - started)


def _exchange(client: Any, collection: str, index: Index, timeout_s: float) -> None:
    """Within moments; only a kill between leaves a gallery without an index, and the same command again gives it one."""
    with uninterrupted():
        client.release_collection(collection, timeout=timeout_s)
        for name in client.list_indexes(collection, FIELD, timeout=timeout_s):
            client.drop_index(collection, name, timeout=timeout_s)
        try:
            client.create_index(collection, add(client, index), timeout=timeout_s, sync=False)
        except MilvusException as error:
            raise StoreError(
                f"Milvus takes no {index} for {collection}, which has no index now",
                got=" ".join(str(error.message).split())[:200],
                next_step="give another --index",
            ) from error


def awaited(
    client: Any,
    collection: str,
    timeout_s: float,
    stop: threading.Event,
    advance: Callable[[int], None] = lambda _: None,
    stalled_s: float = STALLED_S,
) -> bool | None:
    """Whether all cases are in the index; False if it was stopped before, None if Milvus does not build it."""
    done, moved = 0, time.monotonic()
    while True:
        about = client.describe_index(collection, client.list_indexes(collection, FIELD, timeout=timeout_s)[0], timeout=timeout_s)
        now = int(about["indexed_rows"])
        advance(max(0, now - done))
        if now > done:
            moved = time.monotonic()
        done = max(done, now)
        if int(about["pending_index_rows"]) == 0:
            return True
        if time.monotonic() - moved > stalled_s:
            return None
        if stop.wait(_LOOK_EVERY_S):
            return False


def _value(text: str) -> int | str:
    return int(text) if text.isdigit() else text
