"""An answer as a table, for who goes on with the cases in Arrow or pandas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from cxr_retrieval.cases.features import FEATURES

if TYPE_CHECKING:
    from cxr_retrieval.retrieval.query import QueryResult

_TYPES: Final = {"number": pa.float64(), "text": pa.string(), "flag": pa.bool_()}
_FIXED: Final = (
    ("rank", pa.int32()),
    ("votes", pa.bool_()),
    ("key", pa.string()),
    ("image_id", pa.string()),
    ("similarity", pa.float64()),
    ("label", pa.string()),
    ("source", pa.string()),
)


def as_table(result: QueryResult) -> Any:
    """A `pyarrow.Table` (which has no types): a row for each case, the neighbours, nearest first, then films of the query's own patient.

    Columns: `rank` (null for the latter), `votes` (whether it was counted), `key` (its pseudonym), `image_id` (where the local table
    knows it, else the pseudonym), `similarity`, `label`, `source`; every clinical feature (`cases/features.py`), null where it is not
    known; and `extra`, the user's own columns as a map of texts. The schema's metadata hold `image_id`, `model_version`, `label` and
    `confidence` of the answer.
    """
    voted = result.prediction.label is not None
    hits = [*((rank, voted, hit) for rank, hit in enumerate(result.neighbours, start=1)), *((None, False, hit) for hit in result.own)]
    names = {feature.name for feature in FEATURES}
    columns: dict[str, list[Any]] = {
        "rank": [rank for rank, _, _ in hits],
        "votes": [votes for _, votes, _ in hits],
        "key": [hit.case.key for _, _, hit in hits],
        "image_id": [hit.case.image_id for _, _, hit in hits],
        "similarity": [hit.similarity for _, _, hit in hits],
        "label": [hit.case.label for _, _, hit in hits],
        "source": [hit.case.source for _, _, hit in hits],
        **{feature.name: [hit.case.metadata.get(feature.name) for _, _, hit in hits] for feature in FEATURES},
        "extra": [[(name, str(value)) for name, value in hit.case.metadata.items() if name not in names] for _, _, hit in hits],
    }
    known = [pa.field(feature.name, _TYPES[feature.kind]) for feature in FEATURES]
    about = {
        "image_id": result.image_id,
        "model_version": result.model_version,
        "label": result.prediction.label or "",
        "confidence": repr(result.prediction.confidence),
    }
    fields = [*(pa.field(name, kind) for name, kind in _FIXED), *known, pa.field("extra", pa.map_(pa.string(), pa.string()))]
    return pa.Table.from_pydict(columns, schema=pa.schema(fields, metadata=about))
