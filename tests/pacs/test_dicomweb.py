"""DICOMweb with the real Orthanc, and with servers that answer as none should."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from certificates import LOCAL, Certificates
from cxr_retrieval.errors import PeerDownError, PeerError, SetupError
from cxr_retrieval.pacs import dicomweb
from cxr_retrieval.pacs.dicomweb import Web, answered, objects, opened
from cxr_retrieval.settings import Tls
from pacs.peers import answering, instances, orthanc, says, secured
from tests_support import free_ports

USERS = {"reader": "planted-4b1d0c77"}


@pytest.fixture(scope="module")
def locked(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("locked")
    with orthanc(folder, users=USERS) as running, secured(running.web, certificates, mutual=True) as url:
        running.upload(*instances(folder / "films", 3))
        yield url


def found(web: Web) -> int:
    with answered(web), opened(web) as client:
        return len(objects(web, client.search_for_studies()))


def test_searches_over_tls_with_a_password(locked: str, certificates: Certificates) -> None:
    assert found(Web(locked, certificates.tls("client"), "reader", USERS["reader"])) == 3
    assert found(Web(locked + "/", certificates.tls("client"), "reader", USERS["reader"])) == 3


def test_who_is_not_let_in_or_not_trusted_is_told_so(locked: str, certificates: Certificates) -> None:
    path, ours = certificates.path, certificates.tls("client")
    own = ("reader", USERS["reader"])
    for web, said in (
        (Web(locked, ours, "reader", "wrong"), "does not let us in; got HTTP 401"),
        (Web(locked, ours), "does not let us in; got HTTP 401"),
        (Web(locked, certificates.tls("client", "theirs"), *own), "no encrypted connection; got .*certificate in certificate chain"),
        (Web(locked, None, *own), "no encrypted connection; got .*certificate in certificate chain"),
        (Web(locked, Tls(path("ours.pem"), server_name="pacs.example"), *own), "no encrypted connection; got .*mismatch"),
        (Web(locked.replace("dicom-web", "elsewhere"), ours, *own), "refuses the request; got HTTP 404"),
    ):
        with pytest.raises(PeerError, match=said) as refused:
            found(web)
        assert not refused.value.may_pass
        assert USERS["reader"] not in str(refused.value)


@pytest.mark.parametrize("who", [None, "stranger"])
def test_a_client_certificate_that_is_wanted_is_asked_for(locked: str, certificates: Certificates, who: str | None) -> None:
    """With TLS 1.3 the refusal comes after the handshake, in the place of an answer."""
    with pytest.raises(PeerError, match=r"no encrypted connection; got .*certificate") as refused:
        found(Web(locked, certificates.tls(who), "reader", USERS["reader"]))
    assert not refused.value.may_pass


@pytest.mark.parametrize("code", [500, 502, 503, 504, 429])
def test_what_may_pass_does_so(code: int) -> None:
    with answering(says(code)) as (url, asked), pytest.raises(PeerDownError, match=f"cannot serve now; got HTTP {code}"):
        found(Web(url))
    assert len(asked) == 1


def test_nobody_there_and_nobody_who_answers_in_time() -> None:
    with pytest.raises(PeerDownError, match="does not answer"):
        found(Web(f"http://{LOCAL}:{free_ports(1)[0]}"))
    ended = threading.Event()

    def late(_: BaseHTTPRequestHandler) -> None:
        ended.wait(10)

    with answering(late) as (url, _):
        with pytest.raises(PeerDownError, match="too slow"):
            found(Web(url, timeout_s=0.3))
        ended.set()


@pytest.mark.parametrize("body", [b"<html>welcome</html>", b"[{", b"\xff\xfe", b'"text"', b"3"])
def test_what_is_no_dicom_json_is_refused(body: bytes) -> None:
    with answering(says(200, body, Content_Type="application/dicom+json")) as (url, _), pytest.raises(PeerError, match="not as DICOMweb"):
        found(Web(url))


def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomweb, "MAX_BYTES", 1 << 20)

    def forever(to: BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.end_headers()
        while True:
            to.wfile.write(b" " * 65536)

    with answering(forever) as (url, _), pytest.raises(PeerError, match="an answer without end; expected at most 1 MiB"):
        found(Web(url))


def test_redirects_are_not_followed_and_carry_no_token() -> None:
    with answering(says(200, b"[]")) as (elsewhere, there):
        for code in (301, 302, 307, 308):
            with answering(says(code, Location=f"{elsewhere}/studies")) as (url, here):
                with pytest.raises(PeerError, match="leads elsewhere"):
                    found(Web(url, token="planted-93ab"))
                assert here[0]["Authorization"] == "Bearer planted-93ab"
        assert not there


def test_a_password_of_netrc_or_a_proxy_of_the_environment_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text(f"machine {LOCAL} login a password planted-5521\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HTTP_PROXY", f"http://{LOCAL}:1")
    monkeypatch.setenv("http_proxy", f"http://{LOCAL}:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with answering(says(200, b"[]")) as (url, asked):
        assert found(Web(url)) == 0
    assert "Authorization" not in asked[0]


def test_nothing_crosses_the_network_in_the_open() -> None:
    for options in ({"token": "t"}, {"user": "u", "password": "p"}, {"token": "t", "insecure": True}):
        with pytest.raises(SetupError, match=r"a secret .* would cross the network unencrypted"):
            Web("http://pacs.example/dicom-web", **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SetupError, match=r"identities .* would cross the network unencrypted"):
        Web("http://pacs.example/dicom-web")
    assert not Web("http://pacs.example/dicom-web", insecure=True).secure
    assert Web("http://127.0.0.1:8042/dicom-web", token="t").root == "http://127.0.0.1:8042/dicom-web"


@pytest.mark.parametrize(
    "url", ["", "pacs", "ftp://pacs", "http://", "https://u:p@pacs/", "https://pacs/?a=b", "https://pacs:x/", "https://[::1"]
)
def test_malformed_addresses_are_refused(url: str) -> None:
    with pytest.raises(SetupError, match="malformed") as refused:
        Web(url)
    assert "u:p" not in str(refused.value)


def test_secrets_stay_out_of_repr() -> None:
    assert "planted" not in repr(Web("https://pacs", user="u", password="planted")) + repr(Web("https://pacs", token="planted"))
    for options in ({"token": "a\nb"}, {"user": "u"}, {"password": "p"}, {"user": "u", "password": "p", "token": "t"}):
        with pytest.raises(SetupError):
            Web("https://pacs", **options)  # pyright: ignore[reportArgumentType]
