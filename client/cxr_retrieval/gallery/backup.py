"""A gallery as one Parquet file, and back: every row with every field that the collection describes, whatever these are.

A column for each described field (vectors as lists of a fixed size, JSON as text), and `$meta` for what a server without nullable fields
keeps beside them; thumbnails, if asked for, in two columns more. The file says which model version its embeddings come from, under which
key its pseudonyms were made, what else the gallery keeps (its calibration, profiles of sites, clusters), how many rows it has, and the
SHA-256 of all of that with all rows in order; where that does not fit, it is refused before the first row is stored. Rows pass in pages:
memory stays flat.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pymilvus import DataType

from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import IMAGE_SIZE
from cxr_retrieval.errors import SetupError, UsageError
from cxr_retrieval.gallery.aliases import PREFIX, collection_of
from cxr_retrieval.gallery.spaces import FILM, SPACES, Space
from cxr_retrieval.gallery.store import CLUSTERS, HOSPITAL, KEPT, NO_CLUSTER, Store
from cxr_retrieval.gallery.thumbnails import Thumbnail
from cxr_retrieval.gallery.words import WORDS_FIELD
from cxr_retrieval.settings import MilvusSettings, ThumbnailKind

LAYOUT: Final = "2"
"""Of the file; another one is refused, but for the first, which held nothing but cases."""
_FIRST: Final = "1"
_PAGE: Final = 500
"""Rows held at once: some hundred numbers each, pages of notes at worst, and 64 KiB of picture if asked for."""
META: Final = "$meta"
_THUMBNAIL: Final = "$thumbnail"
_KIND: Final = "$thumbnail_kind"
_BESIDE: Final = ((META, pa.string()), (_KIND, pa.string()), (_THUMBNAIL, pa.binary()))
"""Columns that are no fields; a picture is its 256×256 bytes."""
_NAMESPACE: Final = "cxr."
"""Of our keys in the file's metadata."""
_TOLD: Final = ("layout", "model_version", "key_fingerprint", "fields", "kept", "rows", "sha256")
_ARROW: Final[Mapping[DataType, Any]] = {
    DataType.BOOL: pa.bool_(),
    DataType.INT8: pa.int8(),
    DataType.INT16: pa.int16(),
    DataType.INT32: pa.int32(),
    DataType.INT64: pa.int64(),
    DataType.FLOAT: pa.float32(),
    DataType.DOUBLE: pa.float64(),
    DataType.VARCHAR: pa.string(),
    DataType.JSON: pa.string(),
}


@dataclass(frozen=True)
class Backup:
    """What a file says of itself.

    Attributes:
        model_version: Its embeddings come from it.
        key_fingerprint: Of the key of its pseudonyms (`Pseudonyms.fingerprint`).
        fields: That its collection described: name → Milvus' type.
        kept: What the gallery keeps beside its cases: property → text (`Store.kept`).
        rows: How many.
        sha256: Of all of this and of all rows in order.
        layout: Of the file.
    """

    model_version: str
    key_fingerprint: str
    fields: Mapping[str, str]
    kept: Mapping[str, str]
    rows: int
    sha256: str
    layout: str = LAYOUT


def export_gallery(store: Store, out: Path, advance: Callable[[int], None] = lambda _: None, *, thumbnails: bool = False) -> Backup:
    """Writes a gallery to a file, which is there whole or not at all, with rights 0600.

    What is ingested or removed meanwhile may be in it or not; every row that is there is whole.

    Args:
        thumbnails: Also the pictures that are kept of its cases.

    Raises:
        SetupError: It cannot be written.
        StoreError: Milvus cannot serve.
    """
    fields = store.fields
    schema = pa.schema([*((name, arrow_type(kind, dim)) for name, (kind, dim) in fields.items()), *_BESIDE])
    partial = out.with_name(out.name + ".partial")
    version, kinds = store.collection.removeprefix(PREFIX), {name: kind.name for name, (kind, _) in fields.items()}
    begun = Backup(version, store.pseudonyms.fingerprint, kinds, store.kept, 0, "")
    digest, count = _digest_of(begun), 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file,
            pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
        ):
            rows = store.rows(["*"])
            while page := [as_columns(row, fields) for row in islice(rows, _PAGE)]:
                if thumbnails:
                    _add_thumbnails(page, store.thumbnails([row["key"] for row in page]))
                table = pa.Table.from_pylist(page, schema)
                writer.write_table(table)
                _add(digest, table.to_pylist())
                count += len(page)
                advance(len(page))
            about = replace(begun, rows=count, sha256=digest.hexdigest())
            writer.add_key_value_metadata(_told(about))
        _sync(partial)
        partial.replace(out)
    except OSError as error:
        raise SetupError(
            f"{out}: cannot be written", got=error.strerror or str(error), next_step="make room, or give another file"
        ) from error
    return about


