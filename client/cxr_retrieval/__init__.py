"""cxr-retrieval: which confirmed chest radiographs looked like this one, and what became of them. Research use only.

What a program or a notebook uses is here:

    from cxr_retrieval import Retriever

    with Retriever() as retriever:
        result = retriever.query("film.dcm")
    result  # a notebook shows it (docs/notebook.ipynb); result.prediction, result.neighbours, result.to_pandas(), result.as_json()

Names are loaded when first asked for, so that `import cxr_retrieval` costs nothing.
"""

from __future__ import annotations

from importlib import import_module as _import
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cxr_retrieval.archive.embedding import IngestReport, ingest
    from cxr_retrieval.archive.reindex import ReindexReport, reindex
    from cxr_retrieval.cases.features import FEATURES, Feature
    from cxr_retrieval.cases.fhir import Chart, read_chart
    from cxr_retrieval.cases.manifest import Manifest, ManifestRow, read_manifest
    from cxr_retrieval.cases.pseudonyms import Original, Pseudonyms, open_pseudonyms
    from cxr_retrieval.errors import (
        ClauseError,
        CxrError,
        ImageError,
        InferenceError,
        InputError,
        ManifestError,
        ServiceError,
        StoreError,
        UsageError,
    )
    from cxr_retrieval.evaluation.metrics import evaluate
    from cxr_retrieval.evaluation.recalibration import Recalibration, recalibrate
    from cxr_retrieval.gallery.backup import Backup, export_gallery, import_gallery, read_backup
    from cxr_retrieval.gallery.completion import Snapshot
    from cxr_retrieval.gallery.store import Case, Clause, Neighbour, Store
    from cxr_retrieval.inference.triton import TritonClient
    from cxr_retrieval.radiograph.decoding import DecodingLimits, Film, FilmReader
    from cxr_retrieval.retrieval.calibration import Calibration, Trust
    from cxr_retrieval.retrieval.feedback import Mark, Marked
    from cxr_retrieval.retrieval.gate import Ood
    from cxr_retrieval.retrieval.outcome import Outcome, OutcomeModel
    from cxr_retrieval.retrieval.picture import write_html, write_montage
    from cxr_retrieval.retrieval.query import QueryResult, query
    from cxr_retrieval.retrieval.reports import ReportReader, TextAnswer, query_text
    from cxr_retrieval.retrieval.retriever import Retriever
    from cxr_retrieval.retrieval.summary import Summary, summarise
    from cxr_retrieval.retrieval.voting import Vote, weighted_vote
    from cxr_retrieval.settings import (
        Match,
        Method,
        MilvusSettings,
        PseudonymSettings,
        SpaceName,
        ThumbnailKind,
        Tls,
        TritonSettings,
    )

__version__ = _version("cxr-retrieval")

_WHERE = {
    "archive.embedding": ("IngestReport", "ingest"),
    "archive.reindex": ("ReindexReport", "reindex"),
    "cases.features": ("FEATURES", "Feature"),
    "cases.fhir": ("Chart", "read_chart"),
    "cases.manifest": ("Manifest", "ManifestRow", "read_manifest"),
    "cases.pseudonyms": ("Original", "Pseudonyms", "open_pseudonyms"),
    "errors": (
        "ClauseError",
        "CxrError",
        "ImageError",
        "InferenceError",
        "InputError",
        "ManifestError",
        "ServiceError",
        "StoreError",
        "UsageError",
    ),
    "evaluation.metrics": ("evaluate",),
    "evaluation.recalibration": ("Recalibration", "recalibrate"),
    "gallery.backup": ("Backup", "export_gallery", "import_gallery", "read_backup"),
    "gallery.completion": ("Snapshot",),
    "gallery.store": ("Case", "Clause", "Neighbour", "Store"),
    "inference.triton": ("TritonClient",),
    "radiograph.decoding": ("DecodingLimits", "Film", "FilmReader"),
    "retrieval.calibration": ("Calibration", "Trust"),
    "retrieval.feedback": ("Mark", "Marked"),
    "retrieval.gate": ("Ood",),
    "retrieval.outcome": ("Outcome", "OutcomeModel"),
    "retrieval.picture": ("write_html", "write_montage"),
    "retrieval.query": ("QueryResult", "query"),
    "retrieval.reports": ("ReportReader", "TextAnswer", "query_text"),
    "retrieval.retriever": ("Retriever",),
    "retrieval.summary": ("Summary", "summarise"),
    "retrieval.voting": ("Vote", "weighted_vote"),
    "settings": (
        "Match",
        "Method",
        "MilvusSettings",
        "PseudonymSettings",
        "SpaceName",
        "ThumbnailKind",
        "Tls",
        "TritonSettings",
    ),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "FEATURES",
    "Backup",
    "Calibration",
    "Case",
    "Chart",
    "Clause",
    "ClauseError",
    "CxrError",
    "DecodingLimits",
    "Feature",
    "Film",
    "FilmReader",
    "ImageError",
    "InferenceError",
    "IngestReport",
    "InputError",
    "Manifest",
    "ManifestError",
    "ManifestRow",
    "Mark",
    "Marked",
    "Match",
    "Method",
    "MilvusSettings",
    "Neighbour",
    "Ood",
    "Original",
    "Outcome",
    "OutcomeModel",
    "PseudonymSettings",
    "Pseudonyms",
    "QueryResult",
    "Recalibration",
    "ReindexReport",
    "ReportReader",
    "Retriever",
    "ServiceError",
    "Snapshot",
    "SpaceName",
    "Store",
    "StoreError",
    "Summary",
    "TextAnswer",
    "ThumbnailKind",
    "Tls",
    "TritonClient",
    "TritonSettings",
    "Trust",
    "UsageError",
    "Vote",
    "evaluate",
    "export_gallery",
    "import_gallery",
    "ingest",
    "open_pseudonyms",
    "query",
    "query_text",
    "read_backup",
    "read_chart",
    "read_manifest",
    "recalibrate",
    "reindex",
    "summarise",
    "weighted_vote",
    "write_html",
    "write_montage",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'cxr_retrieval' has no attribute {name!r}")
    return getattr(_import(f"cxr_retrieval.{_MODULE_OF[name]}"), name)
