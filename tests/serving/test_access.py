"""Who is served, and what `cxr serve` refuses to start with."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from pymilvus.grpc_gen import milvus_pb2

from certificates import Certificates
from cxr_retrieval.errors import SetupError, StoreAccessError
from cxr_retrieval.gallery.milvus import connected
from cxr_retrieval.serving.access import Access, refuse_exposure
from cxr_retrieval.serving.server import embedded_milvus
from cxr_retrieval.settings import MilvusSettings
from tests_support import run_cxr

TOKEN = "reader:3f1c8f1d6f0e4a5b9d"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "2001:db8::7"])
def test_beyond_this_machine_only_clients_that_prove_themselves(certificates: Certificates, host: str) -> None:
    alone, mutual = certificates.tls("server", ca=None), certificates.tls("server")
    for access, got in (
        (Access(), "got neither"),
        (Access(token=TOKEN), "got a token alone, which everybody on the network could read"),
        (Access(alone), "got TLS, but anybody would be served"),
        (Access(alone, TOKEN), "got TLS and a token, which Triton cannot check"),
    ):
        with pytest.raises(SetupError, match=f"whoever reaches {host} could use these servers.*{got}.*--tls-client-ca.*--insecure"):
            refuse_exposure(host, access)
        refuse_exposure("127.0.0.1", access)
        refuse_exposure("::1", access)
    refuse_exposure(host, Access(mutual))
    refuse_exposure(host, Access(mutual, TOKEN))


def test_the_command_refuses_and_says_what_to_give(tmp_path: Path) -> None:
    result = run_cxr("serve", "--host", "0.0.0.0", "--store", tmp_path / "g.db")
    assert result.returncode == 2
    assert "give --tls-cert, --tls-key and --tls-client-ca" in " ".join(result.stderr.split())
    assert not (tmp_path / "g.db").exists()


def test_what_is_no_lock_is_refused(certificates: Certificates) -> None:
    with pytest.raises(SetupError, match="no certificate to serve with"):
        Access(certificates.tls())
    with pytest.raises(SetupError, match="token is too short; expected at least 16 characters; got 5"):
        Access(token="short")
    assert TOKEN not in repr(Access(token=TOKEN))


@pytest.fixture(scope="module")
def locked(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded_milvus(
        tmp_path_factory.mktemp("locked") / "g.db", "127.0.0.1", 0, Access(certificates.tls("server", None), TOKEN)
    ) as uri:
        assert uri.startswith("https://127.0.0.1:")
        yield uri


def call(channel: grpc.Channel, method: Any, *metadata: tuple[str, str]) -> grpc.StatusCode:
    asked = channel.unary_unary(f"/milvus.proto.milvus.MilvusService/{method.name}")
    try:
        asked(b"", metadata=metadata, timeout=10)
    except grpc.RpcError as error:
        status: Any = error
        return status.code()
    return grpc.StatusCode.OK


def test_no_method_answers_without_the_token(locked: str, certificates: Certificates) -> None:
    shown = {word: base64.b64encode(word.encode()).decode() for word in (TOKEN, TOKEN[:-1], f"{TOKEN}x", "")}
    right = ("authorization", shown[TOKEN])
    methods = milvus_pb2.DESCRIPTOR.services_by_name["MilvusService"].methods
    trusted = grpc.ssl_channel_credentials(certificates.path("ours.pem").read_bytes())
    with grpc.secure_channel(locked.removeprefix("https://"), trusted) as channel:
        for method in methods:
            assert call(channel, method) is grpc.StatusCode.UNAUTHENTICATED, method.name
        assert len(methods) > 50
        connect = next(method for method in methods if method.name == "Connect")
        for wrong in (shown[TOKEN[:-1]], shown[f"{TOKEN}x"], shown[""], TOKEN, f"Bearer {TOKEN}", right[1].lower()):
            assert call(channel, connect, ("authorization", wrong)) is grpc.StatusCode.UNAUTHENTICATED
        assert call(channel, connect, right, right) is grpc.StatusCode.UNAUTHENTICATED, "which of two is meant?"
        assert call(channel, connect, right) is grpc.StatusCode.OK


def test_token_and_user_open_the_gallery_and_a_wrong_one_is_said(locked: str, certificates: Certificates) -> None:
    user, _, password = TOKEN.partition(":")
    tls = certificates.tls()
    for settings in (MilvusSettings(locked, token=TOKEN, tls=tls), MilvusSettings(locked, user, password, tls=tls)):
        with connected(settings) as client:
            assert client.list_collections() == []
    for settings, expected in (
        (MilvusSettings(locked, token=f"{TOKEN}x", tls=tls), "expected other credentials"),
        (MilvusSettings(locked, tls=tls), "expected credentials, and none were sent"),
    ):
        with pytest.raises(StoreAccessError, match=rf"refused access; {expected}.*--milvus-token-file") as caught, connected(settings):
            pytest.fail("must not connect")
        assert TOKEN not in str(caught.value)


def test_a_certificate_of_a_former_connection_does_not_serve_the_next(certificates: Certificates, tmp_path: Path) -> None:
    """pymilvus would go on using it: its connections are named by address and token alone."""
    with embedded_milvus(tmp_path / "g.db", "127.0.0.1", 0, Access(certificates.tls("server"))) as uri:
        with connected(MilvusSettings(uri, tls=certificates.tls("client"))) as client:
            assert client.list_collections() == []
        for who, words in ((None, "a client without a certificate"), ("stranger", "this client certificate")):
            with (
                pytest.raises(StoreAccessError, match=f"does not accept {words}"),
                connected(MilvusSettings(uri, tls=certificates.tls(who), timeout_s=5)),
            ):
                pytest.fail("must not connect")
