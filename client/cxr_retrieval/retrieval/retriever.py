"""Triton, Milvus and the reader of films held open together, for a program or a notebook that asks more than one query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING

from cxr_retrieval.cases.pseudonyms import open_pseudonyms
from cxr_retrieval.gallery.balance import DEFAULT_BALANCE
from cxr_retrieval.gallery.spaces import SPACES
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.retrieval.calibration import DEFAULT_ERROR_RATE
from cxr_retrieval.retrieval.feedback import Mark
from cxr_retrieval.retrieval.outcome import OutcomeModel
from cxr_retrieval.retrieval.picture import montage
from cxr_retrieval.retrieval.query import QueryResult, query
from cxr_retrieval.retrieval.reports import ReportReader, TextAnswer, Wording, query_text
from cxr_retrieval.retrieval.voting import DEFAULT_K
from cxr_retrieval.settings import Match, Method, MilvusSettings, PseudonymSettings, SpaceName, TritonSettings

if TYPE_CHECKING:
    from PIL import Image


class Retriever:
    """One per process. Use as a context manager, or call `close`.

    Attributes:
        reader: Decodes files, in worker processes.
        triton: The networks.
        store: The gallery of the model version that Triton announces; of another space, of the model that it serves for that.

    Raises:
        InferenceError: No Triton, or its ensemble is not ready.
        StoreError: No Milvus, or no gallery for this model version and key.
        SetupError: No pseudonym key.
    """

    def __init__(
        self,
        triton: TritonSettings | None = None,
        milvus: MilvusSettings | None = None,
        pseudonyms: PseudonymSettings | None = None,
        space: SpaceName = SpaceName.film,
    ) -> None:
        with ExitStack() as opened:
            self.reader = opened.enter_context(FilmReader())  # first: its workers start while the rest is loaded and connected
            self.triton = opened.enter_context(TritonClient(triton or TritonSettings()))
            keys = opened.enter_context(open_pseudonyms(pseudonyms or PseudonymSettings()))
            self.store = opened.enter_context(
                Store(milvus or MilvusSettings(), SPACES[space].version(self.triton), keys, space=SPACES[space])
            )
            self._opened = opened.pop_all()

    def __enter__(self) -> Retriever:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers and closes both connections."""
        self._opened.close()

    def query(
        self,
        image: str | Path,
        *,
        top_k: int = DEFAULT_K,
        where: str = "",
        text: str = "",
        patient: str | None = None,
        include_own: bool = False,
        gate: bool = True,
        error_rate: float = DEFAULT_ERROR_RATE,
        balance: float = DEFAULT_BALANCE,
        marks: Sequence[Mark] = (),
        source: str | None = None,
        method: Method = Method.nearest,
        outcome: OutcomeModel | None = None,
        facts: Mapping[str, float] = MappingProxyType({}),
        wording: Wording | None = None,
        match: Match = Match.film,
    ) -> QueryResult:
        """As `cxr_retrieval.query`, of which it is the short form."""
        return query(
            Path(image),
            self.reader,
            self.triton,
            self.store,
            top_k=top_k,
            where=where,
            text=text,
            patient=patient,
            include_own=include_own,
            gate=gate,
            error_rate=error_rate,
            balance=balance,
            marks=marks,
            source=source,
            method=method,
            outcome=outcome,
            facts=facts,
            wording=wording,
            match=match,
        )

    def query_text(self, text: str, *, top_k: int = DEFAULT_K, where: str = "", match: Match = Match.film) -> TextAnswer:
        """As `cxr_retrieval.query_text`, in the space of reports."""
        reader = ReportReader.served_by(self.triton)
        return query_text(text, reader, self.triton, self.store, top_k=top_k, where=self.store.clause(where), match=match)

    def picture(self, result: QueryResult) -> Image.Image:
        """The query with contour and attention, the vote, and the neighbours' films, as `cxr query --picture` writes them."""
        return montage(result, self.reader, self.store.thumbnails)
