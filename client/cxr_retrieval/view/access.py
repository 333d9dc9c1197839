"""Who may see the page, and what a browser may do with it.

- Beyond this machine only over TLS, to who knows the token or shows a certificate (`refuse_exposure`).
- A name that is not ours in `Host` is refused, or a stranger's page whose name suddenly leads here could read films (DNS rebinding). An IP
  address is always ours: nobody can let one lead elsewhere.
- What another site asks of the API is refused (Fetch Metadata), and what changes anything needs a header that no other site can send
  without asking first (CSRF).
- The page runs its own scripts alone and is shown in nobody's frame; of what holds a film nothing is written to the browser's disk.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Collection
from http.cookies import SimpleCookie
from typing import Final
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.access import Access, address

HEADER: Final = "x-cxr-view"
"""Every request that is no GET carries it, with whatever value."""
_SESSION: Final = "/api/session"
_WRONG_TOKEN_S: Final = 0.5
"""That a wrong token costs who tries one."""
_ELSEWHERE: Final = (
    "This page is not served under that name. Open it by its IP address or as localhost, or start `cxr view` with --server-name.\n"
)
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), display-capture=(), usb=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def refuse_exposure(host: str, access: Access) -> None:
    """`host` is an IP address.

    Raises:
        SetupError: Others could reach the page at this address, and read films on the way or at their screens.
    """
    if address(host).is_loopback or (access.tls is not None and (access.token or access.mutual)):
        return
    if access.tls is None:
        got = "neither" if not access.token else "a token alone, which everybody on the network could read"
    else:
        got = "TLS, but anybody would be served"
    raise SetupError(
        f"whoever reaches {host} could see films and cases",
        expected="TLS, and a token or a client certificate",
        got=got,
        next_step="give --tls-cert and --tls-key with --token-file or --tls-client-ca (docs/security.md shows how to make them), listen on "
        "127.0.0.1 behind a proxy, or say --insecure",
    )


class Door:
    """ASGI middleware before everything else.

    Args:
        names: Under which the page is reached, beside IP addresses and localhost.
        port: It listens on; a browser's cookies are shared by all ports of a host.
    """

    def __init__(self, app: ASGIApp, access: Access, names: Collection[str], port: int) -> None:
        self._app = app
        self._names = {"localhost", *(name.lower() for name in names)}
        self._token = _digest(access.token) if access.token else None
        self._secure = access.tls is not None
        self._cookie = f"__Host-cxr-view-{port}" if self._secure else f"cxr-view-{port}"
        self._session = secrets.token_urlsafe(32)
        self._one_try = anyio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves, refuses or signs in; whatever is answered gets the headers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers["cache-control"] = "no-cache" if path.startswith("/assets/") else "no-store"
            await send(message)

        headers = Headers(scope=scope)
        response = self._refused(scope["method"], path, headers)
        if response is None and path == _SESSION and scope["method"] == "POST":
            response = await self._signed_in(headers)
        if response is None and path.startswith("/api/") and not self._is_known(headers):
            response = _problem(401, "sign in first", expected="the token of this page", next_step="give it")
        await (response or self._app)(scope, receive, guarded)

    def _refused(self, method: str, path: str, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            return PlainTextResponse(_ELSEWHERE, 421)
        if not path.startswith("/api/"):
            return None
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _problem(403, "asked by another site", expected="this page alone")
        if method in ("GET", "HEAD"):
            return None
        origin = headers.get("origin")
        if HEADER not in headers or (origin is not None and urlsplit(origin).netloc.lower() != host.lower()):
            return _problem(403, "asked by another site", expected=f"this page alone, and the header {HEADER}")
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower().rstrip(".") in self._names
        return True

    async def _signed_in(self, headers: Headers) -> Response:
        """The cookie, for the token: a secret of this process, so that the token itself is kept nowhere."""
        if self._token is None or self._knows_token(headers):
            response = Response(status_code=204)
            response.set_cookie(self._cookie, self._session, path="/", secure=self._secure, httponly=True, samesite="strict")
            return response
        async with self._one_try:
            await anyio.sleep(_WRONG_TOKEN_S)
        return _problem(401, "this is not the token", expected="the one in --token-file", next_step="ask who runs this page")

    def _is_known(self, headers: Headers) -> bool:
        if self._token is None or self._knows_token(headers):
            return True
        shown = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        return shown is not None and hmac.compare_digest(_digest(shown.value), _digest(self._session))

    def _knows_token(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        return self._token is not None and kind.lower() == "bearer" and hmac.compare_digest(_digest(given.strip()), self._token)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _problem(status: int, what: str, *, expected: str = "", next_step: str = "") -> JSONResponse:
    """In the form of `web.problem`."""
    message = what + (f"; expected {expected}" if expected else "") + "." + (f" Next: {next_step}." if next_step else "")
    error = {"kind": "AccessError", "what": what, "expected": expected, "got": "", "next_step": next_step, "message": message}
    return JSONResponse({"error": {**error, "may_pass": False}}, status)
