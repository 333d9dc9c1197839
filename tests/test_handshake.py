"""A server that refuses us, told from one that is away: with gRPC's own servers, and with Python's TLS, which says why."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from certificates import LOCAL, Certificates
from cxr_retrieval.handshake import refusal
from cxr_retrieval.serving.access import credentials
from cxr_retrieval.settings import Tls


@contextmanager
def grpc_server(tls: Tls | None) -> Generator[int]:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port(f"{LOCAL}:0") if tls is None else server.add_secure_port(f"{LOCAL}:0", credentials(tls))
    server.start()
    yield port
    server.stop(0).wait()


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Generator[int]:
    """A server that does this with each connection, until none comes any more."""
    with socket.create_server((LOCAL, 0)) as server:
        server.settimeout(5)

        def run() -> None:
            try:
                while True:
                    serve(server.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=run)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_who_is_let_in(certificates: Certificates) -> None:
    with grpc_server(certificates.tls("server")) as port:
        assert refusal(LOCAL, port, certificates.tls("client")) is None
        refused = {who: refusal(LOCAL, port, certificates.tls(who)) for who in (None, "stranger")}
        assert [one and one.why.rsplit(":")[-1] for one in refused.values()] == [
            " it does not accept a client without a certificate",
            " it does not accept this client certificate",
        ]
    with grpc_server(certificates.tls("server", ca=None)) as port:
        assert refusal(LOCAL, port, certificates.tls()) is None


@pytest.mark.parametrize(
    ("server", "trusted", "why", "next_step"),
    [
        ("server", "theirs", "unable to get local issuer certificate", "give the authority"),
        ("server", None, "unable to get local issuer certificate", "give the authority"),
        ("expired", "ours", "certificate has expired", "renew the server's certificate"),
        ("elsewhere", "ours", "not valid for '127.0.0.1'", "use the name that the certificate is for"),
    ],
)
def test_which_servers_are_trusted(certificates: Certificates, server: str, trusted: str | None, why: str, next_step: str) -> None:
    with grpc_server(certificates.tls(server, ca=None)) as port:
        found = refusal(LOCAL, port, certificates.tls(ca=trusted))
        assert found is not None
        assert why in found.why
        assert next_step in found.next_step
        assert refusal(LOCAL, port, certificates.tls(server_name="triton.hospital.example")) is None or server != "elsewhere"


def test_one_side_speaks_tls_and_the_other_does_not(certificates: Certificates) -> None:
    with grpc_server(certificates.tls("server")) as port:
        found = refusal(LOCAL, port, None)
        assert found is not None
        assert "speaks TLS, and was asked without" in found.why
    with grpc_server(None) as port:
        assert refusal(LOCAL, port, None) is None
        found = refusal(LOCAL, port, certificates.tls())
        assert found is not None
        assert "does not speak TLS as we do" in found.why


def test_a_server_that_says_why(certificates: Certificates) -> None:
    """Of TLS 1.2, within the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certificates.path("ours.pem"))
    context.load_cert_chain(certificates.path("server.pem"), certificates.path("server.key"))

    def serve(plain: socket.socket) -> None:
        with pytest.raises(ssl.SSLError), plain:
            context.wrap_socket(plain, server_side=True)

    with listening(serve) as port:
        for who, next_step in ((None, "give a client certificate and its key"), ("stranger", "of the authority that the server trusts")):
            found = refusal(LOCAL, port, certificates.tls(who))
            assert found is not None
            assert "the server did not accept us" in found.why
            assert "alert" in found.why
            assert next_step in found.next_step


def test_servers_that_are_away_stall_or_end_are_waited_for(certificates: Certificates) -> None:
    with socket.socket() as unused:
        unused.bind((LOCAL, 0))
        assert refusal(LOCAL, unused.getsockname()[1], certificates.tls()) is None
        assert refusal(LOCAL, unused.getsockname()[1], None) is None
    with socket.create_server((LOCAL, 0)) as stalled:
        assert refusal(LOCAL, stalled.getsockname()[1], certificates.tls(), timeout_s=0.2) is None
        assert refusal(LOCAL, stalled.getsockname()[1], None, timeout_s=0.2) is None
    with listening(lambda plain: plain.close()) as port:
        assert refusal(LOCAL, port, certificates.tls()) is None, "as a proxy whose server is away"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.path("server.pem"), certificates.path("server.key"))
    with socket.create_server((LOCAL, 0)) as ending:

        def once() -> None:
            plain = ending.accept()[0]
            ending.close()
            with context.wrap_socket(plain, server_side=True) as secured:
                secured.recv(100)

        thread = threading.Thread(target=once)
        port = int(ending.getsockname()[1])
        thread.start()
        assert refusal(LOCAL, port, certificates.tls()) is None, "it closed after the handshake, and then was gone"
        thread.join()
