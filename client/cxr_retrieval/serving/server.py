"""Runs the embedded Triton (and, for `cxr serve`, a Milvus Lite server) as a context that leaves nothing behind."""

from __future__ import annotations

import ctypes
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from cxr_retrieval.contract import ENSEMBLE, LEAF_MODELS, MULTILABEL_MODEL, MULTIMODAL_IMAGE_MODEL, MULTIMODAL_TEXT_MODEL, OUTCOME_MODEL
from cxr_retrieval.cores import cores
from cxr_retrieval.errors import SetupError
from cxr_retrieval.interruption import uninterrupted
from cxr_retrieval.locations import cache_folder
from cxr_retrieval.serving.access import Access, TokenCheck, address, credentials
from cxr_retrieval.serving.choices import Networks, Precision, resolve
from cxr_retrieval.serving.repository import derive_embedded, derive_further
from cxr_retrieval.settings import Tls

_SHM: Final = Path("/dev/shm")  # noqa: S108 (where Linux shows POSIX shared memory)
_LARGEST_MESSAGE: Final = 256 * 2**20
"""Bytes of a request to the gallery, as of Milvus itself."""
_DIE_WITH_PARENT: Final = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has ended meanwhile")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes Triton, which the kernel then ends should the thread that started it be killed without a chance to clean up. A program of its own
instead of Popen's `preexec_fn`: between fork and exec of a process with threads (Milvus Lite's, gRPC's) no Python may run.
"""


@dataclass(frozen=True)
class ServerOptions:
    """Where and how the embedded Triton runs. A port of 0 means any free one.

    `outcome`, `multilabel`, `multimodal`: folders of `cxr build` with models that are served, too.

    `tls` encrypts gRPC; with a `ca`, every client must show a certificate. HTTP and metrics, for which Triton has no TLS, then stay on
    127.0.0.1.
    """

    repository: Path
    precision: Precision = Precision.auto
    networks: Networks = Networks.ensemble
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002
    threads: int = 0
    ready_timeout_s: float = 120.0
    tls: Tls | None = None
    outcome: Path | None = None
    multilabel: Path | None = None
    multimodal: Path | None = None

    @property
    def further(self) -> dict[str, Path]:
        """Models that are no step of the ensemble → their folders."""
        given = {OUTCOME_MODEL: self.outcome, MULTILABEL_MODEL: self.multilabel}
        both = (MULTIMODAL_IMAGE_MODEL, MULTIMODAL_TEXT_MODEL)
        of_two = {} if self.multimodal is None else {name: self.multimodal / name for name in both}
        return {**{name: folder for name, folder in given.items() if folder is not None}, **of_two}

    @property
    def plain_host(self) -> str:
        """Where HTTP and metrics listen."""
        return self.host if self.tls is None else "127.0.0.1"

    def on_free_ports(self) -> ServerOptions:
        """The same with each port chosen, and found free. Each stays bound until all are, or one might be chosen twice.

        Raises:
            SetupError: One is in use.
        """
        with ExitStack() as bound:
            return replace(
                self,
                grpc_port=bound.enter_context(_free_port(self.host, self.grpc_port, "grpc")),
                http_port=bound.enter_context(_free_port(self.plain_host, self.http_port, "http")),
                metrics_port=bound.enter_context(_free_port(self.plain_host, self.metrics_port, "metrics")),
            )

    @property
    def chosen_precision(self) -> Precision:
        """The precision itself: `auto` resolved for this CPU and these weights."""
        return resolve(self.repository, self.precision, self.networks)


@dataclass(frozen=True)
class Endpoints:
    """Where a running server listens, as host:port."""

    grpc: str
    http: str
    metrics: str
    process: subprocess.Popen[bytes]
    log: Path

    def last_words(self) -> str:
        """The end of its log, on one line."""
        return _log_end(self.log)


@contextmanager
def embedded_triton(options: ServerOptions) -> Generator[Endpoints]:
    """Starts Triton, waits until every model is ready, and stops it on leaving, whatever the reason.

    One that aborts while it starts, without a model to blame, has a second try: on a machine with more to do than it can, the memory that
    Triton 2.51 shares with a backend may not be there in time (`boost::interprocess::lock_exception`).

    Raises:
        SetupError: Port in use, wheel or shared library missing, a model failed (its name and Triton's reason), timeout.
    """
    with ExitStack() as stack:
        try:
            endpoints = stack.enter_context(_triton(options))
        except _AbortedError:
            endpoints = stack.enter_context(_triton(options))
        yield endpoints


class _AbortedError(SetupError):
    """Triton ended by a signal of its own while it started."""


@contextmanager
def _triton(options: ServerOptions) -> Generator[Endpoints]:
    options = options.on_free_ports()
    stack = ExitStack()
    try:
        with uninterrupted():
            endpoints = _started(options, stack)
        _wait_until_ready(endpoints, (*LEAF_MODELS, *options.further, ENSEMBLE), options.ready_timeout_s)
        yield endpoints
    finally:
        with uninterrupted():  # half a clean-up, as half a start, would leave a server or its memory behind
            stack.close()


def _started(options: ServerOptions, stack: ExitStack) -> Endpoints:
    """Its process, with whatever must be cleaned up after it left to `stack`."""
    work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"cxr-serve-{os.getpid()}-")))
    prefix = f"{work.name}-"
    stack.callback(_remove_shared_memory, prefix)
    threads = options.threads or cores()
    derive_embedded(options.repository, work / "models", options.chosen_precision, options.networks, threads)
    for name, folder in options.further.items():
        derive_further(name, folder, options.repository, work / "models", options.networks, threads)
    binary, environment = _install_backend(work)
    log = stack.enter_context((work / "triton.log").open("wb"))
    process = subprocess.Popen(
        [
            sys.executable,
            *("-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())),
            str(binary),
            f"--model-repository={work / 'models'}",
            f"--backend-directory={work / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={prefix}",
            f"--grpc-address={options.host}",
            f"--grpc-port={options.grpc_port}",
            f"--http-address={options.plain_host}",
            f"--http-port={options.http_port}",
            f"--metrics-address={options.plain_host}",
            f"--metrics-port={options.metrics_port}",
            *_encrypted(options.tls),
            "--exit-on-error=false",
            "--exit-timeout-secs=10",
            "--disable-auto-complete-config",
            "--log-verbose=0",
        ],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    stack.callback(_stop, process)
    return Endpoints(
        _reached_at(options.host, options.grpc_port),
        _reached_at(options.plain_host, options.http_port),
        _reached_at(options.plain_host, options.metrics_port),
        process,
        work / "triton.log",
    )


def _reached_at(host: str, port: int) -> str:
    host = "127.0.0.1" if address(host).is_unspecified else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _encrypted(tls: Tls | None) -> list[str]:
    """Triton's words for it."""
    if tls is None:
        return []
    own = [f"--grpc-server-cert={tls.certificate}", f"--grpc-server-key={tls.key}"]
    return ["--grpc-use-ssl=true", *own, *([f"--grpc-root-cert={tls.ca}", "--grpc-use-ssl-mutual=true"] if tls.ca else [])]


@contextmanager
def embedded_milvus(folder: Path, host: str, port: int, access: Access = Access()) -> Generator[str]:  # noqa: B008 (frozen)
    """Serves a Milvus Lite folder over gRPC, so that several clients can use it at once. Yields its URI.

    Milvus Lite's own way to do so has neither TLS nor a check of who asks.

    Raises:
        SetupError: Port in use, or another process has the folder open.
    """
    import grpc
    from milvus_lite.adapter.grpc.servicer import MilvusServicer
    from milvus_lite.db import MilvusLite
    from milvus_lite.exceptions import DataDirLockedError
    from pymilvus.grpc_gen import milvus_pb2_grpc

    from cxr_retrieval.gallery.milvus import one_blas_thread

    folder.parent.mkdir(parents=True, exist_ok=True)
    with _free_port(host, port, "milvus") as port:
        pass
    try:
        database = MilvusLite(str(folder))
    except DataDirLockedError as error:
        raise SetupError(
            f"{folder}: another process has this gallery open", next_step="stop that process, or give another --store"
        ) from error
    limits = [("grpc.max_receive_message_length", _LARGEST_MESSAGE), ("grpc.max_send_message_length", _LARGEST_MESSAGE)]
    server = grpc.server(ThreadPoolExecutor(10), interceptors=[TokenCheck(access.token)] if access.token else [], options=limits)
    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(MilvusServicer(database), server)
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(where) if access.tls is None else server.add_secure_port(where, credentials(access.tls))
        server.start()
        with one_blas_thread():
            yield f"{'http' if access.tls is None else 'https'}://{_reached_at(host, bound)}"
    finally:
        server.stop(grace=2).wait()
        database.close()


@contextmanager
def _free_port(host: str, port: int, name: str) -> Generator[int]:
    """Checks a port by binding it (Triton and gRPC would otherwise share it silently through SO_REUSEPORT), until it is left."""
    with socket.socket(socket.AF_INET6 if address(host).version == 6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SetupError(
                f"{name} port {host}:{port} cannot be used",
                expected="a free port",
                got=error.strerror or str(error),
                next_step=f"stop what uses it, or give --{name}-port",
            ) from error
        yield int(probe.getsockname()[1])


def _install_backend(work: Path) -> tuple[Path, dict[str, str]]:
    """Lays out the Python backend with the stub of the running Python; returns the server binary and its environment."""
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        raise SetupError(
            "the embedded Triton is not installed", expected="the wheel nvidia-pytriton", next_step="pip install cxr-retrieval"
        )
    package = Path(found.origin).parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise SetupError(
            f"the embedded Triton does not support Python {version}", expected="Python 3.10 to 3.12", next_step="use one of these"
        )
    backend = work / "backends" / "python"
    shutil.copytree(package / "tritonserver" / "backends" / "python", backend, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(stub, backend / stub.name)
    libraries = [str(package.parent / "nvidia_pytriton.libs"), *_python_library_folder(version)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "CXR_"))}  # nor any secret
    environment["LD_LIBRARY_PATH"] = ":".join([*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    environment["PYTHONPATH"] = ":".join(path for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) if path)
    environment["CXR_COMPILED"] = str(cache_folder() / "openvino")
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    return package / "tritonserver" / "bin" / "tritonserver", environment


def _python_library_folder(version: str) -> list[str]:
    """Triton's stub embeds Python and needs libpython as a shared library, which a static python3 does not bring."""
    name = f"libpython{version}.so.1.0"
    folder = sysconfig.get_config_var("LIBDIR")
    if folder and (Path(folder) / name).is_file():
        return [str(folder)]
    try:
        ctypes.CDLL(name)
    except OSError as error:
        raise SetupError(
            "the embedded Triton cannot start its Python backend",
            expected=f"the shared library {name}",
            got="none on this machine",
            next_step=f"apt-get install libpython{version}",
        ) from error
    return []


def _wait_until_ready(server: Endpoints, models: Sequence[str], timeout_s: float) -> None:
    """Asks over HTTP, which is on this machine and unencrypted whatever gRPC is."""
    deadline = time.monotonic() + timeout_s
    while True:
        if server.process.poll() is not None:
            # Triton 2.51 can crash over a model that fails its warm-up; its log still says which one and why.
            if failed := _failures_in_log(server.log):
                raise _could_not_load(failed)
            ended = server.process.returncode
            raise (_AbortedError if ended in (-signal.SIGABRT, -signal.SIGSEGV) else SetupError)(
                f"Triton stopped with exit code {ended} while starting",
                got=server.last_words(),
                next_step="see its words above",
            )
        try:
            if all(_asked(server.http, "GET", f"/v2/models/{name}/ready")[0] == http.HTTPStatus.OK for name in models):
                return
            failed = _failures(server.http)
        except (OSError, http.client.HTTPException):
            failed = []  # not listening yet
        if failed:
            raise _could_not_load(failed)
        if time.monotonic() > deadline:
            raise SetupError(
                "Triton was not ready in time",
                expected=f"all models within {timeout_s:g} s",
                got=server.last_words(),
                next_step="try again with --ready-timeout",
            )
        time.sleep(0.1)


def _asked(address: str, method: str, path: str) -> tuple[int, bytes]:
    """Status and body; no proxy of the environment's comes between."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _could_not_load(failed: list[str]) -> SetupError:
    return SetupError("Triton could not load " + "; ".join(failed), next_step="repair that model and start again")


def _failures_in_log(log: Path) -> list[str]:
    return [
        f"{name}: {reason}"
        for name, reason in re.findall(r"failed to load '(\w+)' version \d+: (.*)", log.read_text("utf-8", errors="replace"))
    ]


def _failures(address: str) -> list[str]:
    """Models that Triton gave up on, with its own reason; the leaves' reasons first, they explain the ensemble's."""
    status, body = _asked(address, "POST", "/v2/repository/index")
    index: list[dict[str, Any]] = json.loads(body) if status == http.HTTPStatus.OK else []
    failed = {model["name"]: model["reason"] for model in index if model.get("state") == "UNAVAILABLE" and model.get("reason")}
    leaves = [f"{name}: {failed[name]}" for name in LEAF_MODELS if name in failed]
    return leaves or [f"{name}: {reason}" for name, reason in failed.items()]


def _log_end(log: Path) -> str:
    return " | ".join(log.read_text("utf-8", errors="replace").splitlines()[-6:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends Triton and its backend processes: politely, then, after 15 s, by force."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _remove_shared_memory(prefix: str) -> None:
    if _SHM.is_dir():
        for region in _SHM.glob(f"{prefix}*"):
            region.unlink(missing_ok=True)
