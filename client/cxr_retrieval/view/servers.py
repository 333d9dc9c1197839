"""Triton and the gallery, held open for many requests, and opened anew after a failure."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from cxr_retrieval.cases.pseudonyms import Pseudonyms, open_pseudonyms
from cxr_retrieval.contract import MULTIMODAL_TEXT_MODEL, OUTCOME_MODEL
from cxr_retrieval.errors import ServiceError, SetupError, StoreError
from cxr_retrieval.gallery.spaces import FILM, REPORTS
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.retrieval.outcome import OutcomeModel
from cxr_retrieval.retrieval.reports import ReportReader
from cxr_retrieval.settings import MilvusSettings, PseudonymSettings, TritonSettings


class Reached:
    """Both servers, connected.

    Attributes:
        reports: What reads a question in words, and the gallery that is asked with it; None where there is not both.
        outcome: The outcome model that the server has, if it has one.
        users: Requests that use them now.
    """

    def __init__(self, triton: TritonSettings, milvus: MilvusSettings, pseudonyms: PseudonymSettings) -> None:
        with ExitStack() as opened:
            self.triton = opened.enter_context(TritonClient(triton))
            keys = opened.enter_context(open_pseudonyms(pseudonyms))
            self.store = opened.enter_context(Store(milvus, self.triton.model_version, keys, space=FILM))
            self.reports = self._reports(milvus, keys)
            self.outcome = None if self.triton.parameters(OUTCOME_MODEL) is None else OutcomeModel.served_by(self.triton)
            self._opened = opened.pop_all()
        self.users = 0

    def _reports(self, milvus: MilvusSettings, keys: Pseudonyms) -> tuple[ReportReader, Store] | None:
        if self.triton.parameters(MULTIMODAL_TEXT_MODEL) is None:
            return None
        try:
            return ReportReader.served_by(self.triton), Store(milvus, REPORTS.version(self.triton), keys, beside=self.store, space=REPORTS)
        except (StoreError, SetupError):  # no gallery of reports yet, or the page's own installation cannot read text
            return None

    def close(self) -> None:
        """Closes both connections."""
        self._opened.close()


class Servers:
    """Opens both when they are first wanted: a page can be served before they run, and say so.

    After a failure the next request opens them anew: other weights, a gallery that was made again or a server that came back are then met
    as they are. What others still use is closed when they have done.

    Attributes:
        milvus: Where the gallery is.
    """

    def __init__(self, triton: TritonSettings, milvus: MilvusSettings, pseudonyms: PseudonymSettings) -> None:
        self._settings = triton, milvus, pseudonyms
        self.milvus = milvus
        self._lock = threading.Lock()
        self._now: Reached | None = None

    @contextmanager
    def reached(self) -> Generator[Reached]:
        """Both servers.

        Raises:
            ServiceError: One of them cannot be reached, or there is no gallery for these weights and this key.
        """
        with self._lock:
            if self._now is None:
                self._now = Reached(*self._settings)
            reached = self._now
            reached.users += 1
        failed = False
        try:
            yield reached
        except ServiceError:
            failed = True
            raise
        finally:
            with self._lock:
                reached.users -= 1
                if failed and self._now is reached:
                    self._now = None
                if self._now is not reached and not reached.users:
                    reached.close()

    def close(self) -> None:
        """Closes both connections; for when no request is under way."""
        with self._lock:
            if self._now is not None:
                self._now.close()
                self._now = None
