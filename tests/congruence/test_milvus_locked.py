"""A real Milvus server, 2.3.5, with mutual TLS and authentication switched on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from certificates import Certificates
from cxr_retrieval.cases.manifest import read_manifest
from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.errors import StoreAccessError
from cxr_retrieval.gallery.store import Store, make_entry
from cxr_retrieval.serving.server import Endpoints
from cxr_retrieval.settings import MilvusSettings
from tests_support import ENVIRONMENT, HURRIED, real_milvus, run_cxr
from vectors import unit_vectors

pytestmark = pytest.mark.server

FIRST_PASSWORD = "Milvus"  # what a new server lets its user root in with


@pytest.fixture(scope="module")
def uri(certificates: Certificates) -> Iterator[str]:
    locked = {
        **HURRIED,
        "authorization_enabled": True,
        "tls_mode": 2,
        "server_pem_path": str(certificates.path("server.pem")),
        "server_key_path": str(certificates.path("server.key")),
        "ca_pem_path": str(certificates.path("ours.pem")),
    }
    with real_milvus(**locked) as server:
        yield f"https://127.0.0.1:{server.listen_port}"


def test_store_and_search(uri: str, certificates: Certificates, tmp_path: Path, pseudonyms: Pseudonyms) -> None:
    (tmp_path / "m.csv").write_text("image_id,path,label\n" + "".join(f"i{n},i{n}.png,control\n" for n in range(20)))
    entries = [make_entry(row, "", pseudonyms) for row in read_manifest(tmp_path / "m.csv").rows]
    vectors = unit_vectors(20)
    for settings in (
        MilvusSettings(uri, "root", FIRST_PASSWORD, tls=certificates.tls("client")),
        MilvusSettings(uri, token=f"root:{FIRST_PASSWORD}", tls=certificates.tls("client")),
    ):
        with Store(settings, "locked", pseudonyms, create=True) as store:
            store.upsert(entries, [f"{i:064x}" for i in range(20)], vectors)
            assert store.count() == 20
            assert store.search(vectors[7], 1)[0].case.image_id == "i7"


@pytest.mark.parametrize(
    ("who", "ca", "password", "words"),
    [
        ("client", "theirs", FIRST_PASSWORD, "certificate was not accepted.*give the authority"),
        ("stranger", "ours", FIRST_PASSWORD, "did not accept us.*give a client certificate of the authority"),
        (None, "ours", FIRST_PASSWORD, "did not accept us.*give a client certificate and its key"),
        ("client", "ours", "planted-wrong", "refused access; expected other credentials.*--milvus-token-file"),
        ("client", "ours", "", "refused access; expected credentials, and none were sent"),
    ],
)
def test_whoever_lacks_something_is_told_what(
    who: str | None, ca: str, password: str, words: str, uri: str, certificates: Certificates, pseudonyms: Pseudonyms
) -> None:
    settings = MilvusSettings(uri, "root" if password else "", password, tls=certificates.tls(who, ca), timeout_s=10)
    with pytest.raises(StoreAccessError, match=words) as caught:
        Store(settings, "locked", pseudonyms)
    assert "planted" not in str(caught.value)
    plain = MilvusSettings(uri.replace("https", "http"), "root", FIRST_PASSWORD, timeout_s=10)
    with pytest.raises(StoreAccessError, match="speaks TLS, and was asked without"):
        Store(plain, "locked", pseudonyms)


def test_query_as_a_user_does(uri: str, quick: Endpoints, certificates: Certificates, phantom_manifest: Path, tmp_path: Path) -> None:
    path = certificates.path
    options = ("--milvus", uri, "--milvus-ca", path("ours.pem"), "--milvus-cert", path("client.pem"), "--milvus-key", path("client.key"))
    (tmp_path / "password").write_text(f"{FIRST_PASSWORD}\n")
    credentials = ("--milvus-user", "root", "--milvus-password-file", tmp_path / "password", "--triton", quick.grpc, "--no-gate")
    done = run_cxr("ingest", "--manifest", phantom_manifest, "--audit", tmp_path / "audit", *options, *credentials)
    assert done.returncode == 0, done.stderr
    film = next((phantom_manifest.parent / "images").iterdir())
    environment = ENVIRONMENT | {"CXR_MILVUS_TOKEN": f"root:{FIRST_PASSWORD}"}
    answered = run_cxr("query", film, *options, "--triton", quick.grpc, "--no-gate", environment=environment)
    assert answered.returncode == 0, answered.stderr
    assert "confidence" in answered.stdout
