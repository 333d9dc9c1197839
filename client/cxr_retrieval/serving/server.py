"""Runs the embedded Triton (and, for `cxr serve`, a Milvus Lite server) as a context that leaves nothing behind."""

from __future__ import annotations

import ctypes
import importlib.util
import ipaddress
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
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from cxr_retrieval.contract import ENSEMBLE, LEAF_MODELS
from cxr_retrieval.errors import SetupError
from cxr_retrieval.serving.choices import Precision, Segmentation, resolve
from cxr_retrieval.serving.repository import derive_embedded

_SHM: Final = Path("/dev/shm")  # noqa: S108 (where Linux shows POSIX shared memory)


@dataclass(frozen=True)
class ServerOptions:
    """Where and how the embedded Triton runs. A port of 0 means any free one."""

    repository: Path
    precision: Precision = Precision.auto
    segmentation: Segmentation = Segmentation.ensemble
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002
    threads: int = 0
    ready_timeout_s: float = 120.0

    @property
    def chosen_precision(self) -> Precision:
        """The precision itself: `auto` resolved for this CPU and these weights."""
        return resolve(self.repository, self.precision, self.segmentation)


@dataclass(frozen=True)
class Endpoints:
    """Where a running server listens, as host:port."""

    grpc: str
    http: str
    metrics: str
    process: subprocess.Popen[bytes]


@contextmanager
def embedded_triton(options: ServerOptions) -> Generator[Endpoints]:
    """Starts Triton, waits until every model is ready, and stops it on leaving, whatever the reason.

    Raises:
        SetupError: Port in use, wheel or shared library missing, a model failed (its name and Triton's reason), timeout.
    """
    ports = _ports(options)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"cxr-serve-{os.getpid()}-")))
        prefix = f"{work.name}-"
        stack.callback(_remove_shared_memory, prefix)
        threads = options.threads or len(os.sched_getaffinity(0))
        derive_embedded(options.repository, work / "models", options.chosen_precision, options.segmentation, threads)
        binary, environment = _install_backend(work)
        log = stack.enter_context((work / "triton.log").open("wb"))
        process = subprocess.Popen(
            [
                str(binary),
                f"--model-repository={work / 'models'}",
                f"--backend-directory={work / 'backends'}",
                f"--backend-config=python,shm-region-prefix-name={prefix}",
                f"--grpc-address={options.host}",
                f"--grpc-port={ports[0]}",
                f"--http-address={options.host}",
                f"--http-port={ports[1]}",
                f"--metrics-address={options.host}",
                f"--metrics-port={ports[2]}",
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
            preexec_fn=_die_with_parent,
        )
        stack.callback(_stop, process)
        host = "127.0.0.1" if ipaddress.ip_address(options.host).is_unspecified else options.host
        host = f"[{host}]" if ":" in host else host
        endpoints = Endpoints(*(f"{host}:{port}" for port in ports), process=process)
        _wait_until_ready(process, endpoints.grpc, work / "triton.log", options.ready_timeout_s)
        yield endpoints


@contextmanager
def embedded_milvus(folder: Path, host: str, port: int) -> Generator[str]:
    """Serves a Milvus Lite folder over gRPC, so that several clients can use it at once. Yields its URI.

    Raises:
        SetupError: Port in use, or another process has the folder open.
    """
    from milvus_lite.adapter.grpc.server import start_server_in_thread
    from milvus_lite.exceptions import DataDirLockedError

    from cxr_retrieval.gallery.milvus import one_blas_thread

    folder.parent.mkdir(parents=True, exist_ok=True)
    port = _free_port(host, port, "milvus")
    try:
        server, database, bound = start_server_in_thread(str(folder), host, port)
    except DataDirLockedError as error:
        raise SetupError(
            f"{folder}: another process has this gallery open", next_step="stop that process, or give another --store"
        ) from error
    try:
        with one_blas_thread():
            yield f"http://{host}:{bound}"
    finally:
        server.stop(grace=2).wait()
        database.close()


def _ports(options: ServerOptions) -> tuple[int, int, int]:
    wanted = {"grpc": options.grpc_port, "http": options.http_port, "metrics": options.metrics_port}
    chosen = tuple(_free_port(options.host, port, name) for name, port in wanted.items())
    return chosen[0], chosen[1], chosen[2]


def _free_port(host: str, port: int, name: str) -> int:
    """Checks a port by binding it (Triton and gRPC would otherwise share it silently through SO_REUSEPORT)."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise SetupError(
            f"the address {host} is not one", expected="an IP address such as 127.0.0.1", next_step="correct --host"
        ) from error
    with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET) as probe:
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
        return int(probe.getsockname()[1])


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
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["LD_LIBRARY_PATH"] = ":".join([*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    environment["PYTHONPATH"] = ":".join(path for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) if path)
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


def _die_with_parent() -> None:
    """Asks the kernel to end the server should this process be killed without a chance to clean up."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    models = (*LEAF_MODELS, ENSEMBLE)
    with grpcclient.InferenceServerClient(url) as client:
        while True:
            if process.poll() is not None:
                # Triton 2.51 can crash over a model that fails its warm-up; its log still says which one and why.
                if failed := _failures_in_log(log):
                    raise _could_not_load(failed)
                raise SetupError(
                    f"Triton stopped with exit code {process.returncode} while starting", got=_log_end(log), next_step="see its words above"
                )
            try:
                if all(client.is_model_ready(name, client_timeout=5) for name in models):
                    return
                failed = _failures(client)
            except InferenceServerException:
                failed = []  # not listening yet
            if failed:
                raise _could_not_load(failed)
            if time.monotonic() > deadline:
                raise SetupError(
                    "Triton was not ready in time",
                    expected=f"all models within {timeout_s:g} s",
                    got=_log_end(log),
                    next_step="try again with --ready-timeout",
                )
            time.sleep(0.1)


def _could_not_load(failed: list[str]) -> SetupError:
    return SetupError("Triton could not load " + "; ".join(failed), next_step="repair that model and start again")


def _failures_in_log(log: Path) -> list[str]:
    return [
        f"{name}: {reason}"
        for name, reason in re.findall(r"failed to load '(\w+)' version \d+: (.*)", log.read_text("utf-8", errors="replace"))
    ]


def _failures(client: grpcclient.InferenceServerClient) -> list[str]:
    """Models that Triton gave up on, with its own reason; the leaves' reasons first, they explain the ensemble's."""
    index: Any = client.get_model_repository_index(client_timeout=5)
    failed = {model.name: model.reason for model in index.models if model.state == "UNAVAILABLE" and model.reason}
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