def read_backup(path: Path) -> Backup:
    """Reads all of a file, and checks it against what it says of itself.

    Raises:
        UsageError: Cut off, changed, or no such file.
    """
    with _readable(path) as file:
        about = _about(path, file)
        if not _fits(file.schema_arrow, about.fields):
            raise _damaged(path, f"columns {', '.join(about.fields)}", " ".join(str(file.schema_arrow).split())[:200])
        digest, count = _digest_of(about), 0
        try:
            for page in _pages(file):
                _add(digest, page)
                if any(row[_THUMBNAIL] is not None and len(row[_THUMBNAIL]) != IMAGE_SIZE**2 for row in page):
                    raise _damaged(path, f"thumbnails of {IMAGE_SIZE}×{IMAGE_SIZE} bytes", "others")
                count += len(page)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(path, "pages whose checksums fit", str(error)) from error
    if (count, digest.hexdigest()) != (about.rows, about.sha256):
        raise _damaged(path, f"{about.rows} rows with digest {about.sha256[:12]}…", f"{count} with {digest.hexdigest()[:12]}…")
    return about


def import_gallery(
    settings: MilvusSettings,
    pseudonyms: Pseudonyms,
    path: Path,
    checked: Backup,
    *,
    merge: bool = False,
    model_version: str | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Sequence[str]:
    """Stores the rows of a file in the gallery of their own model version.

    Safe to repeat: rows are stored by their keys. What the file does not hold stays as it is, and so do a calibration, profiles of
    sites and clusters that the gallery has: they were measured on it.

    Args:
        checked: What `read_backup` found in it.
        merge: Into a gallery that holds cases already; rows of the same key are replaced.
        model_version: Refuse a file of another one.

    Returns:
        Of what the file holds beside cases (`Backup.kept`), the properties that the gallery lacked and now keeps.

    Raises:
        UsageError: Another model version, another layout, another key, a gallery that is not empty, or one that lacks a field of the file.
        StoreError: Milvus cannot serve.
    """
    space = fitting_space(path, checked, pseudonyms, model_version)
    with Store(settings, checked.model_version, pseudonyms, create=True, space=space, expected=checked.rows) as store:
        if store.count() and not merge:
            raise UsageError(
                f"{store.collection}: holds {store.count()} cases already",
                expected="no gallery of that version, or an empty one",
                next_step="give --merge to replace those of the same key, and to go on after an interruption",
            )
        for rows, thumbnails in rows_for(store, path, checked):
            store.put(rows)
            store.keep_thumbnails(thumbnails)
            advance(len(rows))
        taken = take_kept(store, checked)
        store.publish()
    return taken


def fitting_space(path: Path, checked: Backup, pseudonyms: Pseudonyms, model_version: str | None) -> Space:
    """Of the gallery that the file holds, if that can become one here.

    Raises:
        UsageError: As `import_gallery`.
    """
    if model_version is not None and collection_of(checked.model_version) != collection_of(model_version):
        raise UsageError(
            f"{path}: holds embeddings of another model version",
            expected=model_version,
            got=checked.model_version,
            next_step="give the file of that version; `cxr reindex` makes one version's gallery from another's",
        )
    if checked.key_fingerprint != pseudonyms.fingerprint:
        raise UsageError(
            f"{path}: its pseudonyms were made under another key",
            expected=f"the key with the fingerprint {checked.key_fingerprint}",
            got=f"one with {pseudonyms.fingerprint}",
            next_step="give that key (--pseudonym-key, CXR_PSEUDONYM_KEY)",
        )
    with _readable(path) as file:
        size = file.schema_arrow.field("embedding").type.list_size if "embedding" in checked.fields else 0
    space = next((one for one in SPACES.values() if checked.model_version.startswith(f"{one.name.value}_")), FILM)
    if size != space.size:
        raise UsageError(
            f"{path}: holds a gallery of another layout",
            expected=f"a vector of {space.size} numbers of each case",
            got=str(size),
            next_step="import it with the version of this system that exported it; this one's `cxr reindex` then carries it over",
        )
    return space


def rows_for(store: Store, path: Path, checked: Backup) -> Iterator[tuple[list[dict[str, Any]], list[Thumbnail]]]:
    """A file's rows as this gallery keeps them, and the pictures that come with them, page by page."""
    here = store.fields
    with _readable(path) as file:
        for page in _pages(file):
            rows = [_as_row(row, checked.fields, here, store, path) for row in page]
            yield rows, [_thumbnail(row) for row in page if row[_THUMBNAIL] is not None]


def take_kept(store: Store, checked: Backup) -> Sequence[str]:
    """Keeps what the file holds beside cases and the gallery lacks; which properties these are."""
    room = KEPT.keys() - store.kept.keys() - (set() if store.has_clusters else {CLUSTERS})
    taken = {name: text for name, text in checked.kept.items() if name in room}
    store.keep(taken)
    return sorted(taken)


def as_columns(row: Mapping[str, Any], fields: Mapping[str, tuple[DataType, int | None]]) -> dict[str, Any]:
    """A row as Milvus has it → as a Parquet file has it: JSON as text, and what is no field together in `$meta`."""
    columns = {name: _text(row.get(name)) if kind is DataType.JSON else row.get(name) for name, (kind, _) in fields.items()}
    beside = {name: value for name, value in row.items() if name not in fields}
    return {**columns, META: _text(beside) if beside else None}


def arrow_type(kind: DataType, dim: int | None) -> Any:
    """Of a column that holds such a field."""
    if kind is DataType.FLOAT_VECTOR:
        return pa.list_(pa.float32(), dim)
    if kind in _ARROW:
        return _ARROW[kind]
    raise UsageError(f"a field of type {kind.name} cannot be exported", expected="numbers, flags, text, JSON and float vectors")


def _fits(schema: Any, fields: Mapping[str, str]) -> bool:
    """Whether the file's columns are those that it says were described, of the types that these become."""
    if schema.names != [*fields, *(name for name, _ in _BESIDE)] or any(schema.field(name).type != kind for name, kind in _BESIDE):
        return False
    kinds = {kind.name: arrow for kind, arrow in _ARROW.items()}
    vectors = [name for name, kind in fields.items() if kind == DataType.FLOAT_VECTOR.name]
    return all(pa.types.is_fixed_size_list(schema.field(name).type) for name in vectors) and all(
        schema.field(name).type == kinds.get(kind) for name, kind in fields.items() if name not in vectors
    )


def _as_row(
    columns: Mapping[str, Any], there: Mapping[str, str], here: Mapping[str, tuple[DataType, int | None]], store: Store, path: Path
) -> dict[str, Any]:
    """And back, for a collection that may describe as fields what the file has in `$meta`, and the other way round."""
    is_json = {name for name, kind in there.items() if kind == DataType.JSON.name}
    known = {name: json.loads(columns[name]) if name in is_json else columns[name] for name in there if columns[name] is not None}
    known |= json.loads(columns[META] or "{}")
    if store.takes_any_field:
        return known
    unknown = sorted(known.keys() - here.keys() - {WORDS_FIELD, HOSPITAL, *NO_CLUSTER})  # which `put` makes where there is room for them
    if unknown:
        raise UsageError(
            f"{path}: holds fields that {store.collection} lacks",
            expected=", ".join(here),
            got=", ".join(unknown),
            next_step="import it with the version of this system that exported it, or ingest again",
        )
    return {name: known.get(name) for name in here}


def _add_thumbnails(page: Sequence[dict[str, Any]], thumbnails: Mapping[str, Thumbnail]) -> None:
    for row in page:
        if one := thumbnails.get(row["key"]):
            row |= {_KIND: one.kind.value, _THUMBNAIL: np.ascontiguousarray(one.square).tobytes()}


def _thumbnail(row: Mapping[str, Any]) -> Thumbnail:
    square = np.frombuffer(row[_THUMBNAIL], np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE)
    return Thumbnail(row["key"], ThumbnailKind(row[_KIND]), row["pixels"], square)


def _pages(file: pq.ParquetFile) -> Iterator[list[dict[str, Any]]]:
    for batch in file.iter_batches(_PAGE):
        yield batch.to_pylist()


def _digest_of(about: Backup) -> Any:
    """Of a file without rows."""
    told: list[Any] = [about.layout, about.model_version, about.key_fingerprint, about.fields]
    if about.layout != _FIRST:
        told.append(about.kept)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode() + b"\n")


