"""Vectors as a gallery keeps them, two parts of unit length side by side; and a gallery of before there were two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient

from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import EMBEDDING_SIZE
from cxr_retrieval.gallery.balance import VECTOR_SIZE
from cxr_retrieval.gallery.store import FORMER_SIZE, Store
from cxr_retrieval.gallery.words import WORDS_FIELD
from cxr_retrieval.settings import MilvusSettings


def unit_vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    """`[count, 120]`, drawn."""
    return with_unit_parts(np.random.default_rng(seed).normal(size=(count, VECTOR_SIZE)))


def with_unit_parts(values: NDArray[Any]) -> NDArray[np.float32]:
    """`[…, 120]`, its parts brought to unit length."""
    parts = np.split(values, [EMBEDDING_SIZE], axis=-1)
    return np.concatenate([part / np.linalg.norm(part, axis=-1, keepdims=True) for part in parts], axis=-1).astype(np.float32)


def make_former_gallery(settings: MilvusSettings, pseudonyms: Pseudonyms, version: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The same fields as today but for notes' words, and of each row's vector 64 numbers."""
    with Store(settings, version, pseudonyms, create=True) as store:
        about = store._client.describe_collection(store.collection)  # pyright: ignore[reportPrivateUsage]
        name = store.collection
    client = MilvusClient(settings.uri)
    client.drop_collection(name)
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=bool(about["enable_dynamic_field"]))
    for field in about["fields"]:
        if field["type"] == DataType.FLOAT_VECTOR:
            schema.add_field(field["name"], field["type"], dim=FORMER_SIZE)
        elif field["name"] != WORDS_FIELD:
            primary = {"is_primary": True} if field["name"] == "key" else {}
            schema.add_field(field["name"], field["type"], nullable=bool(field.get("nullable")), **primary, **field["params"])
    index = client.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="COSINE")
    client.create_collection(name, schema=schema, index_params=index, properties=about["properties"])
    kept = [{field: value for field, value in row.items() if field != WORDS_FIELD} for row in rows]
    client.upsert(name, [{**row, "embedding": list(row["embedding"])[:FORMER_SIZE]} for row in kept])
    client.flush(name)
    client.close()
    if settings.is_lite:
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(settings.uri)
