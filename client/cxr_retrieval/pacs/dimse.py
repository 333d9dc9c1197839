"""Associations that we open (PS3.8): with whom, for how long, encrypted or not, and what is wrong where there is none.

Messages repeat codes of what a peer sent, never its words.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext

from cxr_retrieval.errors import PeerDownError, PeerError, SetupError
from cxr_retrieval.handshake import refusal
from cxr_retrieval.settings import Tls

_AE: Final = re.compile(r"(?=.*[^ ])[ -\[\]-~]{1,16}")
PENDING: Final = (0xFF00, 0xFF01)
"""Statuses that say: more to come."""
NO_ROOM: Final = range(0xA700, 0xA800)
"""Those that say: not now."""
_ENDS_WITHIN_S: Final = 10.0
_SAYS_NO_WITHIN_S: Final = 2.0
_REJECTED: Final = {
    (1, 2): "it does not speak this version of DICOM",
    (1, 3): "it does not know our AE title",
    (1, 7): "its AE title is another one",
    (2, 2): "it does not speak this version of the protocol",
}
"""What an A-ASSOCIATE-RJ means, by source and reason (PS3.8 9.3.4); others are told by their numbers."""
_BUSY: Final = 3
"""The source that rejects because it is busy."""


def checked_title(title: str, option: str) -> str:
    """An AE title (PS3.5 6.2, VR AE) without the spaces around it, which do not count.

    Raises:
        SetupError: It is none; `option` is what to correct.
    """
    if not _AE.fullmatch(title):
        raise SetupError(
            "an AE title is malformed",
            expected="1 to 16 printable ASCII characters other than \\",
            got=repr(title),
            next_step=f"correct {option}",
        )
    return title.strip()


@dataclass(frozen=True)
class Peer:
    """An application entity that listens.

    Args:
        aet: Its AE title.
        tls: How we talk to it; None: unencrypted.
        timeout_s: To connect, for an answer to an association, and between two messages.

    Raises:
        SetupError: One of them is malformed.
    """

    aet: str
    host: str
    port: int
    tls: Tls | None = None
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        checked_title(self.aet, "the AE title of the peer")
        if not re.fullmatch(r"[^\s/@]+", self.host) or not 0 < self.port < 65536:
            raise SetupError(
                "the address of a DICOM peer is malformed",
                expected="AET@host:port, such as ARCHIVE@10.0.0.5:11112",
                got=f"{self.host}:{self.port}",
                next_step="correct --peer",
            )
        if self.timeout_s <= 0:
            raise SetupError(
                "the timeout of a DICOM peer is out of range",
                expected="more than 0 s",
                got=f"{self.timeout_s:g}",
                next_step="correct --timeout",
            )

    @property
    def address(self) -> str:
        """As messages name it."""
        return f"{self.aet.strip()}@{self.host}:{self.port}"


def peer(address: str, tls: Tls | None = None, timeout_s: float = 30.0) -> Peer:
    """A peer by its address, AET@host:port.

    Raises:
        SetupError: It is malformed.
    """
    found = re.fullmatch(r"(?P<aet>[^@]+)@(\[(?P<ip6>[0-9a-fA-F:]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5})", address)
    if found is None:
        raise SetupError(
            "the address of a DICOM peer is malformed",
            expected="AET@host:port, such as ARCHIVE@10.0.0.5:11112",
            got=repr(address),
            next_step="correct --peer",
        )
    return Peer(found["aet"], found["ip6"] or found["host"], int(found["port"]), tls, timeout_s)


@contextmanager
def associated(
    peer: Peer,
    calling: str,
    contexts: Sequence[PresentationContext],
    *,
    negotiated: Sequence[Any] = (),
    handlers: Sequence[Any] = (),
    serving: bool = False,
) -> Generator[Association]:
    """An association with a peer, in which it has accepted at least one of the contexts; it is released when the block ends, or aborted
    where that fails, and its threads have ended then.

    Args:
        calling: Our AE title.
        negotiated: Roles and other items of negotiation (PS3.7 D.3.3); of role selection for C-GET.
        handlers: pynetdicom's `evt_handlers`, for what the peer asks of us within it.
        serving: Whether it may also ask between our own questions, as for storage commitment; within one, C-GET's always may.

    Raises:
        PeerError: It does not want us, or not for this; its certificate is not accepted, or ours is not.
        PeerDownError: Nobody answers in time, or it is busy.
    """
    entity = AE(checked_title(calling, "--calling"))
    entity.connection_timeout = entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = peer.timeout_s
    tls = None if peer.tls is None else (peer.tls.context(), peer.tls.server_name or peer.host)
    try:
        association = entity.associate(
            peer.host,
            peer.port,
            list(contexts),
            ae_title=peer.aet.strip(),
            ext_neg=list(negotiated),
            tls_args=tls,
            evt_handlers=[*AT_ONCE, *handlers],
        )
    except OSError as error:  # a name that nobody knows
        raise _silent(peer, error.strerror or type(error).__name__) from error
    try:
        if not association.is_established:
            raise _refused(peer, association)
        if not serving:
            _answers_are_ours(association)
        yield association
    except BaseException:
        if association.is_established:
            association.abort()
        raise
    else:
        association.release()
    finally:
        for thread in (association, association.dul):
            if thread.is_alive():
                thread.join(_ENDS_WITHIN_S)
        if association.dul.socket is not None and association.dul.socket.socket is not None:
            association.dul.socket.socket.close()  # pynetdicom leaves it open where the peer has left


def lost(peer: Peer) -> PeerDownError:
    """What became of an association that ended while an answer was awaited."""
    return PeerDownError(
        f"{peer.address}: the association ended before the answer",
        expected=f"an answer within {peer.timeout_s:g} s",
        next_step="see the peer's log: it may not know our AE title; --timeout gives it longer",
    )


def _answers_are_ours(association: Association) -> None:
    """Keeps pynetdicom's own thread, which looks for questions of the peer, from taking answers to ours: it is paused while one is asked,
    but may not have noticed yet that it goes on when the next one follows at once; answers that it takes are lost without an error.
    """
    take = association.dimse.get_msg

    def take_if_waited_for(block: bool = False) -> Any:
        return take(block) if block else (None, None)

    association.dimse.get_msg = take_if_waited_for


def _at_once(event: Any) -> None:
    """What is sent goes out at once, and what comes is acknowledged at once; else one end waits some 40 ms for the other in every exchange,
    of which a search has two for each study.
    """
    connection: socket.socket | None = event.assoc.dul.socket.socket
    if connection is not None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # until the kernel thinks otherwise


AT_ONCE: Final = tuple((moment, _at_once) for moment in (evt.EVT_CONN_OPEN, evt.EVT_DATA_SENT, evt.EVT_DATA_RECV))
"""Handlers for every association, also those that a peer opens."""


def _refused(peer: Peer, association: Association) -> PeerError:
    if association.is_rejected:
        answer: Any = association.acceptor.primitive
        source, reason = int(answer.result_source), int(answer.diagnostic)
        if source == _BUSY:
            return PeerDownError(f"{peer.address}: busy, takes no association now", next_step="ask again later")
        said = _REJECTED.get((source, reason), "without a reason that the standard knows")
        return PeerError(
            f"{peer.address}: rejects the association: {said}",
            got=f"result {answer.result}, source {source}, reason {reason}",
            next_step="have this AE title, host and port entered in its configuration, and correct the AE titles here",
        )
    if association.rejected_contexts:
        return PeerError(
            f"{peer.address}: accepts none of what it is asked for",
            expected=", ".join(
                sorted({context.abstract_syntax.name for context in association.rejected_contexts if context.abstract_syntax})
            ),
            next_step="ask its administrator whether it offers that service to this AE title",
        )
    found = refusal(peer.host, peer.port, peer.tls, min(peer.timeout_s, _SAYS_NO_WITHIN_S), http2=False)
    if found is not None:
        return PeerError(f"{peer.address}: cannot be spoken to", got=found.why, next_step=found.next_step)
    return _silent(peer, "no answer")


def _silent(peer: Peer, got: str) -> PeerDownError:
    return PeerDownError(
        f"{peer.address}: no DICOM peer answers",
        expected=f"an association within {peer.timeout_s:g} s",
        got=got,
        next_step="check its address, and whether it runs",
    )
