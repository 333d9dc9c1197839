"""A DICOM node that receives (PS3.4 B and J, PS3.7, PS3.8): it answers C-ECHO, takes films by C-STORE, and promises to keep what it keeps.

What comes over the network is not parsed here: a data set goes to the spool as it came, and a worker process reads its header
(`radiograph/decoding.py`). What one peer may cost is bounded: connections, associations, the length of a PDU, of an instance, of a silence;
a handshake or a half-sent PDU holds up nobody else. Names of patients reach neither a status nor a log.
"""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from socketserver import BaseServer
from typing import Any, Final, cast

from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE, N_ACTION
from pynetdicom.events import Event
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from cxr_retrieval.errors import ImageError, SetupError
from cxr_retrieval.pacs.arrivals import Arrivals, FullError, Outgoing
from cxr_retrieval.pacs.dimse import AT_ONCE
from cxr_retrieval.pacs.rules import Limits, Rules
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.header import FORMS
from cxr_retrieval.radiograph.syntaxes import DECODERS
from cxr_retrieval.settings import Tls

STORED: Final = (ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation, SecondaryCaptureImageStorage)
"""SOP classes that are taken."""
VERIFICATION: Final = "1.2.840.10008.1.1"
STORAGE_COMMITMENT: Final = "1.2.840.10008.1.20.1"
"""The push model (PS3.4 J.3)."""
SYNTAXES: Final = [
    ExplicitVRLittleEndian,
    *(UID(syntax) for syntax in DECODERS if syntax not in (ExplicitVRLittleEndian, ImplicitVRLittleEndian)),
    ImplicitVRLittleEndian,
]
"""Transfer syntaxes, the preferred one first: all that are decoded here. Explicit VR tells what private elements are, implicit does not."""

SUCCESS: Final = 0x0000
NO_ROOM: Final = 0xA700
MISMATCH: Final = 0xA900
CANNOT_UNDERSTAND: Final = 0xC000
NOT_AUTHORISED: Final = 0x0124
FAILURE: Final = 0x0110
NO_SUCH_ACTION: Final = 0x0123
INVALID_ARGUMENT: Final = 0x0115

_HANDSHAKE_S: Final = 10.0
_PER_ASSOCIATION: Final = 4
"""Connections that may be open for each association that may: they cost three threads each."""
_PDU_OVERHEAD: Final = 2**16
_MOST_REFERENCES: Final = 10_000
"""Instances in one request for storage commitment."""
_MOST_ACTION_BYTES: Final = 4 * 2**20
_REJECTIONS: Final = {(1, 3): "caller", (1, 7): "called", (3, 2): "associations"}
"""Why an association was rejected, by source and diagnostic (PS3.8 9.3.4)."""
_STOP_POLL_S: Final = 0.05


@dataclass(frozen=True)
class NodeSettings:
    """Where a node listens, and as whom; `tls`: our certificate, and the authorities of those that every caller must show."""

    aet: str
    host: str
    port: int
    tls: Tls | None = None


