"""Archives that tests talk to: the real Orthanc, dcmtk's tools, and radiographs made for them."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pydicom
import requests
from pydicom.uid import generate_uid

from certificates import LOCAL, Certificates
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom, write_dicom
from tests_support import free_ports

_PLUGIN: Final = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
_READY_S: Final = 60.0


def dcmtk(tool: str, *arguments: str | Path | int, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs one of dcmtk's tools to its end."""
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, check=False)


def instances(
    folder: Path, count: int, *, per_study: int = 1, studies_per_patient: int = 1, scaled: int = 4, **elements: object
) -> list[Path]:
    """So many DX instances of one phantom, every `scaled`th pixel of it, each with UIDs of its own, in studies (of one series) and patients of these sizes; `elements`
    replace those of all. Patients are P<digits> by themselves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    phantom = make_phantom(3, PHANTOM_LABELS[0])
    first = folder / "0000.dcm"
    write_dicom(replace(phantom, pixels=phantom.pixels[::scaled, ::scaled].copy()), first)
    dataset = pydicom.dcmread(first)
    written: list[Path] = []
    for number in range(count):
        if number % per_study == 0:
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
        if number % (per_study * studies_per_patient) == 0:
            dataset.PatientID = f"P{generate_uid()[-12:]}"
        dataset.SOPInstanceUID, dataset.InstanceNumber = generate_uid(), number % per_study + 1
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        written.append(folder / f"{number:04d}.dcm")
        dataset.save_as(written[-1])
    return written


@dataclass
class Orthanc:
    """One that runs.

    Attributes:
        http: Its REST API. web: Root of its DICOMweb. log: What it says; every request, if `verbose`.
    """

    aet: str
    port: int
    http: str
    folder: Path
    process: subprocess.Popen[bytes]
    auth: tuple[str, str] | None = None

    @property
    def web(self) -> str:
        return f"{self.http}/dicom-web"

    @property
    def log(self) -> str:
        return (self.folder / "orthanc.log").read_text("utf-8", "replace")

    def ask(self, method: str, path: str, **given: Any) -> Any:
        """Of its REST API, as JSON."""
        answer = requests.request(method, self.http + path, auth=self.auth, timeout=60, **given)
        answer.raise_for_status()
        return answer.json()

    def upload(self, *paths: Path) -> None:
        for path in paths:
            self.ask("POST", "/instances", data=path.read_bytes())

    def find(self, level: str = "Instance", **query: str) -> list[Any]:
        """What it holds, in full."""
        return self.ask("POST", "/tools/find", json={"Level": level, "Query": query, "Expand": True})

    def store(self, modality: str, *resources: str) -> Any:
        """Sends resources (ids of its own) to a peer of its configuration, by C-STORE."""
        return self.ask("POST", f"/modalities/{modality}/store", json={"Resources": list(resources), "Synchronous": True})

    def statistics(self) -> dict[str, Any]:
        return self.ask("GET", "/statistics")

    def stop(self) -> None:
        """As if it had lost its power."""
        self.process.kill()
        self.process.wait(30)

    def start(self) -> None:
        """Again, on the same ports with what it had."""
        self.process = _started(self.folder)
        _wait_until_ready(self)


@contextmanager
def orthanc(
    folder: Path,
    *,
    aet: str = "ORTHANC",
    modalities: Mapping[str, tuple[str, str, int]] | None = None,
    dicomweb: bool = True,
    users: Mapping[str, str] | None = None,
    tls: Certificates | None = None,
    verbose: bool = False,
    **settings: object,
) -> Generator[Orthanc]:
    """The real Orthanc, empty, ready, on free ports of this machine; killed at the end.

    Args:
        folder: Its own; keeps configuration, storage and log.
        modalities: Name → AE title, host, port of whom it may send to.
        users: Name → password; None: whoever asks.
        tls: DIMSE over TLS, as `server`, with clients that show a certificate of `ours`; None: unencrypted. HTTP over TLS is `secured`:
            Debian's Orthanc 1.10.1 dies of its first encrypted request.
        settings: Further ones of its configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dicom, http = free_ports(2)
    configuration: dict[str, object] = {
        "Name": aet,
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": users is not None,
        "RegisteredUsers": dict(users or {}),
        "HttpPort": http,
        "DicomPort": dicom,
        "DicomAet": aet,
        "DicomCheckCalledAet": True,
        "DicomModalities": {name: list(peer) for name, peer in (modalities or {}).items()},
        "Plugins": [str(_PLUGIN)] if dicomweb else [],
        "DicomWeb": {"Enable": dicomweb, "Root": "/dicom-web/"},
        "StorageCompression": False,
        "HttpRequestTimeout": 60,
        **settings,
    }
    if tls is not None:
        configuration |= {
            "DicomTlsEnabled": True,
            "DicomTlsCertificate": str(tls.path("server.pem")),
            "DicomTlsPrivateKey": str(tls.path("server.key")),
            "DicomTlsTrustedCertificates": str(tls.path("ours.pem")),
        }
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    (folder / "options").write_text("--verbose" if verbose else "")
    running = Orthanc(
        aet,
        dicom,
        f"http://127.0.0.1:{http}",
        folder,
        _started(folder),
        next(iter(users.items())) if users else None,
    )
    try:
        _wait_until_ready(running)
        yield running
    finally:
        running.stop()


