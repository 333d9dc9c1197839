"""A whole gallery at once: files that a Milvus server reads by itself, instead of rows that are sent to it and pass through its log.

A server does not look for doubles in what it reads so: the same file read twice is every case twice. So nothing is ever added to a gallery
this way. A new collection is filled, marked as being filled like one of `cxr reindex`, and answers only once it holds as many cases as the
file has keys, each of them once. It remembers which file it came from: the same command again finds it there and does nothing, and after an
interruption takes the half away and begins anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from pymilvus import DataType

from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.errors import SetupError, StoreError, UsageError
from cxr_retrieval.gallery.aliases import aliases_of, collection_of, filling
from cxr_retrieval.gallery.backup import META, Backup, arrow_type, as_columns, fitting_space, rows_for, take_kept
from cxr_retrieval.gallery.indexes import LOAD_S, awaited
from cxr_retrieval.gallery.milvus import connected
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.settings import MilvusSettings

BULK: Final = "cxr.bulk"
"""Property of a collection with the digest of the file that it was filled from."""
ROWS_IN_A_FILE: Final = 100_000
"""Some 100 MB, which a server has in memory while it reads one."""
_LOOK_EVERY_S: Final = 0.5


@dataclass(frozen=True)
class Imported:
    """What became of it. `restored`: what the gallery keeps beside cases now. `already`: it was there. `whole`: not if it was stopped."""

    restored: Sequence[str]
    already: bool = False
    whole: bool = True


def bulk_import(
    settings: MilvusSettings,
    pseudonyms: Pseudonyms,
    path: Path,
    checked: Backup,
    folder: Path,
    seen_as: str,
    stop: threading.Event,
    *,
    model_version: str | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Imported:
    """Makes a gallery of a file of `cxr gallery export` that a server reads by itself; safe to interrupt and to repeat.

    Args:
        checked: What `read_backup` found in it.
        folder: Which the server reads, too: files are written there, and taken away again.
        seen_as: What the server calls that folder; a prefix in its bucket, where it has one.
        model_version: Refuse a file of another one.
        advance: Told of each case that is written to files, and again once the server has read it.

    Raises:
        UsageError: As `import_gallery`; Milvus Lite; a gallery that is there already, of something else; keys that are not in order.
        SetupError: The folder cannot be written to.
        StoreError: Milvus cannot serve, or cannot read the files.
    """
    if settings.is_lite:
        raise UsageError("Milvus Lite reads no files", expected="a Milvus server", next_step="leave --bulk out")
    space = fitting_space(path, checked, pseudonyms, model_version)
    collection = collection_of(checked.model_version)
    if _is_there(settings, collection, checked.sha256):
        return Imported((), already=True)
    with Store(settings, checked.model_version, pseudonyms, fill=True, space=space, expected=checked.rows) as store:
        with connected(settings) as client:
            client.alter_collection_properties(collection, {BULK: checked.sha256}, timeout=settings.timeout_s)
            with _written(store, path, checked, folder, stop, advance) as names:
                if stop.is_set() or not _read(
                    client, collection, settings, [f"{seen_as.rstrip('/')}/{name}" for name in names], stop, advance
                ):
                    return Imported((), whole=False)
            if awaited(client, collection, settings.timeout_s, stop) is False:
                return Imported((), whole=False)
            client.refresh_load(collection, timeout=LOAD_S)
        if (count := store.count()) != checked.rows:
            raise StoreError(
                f"{collection} does not hold what the file does",
                expected=f"{checked.rows} cases",
                got=f"{count}",
                next_step="give the same command again: it begins anew; or leave --bulk out",
            )
        restored = take_kept(store, checked)
        store.filled()
        store.publish()
    return Imported(restored)


def _is_there(settings: MilvusSettings, collection: str, digest: str) -> bool:
    """Whether it was filled from this file before. A half of that is taken away."""
    with connected(settings) as client:
        if not client.has_collection(collection, timeout=settings.timeout_s):
            return False
        of = client.describe_collection(collection, timeout=settings.timeout_s).get("properties", {}).get(BULK)
        half = filling(collection) in aliases_of(client, collection, settings.timeout_s)
        if of and half:
            client.drop_alias(filling(collection), timeout=settings.timeout_s)
            client.drop_collection(collection, timeout=settings.timeout_s)
            return False
        if of == digest:
            return True
        cases = int(client.get_collection_stats(collection, timeout=settings.timeout_s)["row_count"])
        if half or cases:
            raise UsageError(
                f"{collection}: " + ("is being filled by `cxr reindex`" if half else f"holds {cases} cases already"),
                expected="no gallery of that version, or an empty one: a server does not look for doubles in what it reads by itself",
                next_step="leave --bulk out, and give --merge",
            )
        return False


@contextmanager
def _written(
    store: Store, path: Path, checked: Backup, folder: Path, stop: threading.Event, advance: Callable[[int], None]
) -> Generator[Sequence[str]]:
    """Names of files in the folder, as the server reads them; there while it does."""
    fields = store.fields
    schema = pa.schema(
        [
            *(
                (name, pa.list_(pa.float32()) if kind is DataType.FLOAT_VECTOR else arrow_type(kind, dim))
                for name, (kind, dim) in fields.items()
            ),
            *([(META, pa.string())] if store.takes_any_field else []),
        ]
    )
    names: list[str] = []
    try:
        for number, rows in enumerate(_parts(store, path, checked)):
            if stop.is_set():
                break
            names.append(f"cxr-{checked.sha256[:12]}-{number:05}.parquet")
            table = pa.Table.from_pylist([_columns(row, fields) for row in rows], schema)
            pq.write_table(table, folder / names[-1], compression="zstd")
            advance(len(rows))
        yield names
    except OSError as error:
        raise SetupError(
            f"{folder}: cannot be written to", expected="a folder that the Milvus server reads, too", got=error.strerror or str(error)
        ) from error
    finally:
        for name in names:
            (folder / name).unlink(missing_ok=True)


def _columns(row: Mapping[str, Any], fields: Mapping[str, tuple[DataType, int | None]]) -> dict[str, Any]:
    columns = as_columns(row, fields)
    return {**columns, META: columns[META] or "{}"}


def _parts(store: Store, path: Path, checked: Backup) -> Iterator[list[dict[str, Any]]]:
    """Rows as the gallery keeps them, so many at once; pictures are kept on the way.

    Raises:
        UsageError: A key that does not come after the one before it, so that it might be there twice.
    """
    last, part = "", list[dict[str, Any]]()
    for rows, thumbnails in rows_for(store, path, checked):
        store.keep_thumbnails(thumbnails)
        for row in rows:
            if row["key"] <= last:
                raise UsageError(f"{path}: keys are not in order", expected="each after the one before", next_step="leave --bulk out")
            last = row["key"]
            part.append(store.fitting(row))
        if len(part) >= ROWS_IN_A_FILE:
            yield part
            part = []
    if part:
        yield part


def _read(
    client: Any, collection: str, settings: MilvusSettings, names: Sequence[str], stop: threading.Event, advance: Callable[[int], None]
) -> bool:
    """Has the server read them; whether it has read all before it was stopped."""
    server = client._get_connection()  # pymilvus offers this to clients only with a second connection of its own, without our TLS
    tasks = [server.do_bulk_insert(collection, "", [name], timeout=settings.timeout_s) for name in names]
    for task in tasks:
        while True:
            state = server.get_bulk_insert_state(task, timeout=settings.timeout_s)
            if state.state_name == "Completed":
                advance(state.row_count)
                break
            if state.state_name.startswith("Failed"):
                raise StoreError(
                    f"Milvus at {settings.uri} cannot read the files",
                    expected=f"that it finds {names[0]}",
                    got=" ".join(str(state.failed_reason).split())[:200],
                    next_step="give by --bulk-as what the server calls that folder, or leave --bulk out",
                )
            if stop.wait(_LOOK_EVERY_S):
                return False
    return True
