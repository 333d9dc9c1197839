"""What tests call rather than receive as a fixture."""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.config import IGNORE
from pydicom.dataelem import DataElement
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MediaStorageDirectoryStorage

from cxr_retrieval.cases.manifest import Manifest, read_manifest
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom, write_phantoms

KEPT = Path(tempfile.mkdtemp(prefix="cxr-tests-"))
"""What else would lie in the user's home: this test process' own pseudonym key with its table, its audit log, and maps."""
atexit.register(shutil.rmtree, KEPT, ignore_errors=True)
KEY_FILE = KEPT / "pseudonym.key"

ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("CXR_")} | {
    "COLUMNS": "100",
    "CXR_AUDIT": str(KEPT / "audit.jsonl"),
    "CXR_MAPS": str(KEPT / "maps"),
    "NO_COLOR": "1",
    "TERM": "dumb",
    "CXR_PSEUDONYM_KEY_FILE": str(KEY_FILE),
}


def cxr_command(*arguments: str | Path) -> list[str]:
    """The command line of `cxr` in this environment."""
    return [str(Path(sys.executable).with_name("cxr")), *map(str, arguments)]


def run_cxr(
    *arguments: str | Path, timeout: float = 240, cwd: Path | None = None, environment: Mapping[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user would, in a process of its own."""
    return subprocess.run(cxr_command(*arguments), capture_output=True, text=True, timeout=timeout, env=environment, cwd=cwd, check=False)


def phantoms_to_train_on(folder: Path, each: int) -> Manifest:
    """So many phantoms of each label to train on, two of each to watch."""
    path = write_phantoms(folder, [make_phantom(seed, label) for label in PHANTOM_LABELS for seed in range(each)], "train")
    text = path.read_text()
    write_phantoms(folder, [make_phantom(100 + seed, label) for label in PHANTOM_LABELS for seed in range(2)], "val")
    path.write_text(text + "\n".join(path.read_text().splitlines()[1:]) + "\n")
    return read_manifest(path)


def free_ports(count: int) -> list[int]:
    """On this machine; whoever is quick may still take them."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def until(met: Callable[[], bool], seconds: float = 60) -> None:
    """Waits until it is so."""
    ends = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < ends, "it never came to that"
        time.sleep(0.02)


_LIKE_A_TERMINAL = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


def at_a_terminal(*command: str) -> list[str]:
    """The command with Ctrl-C as at a terminal: a shell without job control starts its background jobs, and so perhaps these tests, with SIGINT
    ignored. Not in `preexec_fn`, for which Python forks: a child of a process in which gRPC runs may die of that.
    """
    return [sys.executable, "-c", _LIKE_A_TERMINAL, *command]


class Served:
    """`cxr serve` in the background; there when it is ready."""

    def __init__(self, folder: Path, *options: str, environment: Mapping[str, str] = ENVIRONMENT) -> None:
        grpc, http, metrics, milvus = free_ports(4)
        self.servers = ("--triton", f"127.0.0.1:{grpc}", "--milvus", f"http://127.0.0.1:{milvus}")
        ports = ("--grpc-port", f"{grpc}", "--http-port", f"{http}", "--metrics-port", f"{metrics}", "--milvus-port", f"{milvus}")
        self.process = subprocess.Popen(
            at_a_terminal(*cxr_command("serve", "--store", folder / "gallery.db", "--ready-timeout", "600", *ports, *options)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []
        self.until("ready")

    def until(self, words: str) -> str:
        """Listens until it says so; the line."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if words in line:
                return line
        raise AssertionError(f"cxr serve did not say {words!r}: " + "".join(self.said))

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(with_signal)
        return self.ended()

    def ended(self) -> int:
        """Its exit code, once it has ended; `said` then has all it said."""
        try:
            self.said.append(self.process.communicate(timeout=90)[1])
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode


HURRIED: Final[Mapping[str, object]] = {"proxy.timeTickInterval": 50, "queryCoord.checkInterval": 100, "queryCoord.distPullInterval": 100}
"""Settings, in ms, under which the parts of a Milvus server ask each other four to ten times as often as they do by themselves; a small collection's
time passes in waiting for that."""


@contextmanager
def real_milvus(**settings: object) -> Generator[Any]:
    """A real Milvus 2.3.5 standalone (older than nullable fields), as its package's `MilvusServer`, with these settings of its configuration.

    Alone on this machine, whoever else runs tests: the etcd within listens on ports 2379 and 2380 whatever it is told, so that a second server
    would keep its galleries with the first one's.
    """
    from milvus import MilvusServer, MilvusServerConfig

    with (
        (Path(tempfile.gettempdir()) / "cxr-tests-milvus.lock").open("w") as lock,
        tempfile.TemporaryDirectory(prefix="cxr-milvus-") as folder,
    ):
        flock(lock, LOCK_EX)
        config = MilvusServerConfig(data_dir=folder)
        for name, value in settings.items():
            config.set(name, value)
        server: Any = MilvusServer(config)
        try:
            with warnings.catch_warnings():  # the package forgets its socket where a port is taken; some later test would be accused of it
                warnings.simplefilter("ignore", ResourceWarning)
                server.start()
                gc.collect()
            yield server
        finally:
            if server.server_proc is not None:
                # the package kills what has not ended after a second, and gives up when that takes three more
                server.server_proc.kill()
                server.server_proc.wait(60)
            server.stop()


class Viewed:
    """`cxr view` in the background; there when the page is, at `url`. Use as a context manager."""

    def __init__(self, *options: str | Path, environment: Mapping[str, str] = ENVIRONMENT) -> None:
        command = at_a_terminal(*cxr_command("view", "--port", "0", *options))
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.said = ""
        if not self.url:
            raise AssertionError(f"cxr view did not say where it listens: {self.process.communicate(timeout=60)[1]}")

    def __enter__(self) -> Viewed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.stop()

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        """Its exit code; `said` then has what it said on stderr."""
        self.process.send_signal(with_signal)
        try:
            self.said = self.process.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode


def cosine(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    """The least cosine over the batch."""
    x, y = a.astype(float), b.astype(float)
    return float(((x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).min())


def leftovers(pid: int) -> set[str]:
    """Temporary folders and shared memory of embedded servers that this process started."""
    return {path.name for folder in (tempfile.gettempdir(), "/dev/shm") for path in Path(folder).glob(f"cxr-serve-{pid}-*")}


def dashboard_metrics(prefix: str) -> set[str]:
    """Names of the metrics with this prefix that the Grafana dashboard asks for."""
    board = json.loads((Path(__file__).parents[1] / "deploy" / "grafana" / "dashboards" / "cxr-retrieval.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return {name for expression in expressions for name in re.findall(rf"{prefix}\w+", expression)}


def write_dicomdir(path: Path, file_ids: Sequence[str | list[str] | None], **first: object) -> None:
    """A DICOMDIR with an IMAGE record for each Referenced File ID (None: without one), below a PATIENT record; `first`: other elements of
    the first image's record."""
    records: list[pydicom.Dataset] = []
    for number, file_id in enumerate([None, *file_ids]):
        record = pydicom.Dataset()
        record.OffsetOfTheNextDirectoryRecord = record.OffsetOfReferencedLowerLevelDirectoryEntity = 0
        record.RecordInUseFlag = 0xFFFF
        record.DirectoryRecordType = "IMAGE" if number else "PATIENT"
        if file_id is not None:
            record.add(DataElement("ReferencedFileID", "CS", file_id, validation_mode=IGNORE))
        for name, value in first.items() if number == 1 else ():
            setattr(record, name, value)
        records.append(record)
    dataset = pydicom.Dataset()
    dataset.FileSetID = "TEST"
    dataset.OffsetOfTheFirstDirectoryRecordOfTheRootDirectoryEntity = dataset.OffsetOfTheLastDirectoryRecordOfTheRootDirectoryEntity = 0
    dataset.FileSetConsistencyFlag = 0
    dataset.DirectoryRecordSequence = records
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


class Wire:
    """A TCP proxy before a server, which keeps every byte that passes, each direction of each connection by itself."""

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("http://").rsplit(":", 1)
        self._target = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.streams: list[bytearray] = []
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for end in self._open:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listening.accept()[0]
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._open += [client, server]
            for source, sink in ((client, server), (server, client)):
                self.streams.append(kept := bytearray())
                threading.Thread(target=self._pass_on, args=(source, sink, kept), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        try:
            while data := source.recv(1 << 16):
                kept += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass
