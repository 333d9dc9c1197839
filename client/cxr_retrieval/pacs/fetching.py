"""An instance, whole, out of an archive into a file: by WADO-RS (PS3.18 10.4), C-GET or C-MOVE (PS3.4 C.4.2, C.4.3).

Each instance is asked for by itself: so what failed is known, and nothing comes twice.
"""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final
from weakref import WeakKeyDictionary

import requests
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.presentation import AllStoragePresentationContexts, build_context, build_role

from cxr_retrieval.errors import PeerDownError, PeerError, SetupError
from cxr_retrieval.pacs.dicomweb import MAX_BYTES, Web, answered, not_dicomweb
from cxr_retrieval.pacs.dimse import AT_ONCE, NO_ROOM, PENDING, Peer, associated, checked_title, lost
from cxr_retrieval.pacs.pulled import Found
from cxr_retrieval.radiograph.syntaxes import DECODERS
from cxr_retrieval.settings import Tls

_GET: Final = "1.2.840.10008.5.1.4.1.2.2.3"
_MOVE: Final = "1.2.840.10008.5.1.4.1.2.2.2"
"""Study Root Query/Retrieve Information Models."""
_FILMS: Final = {
    "1.2.840.10008.5.1.4.1.1.1": "Computed Radiography",
    "1.2.840.10008.5.1.4.1.1.1.1": "Digital X-Ray, for presentation",
    "1.2.840.10008.5.1.4.1.1.1.1.1": "Digital X-Ray, for processing",
    "1.2.840.10008.5.1.4.1.1.7": "Secondary Capture",
}
"""What may come by C-GET: an association has room for 128 contexts, and each syntax takes one of its own."""
_UNKNOWN_DESTINATION: Final = 0xA801
_NOT_ASKED_FOR: Final = 0x0124
_CANNOT_STORE: Final = 0xA700
_PIECE: Final = 1 << 18
_END_S: Final = 5.0

Fetch = Callable[[Found, Path], None]
"""Writes an instance into an empty file. Raises PeerError (PeerDownError: the same may succeed later), OSError where there is no room."""

Connect = Callable[[], AbstractContextManager[Fetch]]
"""Entered by each thread for itself, and anew after a PeerDownError."""


# ----------------------------------------------------------------------------------------------------------- HTTP


def web_fetcher(web: Web, through: requests.Session) -> Connect:
    """By WADO-RS, all threads through one session."""

    def fetch(found: Found, into: Path) -> None:
        url = f"{web.root}/studies/{found.study}/series/{found.series}/instances/{found.instance}"
        accepted = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
        with answered(web), through.get(url, headers=accepted, stream=True) as response, into.open("wb") as file:
            response.raise_for_status()
            _write_only_part(web, response, file)

    @contextmanager
    def connected() -> Generator[Fetch]:
        yield fetch

    return connected


def _write_only_part(web: Web, response: requests.Response, file: BinaryIO) -> None:
    """The one instance of a multipart answer (RFC 2046, 5.1.1), as it comes; also one that is no multipart but the instance itself.

    Raises:
        PeerError: It is neither, or ends early, or holds several.
    """
    kind, _, parameters = response.headers.get("Content-Type", "").partition(";")
    pieces = response.iter_content(_PIECE)
    if kind.strip().lower() == "application/dicom":
        for piece in pieces:
            file.write(piece)
        return
    boundary = re.search(r'boundary="?([^";]{1,70})"?', parameters, re.IGNORECASE)
    if kind.strip().lower() != "multipart/related" or boundary is None:
        raise not_dicomweb(web, "another type of content")
    delimiter = b"--" + boundary[1].encode()
    held = b""
    for piece in pieces:
        held += piece
        start, end = held.find(delimiter), held.find(b"\r\n\r\n")
        if 0 <= start < end:
            held = held[end + 4 :]
            break
        if len(held) > _PIECE:
            raise not_dicomweb(web, "no part where one begins")
    else:
        raise not_dicomweb(web, "an answer that ends early")
    delimiter = b"\r\n" + delimiter
    while (end := held.find(delimiter)) < 0:
        keep = len(delimiter) - 1
        file.write(held[:-keep])
        piece = next(pieces, None)
        if piece is None:
            raise not_dicomweb(web, "an answer that ends early")
        held = held[-keep:] + piece
    file.write(held[:end])
    if b"".join((held[end + len(delimiter) :], *pieces))[:2] != b"--":
        raise not_dicomweb(web, "several instances, or an answer that ends early")


# ---------------------------------------------------------------------------------------------------------- DIMSE


@dataclass
class _Slot:
    """Where an instance goes that has been asked for, and what became of it."""

    into: Path
    came: bool = False
    error: OSError | None = None


