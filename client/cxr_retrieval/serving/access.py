"""Who may use the embedded servers: what is refused before they start, and the check of the gallery's token."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from cxr_retrieval.errors import SetupError
from cxr_retrieval.settings import Tls

_SHORTEST: Final = 16
"""Characters of a token; `openssl rand -hex 32` gives 64."""


@dataclass(frozen=True)
class Access:
    """What clients must show.

    Args:
        tls: Our certificate and key; `ca`: who must have signed the certificate that every client then has to show. None: unencrypted.
        token: What clients of the gallery must know; Triton checks none.
    """

    tls: Tls | None = None
    token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.tls is not None and self.tls.certificate is None:
            raise SetupError(
                "no certificate to serve with", expected="a certificate and its private key", next_step="give --tls-cert and --tls-key"
            )
        if self.token and len(self.token) < _SHORTEST:
            raise SetupError(
                "the token is too short",
                expected=f"at least {_SHORTEST} characters",
                got=str(len(self.token)),
                next_step="make one with `openssl rand -hex 32`",
            )

    @property
    def mutual(self) -> bool:
        """Whether every client proves itself by a certificate."""
        return self.tls is not None and self.tls.ca is not None


def refuse_exposure(host: str, access: Access) -> None:
    """Beyond this machine only clients that prove themselves are served, over TLS; `host` is an IP address.

    A token does not do for Triton: it would have to stand on Triton's command line, where the process list shows it.

    Raises:
        SetupError: Others could reach the servers at this address, and use them.
    """
    if address(host).is_loopback or access.mutual:
        return
    if access.tls is None:
        got = "neither" if not access.token else "a token alone, which everybody on the network could read"
    else:
        got = "TLS" + (" and a token, which Triton cannot check" if access.token else ", but anybody would be served")
    raise SetupError(
        f"whoever reaches {host} could use these servers",
        expected="TLS, and clients that show a certificate",
        got=got,
        next_step="give --tls-cert, --tls-key and --tls-client-ca (docs/security.md shows how to make them), listen on 127.0.0.1 behind a "
        "proxy, or say --insecure",
    )


def address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Where to listen.

    Raises:
        SetupError: It is a name, or nothing at all.
    """
    try:
        return ipaddress.ip_address(host)
    except ValueError as error:
        raise SetupError(
            f"the address {host} is not one", expected="an IP address such as 127.0.0.1", next_step="correct --host"
        ) from error


def credentials(tls: Tls) -> grpc.ServerCredentials:
    """The same for a gRPC server of our own."""
    assert tls.certificate is not None and tls.key is not None  # noqa: PT018 (Access has checked)
    authority = tls.ca.read_bytes() if tls.ca is not None else None
    return grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.certificate.read_bytes())], root_certificates=authority, require_client_auth=authority is not None
    )


class TokenCheck(grpc.ServerInterceptor):
    """Lets through only calls whose `authorization` is the token as Milvus' clients send it: base64 of the token, or of user:password."""

    def __init__(self, token: str) -> None:
        self._expected = _digest(base64.b64encode(token.encode()))
        self._refused = grpc.unary_unary_rpc_method_handler(_refuse)

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """Digests are compared, in constant time: neither length nor beginning of the token can be learnt from how long it takes."""
        shown = [value for name, value in handler_call_details.invocation_metadata if name == "authorization"]
        given = shown[0] if len(shown) == 1 else b""
        right = hmac.compare_digest(_digest(given.encode() if isinstance(given, str) else given), self._expected)
        return continuation(handler_call_details) if right else self._refused


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _refuse(request: Any, context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")
