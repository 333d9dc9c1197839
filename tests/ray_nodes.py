"""A Ray cluster of several nodes on this machine, each started by `ray start` as on a machine of its own, and killed as machines fail."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import psutil

from tests_support import ENVIRONMENT, free_ports, until

MEMORY = 4 * 2**30
OBJECTS = 120 * 2**20
"""Bytes: a node's memory for Ray to give away, and for objects; the least that Ray takes is 75 MB of the latter."""


@dataclass
class RayCluster:
    """A head without CPUs, and workers of one each."""

    folder: Path
    port: int
    environment: Mapping[str, str]
    head: subprocess.Popen[bytes] | None = None
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, *options: str, core: int | None = None) -> subprocess.Popen[bytes]:
        pinned = [] if core is None else ["taskset", "--cpu-list", str(core)]
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            "--disable-usage-stats",
            f"--object-store-memory={OBJECTS}",
        ]
        with (self.folder / "nodes.log").open("ab") as log:
            return subprocess.Popen(
                [*pinned, *command, *options], env=dict(self.environment), stdout=log, stderr=log, start_new_session=True
            )

    def start_head(self) -> None:
        options = ("--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={self.folder}")
        self.head = self._joined(*options)

    def add_worker(self, core: int | None = None) -> None:
        """`core`: the only one that it may use."""
        self.workers.append(self._joined(f"--address={self.address}", "--num-cpus=1", f"--memory={MEMORY}", core=core))

    def _joined(self, *options: str, core: int | None = None) -> subprocess.Popen[bytes]:
        """Once it has; Ray gives a node up that is not there within half a minute, as its first start on a busy machine may be."""
        there = self._started()
        for _ in range(3):
            node = self.start(*options, core=core)
            until(lambda node=node: self._started() > there or node.poll() is not None, 120)
            if self._started() > there:
                return node
        raise AssertionError((self.folder / "nodes.log").read_text("utf-8"))

    def _started(self) -> int:
        log = self.folder / "nodes.log"
        return log.read_text("utf-8").count("Ray runtime started") if log.exists() else 0

    def processes(self, what: str, under: subprocess.Popen[bytes] | None = None) -> list[psutil.Process]:
        """Processes of the cluster, or of one node, in whose command line this stands."""
        roots = [under] if under else [node for node in (self.head, *self.workers) if node]
        found: list[psutil.Process] = []
        for root in roots:
            try:
                below = psutil.Process(root.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            for process in below:
                try:
                    if what in " ".join(process.cmdline()):
                        found.append(process)
                except psutil.Error:
                    continue
        return found

    def kill_worker(self, number: int) -> None:
        """A machine that loses its power."""
        node = self.workers.pop(number)
        for process in [*self.processes("", node), psutil.Process(node.pid)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        node.wait()

    def stop(self) -> None:
        while self.workers:
            self.kill_worker(0)
        if self.head:
            self.workers = [self.head]
            self.kill_worker(0)


@contextmanager
def ray_cluster(folder: Path, workers: int, settings: Mapping[str, str] = MappingProxyType({})) -> Generator[RayCluster]:
    """`settings`: further variables of every node."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {
        **ENVIRONMENT,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "OMP_NUM_THREADS": "1",
        "RAY_raylet_start_wait_time_s": "120",
        **settings,
    }
    (port,) = free_ports(1)
    cluster = RayCluster(folder, port, environment)
    try:
        cluster.start_head()
        for _ in range(workers):
            cluster.add_worker()
        yield cluster
    finally:
        cluster.stop()