class Node:
    """Listens from the moment it is made until it is closed. Use as a context manager.

    Args:
        told: Told of every instance that was admitted ("received", "again") or refused ("rejected <reason>"), and of associations that were
            rejected; raises nothing.

    Raises:
        SetupError: The address is not ours, or taken.
    """

    def __init__(
        self, settings: NodeSettings, rules: Rules, arrivals: Arrivals, reader: FilmReader, told: Callable[[str], None] = lambda _: None
    ) -> None:
        self._rules, self._arrivals, self._reader, self._told = rules, arrivals, reader, told
        self._limits = rules.node
        entity = AE(settings.aet)
        entity.require_called_aet = True
        entity.require_calling_aet = list(self._limits.callers)
        entity.maximum_associations = self._limits.associations
        entity.maximum_pdu_size = self._limits.pdu_bytes
        entity.acse_timeout = entity.connection_timeout = min(self._limits.idle_s, 30.0)
        entity.network_timeout = entity.dimse_timeout = self._limits.idle_s
        entity.add_supported_context(VERIFICATION)
        for kind in STORED:
            entity.add_supported_context(kind, list(SYNTAXES))
        entity.add_supported_context(STORAGE_COMMITMENT)
        handlers: list[Any] = [
            (evt.EVT_C_ECHO, lambda _: SUCCESS),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_N_ACTION, self._commit),
            (evt.EVT_REJECTED, self._count_rejection),
            *AT_ONCE,
        ]
        tls = settings.tls.server_context() if settings.tls else None
        try:
            self._server = _Server(entity, (settings.host, settings.port), settings.aet, tls, handlers, self._limits, self._refuse)
        except OSError as error:
            raise SetupError(
                f"no node can listen at {settings.host}, port {settings.port}",
                expected="an address of this machine and a free port",
                got=error.strerror or str(error),
                next_step="stop what uses it, or give another --port",
            ) from error
        self._serving = threading.Thread(target=self._server.serve_forever, args=(_STOP_POLL_S,), name="cxr-node", daemon=True)
        self._serving.start()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(0)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def associations(self) -> int:
        """How many are open."""
        return sum(association.is_established for association in self._server.active_associations)

    def close(self, grace_s: float) -> None:
        """Takes no new associations, lets open ones end for so many seconds, and then aborts them."""
        if not self._serving.is_alive():
            return
        self._server.stop()
        self._serving.join()
        until = time.monotonic() + grace_s
        while self._server.active_associations and time.monotonic() < until:
            time.sleep(_STOP_POLL_S)
        for association in self._server.active_associations:
            association.abort()
        for association in self._server.active_associations:
            association.join(_HANDSHAKE_S)

    # ------------------------------------------------------------------------------------------ C-STORE

    def _store(self, event: Event) -> Dataset | int:
        """PS3.4 B.2.3: the statuses, and what each says."""
        reading: Any = event.assoc.dul.socket
        reading.recv.next_message()
        try:
            return self._stored(event)
        except FullError as full:
            return self._refused(NO_ROOM, f"no room ({full})", "no room now: send it again later")
        except ImageError:
            return self._refused(CANNOT_UNDERSTAND, "malformed", "the data set cannot be read, or lacks a UID")
        except Exception:  # an error of ours, or of a disk: never a confirmation
            return self._refused(NO_ROOM, "failure", "cannot be stored now: send it again later")

    def _stored(self, event: Event) -> Dataset | int:
        association, request = event.assoc, cast(C_STORE, event.request)
        caller = str(association.requestor.ae_title)
        address = str(association.requestor.address)
        if self._limits.addresses.get(caller, address) != address:
            return self._refused(NOT_AUTHORISED, "address", "this AE title comes from another address")
        data = event.encoded_dataset()
        self._arrivals.refuse_if_full(len(data))
        digest = hashlib.sha256(cast(BytesIO, request.DataSet).getbuffer()).hexdigest()
        instance = str(request.AffectedSOPInstanceUID)
        if (known := self._arrivals.known(instance)) is not None:
            return self._again(same=known == digest)
        with self._arrivals.partial(data) as partial:
            header = self._reader.header(partial, "the instance").result()
            if (header.instance, header.sop_class) != (instance, str(request.AffectedSOPClassUID)):
                return self._refused(MISMATCH, "mismatch", "the data set is another instance than announced")
            rule = self._rules.match(caller, header)
            if rule is None:
                return self._refused(NOT_AUTHORISED, "no rule", "no rule of this node is for such an instance")
            if not self._arrivals.admit(partial, digest, caller, rule.name, header):
                return self._again(same=self._arrivals.known(instance) == digest)
        self._told("received")
        return SUCCESS

    def _again(self, *, same: bool) -> int:
        """It was here before, and is answered once; one that differs, too: a UID is one instance (PS3.5 9), and the first one counts."""
        self._told("again" if same else "again, changed")
        return SUCCESS

    def _refused(self, status: int, reason: str, comment: str) -> Dataset:
        self._refuse(reason)
        answer = Dataset()
        answer.Status, answer.ErrorComment = status, comment
        return answer

    def _refuse(self, reason: str) -> None:
        self._arrivals.rejected(reason)
        self._told(f"rejected {reason}")

    # ------------------------------------------------------------------------------------------ storage commitment

    def _commit(self, event: Event) -> tuple[int | Dataset, Dataset | None]:
        """PS3.4 J.3.2: what is kept as it was received is promised, all else is said not to be here, by N-EVENT-REPORT (J.3.3)."""
        try:
            return self._promised(event), None
        except Exception:  # an action information that is none
            return self._refused(INVALID_ARGUMENT, "commitment", "the request cannot be read"), None

    def _promised(self, event: Event) -> int | Dataset:
        request = cast(N_ACTION, event.request)
        if request.ActionTypeID != 1:
            return self._refused(NO_SUCH_ACTION, "commitment", "storage commitment has one action")
        if request.ActionInformation is None or request.ActionInformation.getbuffer().nbytes > _MOST_ACTION_BYTES:
            return self._refused(INVALID_ARGUMENT, "commitment", "no list of instances, or too long a one")
        destination = self._rules.destination_of(str(event.assoc.requestor.ae_title))
        if destination is None:
            return self._refused(FAILURE, "commitment", "no destination has your AE title: see the rules")
        said = event.action_information
        transaction = str(said.TransactionUID)
        asked = [(str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID)) for item in said.ReferencedSOPSequence]
        uids = (transaction, *(uid for pair in asked for uid in pair))
        if len(asked) > _MOST_REFERENCES or not all(FORMS["SOPInstanceUID"].fullmatch(uid) for uid in uids):
            return self._refused(INVALID_ARGUMENT, "commitment", "too many instances, or no UIDs")
        held = self._arrivals.held([instance for _, instance in asked])
        report = {
            "transaction": transaction,
            "held": [pair for pair in asked if pair[1] in held],
            "missing": [pair for pair in asked if pair[1] not in held],
        }
        self._arrivals.post(Outgoing(destination, "commitment", json.dumps(report).encode()))
        self._told("commitment")
        return SUCCESS

    def _count_rejection(self, event: Event) -> None:
        primitive = event.assoc.acceptor.primitive
        source, diagnostic = (getattr(primitive, name, 0) for name in ("result_source", "diagnostic"))
        self._refuse(_REJECTIONS.get((source, diagnostic), "association"))