class _Inbox:
    """What is asked for now, by SOP Instance UID; nothing else is taken, and nothing without end."""

    def __init__(self) -> None:
        self._slots: dict[str, _Slot] = {}
        self._received: WeakKeyDictionary[Association, int] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self.handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_DATA_RECV, self._count)]

    @contextmanager
    def expecting(self, found: Found, into: Path) -> Generator[_Slot]:
        slot = _Slot(into)
        with self._lock:
            self._slots[found.instance] = slot
        try:
            yield slot
        finally:
            with self._lock:
                del self._slots[found.instance]

    def _store(self, event: Any) -> int:
        """Answers a C-STORE, with a status (PS3.4 B.2.3)."""
        with self._lock:
            self._received.pop(event.assoc, None)
            slot = self._slots.get(str(event.request.AffectedSOPInstanceUID))
            if slot is None or slot.came:
                return _NOT_ASKED_FOR
            slot.came = True
        try:
            slot.into.write_bytes(event.encoded_dataset())
        except OSError as error:
            slot.error = error
            return _CANNOT_STORE
        return 0

    def _count(self, event: Any) -> None:
        """Ends an association whose instance has no end."""
        with self._lock:
            self._received[event.assoc] = count = self._received.get(event.assoc, 0) + len(event.data)
        if count > MAX_BYTES:
            event.assoc.abort()


def get_fetcher(peer: Peer, calling: str) -> Connect:
    """By C-GET: instances come back in the association that asks for them, so that no port of ours need be open."""
    contexts = [build_context(_GET), *(build_context(film, syntax) for film in _FILMS for syntax in DECODERS)]
    roles = [build_role(film, scp_role=True) for film in _FILMS]

    @contextmanager
    def connected() -> Generator[Fetch]:
        inbox = _Inbox()
        with associated(peer, calling, contexts, negotiated=roles, handlers=inbox.handlers) as association:

            def fetch(found: Found, into: Path) -> None:
                with inbox.expecting(found, into) as slot:
                    _await(peer, association, association.send_c_get(_image(found), _GET) if association.is_established else (), slot)

            yield fetch

    return connected


@contextmanager
def move_fetcher(peer: Peer, calling: str, port: int) -> Generator[Connect]:
    """By C-MOVE: the peer opens associations to `port` of this machine, where its AE title alone is let in, until the block ends.

    Raises:
        SetupError: The port is taken, or the peer is spoken to over TLS and there is no certificate to show it here.
    """
    inbox, title = _Inbox(), checked_title(calling, "--calling")
    entity = AE(title)
    entity.require_called_aet = True
    entity.require_calling_aet = [peer.aet.strip()]
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = peer.timeout_s
    for context in AllStoragePresentationContexts:
        entity.add_supported_context(context.abstract_syntax or "", list(DECODERS))
    context = None if peer.tls is None else _as_server(peer.tls)
    try:
        entity.start_server(("", port), block=False, ssl_context=context, evt_handlers=[*AT_ONCE, *inbox.handlers])
    except OSError as error:
        raise SetupError(
            f"port {port}: cannot be listened on", expected="a free port", got=error.strerror or "", next_step="correct --move-port"
        ) from error

    @contextmanager
    def connected() -> Generator[Fetch]:
        with associated(peer, calling, [build_context(_MOVE)]) as association:

            def fetch(found: Found, into: Path) -> None:
                with inbox.expecting(found, into) as slot:
                    _await(
                        peer, association, association.send_c_move(_image(found), title, _MOVE) if association.is_established else (), slot
                    )

            yield fetch

    try:
        yield connected
    finally:
        for association in entity.active_associations:
            if not association.is_established:  # refused, it ends by itself; pynetdicom's threads break where it is aborted, too
                association.join(_END_S)
        entity.shutdown()


def _image(found: Found) -> Dataset:
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "IMAGE"
    identifier.StudyInstanceUID, identifier.SeriesInstanceUID, identifier.SOPInstanceUID = found.study, found.series, found.instance
    return identifier


def _await(peer: Peer, association: Association, responses: Iterable[tuple[Dataset, Dataset | None]], slot: _Slot) -> None:
    """Until the peer has sent what it was asked for, or says that it cannot."""
    status = Dataset()
    for status, _ in responses:
        if status.get("Status") not in (None, *PENDING):
            break
    code = status.get("Status")
    if slot.error is not None:
        raise slot.error
    if code is None or not association.is_established:
        raise lost(peer)
    if slot.came:
        return
    if code == _UNKNOWN_DESTINATION:
        raise SetupError(
            f"{peer.address}: does not know where to send to",
            got=f"status 0x{code:04X}",
            next_step="have our AE title entered in its configuration, with this machine and --move-port; or try --get",
        )
    kind = PeerDownError if code in NO_ROOM else PeerError
    raise kind(
        f"{peer.address}: did not send it",
        got=f"status 0x{code:04X}, {status.get('NumberOfFailedSuboperations') or 0} failed",
        next_step="see the peer's log; it must know our AE title, and reach --move-port for C-MOVE",
    )


def _as_server(tls: Tls) -> ssl.SSLContext:
    """The same files for who connects to us: they must show a certificate of our authorities."""
    if tls.certificate is None or tls.key is None or tls.ca is None:
        raise SetupError(
            "C-MOVE over TLS without a certificate of ours",
            expected="--ca, --cert and --key, which the peer sees when it sends",
            next_step="give them, or --get",
        )
    return tls.server_context()
