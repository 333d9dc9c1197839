"""Associations that we open, with real peers: Orthanc, and dcmtk with TLS and without."""

from __future__ import annotations

import gc
import socket
import subprocess
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom.uid import UID
from pynetdicom.presentation import build_context

from certificates import LOCAL, Certificates
from cxr_retrieval.errors import PeerDownError, PeerError, SetupError
from cxr_retrieval.pacs.dimse import Peer, associated, peer
from cxr_retrieval.settings import Tls
from pacs.peers import Orthanc, orthanc
from tests_support import free_ports

pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed <(ssl.SSL|)[sS]ocket:ResourceWarning")
"""pynetdicom forgets the socket of a connection that failed."""
ECHO = [build_context("1.2.840.10008.1.1")]


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What is forgotten is so here, not in a later test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with orthanc(tmp_path_factory.mktemp("orthanc"), dicomweb=False) as running:
        yield running


@contextmanager
def storescp(folder: Path, *options: str) -> Generator[int]:
    """dcmtk's, as STORE; its port."""
    (port,) = free_ports(1)
    with subprocess.Popen(["storescp", "-aet", "STORE", "-od", str(folder), *options, str(port)], stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(200):
                try:
                    socket.create_connection((LOCAL, port), 1).close()
                    break
                except OSError:
                    time.sleep(0.02)
            yield port
        finally:
            process.kill()


def echo(to: Peer) -> int:
    with associated(to, "CXR", ECHO) as association:
        return int(association.send_c_echo().Status)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if type(thread).__module__.startswith("pynetdicom")]


def test_a_peer_answers_and_no_thread_is_left(archive: Orthanc) -> None:
    assert echo(Peer(archive.aet, LOCAL, archive.port)) == 0
    assert echo(peer(f"{archive.aet}@localhost:{archive.port}")) == 0
    assert not threads()


def test_is_aborted_where_the_block_fails(archive: Orthanc) -> None:
    with pytest.raises(KeyError), associated(Peer(archive.aet, LOCAL, archive.port), "CXR", ECHO):
        raise KeyError
    assert not threads()


def test_another_ae_title_is_refused(archive: Orthanc) -> None:
    with pytest.raises(PeerError, match="its AE title is another one") as refused:
        echo(Peer("ELSEWHERE", LOCAL, archive.port))
    assert not refused.value.may_pass
    assert not threads()


def test_a_service_that_it_does_not_offer(archive: Orthanc) -> None:
    patient_only = [build_context("1.2.840.10008.5.1.4.1.2.3.1")]  # retired; Orthanc never had it
    with (
        pytest.raises(PeerError, match="accepts none of what it is asked for") as refused,
        associated(Peer(archive.aet, LOCAL, archive.port), "CXR", patient_only),
    ):
        pass
    assert UID("1.2.840.10008.5.1.4.1.2.3.1").name in str(refused.value)


def test_nobody_there_may_pass() -> None:
    for host in (LOCAL, "no-such-host.invalid"):
        with pytest.raises(PeerDownError) as down:
            echo(Peer("ANY", host, free_ports(1)[0], timeout_s=5))
        assert down.value.may_pass


def test_a_peer_that_says_nothing_is_given_up() -> None:
    with socket.create_server((LOCAL, 0)) as silent:
        began = time.monotonic()
        with pytest.raises(PeerDownError, match="no DICOM peer answers"):
            echo(Peer("ANY", LOCAL, silent.getsockname()[1], timeout_s=1))
        assert time.monotonic() - began < 15
    assert not threads()


def test_tls_with_certificates_on_both_sides(certificates: Certificates, tmp_path: Path) -> None:
    path = certificates.path
    ours = ("+tls", str(path("server.key")), str(path("server.pem")), "+cf", str(path("ours.pem")))
    with storescp(tmp_path, *ours) as port:
        assert echo(Peer("STORE", LOCAL, port, certificates.tls("client"))) == 0
        for tls, said in (
            (certificates.tls("client", "theirs"), "certificate was not accepted"),
            (Tls(path("ours.pem"), path("client.pem"), path("client.key"), "elsewhere.example"), "certificate was not accepted"),
            (certificates.tls("stranger"), "did not accept us|does not accept this client certificate"),
            (certificates.tls(), "did not accept us|does not accept a client without a certificate"),
            (None, "speaks TLS"),
        ):
            with pytest.raises(PeerError, match=said) as refused:
                echo(Peer("STORE", LOCAL, port, tls, timeout_s=5))
            assert not refused.value.may_pass
    assert not threads()


@pytest.mark.parametrize(
    "address",
    ["", "ARCHIVE", "ARCHIVE@host", "@host:104", "A@host:0", "A@host:70000", "A" * 17 + "@host:104", "A\\B@host:104", "  @host:104"],
)
def test_malformed_addresses_are_refused(address: str) -> None:
    with pytest.raises(SetupError, match="malformed"):
        peer(address)


def test_addresses_of_ipv6() -> None:
    assert (peer("A B@[::1]:104").host, peer("A B@[::1]:104").aet) == ("::1", "A B")
