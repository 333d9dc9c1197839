"""Who may see the page: before any film is shown, whatever the application behind the door is."""

from __future__ import annotations

import json

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from certificates import Certificates
from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.access import Access
from cxr_retrieval.view.access import Door, refuse_exposure

TOKEN = "planted-token-5d20c8a1f3"
OURS = {"X-CXR-View": "1"}


OPEN = Access()


def behind(access: Access = OPEN, names: tuple[str, ...] = (), url: str = "http://127.0.0.1:8080") -> TestClient:
    async def anything(request: Request) -> Response:
        return PlainTextResponse("a film")

    methods = ["GET", "POST", "DELETE"]
    routes = [Route("/", anything), Route("/assets/app.js", anything), Route("/api/{rest:path}", anything, methods=methods)]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(Door, access=access, names=names, port=8080)]), url)


@pytest.mark.parametrize(
    ("host", "locked", "served"),
    [
        ("127.0.0.1", "", True),
        ("::1", "", True),
        ("0.0.0.0", "", False),
        ("10.0.0.5", "token", False),
        ("10.0.0.5", "tls", False),
        ("10.0.0.5", "tls token", True),
        ("::", "tls client", True),
    ],
)
def test_beyond_this_machine_only_over_tls_to_who_proves_himself(certificates: Certificates, host: str, locked: str, served: bool) -> None:
    tls = certificates.tls("server", ca="ours" if "client" in locked else None) if "tls" in locked else None
    access = Access(tls, TOKEN if "token" in locked else "")
    if served:
        refuse_exposure(host, access)
        return
    with pytest.raises(SetupError, match="could see films and cases") as refused:
        refuse_exposure(host, access)
    assert TOKEN not in str(refused.value)


@pytest.mark.parametrize("name", ["127.0.0.1:8080", "localhost:8080", "LOCALHOST", "[::1]:8080", "10.1.2.3", "cxr.hospital.example:443"])
def test_our_own_names_are_served(name: str) -> None:
    assert behind(names=("CXR.hospital.example",)).get("/", headers={"host": name}).text == "a film"


@pytest.mark.parametrize(
    "name", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080", "", "[::1", "cxr.hospital.example@evil.example:x"]
)
@pytest.mark.parametrize("path", ["/", "/api/status", "/assets/app.js"])
def test_a_name_that_is_not_ours_is_refused(name: str, path: str) -> None:
    """DNS rebinding: the stranger's page is at a name of his, which leads here by now."""
    answer = behind(names=("cxr.hospital.example",)).get(path, headers={"host": name})
    assert answer.status_code == 421
    assert "--server-name" in answer.text
    assert "a film" not in answer.text


def test_another_site_can_neither_ask_nor_change() -> None:
    client = behind()
    for site in ("cross-site", "same-site"):
        assert client.get("/api/films/x/thumbnail", headers={"sec-fetch-site": site}).status_code == 403
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200, "a link that leads here"
    assert client.post("/api/queries").status_code == 403, "as a form would"
    assert client.request("DELETE", "/api/x").status_code == 403
    assert client.post("/api/queries", headers={**OURS, "origin": "http://evil.example"}).status_code == 403
    assert client.post("/api/queries", headers={**OURS, "origin": "null"}).status_code == 403
    assert client.post("/api/queries", headers={**OURS, "origin": "http://127.0.0.1:8081"}).status_code == 403, (
        "another port is another site"
    )
    assert client.post("/api/queries", headers={**OURS, "origin": "http://127.0.0.1:8080"}).text == "a film"
    preflight = client.options("/api/queries", headers={"origin": "http://evil.example", "access-control-request-headers": "x-cxr-view"})
    assert "access-control-allow-origin" not in preflight.headers


def test_every_answer_has_the_headers() -> None:
    client = behind()
    for path, headers in (("/", {}), ("/api/status", {}), ("/nothing", {}), ("/", {"host": "evil.example"})):
        answer = client.get(path, headers=headers)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert client.get("/assets/app.js").headers["cache-control"] == "no-cache"


def test_without_the_token_there_is_the_page_and_no_film() -> None:
    client = behind(Access(token=TOKEN))
    assert client.get("/").status_code == 200
    refused = client.get("/api/status")
    assert refused.status_code == 401
    assert json.loads(refused.text)["error"]["next_step"] == "give it"
    wrong = client.post("/api/session", headers={**OURS, "authorization": f"Bearer {TOKEN[:-1]}"})
    assert wrong.status_code == 401
    assert "set-cookie" not in wrong.headers
    assert TOKEN[:-1] not in wrong.text
    assert client.post("/api/session", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 403, "from a form"
    for forged in ("cxr-view-8080=", "cxr-view-8080=x", f"cxr-view-8080={TOKEN}", "cxr-view-8080=\xff"):
        assert client.get("/api/status", headers={b"cookie": forged.encode("latin-1")}).status_code == 401
    assert client.get("/api/status", headers={"authorization": f"Bearer {TOKEN}"}).text == "a film", "a program"
    entered = client.post("/api/session", headers={**OURS, "authorization": f"Bearer {TOKEN}"})
    assert entered.status_code == 204
    cookie = entered.headers["set-cookie"]
    assert TOKEN not in cookie
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert client.get("/api/status").text == "a film", "and the browser keeps the cookie"
    assert behind(Access(token=TOKEN)).get("/api/status", headers={"cookie": cookie.partition(";")[0]}).status_code == 401, "of one run"


def test_over_tls_the_cookie_goes_nowhere_else(certificates: Certificates) -> None:
    client = behind(Access(certificates.tls("server", ca=None), TOKEN), url="https://127.0.0.1:8080")
    cookie = client.post("/api/session", headers={**OURS, "authorization": f"Bearer {TOKEN}"}).headers["set-cookie"]
    assert cookie.startswith("__Host-cxr-view-8080=")
    assert "Secure" in cookie
    assert "Path=/" in cookie
    assert client.get("/api/status").text == "a film"