# ------------------------------------------------------------------------------------------------ what a peer may cost


class _Bounded:
    """In the place of a socket's `recv`: reads no more, and waits no longer, than a peer may make us."""

    def __init__(self, client: socket.socket, limits: Limits) -> None:
        self._client = client
        self._pdu_bytes = limits.pdu_bytes + _PDU_OVERHEAD
        self._message_bytes = limits.instance_mib * 2**20 + _PDU_OVERHEAD
        self._idle_s = limits.idle_s
        self._since = 0
        client.settimeout(limits.idle_s)

    def next_message(self) -> None:
        """What was received until now is dealt with."""
        self._since = 0

    def __call__(self, count: int) -> bytearray:
        """As `AssociationSocket.recv`, but in large pieces; OSError, which ends the association, where it would be too much."""
        self._since += count
        if count > self._pdu_bytes or self._since > self._message_bytes:
            raise OSError("the peer sends more than it may")
        received, at = bytearray(count), 0
        ends = time.monotonic() + self._idle_s
        with memoryview(received) as view:
            while at < count and (more := self._client.recv_into(view[at:])):
                at += more
                if time.monotonic() > ends:  # a byte now and then is no sign of life
                    break
        del received[at:]
        return received


class _Handler(RequestHandler):
    """An association whose socket is bounded, and closed at its end: pynetdicom leaves one open that its peer has left."""

    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def _create_association(self) -> Association:
        association = super()._create_association()
        reading: Any = association.dul.socket
        reading.recv = _Bounded(cast(socket.socket, self.request), self.server.limits)
        self._association = association
        return association

    def handle(self) -> None:
        """Until it has ended."""
        super().handle()
        self._association.join()
        cast(socket.socket, self.request).close()


class _Server(ThreadedAssociationServer):
    """pynetdicom's, but that TLS handshakes have threads of their own, connections are counted, and addresses may be bound to AE titles."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        entity: AE,
        address: tuple[str, int],
        aet: str,
        tls: ssl.SSLContext | None,
        handlers: list[Any],
        limits: Limits,
        refuse: Callable[[str], None],
    ) -> None:
        self.limits = limits
        self._tls, self._refuse = tls, refuse
        self._connected = 0
        self._counting = threading.Lock()
        super().__init__(entity, address, aet, entity.supported_contexts, None, handlers, _Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for another connection."""
        with self._counting:
            room = self._connected < _PER_ASSOCIATION * self.limits.associations
            self._connected += room
        if not room:
            self._refuse("connections")
        return room

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The handshake, then the association until its end; in a thread of its own."""
        try:
            if self._tls is not None:
                request.settimeout(_HANDSHAKE_S)
                request = self._tls.wrap_socket(request, server_side=True)
            self.finish_request(request, client_address)
        except Exception:  # no TLS, no certificate that we trust, a connection that ended
            self._refuse("handshake")
            self.shutdown_request(request)
        finally:
            with self._counting:
                self._connected -= 1

    def service_actions(self) -> None:
        """Nothing: pynetdicom has all garbage collected every 60 polls, which here is every three seconds."""

    def stop(self) -> None:
        """Takes no further connections."""
        BaseServer.shutdown(self)
        self.server_close()