def _started(folder: Path) -> subprocess.Popen[bytes]:
    options = (folder / "options").read_text().split()
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin"}
    with (folder / "orthanc.log").open("ab") as log:
        return subprocess.Popen(["Orthanc", *options, str(folder / "orthanc.json")], stdout=log, stderr=log, env=environment)


def _wait_until_ready(running: Orthanc) -> None:
    ends = time.monotonic() + _READY_S
    while True:
        try:
            running.ask("GET", "/system")
        except requests.RequestException:
            if running.process.poll() is not None or time.monotonic() > ends:
                raise AssertionError(f"Orthanc did not start:\n{running.log[-3000:]}") from None
            time.sleep(0.05)
        else:
            return


@contextmanager
def secured(url: str, certificates: Certificates, *, mutual: bool = False) -> Generator[str]:
    """A proxy that speaks TLS as `server` before an HTTP server of this machine; its address with the path of `url`. `mutual`: clients show a
    certificate of `ours`.
    """
    parts = urlsplit(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.path("server.pem"), certificates.path("server.key"))
    if mutual:
        context.load_verify_locations(certificates.path("ours.pem"))
        context.verify_mode = ssl.CERT_REQUIRED

    def serve(plain: socket.socket) -> None:
        to = (parts.hostname or "", parts.port or 0)
        with plain, suppress(OSError), context.wrap_socket(plain, server_side=True) as client, socket.create_connection(to) as server:
            back = threading.Thread(target=_pass_on, args=(server, client))
            back.start()
            _pass_on(client, server)
            back.join()

    def accept(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=accept, args=(listening,))
        thread.start()
        try:
            yield f"https://127.0.0.1:{listening.getsockname()[1]}{parts.path}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def _pass_on(source: socket.socket, to: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            to.sendall(data)
    with suppress(OSError):
        to.shutdown(socket.SHUT_RDWR)


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], None]) -> Generator[tuple[str, list[dict[str, str]]]]:
    """A server that answers every GET so; where it is, and the headers of all requests, with their path as `path`."""
    asked: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append({**self.headers, "path": self.path})
            try:
                answer(self)
            except OSError:  # the client has had enough
                pass

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer((LOCAL, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://{LOCAL}:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def says(code: int, body: bytes = b"", **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer for `answering`."""

    def answer(to: BaseHTTPRequestHandler) -> None:
        to.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            to.send_header(name.replace("_", "-"), value)
        to.end_headers()
        to.wfile.write(body)

    return answer


@dataclass
class Passing:
    """A proxy before an HTTP server of this machine that knows what it was asked for: the paths of all GETs, in their order."""

    url: str
    asked: list[str]
    delay_s: float = 0.0

    def instances(self) -> list[str]:
        """SOP Instance UIDs of those that were retrieved."""
        return [path.rsplit("/", 1)[1] for path in list(self.asked) if re.search(r"/instances/[\d.]+$", path)]


@contextmanager
def passing(url: str) -> Generator[Passing]:
    """See `Passing`; `url` is a DICOMweb root."""
    through = Passing("", [])
    parts = urlsplit(url)

    def answer(to: BaseHTTPRequestHandler) -> None:
        through.asked.append(to.path)
        if "/instances/" in to.path:
            time.sleep(through.delay_s)
        try:
            given = requests.get(f"http://{parts.netloc}{to.path}", headers={"Accept": to.headers.get("Accept", "*/*")}, timeout=60)
        except requests.RequestException:
            to.close_connection = True
            return
        says(given.status_code, given.content, Content_Type=given.headers.get("Content-Type", ""))(to)

    with answering(answer) as (address, _):
        through.url = address + parts.path
        yield through