def _add(digest: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, separators=(",", ":"), default=_digest_of_bytes).encode() + b"\n")


def _digest_of_bytes(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()


def _told(about: Backup) -> dict[str, str]:
    told = (
        about.layout,
        about.model_version,
        about.key_fingerprint,
        json.dumps(about.fields),
        json.dumps(about.kept),
        str(about.rows),
        about.sha256,
    )
    return {f"{_NAMESPACE}{name}": value for name, value in zip(_TOLD, told, strict=True)}


def _about(path: Path, file: pq.ParquetFile) -> Backup:
    held = file.metadata.metadata or {}
    told = {name: held.get(f"{_NAMESPACE}{name}".encode(), b"").decode("utf-8", "replace") for name in _TOLD}
    if told["layout"] not in (_FIRST, LAYOUT):
        raise UsageError(f"{path}: not a gallery of this system", expected="a file of `cxr gallery export`", next_step="give another file")
    try:
        kept = {} if told["layout"] == _FIRST else {name: str(text) for name, text in json.loads(told["kept"]).items() if name in KEPT}
        fields = dict(json.loads(told["fields"]))
        return Backup(told["model_version"], told["key_fingerprint"], fields, kept, int(told["rows"]), told["sha256"], told["layout"])
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, "what a file of `cxr gallery export` says of itself", str(error)) from error


def _readable(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(path, "a file of `cxr gallery export`", " ".join(str(error).split())[:200]) from error


def _damaged(path: Path, expected: str, got: str) -> UsageError:
    return UsageError(f"{path}: is not whole", expected=expected, got=got, next_step="take another copy; nothing was stored")


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
