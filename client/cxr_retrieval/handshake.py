"""Why a server that is there cannot be spoken to: gRPC calls it UNAVAILABLE, and so it does a server that is away.

One connection of our own tells them apart: TCP, the TLS handshake, and the first frame of HTTP/2, by which a server that wants a client
certificate has said so (RFC 8446, 4.4.2.4; RFC 9113, 3.4).
"""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass
from typing import Final

from cxr_retrieval.settings import Tls

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_ENDS_WITHIN_S: Final = 0.5
_BY_CODE: Final = {
    9: "its clock or ours is wrong, or the certificate is meant for later",
    10: "renew the server's certificate",
    62: "use the name that the certificate is for, in the address or as the server name",
    64: "use the name that the certificate is for, in the address or as the server name",
}
"""What to do, by X.509's verification codes as OpenSSL counts them."""


@dataclass(frozen=True)
class Refusal:
    """No waiting mends it: why, and what does. `said` is false where the server only closed the connection, as one does that is ending."""

    why: str
    next_step: str
    said: bool = True


def refusal(host: str, port: int, tls: Tls | None, timeout_s: float = 5.0, *, http2: bool = True) -> Refusal | None:
    """Looks for what keeps a client from talking to a server.

    Args:
        tls: How the client wants to talk; None: unencrypted.
        http2: Whether it will talk HTTP/2; else nothing is said, and whoever says nothing within `timeout_s` either has nothing against us.

    Returns:
        None where the server is away, stalls, or has nothing against this client.
    """
    found = _asked(host, port, tls, timeout_s, http2)
    if found is None or found.said:
        return found
    time.sleep(_ENDS_WITHIN_S)
    return _asked(host, port, tls, timeout_s, http2)


def _asked(host: str, port: int, tls: Tls | None, timeout_s: float, http2: bool) -> Refusal | None:
    try:
        with socket.create_connection((host, port), timeout_s) as plain:
            return _asked_for_tls(plain) if tls is None else _shaken(plain, tls, tls.server_name or host, http2)
    except OSError:  # away, or ended while we asked
        return None


def _asked_for_tls(plain: socket.socket) -> Refusal | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent: only whether it speaks TLS is asked
    try:
        with context.wrap_socket(plain):
            return Refusal("the server speaks TLS, and was asked without", "give the authority of its certificate")
    except OSError:
        return None


def _shaken(plain: socket.socket, tls: Tls, name: str, http2: bool) -> Refusal | None:
    context = tls.context()
    if http2:
        context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(plain, server_hostname=name) as secured:
            secured.sendall(_PREFACE if http2 else b"")
            if secured.recv(1):
                return None
            shown = "this client certificate" if tls.certificate else "a client without a certificate"
            return Refusal(f"the server closed the connection: it does not accept {shown}", _clients(tls), said=False)
    except ssl.SSLCertVerificationError as error:
        otherwise = "give the authority that signed the server's certificate"
        return Refusal(f"the server's certificate was not accepted: {error.verify_message}", _BY_CODE.get(error.verify_code, otherwise))
    except ssl.SSLEOFError:
        return None
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        if "alert" in reason:
            return Refusal(
                f"the server did not accept us: {reason}",
                _clients(tls),
            )
        return Refusal(f"the server does not speak TLS as we do: {reason}", "check address and port, or talk to it without TLS")


def _clients(tls: Tls) -> str:
    return (
        "give a client certificate of the authority that the server trusts" if tls.certificate else "give a client certificate and its key"
    )
