"""Serves the page until it is interrupted."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.access import Access, address

_AT_ONCE: Final = 128
"""Connections; further ones are told that there is no room."""
_GRACE_S: Final = 3
"""Seconds that requests under way may still take at the end."""


def listening(host: str, port: int) -> socket.socket:
    """A socket at this address, taken but not yet served; a port of 0 is any free one.

    Raises:
        SetupError: It is no address of this machine, or in use.
    """
    found = socket.socket(socket.AF_INET6 if address(host).version == 6 else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise SetupError(
            f"the page cannot be served at {host}, port {port}",
            expected="an address of this machine and a free port",
            got=error.strerror or str(error),
            next_step="stop what uses it, or give another --port",
        ) from error
    return found


def url_of(at: socket.socket, access: Access) -> str:
    """Where a browser on this machine finds it."""
    host, port = at.getsockname()[:2]
    if address(host).is_unspecified:
        host = "[::1]" if ":" in host else "127.0.0.1"
    elif ":" in host:
        host = f"[{host}]"
    return f"{'https' if access.tls else 'http'}://{host}:{port}/"


def serve(app: ASGIApp, at: socket.socket, access: Access, ready: Callable[[], None]) -> None:
    """Returns once it was interrupted, and raises what Python makes of that signal; `ready` is called when requests are answered.

    It logs no requests: an address is nobody's business.
    """
    tls = access.tls
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_AT_ONCE,
        timeout_graceful_shutdown=_GRACE_S,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
        ssl_ca_certs=tls.ca if tls else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if access.mutual else ssl.CERT_NONE,
    )
    _Announcing(config, ready).run([at])


class _Announcing(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()
