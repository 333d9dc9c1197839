"""The gallery in Milvus: schema, deterministic keys, upsert, search. Same code for Milvus Lite and a Milvus server.

One collection holds the embeddings of one model version (`cxr_<version>`), because vectors of two versions cannot be
compared (`aliases.py`). A case's vector is what was learnt and what its lungs look like, side by side (`balance.py`).

No id and no path stands there: images and patients have keyed pseudonyms. Whoever uses this module speaks of ids, and gets them back as
far as the local table knows them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient

from cxr_retrieval.cases.fields import CLINICAL_FIELDS, MAX_TEXT, Value, parse_clinical
from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.cases.pseudonyms import Original, Pseudonyms
from cxr_retrieval.errors import InputError, StoreError, UsageError
from cxr_retrieval.gallery.aliases import (
    ALIAS,
    PREFIX,
    aliases_of,
    collection_of,
    filling,
    galleries,
    gallery_names,
    is_filling,
    point,
    the_gallery,
)
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE
from cxr_retrieval.gallery.clause import And, Compare, Field, In, Kind, Node, all_of, constant, items, printed
from cxr_retrieval.gallery.clause import Value as Stated
from cxr_retrieval.gallery.clause_parser import parse, parse_text
from cxr_retrieval.gallery.filters import Dialect, for_milvus, settled, with_pseudonyms
from cxr_retrieval.gallery.indexes import DEFAULT_RECALL, FLAT, METRIC, RECALL, Index, add, describe, fitting
from cxr_retrieval.gallery.matching import matches, with_words
from cxr_retrieval.gallery.milvus import close, connect, connected, has_nullable, is_lite, one_blas_thread, release_of, silent, translated
from cxr_retrieval.gallery.spaces import FILM, SPACES, Space
from cxr_retrieval.gallery.thumbnails import COLLECTION as THUMBNAILS
from cxr_retrieval.gallery.thumbnails import Thumbnail, Thumbnails
from cxr_retrieval.gallery.words import MAX_WORDS, NOTES, WORDS_FIELD
from cxr_retrieval.settings import IndexName, MilvusSettings, SpaceName, ThumbnailKind

UPSERT_ROWS: Final = 500
"""Rows per call at most."""
UPSERT_BYTES: Final = 8 * 2**20
"""Per call, whatever the rows hold: Milvus takes 64 MB, and a row can have pages of notes."""
MAX_EXTRA: Final = 65_536
"""Bytes of JSON that the manifest's further columns may come to: Milvus' own limit."""
SEARCH_ROWS: Final = 4096
"""Hits that one call may bring, of all its embeddings: some megabytes, for a case can have pages of notes."""
LITE_COMFORTABLE_ROWS: Final = 100_000
"""Milvus Lite searches exactly (FLAT): about 50 queries/s at 20 k rows, 7 at 100 k. Beyond, use a server."""
_WHOLE_ROWS: Final = 200
_LONG_ROWS: Final = 2000
_SHORT_ROWS: Final = 5000
"""That one call brings: with all their fields, of which each can have pages of notes; with notes or the user's own columns; with others.
Milvus Lite sorts the whole gallery for each call.
"""
MAX_HITS: Final = 16_384
"""Of one search: Milvus' own limit."""

FORMER_SIZE: Final = 64
"""Of a case's vector in galleries made before there was a balance."""
FINGERPRINT: Final = "cxr.pseudonyms"
"""Property of a collection that tells under which key its pseudonyms were made. Milvus Lite forgets descriptions; it keeps properties."""
SPACE: Final = "cxr.space"
"""Property with the name of its space; missing: `film`."""
CALIBRATION: Final = "cxr.calibration"
"""Property with the gallery's own calibration as text; "" or missing: it has none."""
SITES: Final = "cxr.sites"
"""The same with the profiles of sites."""
CLUSTERS: Final = "cxr.clusters"
"""The same with what is known of its clusters (`retrieval/clusters.py`)."""
KEPT: Final = {CALIBRATION: "calibration", SITES: "profiles of sites", CLUSTERS: "clusters"}
"""What it may keep so, in words."""

_NAMED: Final = {
    "label": 256,
    "patient_id": 32,
    "source": 256,
    "split": 64,
    "file": 64,
    "facts": 64,
    "pixels": 64,
}
"""Text fields of our own, each with its greatest length in bytes of UTF-8, as Milvus counts."""
_OPTIONAL: Final = frozenset({"patient_id", "source", "split"})
_CLUSTER: Final = "cluster"
_STRENGTH: Final = "strength"
NO_CLUSTER: Final[Mapping[str, None]] = {_CLUSTER: None, _STRENGTH: None}
"""Fields of a case that is in no cluster."""
HOSPITAL: Final = "hospital"
"""Partition key of a gallery that is kept by source: the source, or "" where a case has none; Milvus allows no null there."""
_PARTITIONS: Final = 64
"""Into which sources are hashed. Each has segments of its own, which an unfiltered search looks through one by one."""
_UPSERTS_BY_KEY_SINCE: Final = (2, 4)
"""A server before hashes what is upserted by another field than the partition key, so that a search by that misses it (milvus#30772)."""
FILTER_FIELDS: Final[Mapping[str, Kind]] = {
    "key": "text",
    "image_id": "id",
    "patient_id": "id",
    "label": "text",
    "source": "text",
    "split": "text",
    **CLINICAL_FIELDS,
    "extra": "own",
}
"""Names that a clause may use, and what these hold; ids become pseudonyms before Milvus sees them."""
_IN_CLEAR: Final = frozenset({"image_id", "path"})
"""Fields of galleries made before there were pseudonyms."""
_MILVUS_TYPES: Final = {"number": DataType.DOUBLE, "flag": DataType.BOOL, "text": DataType.VARCHAR}


@dataclass(frozen=True)
class Case:
    """One gallery image.

    Attributes:
        key: Its pseudonym.
        image_id: As the local table has it; where that does not know it, `key`.
        patient_id: The patient's pseudonym.
        path: Of its file, as the local table has it, or None; `member` is set if that is a ZIP that holds it.
        metadata: The clinical facts that are known.
        file: Keyed digest of the file's bytes (`Pseudonyms.digest`).
        pixels: The same of the 256×256 picture.
        cluster: The label of its cluster (`retrieval/clusters.py`), and `strength`, the weight of its edges; None: it is in none.
    """

    key: str
    image_id: str
    label: str
    patient_id: str | None
    source: str | None
    split: str | None
    path: Path | None
    metadata: Mapping[str, Value]
    file: str
    pixels: str
    member: str | None = None
    cluster: str | None = None
    strength: float = 0.0


@dataclass(frozen=True)
class Clause:
    """What cases must meet, understood and made ready for one gallery (`Store.clause`).

    Attributes:
        given: As the user gave it; "" if nothing.
        asked: What Milvus is asked; it names no id.
    """

    given: str
    asked: str


EVERY_CASE: Final = Clause("", "")


@dataclass(frozen=True)
class Neighbour:
    """A retrieved case with its similarity to the query at the balance asked for, in [−1, 1].

    Attributes:
        semantic: Cosine similarity of what was learnt. visual: Of what the lungs look like.
    """

    case: Case
    similarity: float
    semantic: float
    visual: float

    def as_json(self) -> dict[str, Any]:
        """As it stands in an answer, but for its rank."""
        known = {"patient_id": self.case.patient_id, "source": self.case.source}
        return {
            "image_id": self.case.image_id,
            "similarity": self.similarity,
            "label": self.case.label,
            "metadata": {**{name: value for name, value in known.items() if value is not None}, **self.case.metadata},
        }


class Near(NamedTuple):
    """A case that is near another: its key, the label of its cluster (None: it is in none), and their similarity at the default balance."""

    key: str
    cluster: str | None
    similarity: float


@dataclass(frozen=True)
class Entry:
    """A case about to be stored; its embedding comes later.

    Attributes:
        original: What its pseudonym stands for; kept in the local table alone.
        key: Its pseudonym, and primary key: of the image_id alone, so that a corrected row replaces itself whatever was wrong with it.
        patient: The patient's pseudonym.
        known: Values of clinical fields. extra: Of columns of the user's own.
        doubts: Which values are not plausible, in words; stored all the same.
        file: Keyed digest of the file's bytes.
    """

    row: ManifestRow
    original: Original
    key: str
    patient: str | None
    known: Mapping[str, Value]
    extra: Mapping[str, Value]
    doubts: tuple[str, ...]
    file: str

    @property
    def facts(self) -> str:
        """SHA-256 over all that is stored beside the picture."""
        row = self.row
        told = [row.label, self.patient, row.source, row.split, sorted(self.known.items()), sorted(self.extra.items())]
        return hashlib.sha256(repr(told).encode()).hexdigest()


@dataclass(frozen=True)
class Held:
    """What the gallery holds under a key, as far as an ingest must know: digests (of file and picture keyed), and whose it is."""

    file: str
    facts: str
    pixels: str
    source: str | None


def make_entry(row: ManifestRow, file: str, pseudonyms: Pseudonyms) -> Entry:
    """Types a row's columns; `file` is the SHA-256 of its file.

    Raises:
        InputError: A clinical value that cannot be understood, or a cell longer than the gallery's field.
    """
    for name, text in {"label": row.label, "source": row.source, "split": row.split}.items():
        size = len((text or "").encode())
        if size > _NAMED[name]:
            raise InputError(
                f"column {name}: too long",
                expected=f"at most {_NAMED[name]} bytes of UTF-8",
                got=f"{size}, beginning {(text or '')[:40]!r}",
                next_step="shorten that cell",
            )
    known, extra, doubts = parse_clinical(row.fields)
    size = len(json.dumps(extra, ensure_ascii=False).encode())
    if size > MAX_EXTRA:
        raise InputError(
            "the row's further columns: too long",
            expected=f"at most {MAX_EXTRA} bytes as JSON, all together",
            got=f"{size}, in {len(extra)} columns",
            next_step="leave columns out of the manifest",
        )
    return Entry(
        row,
        Original(row.image_id, row.path.resolve(), row.member, row.patient_id),
        pseudonyms.image(row.image_id),
        None if row.patient_id is None else pseudonyms.patient(row.patient_id),
        known,
        extra,
        doubts,
        pseudonyms.digest(file),
    )


class Store:
    """An open gallery for one model version. Use as a context manager.

    Attributes:
        space: By which vectors its films are compared.
        vector_size: Numbers of a case's vector: those of the space, or 64 of the former layout.
        has_clusters: Whether its cases have a field for their cluster.
        index: By what it is searched (`indexes.py`).
        recall: The recall@10 that its searches are to reach.
        by_source: Whether it is kept by source.
        kept: Texts that the gallery keeps beside its cases, as they were when opened: property (one of `KEPT`) → text, without empty ones.

    Args:
        settings: Where Milvus is.
        model_version: Which weights the vectors come from (`Space.version`).
        pseudonyms: The key under which the gallery was, or will be, filled.
        create: Make the collection if it is not there (ingest), or complain (query).
        fill: Make it if it is not there, marked as being filled; with that mark it is refused without `fill`.
        beside: An open gallery whose connection this one shares, since a Milvus Lite folder takes one; closed by the other.
        outdated: Open one of the former layout, too, whose rows can be read and not compared with (`reindex`).
        space: What it is expected to be of; None: whatever it is. A new one is of `film` unless this says otherwise.
        new_index: Of one that is made.
        expected: Cases that one that is made is about to hold; None: nobody knows.
        by_source: One that is made is kept by source: a search within sources reads these alone (docs/galleries.md).

    Raises:
        UsageError: This Milvus has no such index.
        StoreError: Not reachable, locked by another process, not authorised, no gallery, half-filled, of vectors of another size, or of
            another key.
    """

    def __init__(
        self,
        settings: MilvusSettings,
        model_version: str,
        pseudonyms: Pseudonyms,
        *,
        create: bool = False,
        fill: bool = False,
        beside: Store | None = None,
        outdated: bool = False,
        space: Space | None = None,
        new_index: IndexName = IndexName.auto,
        expected: int | None = None,
        by_source: bool = False,
    ) -> None:
        self._settings = settings
        self.pseudonyms = pseudonyms
        self.model_version = model_version
        self.collection = collection_of(model_version)
        self.space = space or FILM
        create = create or fill
        if settings.is_lite and not create and not Path(settings.uri).exists():  # opening it would make an empty one
            raise StoreError(
                f"no gallery for model version {model_version}",
                expected=f"a Milvus Lite folder at {settings.uri}",
                got="nothing there",
                next_step=f"correct --milvus, or run `{_ingest(self.space)}` first",
            )
        self._client: Any = beside._client if beside else connect(settings)
        self._thumbnails = Thumbnails(self._client, settings)
        self._limits = ExitStack()
        if beside is None:
            self._limits.callback(close, self._client, settings)
        if settings.is_lite:
            self._limits.enter_context(one_blas_thread())
        try:
            with translated(settings):
                self._nullable = has_nullable(self._client)
                self._lite = is_lite(self._client)
                self._upserts_by_key = release_of(self._client) >= _UPSERTS_BY_KEY_SINCE
                if not self._client.has_collection(self.collection, timeout=self._settings.timeout_s):
                    if not create:
                        others = gallery_names(self._client, self._settings.timeout_s)
                        carried = ", or `cxr reindex` to carry over another version's gallery" if others else ""
                        raise StoreError(
                            f"no gallery for model version {model_version}",
                            expected=f"collection {self.collection}",
                            got=", ".join(sorted(self._client.list_collections(timeout=self._settings.timeout_s))) or "no collections",
                            next_step=f"run `{_ingest(self.space)}` first{carried}",
                        )
                    if by_source and self._lite:
                        raise UsageError(
                            "Milvus Lite keeps nothing by source", expected="a Milvus server", next_step="leave --by-source out"
                        )
                    self._create(fitting(new_index, expected, release_of(self._client), lite=self._lite), by_source=by_source)
                elif not fill and is_filling(self._client, self.collection, self._settings.timeout_s):
                    raise StoreError(
                        f"the gallery for model version {model_version} is not filled yet",
                        expected=f"a whole one in {self.collection}",
                        got="one that `cxr reindex` has begun and not ended",
                        next_step="let it end, or give the same command again; until then serve the former weights",
                    )
                self._check_schema(space, outdated=outdated)
                self.index = self._described()
                self._client.load_collection(self.collection, timeout=self._settings.timeout_s)
                if fill and not self.filling and self.count() == 0:
                    self._client.create_alias(self.collection, filling(self.collection), timeout=self._settings.timeout_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection and, for Milvus Lite, releases the file."""
        self._limits.close()

    def probe(self) -> None:
        """Asks whether the gallery is still there, after Milvus was away, and has it loaded again.

        Raises:
            StoreDownError: Not there yet.
            StoreError: Milvus is, but not this gallery.
        """
        with translated(self._settings):
            self._client.load_collection(self.collection, timeout=self._settings.timeout_s)

    def count(self) -> int:
        """Rows in the gallery, counted by the server (Strong consistency)."""
        with translated(self._settings):
            result = self._client.query(
                self.collection, filter="", output_fields=["count(*)"], consistency_level="Strong", timeout=self._settings.timeout_s
            )
        return int(result[0]["count(*)"])

    @property
    def calibration(self) -> str:
        """The gallery's own calibration as text (`retrieval/calibration.py`), as it was when opened; "" if it has none."""
        return self.kept.get(CALIBRATION, "")

    @property
    def sites(self) -> str:
        """The profiles of sites that it keeps, as text (`retrieval/site.py`), likewise."""
        return self.kept.get(SITES, "")

    @property
    def clusters(self) -> str:
        """What it keeps of its clusters, as text (`retrieval/clusters.py`), likewise."""
        return self.kept.get(CLUSTERS, "")

    def keep(self, texts: Mapping[str, str]) -> None:
        """Keeps texts with the gallery under these properties (of `KEPT`), in the place of those it had; "": none.

        Whoever has the gallery open sees them when he opens it again.
        """
        if texts:
            with translated(self._settings):
                self._client.alter_collection_properties(self.collection, dict(texts), timeout=self._settings.timeout_s)
            self.kept = {name: text for name, text in {**self.kept, **texts}.items() if text}

    @cached_property
    def size(self) -> int:
        """About how many cases it held when this was first asked; a server answers at once, which it does not for `count`."""
        with translated(self._settings):
            return int(self._client.get_collection_stats(self.collection, timeout=self._settings.timeout_s)["row_count"])

    def held(self, keys: Sequence[str]) -> dict[str, Held]:
        """Key → what is stored there, for those that are."""
        rows = self._rows_of(keys, ["file", "facts", "pixels", "source"])
        return {row["key"]: Held(row["file"], row["facts"], row["pixels"], row.get("source")) for row in rows}

    def embeddings(self, keys: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Key → vector `[size]` (`spaces.py`) for those that are stored."""
        return {row["key"]: np.array(row["embedding"], np.float32) for row in self._rows_of(keys, ["embedding"])}

    def _rows_of(self, keys: Sequence[str], fields: Sequence[str]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        with translated(self._settings):
            for start in range(0, len(keys), UPSERT_ROWS):
                rows += self._client.query(
                    self.collection,
                    filter=f"key in {json.dumps(list(keys[start : start + UPSERT_ROWS]))}",
                    output_fields=["key", *fields],
                    consistency_level="Strong",
                    timeout=self._settings.timeout_s,
                )
        return rows

    def upsert(self, entries: Sequence[Entry], pixels: Iterable[str], embeddings: Iterable[NDArray[np.float32]]) -> None:
        """Stores entries with the keyed digests of their pictures and their vectors `[n, size]`; one stored before is replaced whole.

        The local table has them first: no pseudonym is ever in the gallery that does not lead back.
        """
        self.pseudonyms.remember([entry.original for entry in entries])
        rows = (self._row(entry, picture, vector) for entry, picture, vector in zip(entries, pixels, embeddings, strict=True))
        with translated(self._settings):
            self._write(rows)

    def correct(self, entries: Sequence[Entry], pixels: Sequence[str]) -> None:
        """Stores other facts of cases whose pictures are the ones stored: their vectors, and their clusters, stay."""
        fields = ["embedding", *(NO_CLUSTER if self.has_clusters else ())]
        held = {row["key"]: row for row in self._rows_of([entry.key for entry in entries], fields)}
        self.pseudonyms.remember([entry.original for entry in entries])
        rows = [
            self._row(entry, picture, np.array(held[entry.key]["embedding"], np.float32))
            | {name: held[entry.key].get(name) for name in NO_CLUSTER}
            for entry, picture in zip(entries, pixels, strict=True)
        ]
        self.put(rows)

    def assign(self, clusters: Mapping[str, tuple[str, float]], vectors: Mapping[str, NDArray[np.float32]]) -> int:
        """Puts cases into clusters; all else that is stored of them stays. A case that is there already, or has gone, or is another
        picture's by now, is left as it is.

        Args:
            clusters: Key → label of its cluster (`retrieval/clusters.py`), and its strength.
            vectors: Key → the vector by which it belongs there.

        Returns:
            How many were put there.
        """
        rows = self.rows_of(list(clusters))
        other: list[dict[str, Any]] = []
        for key, row in rows.items():
            label, strength = clusters[key]
            stands = row.get(_CLUSTER) == label and row.get(_STRENGTH) == strength
            if not stands and np.array_equal(np.array(row["embedding"], np.float32), vectors[key]):
                other.append({**row, _CLUSTER: label, _STRENGTH: strength})
        self.put(other)
        return len(other)

    def assigned(self) -> Iterator[tuple[str, str | None]]:
        """Of every case its key, and the label of its cluster, if it is in one."""
        return ((str(row["key"]), row.get(_CLUSTER)) for row in self.rows(["key", *([_CLUSTER] if self.has_clusters else ())]))

    def refuse_without_clusters(self) -> None:
        """Whether cases can be put into clusters.

        Raises:
            UsageError: The gallery was made before there were any.
        """
        if not self.has_clusters:
            raise UsageError(
                f"collection {self.collection} was made before there were clusters",
                expected=f"a field {_CLUSTER} of each case",
                got="none",
                next_step=f"`cxr gallery export` it, `cxr gallery drop {self.collection}`, and `cxr gallery import` it",
            )

    def keep_thumbnails(self, thumbnails: Sequence[Thumbnail]) -> None:
        """Keeps pictures of cases, in a collection that all model versions share."""
        with translated(self._settings):
            self._thumbnails.put(thumbnails)

    def remove_thumbnails(self, keys: Collection[str]) -> None:
        """Takes pictures out: those of films that have been replaced."""
        with translated(self._settings):
            self._thumbnails.remove(keys)

    def thumbnails(self, keys: Sequence[str]) -> dict[str, Thumbnail]:
        """Key → the picture that is kept of this case, for those that have one."""
        with translated(self._settings):
            return self._thumbnails.get(keys)

    def thumbnail_kinds(self, keys: Sequence[str]) -> dict[str, ThumbnailKind]:
        """Key → which picture is kept of this case, for those that have one."""
        with translated(self._settings):
            return self._thumbnails.kinds(keys)

    def publish(self) -> None:
        """Ends an ingest: seals what was written, and makes this *the* gallery where there is none yet.

        Unsealed rows are found as well, but Milvus Lite looks at them one by one: 181 ms a query over 5,000 of them, 8 ms once sealed.
        """
        with translated(self._settings):
            self._client.flush(self.collection, timeout=self._settings.timeout_s)
            self._thumbnails.seal()
            if self.space is FILM and the_gallery(self._client, self._settings.timeout_s) is None:
                point(self._client, self.collection, self._settings.timeout_s)

    @property
    def fields(self) -> dict[str, tuple[DataType, int | None]]:
        """What the collection describes: name → type, and of a vector its dimensions."""
        with translated(self._settings):
            described: list[dict[str, Any]] = self._client.describe_collection(self.collection, timeout=self._settings.timeout_s)["fields"]
        dimensions = {field["name"]: int(field["params"]["dim"]) for field in described if "dim" in field["params"]}
        return {field["name"]: (DataType(field["type"]), dimensions.get(field["name"])) for field in described}

    @property
    def has_index(self) -> bool:
        """Whether it is searched by an index that may miss a case, rather than compared with every one."""
        return self.index != FLAT

    @property
    def outdated(self) -> bool:
        """Whether it is of the former layout: its rows can be read, and nothing compared with them."""
        return self.vector_size == FORMER_SIZE

    @property
    def takes_any_field(self) -> bool:
        """Whether a row may have fields that the collection does not describe: on servers without nullable ones."""
        return not self._nullable

    @property
    def filling(self) -> bool:
        """Whether it is marked as being filled."""
        with translated(self._settings):
            return is_filling(self._client, self.collection, self._settings.timeout_s)

    def filled(self) -> None:
        """Seals what was written, and takes the mark away: from now on it answers."""
        with translated(self._settings):
            self._client.flush(self.collection, timeout=self._settings.timeout_s)
            if self.filling:
                self._client.drop_alias(filling(self.collection), timeout=self._settings.timeout_s)

    def rows(self, fields: Sequence[str], where: str | Clause = "") -> Iterator[dict[str, Any]]:
        """Every row that meets a clause, as Milvus has it, read page by page: memory stays flat. `["*"]`: all fields.

        Raises:
            ClauseError: The clause cannot be meant.
        """
        clause = where if isinstance(where, Clause) else self.clause(where)
        with translated(self._settings, clause.given):
            yield from _rows(self._client, self.collection, clause.asked or 'key != ""', fields, self._settings.timeout_s)

    def rows_of(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Key → its row as Milvus has it, for those that are stored."""
        return {row["key"]: row for row in self._rows_of(keys, ["*"])}

    def cases(self, keys: Sequence[str]) -> dict[str, Case]:
        """Key → its case, for those that are stored."""
        rows = self.rows_of(keys)
        originals = self.pseudonyms.originals(rows)
        return {key: _case(row, originals.get(key)) for key, row in rows.items()}

    def browse(self, where: str | Clause = "", limit: int = 100, offset: int = 0) -> list[Case]:
        """Cases that meet a clause, in Milvus' own order, page by page; `offset + limit` is at most MAX_HITS.

        Raises:
            ClauseError: The clause cannot be meant.
        """
        clause = where if isinstance(where, Clause) else self.clause(where)
        with translated(self._settings, clause.given):
            rows = self._client.query(
                self.collection,
                filter=clause.asked or 'key != ""',
                output_fields=["*"],
                limit=limit,
                offset=offset,
                timeout=self._settings.timeout_s,
            )
        originals = self.pseudonyms.originals([row["key"] for row in rows])
        return [_case(row, originals.get(row["key"])) for row in rows]

    def put(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Upserts rows as `rows` gives them, of a gallery on the same Milvus, made `fitting`."""
        with translated(self._settings):
            self._write(map(self.fitting, rows))

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        for some in by_bytes(rows):
            if self.by_source and not self._upserts_by_key:  # a kill between leaves cases out, which the same command stores again
                self._client.delete(self.collection, ids=[row["key"] for row in some], timeout=self._settings.timeout_s)
                self._client.insert(self.collection, some, timeout=self._settings.timeout_s)
            else:
                self._client.upsert(self.collection, some, timeout=self._settings.timeout_s)

    def remove(self, keys: Sequence[str]) -> None:
        """Takes cases out, and their thumbnails where no other model version's gallery holds them."""
        with translated(self._settings):
            _delete(self._client, self.collection, keys, self._settings.timeout_s)
            _remove_orphans(self._client, self._settings, keys)

    def clause(self, where: str = "", text: str = "") -> Clause:
        """Makes ready what cases must meet, for several searches: what this Milvus cannot be asked is read and matched here, once.

        Args:
            where: Boolean expression over FILTER_FIELDS (docs/asking.md); ids in it become pseudonyms here.
            text: Words that clinical notes must hold, all of them; "phrases in quotes" as they stand; none of the -words.

        Raises:
            ClauseError: One of them cannot be meant.
            StoreError: The notes could not be read.
        """
        dialect = Dialect(self._lite, self._nullable, self._has_words)
        with translated(self._settings, where):
            return _ready(self._client, self.collection, self._settings, self.pseudonyms, dialect, where, text, by_source=self.by_source)

    def counts(self, field: str, where: str | Clause = "") -> dict[Value, int]:
        """How many of the cases that meet a clause have which value of a field, the most frequent first; of those where it is known.

        Reads that field of every such case: Milvus Lite takes 0.14 ms of CPU time for each, 14 s for 100,000. `completion.Snapshot`
        answers at once from what it holds.

        Raises:
            UsageError: No such field, or none that can be counted; or as `clause`.
            StoreError: Milvus cannot serve.
        """
        if FILTER_FIELDS.get(field, "id") in ("id", "own"):
            raise UsageError(
                f"no values of {field} can be counted", expected=", ".join(sorted(FILTER_FIELDS)), next_step="name another field"
            )
        counted = Counter(row[field] for row in self.rows([field], where) if row.get(field) is not None)
        return dict(counted.most_common())

    def search(
        self, vector: NDArray[np.float32], top_k: int, where: str | Clause = "", balance: float = DEFAULT_BALANCE
    ) -> list[Neighbour]:
        """As `search_many`, for one question `[size]`."""
        return self.search_many(vector[None], top_k, where, balance)[0]

    def search_many(
        self, vectors: NDArray[np.float32], top_k: int, where: str | Clause = "", balance: float = DEFAULT_BALANCE
    ) -> list[list[Neighbour]]:
        """For each question the `top_k` nearest cases at a balance, nearest first; equal similarities in order of key.

        A Milvus server is asked with session consistency: what this client stored is found, what another has just stored may be missing
        for a moment. Strong consistency would wait for the server's next time ticks, 0.6 s a query whatever the gallery's size.

        Args:
            vectors: `[n, size]`, as `Space.question` makes them.
            where: As `clause` takes it, or what that has made ready.
            balance: In the space `film`, of what was learnt and what lungs look like, in [0, 1] (`balance.py`).

        Raises:
            ClauseError: It cannot be meant.
            StoreError: The search failed.
            UsageError: No such balance.
        """
        clause = where if isinstance(where, Clause) else self.clause(where)
        asked = self.space.asked(vectors, balance)
        at_once = max(1, SEARCH_ROWS // top_k)
        found: list[list[dict[str, Any]]] = []
        with translated(self._settings, clause.given):
            for start in range(0, len(asked), at_once):
                answers = self._client.search(
                    self.collection,
                    data=asked[start : start + at_once].tolist(),
                    anns_field="embedding",
                    limit=top_k,
                    filter=clause.asked,
                    output_fields=["*"],
                    search_params=self._search_params(top_k),
                    consistency_level="Session",
                    timeout=self._settings.timeout_s,
                )
                found += [[hit["entity"] for hit in hits] for hits in answers]
        originals = self.pseudonyms.originals({row["key"] for hits in found for row in hits})
        neighbours = [
            [
                Neighbour(
                    _case(row, originals.get(row["key"])),
                    *self.space.likeness(vector, np.array(row["embedding"], np.float32), balance),
                )
                for row in hits
            ]
            for vector, hits in zip(vectors, found, strict=True)
        ]
        return [sorted(hits, key=lambda hit: (-hit.similarity, hit.case.key)) for hits in neighbours]

    def nearest(self, vectors: NDArray[np.float32], k: int, among: Clause = EVERY_CASE) -> list[list[Near]]:
        """Of each stored vector `[n, size]` the `k` nearest cases, nearest first, and of these no more than a graph needs.

        Args:
            among: Only cases that meet this (`clause`, `of_run`).

        Raises:
            StoreError: The search failed.
        """
        asked = self.space.asked(self.space.as_question(vectors), DEFAULT_BALANCE)
        lengths = np.linalg.norm(asked, axis=1) * self.space.length  # Milvus tells the cosine
        fields = ["key", *([_CLUSTER] if self.has_clusters else ())]
        with translated(self._settings, among.given):
            answers = self._client.search(
                self.collection,
                data=asked.tolist(),
                anns_field="embedding",
                limit=k,
                filter=among.asked,
                output_fields=fields,
                search_params=self._search_params(k),
                consistency_level="Session",
                timeout=self._settings.timeout_s,
            )
        return [
            [Near(hit["entity"]["key"], hit["entity"].get(_CLUSTER), float(length * hit["distance"])) for hit in hits]
            for length, hits in zip(lengths, answers, strict=True)
        ]

    def vectors(self) -> tuple[list[Case], NDArray[np.float32]]:
        """The whole gallery: cases and vectors `[n, size]`, ordered by key; for exact evaluation."""
        with translated(self._settings):
            rows = list(_rows(self._client, self.collection, 'key != ""', ["*"], self._settings.timeout_s))
        rows.sort(key=lambda row: str(row["key"]))
        originals = self.pseudonyms.originals([row["key"] for row in rows])
        cases = [_case(row, originals.get(row["key"])) for row in rows]
        return cases, np.array([row["embedding"] for row in rows], np.float32).reshape(-1, self.vector_size)

    def prune(self, keep: Collection[str], sources: Collection[str | None]) -> list[str]:
        """Removes the cases of these sources (None: of no source) whose key is not to be kept, and their thumbnails where no other model
        version's gallery holds them; returns the keys removed.
        """
        with translated(self._settings):
            rows = _rows(self._client, self.collection, 'key != ""', ["key", "source"], self._settings.timeout_s)
            gone = sorted(row["key"] for row in rows if row.get("source") in sources and row["key"] not in keep)
            _delete(self._client, self.collection, gone, self._settings.timeout_s)
            _remove_orphans(self._client, self._settings, gone)
        return gone

    def _search_params(self, top_k: int) -> dict[str, Any]:
        return {"metric_type": METRIC, "params": self.index.search(top_k, self.recall)}

    def _described(self) -> Index:
        if self._lite:
            return FLAT
        index = describe(self._client, self.collection, self._settings.timeout_s)
        if index is None:
            raise StoreError(
                f"collection {self.collection} has no index",
                expected="one that `cxr gallery index` gave it",
                got="none: that was killed just when it had taken the former one away",
                next_step=f"`cxr gallery index --model-version {self.collection.removeprefix(PREFIX)}`",
            )
        return index

    def _create(self, index: Index, *, by_source: bool) -> None:
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=not self._nullable)
        schema.add_field("key", DataType.VARCHAR, max_length=32, is_primary=True)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=self.space.size)
        for name, length in _NAMED.items():
            if name not in _OPTIONAL:
                schema.add_field(name, DataType.VARCHAR, max_length=length)
        schema.add_field("extra", DataType.JSON)
        if by_source:
            schema.add_field(HOSPITAL, DataType.VARCHAR, max_length=_NAMED["source"], is_partition_key=True)
        if self._nullable:  # a server before 2.5 keeps the same names as dynamic fields; the same filters work there
            for name in sorted(_OPTIONAL):
                schema.add_field(name, DataType.VARCHAR, max_length=_NAMED[name], nullable=True)
            for name, kind in CLINICAL_FIELDS.items():
                length = {"max_length": MAX_TEXT} if kind == "text" else {}
                schema.add_field(name, _MILVUS_TYPES[kind], nullable=True, **length)
            schema.add_field(_CLUSTER, DataType.VARCHAR, max_length=32, nullable=True)
            schema.add_field(_STRENGTH, DataType.DOUBLE, nullable=True)
            schema.add_field(
                WORDS_FIELD,
                DataType.VARCHAR,
                max_length=MAX_WORDS,
                nullable=True,
                enable_analyzer=True,
                enable_match=True,
                analyzer_params={"tokenizer": "standard" if self._lite else "whitespace"},  # the words are made here
            )
        self._client.create_collection(
            self.collection,
            schema=schema,
            index_params=add(self._client, index),
            consistency_level="Strong",
            properties={
                FINGERPRINT: self.pseudonyms.fingerprint,
                **({} if self.space is FILM else {SPACE: self.space.name.value}),
            },
            timeout=self._settings.timeout_s,
            **({"num_partitions": _PARTITIONS} if by_source else {}),
        )

    def _check_schema(self, expected: Space | None, *, outdated: bool) -> None:
        about = self._client.describe_collection(self.collection, timeout=self._settings.timeout_s)
        _refuse_in_clear(about)
        self.space = _space_of(about, expected)
        fields = {field["name"]: field for field in about["fields"]}
        got = int(fields.get("embedding", {}).get("params", {}).get("dim", 0))
        if self.space is FILM and got == FORMER_SIZE and not outdated:
            raise StoreError(
                f"collection {self.collection} was made by a former version of this system, which kept one vector of a case",
                expected=f"{FILM.size} numbers of each: what was learnt, and what lungs look like",
                got=f"{FORMER_SIZE}, both mixed",
                next_step="serve the weights of this version, and give `cxr reindex`: it fills their gallery from this one",
            )
        if got != self.space.size and not (self.space is FILM and got == FORMER_SIZE):
            raise StoreError(
                f"collection {self.collection} does not fit this system",
                expected=f"a field embedding of {self.space.size} dimensions",
                got=f"{got} dimensions" if got else f"fields {', '.join(sorted(fields))}",
                next_step=f"`cxr gallery drop {self.collection}`, and ingest again",
            )
        wanted = {name: DataType.VARCHAR for name in _NAMED if self._nullable or name not in _OPTIONAL}
        wanted |= {name: _MILVUS_TYPES[kind] for name, kind in CLINICAL_FIELDS.items()} if self._nullable else {}
        other = sorted(name for name, kind in wanted.items() if fields.get(name, {}).get("type") != kind)
        if other:
            raise StoreError(
                f"collection {self.collection} was made by another version of this system",
                expected=f"fields {', '.join(f'{name} ({wanted[name].name})' for name in other)}",
                got=", ".join(f"{name} ({DataType(fields[name]['type']).name})" if name in fields else f"no {name}" for name in other),
                next_step=f"`cxr gallery drop {self.collection}`, and ingest again",
            )
        _refuse_another_key(about, self.pseudonyms)
        self.vector_size = got
        self._has_words = WORDS_FIELD in fields  # galleries made before there was --text have not
        self.has_clusters = not self._nullable or _CLUSTER in fields  # nor those made before there was `cxr cluster`
        properties = about.get("properties", {})
        self.kept: Mapping[str, str] = {name: str(properties[name]) for name in KEPT if properties.get(name)}
        self.by_source = HOSPITAL in fields
        self.recall = float(properties.get(RECALL) or DEFAULT_RECALL)

    def _row(self, entry: Entry, pixels: str, vector: NDArray[np.float32]) -> dict[str, Any]:
        row = entry.row
        named = {
            "label": row.label,
            "patient_id": entry.patient,
            "source": row.source,
            "split": row.split,
            "file": entry.file,
            "facts": entry.facts,
            "pixels": pixels,
        }
        optional: dict[str, Any] = {name: entry.known.get(name) for name in CLINICAL_FIELDS}
        values = {"key": entry.key, "embedding": vector.tolist(), "extra": dict(entry.extra), **named, **optional, **NO_CLUSTER}
        return self.fitting(values if self._nullable else {name: value for name, value in values.items() if value is not None})

    def fitting(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as this gallery keeps it: with the words of its notes if it keeps these, else without; with its cluster and its hospital
        likewise.
        """
        unplaced = {name for name in NO_CLUSTER if not self.has_clusters or (not self._nullable and row.get(name) is None)}
        values = {name: value for name, value in row.items() if name not in {WORDS_FIELD, HOSPITAL, *unplaced}}
        if self.by_source:
            values[HOSPITAL] = values.get("source") or ""
        return with_words(values) if self._has_words else values


def of_label(label: str) -> Clause:
    """A clause made ready that cases of one label meet, and no others."""
    return Clause("", f"label == {constant(label)}")


def of_run(run: str) -> Clause:
    """The same that cases in clusters of one run meet (`Clustering.run`)."""
    return Clause("", f'{_CLUSTER} like "{run}:%"')


def within(clause: Clause, cluster: str) -> Clause:
    """The same of the cases of one cluster, by its label."""
    inside = f"{_CLUSTER} == {constant(cluster)}"
    return Clause(clause.given, f"({clause.asked}) and {inside}" if clause.asked else inside)


def list_collections(settings: MilvusSettings) -> dict[str, str]:
    """Collections and their sizes, by name; of galleries, what they are used as.

    Raises:
        StoreError: As `connect`.
    """
    with connected(settings) as client:
        names = sorted(client.list_collections(timeout=settings.timeout_s))
        rows = {name: client.get_collection_stats(name, timeout=settings.timeout_s)["row_count"] for name in names}
        used_as = {
            name: (", the gallery" if ALIAS in aliases else "") + (", being filled" if filling(name) in aliases else "")
            for name, aliases in galleries(client, settings.timeout_s).items()
        }
        return {name: f"{count} rows{used_as.get(name, '')}" for name, count in rows.items()}


def remove_cases(settings: MilvusSettings, pseudonyms: Pseudonyms, where: str, *, dry_run: bool = False) -> dict[str, list[str]]:
    """Takes the cases that meet a clause out of the galleries of every model version, with their thumbnails, and out of the local table.

    Args:
        dry_run: Only look which they are.

    Returns:
        Collection → keys, where there are any.

    Raises:
        UsageError: The clause is empty, or cannot be meant.
        StoreError: Not reachable, a gallery in clear or of another key, or the removal failed.
    """
    if parse(where, FILTER_FIELDS) is None:
        raise UsageError("the filter says nothing", expected="which cases to remove", next_step="`cxr gallery drop` removes them all")
    found: dict[str, list[str]] = {}
    with connected(settings, where) as client:
        lite, nullable = is_lite(client), has_nullable(client)
        for name in gallery_names(client, settings.timeout_s):
            about = client.describe_collection(name, timeout=settings.timeout_s)
            _refuse_in_clear(about)
            _refuse_another_key(about, pseudonyms)  # whose cases this key does not find
            client.load_collection(name, timeout=settings.timeout_s)
            dialect = Dialect(lite, nullable, any(field["name"] == WORDS_FIELD for field in about["fields"]))
            asked = _ready(client, name, settings, pseudonyms, dialect, where, removing=True).asked
            keys = sorted(row["key"] for row in _rows(client, name, asked, ["key"], settings.timeout_s))
            if keys:
                found[name] = keys
        if not dry_run:
            gone = {key for keys in found.values() for key in keys}
            pseudonyms.forget(gone)  # first: should this be killed, the same command finds the cases again, for it needs the key alone
            Thumbnails(client, settings).remove(gone)
            for name, keys in found.items():
                _delete(client, name, keys, settings.timeout_s)
    return found


def drop_gallery(settings: MilvusSettings, collection: str) -> int:
    """Removes a whole gallery, and the thumbnails that no other gallery has a case for; returns how many cases it held.

    Raises:
        UsageError: No such gallery.
        StoreError: Not reachable.
    """
    with connected(settings) as client:
        names = gallery_names(client, settings.timeout_s)
        if collection not in names:
            raise UsageError(
                f"no gallery {collection}", expected=", ".join(names) or "a gallery; there is none", next_step="correct the name"
            )
        rows = int(client.get_collection_stats(collection, timeout=settings.timeout_s)["row_count"])
        for alias in aliases_of(client, collection, settings.timeout_s):
            client.drop_alias(alias, timeout=settings.timeout_s)
        client.drop_collection(collection, timeout=settings.timeout_s)
        if client.has_collection(THUMBNAILS, timeout=settings.timeout_s):
            client.load_collection(THUMBNAILS, timeout=settings.timeout_s)
            kept = [row["key"] for row in _rows(client, THUMBNAILS, 'key != ""', ["key"], settings.timeout_s)]
            _remove_orphans(client, settings, kept)
        return rows


def by_bytes(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows, in their order, as many at once as UPSERT_BYTES and UPSERT_ROWS allow; a row alone may be larger."""
    some: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        more = _size(row)
        if some and (size + more > UPSERT_BYTES or len(some) == UPSERT_ROWS):
            yield some
            some, size = [], 0
        some.append(row)
        size += more
    if some:
        yield some


def _size(value: Any) -> int:
    """Bytes on the wire, or a little more: names, which a message holds once, count for every row."""
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, dict):
        return sum(len(name.encode()) + _size(part) for name, part in value.items())
    return 8 * len(value) if isinstance(value, list) else 8


def understood(where: str, text: str, pseudonyms: Pseudonyms, *, unknown_patients: bool = True) -> Node | None:
    """What a clause and words to look for ask of what is stored, with pseudonyms and settled; None: nothing.

    Raises:
        ClauseError: One of them cannot be meant.
    """
    asked = [node for node in (parse(where, FILTER_FIELDS), parse_text(text)) if node is not None]
    if not asked:
        return None
    stored = with_pseudonyms(all_of(asked), {"image_id": pseudonyms.image, "patient_id": pseudonyms.patient})
    return settled(stored, unknown_patients=unknown_patients)


def _ready(
    client: Any,
    collection: str,
    settings: MilvusSettings,
    pseudonyms: Pseudonyms,
    dialect: Dialect,
    where: str,
    text: str = "",
    *,
    by_source: bool = False,
    removing: bool = False,
) -> Clause:
    """What both ask, as this Milvus can be asked.

    Args:
        by_source: The gallery is kept by source.
        removing: It chooses what goes, not what is compared: a case of an unknown patient stays where another's are named, and all that
            was stored is waited for.
    """
    given = " and ".join(filter(None, (where, text and f"--text {text}")))
    condition = understood(where, text, pseudonyms, unknown_patients=not removing)
    if condition is None:
        return Clause(given, "")

    def keys_of(possible: Node | None, condition: Node) -> list[str]:
        fields = sorted({item.name if isinstance(item, Field) else item.base for item in items(condition)} | {"key"})
        among = printed(possible) if possible else 'key != ""'
        rows = _rows(client, collection, among, fields, settings.timeout_s, "Strong" if removing else "Session")
        return sorted(row["key"] for row in rows if matches(condition, with_words(row) if NOTES in fields else row))

    asked = printed(for_milvus(condition, dialect, keys_of))
    sources = sources_of(condition) if by_source else None
    return Clause(given, asked if sources is None else f"{HOSPITAL} in [{', '.join(map(constant, sources))}] and ({asked})")


def sources_of(condition: Node) -> list[str] | None:
    """Sources without which no case can meet it, as far as that is plain from its conditions; None: any."""
    match condition:
        case And(nodes):
            return next((found for node in nodes if (found := sources_of(node)) is not None), None)
        case Compare("==", Field("source"), Stated(str() as source)):
            return [source]
        case In(Field("source"), values, False):
            return [str(value) for value in values]
        case _:
            return None


def _refuse_in_clear(about: Mapping[str, Any]) -> None:
    """`about` is what Milvus says of a collection."""
    in_clear = sorted(_IN_CLEAR & {field["name"] for field in about["fields"]})
    if in_clear:
        raise StoreError(
            f"collection {about['collection_name']} holds image ids and paths in clear",
            expected="pseudonyms alone, as this version of the system keeps them",
            got=f"fields {', '.join(in_clear)}",
            next_step=f"`cxr gallery drop {about['collection_name']}`, and ingest again",
        )


def _ingest(space: Space) -> str:
    return "cxr ingest" if space is FILM else f"cxr ingest --space {space.name.value}"


def _space_of(about: Mapping[str, Any], expected: Space | None) -> Space:
    name = about.get("properties", {}).get(SPACE, SpaceName.film.value)
    found = next((space for space in SPACES.values() if space.name.value == name), None)
    if found is None or (expected is not None and found is not expected):
        raise StoreError(
            f"collection {about['collection_name']} is of another space",
            expected=(expected.name.value if expected else ", ".join(one.value for one in SPACES)),
            got=name,
            next_step="give the --space that it was ingested with",
        )
    return found


def _refuse_another_key(about: Mapping[str, Any], pseudonyms: Pseudonyms) -> None:
    name, fingerprint = about["collection_name"], about.get("properties", {}).get(FINGERPRINT)
    if fingerprint != pseudonyms.fingerprint:
        raise StoreError(
            f"collection {name} was filled under another pseudonym key",
            expected=f"the key with the fingerprint {fingerprint}",
            got=f"one with {pseudonyms.fingerprint}",
            next_step=f"give that key (--pseudonym-key, CXR_PSEUDONYM_KEY), or `cxr gallery drop {name}` and ingest again",
        )


def _remove_orphans(client: Any, settings: MilvusSettings, keys: Sequence[str]) -> None:
    """Takes out the thumbnails of those cases that are in no gallery any more."""
    orphans = set(keys)
    if not orphans or not client.has_collection(THUMBNAILS, timeout=settings.timeout_s):
        return
    for name in gallery_names(client, settings.timeout_s):
        if FINGERPRINT in client.describe_collection(name, timeout=settings.timeout_s).get("properties", {}):  # others have none
            client.load_collection(name, timeout=settings.timeout_s)
            for start in range(0, len(keys), UPSERT_ROWS):
                clause = f"key in {json.dumps(list(keys[start : start + UPSERT_ROWS]))}"
                orphans -= {row["key"] for row in _rows(client, name, clause, ["key"], settings.timeout_s)}
    Thumbnails(client, settings).remove(orphans)


def _rows(
    client: Any, collection: str, where: str, fields: Sequence[str], timeout_s: float, consistency: str = "Strong"
) -> Iterator[dict[str, Any]]:
    """Every row that meets the clause, in batches under the hood."""
    at_once = _WHOLE_ROWS if "*" in fields else _SHORT_ROWS if {NOTES, "extra"}.isdisjoint(fields) else _LONG_ROWS
    with silent("pymilvus.orm.iterator"):  # Milvus Lite gives no time stamp for it, and needs none
        iterator = client.query_iterator(
            collection,
            batch_size=at_once,
            filter=where,
            output_fields=list(fields),
            consistency_level=consistency,
            timeout=timeout_s,
        )
    while batch := iterator.next():
        yield from batch
    iterator.close()


def _delete(client: Any, collection: str, keys: Sequence[str], timeout_s: float) -> None:
    for start in range(0, len(keys), UPSERT_ROWS):
        client.delete(collection, ids=list(keys[start : start + UPSERT_ROWS]), timeout=timeout_s)
    if keys:
        client.flush(collection, timeout=timeout_s)


def _case(row: Mapping[str, Any], original: Original | None) -> Case:
    facts: dict[str, Value] = {name: row[name] for name in CLINICAL_FIELDS if row.get(name) is not None}
    facts |= row.get("extra") or {}
    return Case(
        row["key"],
        original.image_id if original else row["key"],
        row["label"],
        row.get("patient_id"),
        row.get("source"),
        row.get("split"),
        original.path if original else None,
        facts,
        row["file"],
        row["pixels"],
        original.member if original else None,
        row.get(_CLUSTER),
        row.get(_STRENGTH) or 0.0,
    )
