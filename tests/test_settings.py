"""What the settings refuse before anything is connected, and that no secret gets out of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat, load_pem_private_key

from certificates import Certificates
from cxr_retrieval.cli.options import secret
from cxr_retrieval.errors import CxrError, SetupError
from cxr_retrieval.settings import MilvusSettings, Tls, TritonSettings, is_loopback

SECRET = "hush-5f1d0c6e"


def test_files_for_tls_are_read_when_the_settings_are_made(certificates: Certificates, tmp_path: Path) -> None:
    ours, pem, key = (certificates.path(name) for name in ("ours.pem", "client.pem", "client.key"))
    assert Tls(ours, pem, key).context().get_ca_certs()
    encrypted = tmp_path / "encrypted.key"
    private = load_pem_private_key(key.read_bytes(), None)
    encrypted.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(SECRET.encode())))
    notes = tmp_path / "notes.pem"
    notes.write_text("no certificate")
    for made, words in (
        (lambda: Tls(tmp_path / "none.pem"), "none.pem: not usable for TLS; expected PEM certificates of authorities; got No such file"),
        (lambda: Tls(tmp_path), "got Is a directory"),
        (lambda: Tls(notes), "notes.pem: not usable"),
        (lambda: Tls(ours, pem, tmp_path / "none.key"), "none.key: not usable for TLS; expected a PEM file; got No such file"),
        (lambda: Tls(ours, pem, certificates.path("server.key")), "whose private key, not encrypted, is .*server.key"),
        (lambda: Tls(ours, pem, encrypted), "whose private key, not encrypted"),
        (lambda: Tls(ours, None, key), "certificate and its private key go together; expected both, or neither; got only the key"),
        (lambda: Tls(ours, pem), "got only the certificate"),
    ):
        with pytest.raises(SetupError, match=words):
            made()


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.5", "triton", "localhost.example", "127.0.0.1.example")),
    ],
)
def test_loopback(host: str, inside: bool) -> None:
    assert is_loopback(host) == inside


def test_a_secret_crosses_a_network_encrypted_or_not_at_all(certificates: Certificates) -> None:
    tls = certificates.tls()
    for refused in (
        lambda: TritonSettings("triton:8001", token=SECRET),
        lambda: TritonSettings("10.0.0.5:8001", headers=(("x-api-key", SECRET),)),
        lambda: MilvusSettings("http://milvus:19530", token=SECRET),
        lambda: MilvusSettings("tcp://milvus:19530", user="u", password=SECRET),
    ):
        with pytest.raises(SetupError, match="would cross the network unencrypted") as caught:
            refused()
        assert SECRET not in str(caught.value)
    assert TritonSettings("triton:8001", tls=tls, token=SECRET).metadata == {"authorization": f"Bearer {SECRET}"}
    assert TritonSettings("[::1]:8001", token=SECRET).metadata
    assert MilvusSettings("https://milvus:19530", token=SECRET).secure
    assert MilvusSettings("unix:///run/milvus.sock", token=SECRET).token
    assert not MilvusSettings("http://milvus:19530").secure


def test_certificates_for_a_milvus_without_tls_are_refused(certificates: Certificates) -> None:
    with pytest.raises(SetupError, match="reached without TLS; expected https"):
        MilvusSettings("http://127.0.0.1:19530", tls=certificates.tls())
    with pytest.raises(SetupError, match="without its authority"):
        MilvusSettings("https://127.0.0.1:19530", tls=certificates.tls("client", ca=None))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: TritonSettings(token=f"{SECRET}\nx"), "header 'authorization'"),
        (lambda: TritonSettings(token=f"{SECRET}ü"), "header 'authorization'"),
        (lambda: TritonSettings(headers=(("X-Key", SECRET),)), "a header for Triton's proxy has no name"),
        (lambda: TritonSettings(headers=((f"x-key {SECRET}", ""),)), "a header for Triton's proxy has no name"),
        (lambda: TritonSettings(headers=(("key-bin", SECRET),)), "header 'key-bin'"),
        (lambda: TritonSettings(headers=(("x-key", ""),)), "header 'x-key'"),
        (lambda: TritonSettings(f"user:{SECRET}@triton:8001"), r"malformed.*got \*\*\*@triton:8001"),
        (lambda: MilvusSettings(f"https://user:{SECRET}@milvus:19530"), r"malformed.*got \*\*\*@milvus:19530"),
        (lambda: MilvusSettings(f"milvus://root:{SECRET}@milvus"), r"malformed.*got \*\*\*@milvus"),
    ],
)
def test_what_cannot_be_sent_is_refused_without_being_shown(made: object, words: str) -> None:
    """gRPC would refuse it, too, with the whole header in its message."""
    assert callable(made)
    with pytest.raises(SetupError, match=words) as caught:
        made()
    assert SECRET not in str(caught.value)


def test_no_secret_is_in_a_repr_or_in_what_a_server_repeats() -> None:
    triton = TritonSettings(token=SECRET, headers=(("x-key", f"{SECRET}-longer"),))
    milvus = MilvusSettings(user="reader", password=SECRET, token=f"reader:{SECRET}")
    for settings in (triton, milvus, replace(milvus, uri="https://milvus:19530")):
        assert SECRET not in repr(settings)
        assert settings.without_secrets(f"denied: {SECRET}, reader:{SECRET}, {SECRET}-longer").count("***") == 3
        assert SECRET not in settings.without_secrets(f"denied: {SECRET}, reader:{SECRET}, {SECRET}-longer")
    assert TritonSettings().without_secrets("as it was") == "as it was"


def test_a_secret_comes_from_a_file_or_from_the_environment_and_then_no_longer_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXR_MILVUS_TOKEN", f" {SECRET}\n")
    assert secret(None, "CXR_MILVUS_TOKEN") == SECRET
    assert "CXR_MILVUS_TOKEN" not in os.environ
    assert secret(None, "CXR_MILVUS_TOKEN") == ""
    kept = tmp_path / "token"
    kept.write_text(f"{SECRET}\n")
    monkeypatch.setenv("CXR_MILVUS_TOKEN", "another")
    assert secret(kept, "CXR_MILVUS_TOKEN") == SECRET
    assert "CXR_MILVUS_TOKEN" not in os.environ
    for content, words in ((b" \n", "empty"), (b"\xff\xfe" + SECRET.encode(), "bytes that are no text")):
        kept.write_bytes(content)
        with pytest.raises(CxrError, match=words) as caught:
            secret(kept, "CXR_MILVUS_TOKEN")
        assert SECRET not in str(caught.value)
    with pytest.raises(SetupError, match="cannot be read; expected a secret; got No such file"):
        secret(tmp_path / "none", "CXR_MILVUS_TOKEN")
