"""What the chaos suite, the soak and the night run in: real servers in processes of their own, an archive of phantoms, and a client to harm."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

import grpc
import numpy as np
import psutil
import tritonclient.grpc as grpcclient
from numpy.typing import NDArray
from PIL import Image
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_fixed
from tritonclient.utils import InferenceServerException

from cxr_retrieval.contract import ENSEMBLE
from cxr_retrieval.gallery.balance import VECTOR_SIZE
from cxr_retrieval.locations import cache_folder
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom
from tests_support import ENVIRONMENT, cxr_command

_STEADY: Final = 5
"""Times in a row, a tenth of a second apart, that a server must answer to be back: a dying one may answer once more."""
MARK: Final = "CHAOS_MARK"
"""Environment variable by which what a client left running is found."""
PSEUDONYM_KEY: Final = "0123456789abcdef" * 4
"""Of pseudonyms: the same everywhere, so that keys of two galleries can be compared."""


@dataclass
class Film:
    """One phantom on disk."""

    path: Path
    label: str


def make_archive(folder: Path, count: int, seed: int = 0, variants: int = 6) -> list[Film]:
    """`count` films: phantoms, each moved and brightened in several ways, so that no two show one picture nor have one embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    films: list[Film] = []
    for base in range(-(-count // variants)):
        label = PHANTOM_LABELS[base % len(PHANTOM_LABELS)]
        pixels = make_phantom(1000 * seed + base, label).pixels
        for variant in range(min(variants, count - base * variants)):
            shifted = np.roll(pixels, (7 * variant, -5 * variant), (0, 1)).astype(np.float32)
            film = Film(folder / f"{len(films):06d}.png", label)
            Image.fromarray((255 * (shifted / 255) ** (1 + 0.06 * variant)).astype(np.uint8)).save(film.path, compress_level=1)
            films.append(film)
    return films


def write_manifest(path: Path, films: Sequence[Film]) -> Path:
    """The CSV of an ingest."""
    path.write_text("image_id,path,label\n" + "".join(f"{film.path.stem},{film.path},{film.label}\n" for film in films))
    return path


def free_port() -> int:
    """One that nobody listens on, below those that the kernel gives to clients: it must still be free after a restart."""
    while True:
        port = random.SystemRandom().randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def environment(home: Path, mark: str = "") -> dict[str, str]:
    """Of a child: its home and its temporary files lie in `home`; what OpenVINO has compiled is where it is for everyone."""
    temporary = home / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    own = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(cache_folder().parent),
        "TMPDIR": str(temporary),
        "CXR_PSEUDONYM_KEY": PSEUDONYM_KEY,
        MARK: mark,
        "OPENBLAS_NUM_THREADS": "1",
    }
    return {name: value for name, value in ENVIRONMENT.items() if name != "CXR_PSEUDONYM_KEY_FILE"} | own


def spawn(command: Sequence[str], environment: Mapping[str, str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
    """In a session of its own, ended with this process, and with Ctrl-C as at a terminal: what a shell starts in the background ignores it."""
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", "env", "--default-signal=INT", *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        start_new_session=True,
    )


@dataclass
class Service:
    """A server in a session of its own, which can be killed, stopped and brought back on its port. Use as a context manager."""

    name: str
    command: Sequence[str]
    home: Path
    is_ready: Callable[[], bool]
    ready_s: float = 120.0
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def log(self) -> Path:
        return self.home / f"{self.name}.log"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = spawn(self.command, environment(self.home), log, log)
        self.starts += 1
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.ready_s
        while not self.is_ready():
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not start: {self.log.read_text(errors='replace')[-800:]}")
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """All that belong to it, those first that were started last."""
        if self.process is None or self.process.poll() is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [*reversed(root.children(recursive=True)), root]
        return []

    def victims(self) -> list[psutil.Process]:
        """What a harm meets: of `cxr serve` the tritonserver and its models, of any other server all of it."""
        every = self.processes()
        inner = [one for one in every if one.pid != (self.process.pid if self.process else 0)]
        return inner or every

    def signal(self, number: signal.Signals) -> None:
        """To every victim."""
        for victim in self.victims():
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(number)

    def kill(self) -> None:
        """kill -9, and waits until they are gone: a dying server's port still takes connections."""
        victims = self.victims()
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        psutil.wait_procs(victims, timeout=30)

    def bring_back(self) -> None:
        """Starts it again on its port; one that is started again by whoever watches over it is waited for."""
        assert self.process is not None
        deadline = time.monotonic() + self.ready_s
        steady = 0
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self.start()
                return
            steady = steady + 1 if self.is_ready() else 0
            if steady == _STEADY:
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name} did not come back: {self.log.read_text(errors='replace')[-800:]}")

    def stop(self) -> None:
        """As a user would, then by force."""
        if self.process is None:
            return
        self.signal(signal.SIGCONT)
        left = self.processes()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            self.process.wait()

    def left_behind(self) -> list[str]:
        """Temporary files and shared memory after its end."""
        prefix = f"cxr-serve-{self.process.pid}-" if self.process else "cxr-serve-"
        return [*(path.name for path in (self.home / "tmp").glob("*")), *(path.name for path in Path("/dev/shm").glob(f"{prefix}*"))]


def triton_service(home: Path, *arguments: str) -> tuple[Service, int]:
    """The embedded Triton in `cxr serve`, with the small networks unless told otherwise; and its gRPC port."""
    port = free_port()
    command = cxr_command("serve", "--no-store", "--grpc-port", str(port), "--http-port", "0", "--metrics-port", "0", *arguments)

    def ready() -> bool:
        try:
            with grpcclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
                return bool(client.is_model_ready(ENSEMBLE, client_timeout=2.0))
        except InferenceServerException:
            return False

    return Service("triton", command, home, ready), port


def milvus_service(home: Path, folder: Path) -> tuple[Service, int]:
    """Milvus Lite as a server over `folder`, and its port."""
    port = free_port()
    command = [sys.executable, "-c", "import sys; from milvus_lite.cmdline import main; sys.exit(main(sys.argv[1:]))"]
    command += ["server", "--data-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)]

    def ready() -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return Service("milvus", command, home, ready), port


@dataclass
class Client:
    """One `cxr` command under way, its output in files."""

    process: subprocess.Popen[bytes]
    folder: Path

    @staticmethod
    def start(folder: Path, mark: str, *arguments: str | Path) -> Client:
        """In a session of its own; what it says of earlier starts is kept."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "client.out").open("ab") as out, (folder / "client.err").open("ab") as err:
            process = spawn(cxr_command(*arguments), environment(folder / "home", mark), out, err)
        return Client(process, folder)

    def family(self) -> list[psutil.Process]:
        """The client and its workers."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def running_with(mark: str) -> list[str]:
    """Processes that carry this mark: what a client has left behind."""
    found: list[str] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
    return found


@retry(retry=retry_if_exception_type((MilvusException, grpc.RpcError)), wait=wait_fixed(0.5), stop=stop_after_delay(30), reraise=True)
def stored_vectors(port: int) -> tuple[list[str], NDArray[np.float32]]:
    """Every row of the only gallery behind a Milvus, ordered by key, as it is stored: a key that is there twice comes twice.

    Asked again where it fails: in a process that has seen a server die, gRPC holds that against the next one on its port for a while.
    """
    client: Any = MilvusClient(f"http://127.0.0.1:{port}", timeout=30)
    try:
        names = [name for name in client.list_collections() if name.startswith("cxr_") and "thumbnail" not in name]
        if not names:
            return [], np.empty((0, VECTOR_SIZE), np.float32)
        client.load_collection(names[0])
        counted = int(client.query(names[0], filter="", output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"])
        found = client.query(names[0], filter='key != ""', output_fields=["key", "embedding"], limit=16_384, consistency_level="Strong")
        rows = sorted((str(row["key"]), list(row["embedding"])) for row in found)  # a copy: pymilvus puts vectors into rows by their place
    finally:
        client.close()
    assert counted == len(rows), f"count(*) says {counted}, reading finds {len(rows)}"
    return [key for key, _ in rows], np.array([vector for _, vector in rows], np.float32)


def copy_folder(source: Path, target: Path) -> Path:
    """A gallery's folder, to be harmed."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def is_root() -> bool:
    """Whether file systems can be mounted."""
    return os.geteuid() == 0
