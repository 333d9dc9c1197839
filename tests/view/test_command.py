"""`cxr view` as a process: where it says that it listens, whom it lets in over TLS, how it ends. No server need run behind it."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from certificates import Certificates
from cxr_retrieval.cli.app import app
from cxr_retrieval.errors import CxrError
from tests_support import Viewed, free_ports

TOKEN = "planted-token-5d20c8a1f3"


def got(url: str, context: ssl.SSLContext | None = None, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, context=context, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def away() -> tuple[str, ...]:
    """Options for servers that do not run."""
    triton, milvus = free_ports(2)
    return ("--triton", f"127.0.0.1:{triton}", "--milvus", f"http://127.0.0.1:{milvus}", "--timeout", "5")


def test_it_says_where_it_listens_and_that_no_server_runs() -> None:
    """And without a lock it is served beyond this machine only if one insists, and that is said."""
    with Viewed("--host", "0.0.0.0", "--insecure", *away()) as viewed:
        assert viewed.url.startswith("http://127.0.0.1:")
        assert got(viewed.url)[0] == 200
        status, answer = got(viewed.url + "api/status")
        assert status == 503
        assert "cxr serve" in json.loads(answer)["error"]["next_step"]
        assert viewed.stop(signal.SIGINT) == 0
        assert "could see films and cases" in viewed.said
        assert "Traceback" not in viewed.said


def test_tls_with_a_token(certificates: Certificates, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    own = ("--tls-cert", certificates.path("server.pem"), "--tls-key", certificates.path("server.key"), "--token-file", tmp_path / "token")
    with Viewed("--host", "0.0.0.0", *own, *away()) as viewed:
        assert viewed.url.startswith("https://127.0.0.1:")
        trusting = certificates.tls().context()
        assert got(viewed.url, trusting)[0] == 200
        assert got(viewed.url + "api/status", trusting)[0] == 401
        assert got(viewed.url + "api/status", trusting, authorization=f"Bearer {TOKEN}")[0] == 503
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            got(viewed.url, certificates.tls(ca="theirs").context())
        port = int(viewed.url.rsplit(":", 1)[1].strip("/"))
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert b"<title>" not in plain.recv(4096), "nothing is served unencrypted"
        assert viewed.stop(signal.SIGTERM) == 128 + signal.SIGTERM
        assert TOKEN not in viewed.said


def test_client_certificates(certificates: Certificates) -> None:
    own = ("--tls-cert", certificates.path("server.pem"), "--tls-key", certificates.path("server.key"))
    with Viewed(*own, "--tls-client-ca", certificates.path("ours.pem"), *away()) as viewed:
        assert got(viewed.url, certificates.tls("client").context())[0] == 200
        for who in (None, "stranger"):
            with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
                got(viewed.url, certificates.tls(who).context())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), "could see films and cases"),
        (("--host", "localhost"), "the address localhost is not one"),
        (("--results", "none.jsonl"), "none.jsonl: no results"),
        (("--tls-key", "none.key"), "go together"),
        (("--port", "{taken}"), "give another --port"),
    ],
)
def test_what_it_refuses_to_begin_with(options: tuple[str, ...], words: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = [option.format(taken=taken.getsockname()[1]) for option in options]
        with pytest.raises(CxrError, match=words) as refused:
            app(["view", *given], standalone_mode=False)
    assert refused.value.exit_code == 2


def test_other_commands_load_nothing_of_it() -> None:
    code = (
        "import sys; from cxr_retrieval.cli.app import app\n"
        "import cxr_retrieval.cli.view, cxr_retrieval.retrieval.query, cxr_retrieval.radiograph.decoding, cxr_retrieval.gallery.store\n"
        "sys.exit(bool({'starlette', 'uvicorn', 'anyio'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
