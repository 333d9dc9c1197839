"""One search over one field against Milvus' `hybrid_search` over two: how far each finds what the documented fusion says, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymilvus import AnnSearchRequest, DataType, MilvusClient, WeightedRanker

from cxr_retrieval.contract import APPEARANCE_SIZE, EMBEDDING_SIZE
from cxr_retrieval.gallery.balance import VECTOR_SIZE, comparable, halves, weighed

K = 10
Vectors = NDArray[np.float32]


def measure_fusion(uri: str, stored: Vectors, queries: Vectors, balances: Sequence[float], lists: Sequence[int]) -> list[dict[str, Any]]:
    """For each balance and way the mean share of the exact ten nearest that is found, and the median time of a query in ms.

    Args:
        uri: Of a Milvus Lite folder; where both ways compare with every case, so that what differs is the fusion.
        stored: `[n, 120]`. queries: `[m, 120]`.
        lists: Lengths of the candidate lists that `hybrid_search` fuses.
    """
    client = MilvusClient(uri)
    _fill(client, "one", {"vector": stored})
    _fill(client, "two", dict(zip(("learnt", "look"), halves(stored), strict=True)))
    rows: list[dict[str, Any]] = []
    for balance in balances:
        exact = np.argsort(-(comparable(queries, balance) @ comparable(stored, balance).T), axis=1)[:, :K]

        def one(query: Vectors, balance: float = balance) -> list[int]:
            return _keys(client.search("one", [weighed(query, balance).tolist()], anns_field="vector", limit=K))

        rows.append({"balance": balance, "way": "one field", **_measured(one, queries, exact)})
        for length in lists:
            for normalised in (False, True):

                def two(query: Vectors, balance: float = balance, length: int = length, normalised: bool = normalised) -> list[int]:
                    asked = zip(("learnt", "look"), halves(query), strict=True)
                    requests = [AnnSearchRequest([part.tolist()], name, {"metric_type": "COSINE"}, limit=length) for name, part in asked]
                    ranker = WeightedRanker(1 - balance, balance, norm_score=normalised)
                    return _keys(client.hybrid_search("two", requests, ranker, limit=K))

                way = f"hybrid_search, lists of {length}{', normalised' if normalised else ''}"
                rows.append({"balance": balance, "way": way, **_measured(two, queries, exact)})
    client.close()
    return rows


def _fill(client: Any, name: str, fields: dict[str, Vectors]) -> None:
    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("key", DataType.INT64, is_primary=True)
    index = client.prepare_index_params()
    for field, vectors in fields.items():
        assert vectors.shape[1] in (VECTOR_SIZE, EMBEDDING_SIZE, APPEARANCE_SIZE)
        schema.add_field(field, DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        index.add_index(field, index_type="FLAT", metric_type="COSINE")
    client.create_collection(name, schema=schema, index_params=index)
    columns = {field: vectors.tolist() for field, vectors in fields.items()}
    count = len(next(iter(columns.values())))
    for start in range(0, count, 1000):
        client.insert(name, [{"key": i, **{f: column[i] for f, column in columns.items()}} for i in range(start, min(start + 1000, count))])
    client.flush(name)
    client.load_collection(name)


def _keys(found: Any) -> list[int]:
    return [int(hit["id"] if "id" in hit else hit["key"]) for hit in found[0]]


def _measured(ask: Any, queries: Vectors, exact: NDArray[np.int64]) -> dict[str, float]:
    shares, seconds = [], []
    for query, nearest in zip(queries, exact, strict=True):
        started = time.perf_counter()
        found = ask(query)
        seconds.append(time.perf_counter() - started)
        shares.append(len({*found} & {*nearest.tolist()}) / K)
    return {"found": round(float(np.mean(shares)), 4), "p50_ms": round(1000 * median(seconds), 2)}
