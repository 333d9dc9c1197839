"""Pictures of cases in Milvus, kept only if an ingest is asked to: in a collection of their own, by the image's pseudonym.

They belong to no model version: `full` ones are what another version can embed again. A picture is kept as PNG, losslessly, in base64: the
greatest that 256×256 of 8 bits can become needs 88 KB, and a text field of Milvus holds 64 KB, so there are two of them.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image
from pymilvus import DataType, MilvusClient

from cxr_retrieval.radiograph.grey import Grey8
from cxr_retrieval.settings import MilvusSettings, ThumbnailKind

COLLECTION: Final = "thumbnails_of_cxr"
_AT_ONCE: Final = 100
"""Pictures per call: 9 MB at most, of Milvus' 64."""
_FIELD_BYTES: Final = 65_535
"""What a text field holds."""


@dataclass(frozen=True)
class Thumbnail:
    """A case's picture `[256, 256]`, of kind `lungs` black outside them. `pixels`: keyed digest of all of it, as the case has it."""

    key: str
    kind: ThumbnailKind
    pixels: str
    square: Grey8


class Thumbnails:
    """The pictures behind one connection, whose failures are translated by who uses it."""

    def __init__(self, client: Any, settings: MilvusSettings) -> None:
        self._client, self._timeout_s = client, settings.timeout_s

    def put(self, thumbnails: Sequence[Thumbnail]) -> None:
        """Keeps pictures; one kept before under the same key is replaced."""
        if thumbnails and not self._exists():
            self._create()
        for start in range(0, len(thumbnails), _AT_ONCE):
            rows = [_row(thumbnail) for thumbnail in thumbnails[start : start + _AT_ONCE]]
            self._client.upsert(COLLECTION, rows, timeout=self._timeout_s)

    def get(self, keys: Sequence[str]) -> dict[str, Thumbnail]:
        """Key → its picture, for those that have one."""
        rows = self._rows(keys, ["kind", "pixels", "picture", "rest"])
        return {row["key"]: Thumbnail(row["key"], ThumbnailKind(row["kind"]), row["pixels"], _square(row)) for row in rows}

    def kinds(self, keys: Sequence[str]) -> dict[str, ThumbnailKind]:
        """Key → what is kept of it, for those that have a picture."""
        return {row["key"]: ThumbnailKind(row["kind"]) for row in self._rows(keys, ["kind"])}

    def remove(self, keys: Collection[str]) -> None:
        """Takes pictures out."""
        gone = sorted(keys)
        if gone and self._exists():
            for start in range(0, len(gone), _AT_ONCE):
                self._client.delete(COLLECTION, ids=gone[start : start + _AT_ONCE], timeout=self._timeout_s)
            self._client.flush(COLLECTION, timeout=self._timeout_s)

    def seal(self) -> None:
        """Has what was put written out, at the end of an ingest."""
        if self._exists():
            self._client.flush(COLLECTION, timeout=self._timeout_s)

    def _rows(self, keys: Sequence[str], fields: Sequence[str]) -> Iterator[dict[str, Any]]:
        if not keys or not self._exists():
            return
        self._client.load_collection(COLLECTION, timeout=self._timeout_s)
        for start in range(0, len(keys), _AT_ONCE):
            yield from self._client.query(
                COLLECTION,
                filter=f"key in {json.dumps(list(keys[start : start + _AT_ONCE]))}",
                output_fields=["key", *fields],
                consistency_level="Strong",
                timeout=self._timeout_s,
            )

    def _exists(self) -> bool:
        return bool(self._client.has_collection(COLLECTION, timeout=self._timeout_s))

    def _create(self) -> None:
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.VARCHAR, max_length=32, is_primary=True)
        schema.add_field("unused", DataType.FLOAT_VECTOR, dim=2)  # Milvus has no collection without vectors
        schema.add_field("kind", DataType.VARCHAR, max_length=16)
        schema.add_field("pixels", DataType.VARCHAR, max_length=64)
        schema.add_field("picture", DataType.VARCHAR, max_length=_FIELD_BYTES)
        schema.add_field("rest", DataType.VARCHAR, max_length=_FIELD_BYTES)
        index = self._client.prepare_index_params()
        index.add_index("unused", index_type="FLAT", metric_type="L2")
        self._client.create_collection(COLLECTION, schema=schema, index_params=index, consistency_level="Strong", timeout=self._timeout_s)


def _row(thumbnail: Thumbnail) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(thumbnail.square)).save(buffer, "PNG", optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode()
    return {
        "key": thumbnail.key,
        "unused": [0.0, 0.0],
        "kind": thumbnail.kind.value,
        "pixels": thumbnail.pixels,
        "picture": text[:_FIELD_BYTES],
        "rest": text[_FIELD_BYTES:],
    }


def _square(row: dict[str, Any]) -> Grey8:
    with Image.open(io.BytesIO(base64.b64decode(row["picture"] + row["rest"]))) as image:
        return np.array(image, np.uint8)
