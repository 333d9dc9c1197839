"""Parcels go out: by C-STORE (PS3.4 B) or STOW-RS (PS3.18 10.5), promises by N-EVENT-REPORT (PS3.4 J.3.3).

What cannot be delivered is tried again, ever more seldom, for days; then it is given up, and stays in the spool for somebody to look at.
A thread for each destination: one that is away or slow holds up no other.
"""

from __future__ import annotations

import io
import json
import random
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pynetdicom import _config, build_role
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from cxr_retrieval.archive.watching import Delivered, Watch, unwatched
from cxr_retrieval.errors import CxrError
from cxr_retrieval.pacs.arrivals import Arrivals, Parcel
from cxr_retrieval.pacs.dicomweb import Web, answered, opened
from cxr_retrieval.pacs.dimse import Peer, associated, lost
from cxr_retrieval.pacs.node import STORAGE_COMMITMENT
from cxr_retrieval.radiograph.elements import referenced

_AT_ONCE: Final = 32
"""Parcels for one association."""
_IDLE_S: Final = 1.0
_FIRST_S: Final = 2.0
_LONGEST_S: Final = 900.0
"""Between two tries."""
_COMMITMENT_INSTANCE: Final = "1.2.840.10008.1.20.1.1"
_NO_SUCH_INSTANCE: Final = 0x0112
_GONE: Final = "its file is gone"
_WARNINGS: Final = frozenset({0xB000, 0xB006, 0xB007})
"""C-STORE statuses that say: stored, but (PS3.4 B.2.3)."""


class Delivery:
    """Delivers from when it is entered until it is left; what is under way then is finished.

    Args:
        destinations: Name → how to reach it.
        calling: Our AE title.
        patience_s: How long a parcel is tried.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        destinations: Mapping[str, Peer | Web],
        calling: str,
        patience_s: float,
        *,
        tell: Callable[[str], None] = lambda _: None,
        watch: Watch = unwatched,
    ) -> None:
        self._arrivals, self._destinations, self._calling = arrivals, destinations, calling
        self._patience_s, self._tell, self._watch = patience_s, tell, watch
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, args=(name,), name=f"cxr-delivery-{name}", daemon=True) for name in destinations
        ]

    def __enter__(self) -> Delivery:
        _config.STORE_SEND_CHUNKED_DATASET = True  # a file is sent as it is, neither decoded nor held in memory
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _serve(self, name: str) -> None:
        away = False
        while not self._stop.is_set():
            parcels = self._arrivals.due(name, _AT_ONCE)
            if not parcels:
                self._arrivals.wait(_IDLE_S)
                continue
            left = list(parcels)
            try:
                with self._reached(name, parcels) as send:
                    while left and not self._stop.is_set():
                        self._settle(left[0], send(left[0]))
                        left.pop(0)
            except Exception as error:  # of a peer or a library: the others of this destination still want to be sent
                if not away:
                    self._tell(f"{name} does not take what it is sent: {error if isinstance(error, CxrError) else type(error).__name__}")
                away = True
                for parcel in left:
                    self._settle(parcel, type(error).__name__)
            else:
                if away:
                    self._tell(f"{name} takes what it is sent again")
                away = False

    def _settle(self, parcel: Parcel, refusal: str | None) -> None:
        """What becomes of a parcel that was sent, or refused for this reason."""
        if refusal is None:
            self._arrivals.sent(parcel)
            self._watch(Delivered(parcel.destination, "sent"))
        elif time.time() - parcel.made > self._patience_s:
            self._arrivals.give_up(parcel, refusal)
            self._watch(Delivered(parcel.destination, "given up"))
        else:
            seconds = min(_LONGEST_S, _FIRST_S * 2.0 ** min(parcel.tries, 20)) * random.uniform(0.5, 1.0)  # noqa: S311
            self._arrivals.postpone(parcel, time.time() + seconds, refusal)
            self._watch(Delivered(parcel.destination, "postponed"))

    @contextmanager
    def _reached(self, name: str, parcels: Sequence[Parcel]) -> Generator[Callable[[Parcel], str | None]]:
        """What sends one parcel there, and says why it was refused, if it was.

        Raises:
            PeerError: It cannot be reached, or no longer.
        """
        destination = self._destinations[name]
        if isinstance(destination, Web):
            with opened(destination, 1) as client:
                yield lambda parcel: _stowed(client, destination, parcel)
        else:
            contexts, roles = _contexts(parcels), []
            if any(parcel.kind == "commitment" for parcel in parcels):
                roles = [build_role(STORAGE_COMMITMENT, scp_role=True)]
            with associated(destination, self._calling, contexts, negotiated=roles) as association:
                yield lambda parcel: _sent(association, destination, parcel)


def _contexts(parcels: Sequence[Parcel]) -> list[PresentationContext]:
    """One for each SOP class and transfer syntax among them (PS3.8 9.3.2.2)."""
    pairs: set[tuple[str, str]] = set()
    for parcel in parcels:
        if parcel.kind != "commitment" and parcel.path.exists():
            meta = read_file_meta_info(parcel.path)
            pairs.add((str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)))
    promises = [build_context(STORAGE_COMMITMENT)] if any(parcel.kind == "commitment" for parcel in parcels) or not pairs else []
    return [*(build_context(kind, syntax) for kind, syntax in sorted(pairs)), *promises]


def _sent(association: Association, peer: Peer, parcel: Parcel) -> str | None:
    if not association.is_established:
        raise lost(peer)
    if not parcel.path.exists():
        return _GONE
    try:
        if parcel.kind == "commitment":
            answer = _promised(association, parcel.path)
        else:
            answer = association.send_c_store(parcel.path)
    except (ValueError, RuntimeError) as error:  # no context was accepted for it, or the association has ended
        if not association.is_established:
            raise lost(peer) from error
        return "not accepted"
    status = answer.get("Status")
    if status is None:
        raise lost(peer)
    return None if status == 0 or status in _WARNINGS else f"status {status:04X}"


def _promised(association: Association, path: Path) -> Dataset:
    """N-EVENT-REPORT of type 1, all is kept, or 2, some is not (PS3.4 J.3.3)."""
    said = json.loads(path.read_text())
    report = Dataset()
    report.TransactionUID = said["transaction"]
    if said["held"]:
        report.ReferencedSOPSequence = [referenced(*pair) for pair in said["held"]]
    if said["missing"]:
        report.FailedSOPSequence = [referenced(*pair) for pair in said["missing"]]
        for item in report.FailedSOPSequence:
            item.FailureReason = _NO_SUCH_INSTANCE
    status, _ = association.send_n_event_report(report, 2 if said["missing"] else 1, STORAGE_COMMITMENT, _COMMITMENT_INSTANCE)
    return status


def _stowed(client: Any, web: Web, parcel: Parcel) -> str | None:
    if parcel.kind == "commitment":
        return "no storage commitment over DICOMweb"
    if not parcel.path.exists():
        return _GONE
    dataset = pydicom.dcmread(io.BytesIO(parcel.path.read_bytes()))
    with answered(web):
        answer = client.store_instances([dataset])
    failed = answer.get("FailedSOPSequence")
    return f"failure reason {int(failed[0].get('FailureReason') or 0):04X}" if failed else None
