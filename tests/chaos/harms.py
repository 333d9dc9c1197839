"""What is done to a client, a server or a connection, at a moment that a seed draws; each harm ends by itself and leaves the world whole."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chaos.proxy import Proxy
from chaos.world import Client, Service

_AWAY_S: Final = (0.5, 12.0)
"""How long a server is gone, stopped or unreachable: on both sides of the deadline of one call (`run.TIMEOUT_S`)."""
_FUSE_BYTES: Final = 700_000
"""A request of eight films has 525 kB: a cut falls into its head, its middle, or the answer."""


@dataclass
class Scene:
    """A run under way."""

    client: Client
    triton: Service
    milvus: Service
    to_triton: Proxy
    to_milvus: Proxy
    dice: random.Random
    disk: Disk | None = None

    def away(self) -> float:
        """Seconds."""
        return self.dice.uniform(*_AWAY_S)


@dataclass
class Disk:
    """A small file system for results and journal: full before the end, until it is made larger."""

    folder: Path

    def __enter__(self) -> Disk:
        self.folder.mkdir(parents=True)
        return self

    def mount(self, size: int) -> None:
        """Of `size` bytes."""
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.folder)], check=True)

    def grow(self) -> None:
        """Room for everything."""
        subprocess.run(["mount", "-o", "remount,size=256m", str(self.folder)], check=True)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=False, stderr=subprocess.DEVNULL)


def _kill_client(scene: Scene) -> None:
    scene.client.process.kill()


def _pause_client(scene: Scene) -> None:
    scene.client.process.send_signal(signal.SIGSTOP)
    time.sleep(scene.away())
    with contextlib.suppress(ProcessLookupError):
        scene.client.process.send_signal(signal.SIGCONT)


def _interrupt_client(scene: Scene) -> None:
    scene.client.process.send_signal(signal.SIGINT)


def _kill(service: Callable[[Scene], Service]) -> Callable[[Scene], None]:
    def harm(scene: Scene) -> None:
        service(scene).kill()
        time.sleep(scene.dice.uniform(0, 3))
        service(scene).bring_back()

    return harm


def _pause(service: Callable[[Scene], Service]) -> Callable[[Scene], None]:
    def harm(scene: Scene) -> None:
        service(scene).signal(signal.SIGSTOP)
        time.sleep(scene.away())
        service(scene).signal(signal.SIGCONT)
        service(scene).bring_back()  # Triton 2.51 at times ends itself after some seconds' stop

    return harm


def _cut(connection: Callable[[Scene], Proxy]) -> Callable[[Scene], None]:
    return lambda scene: connection(scene).cut(scene.dice.randrange(_FUSE_BYTES))


def _stall(connection: Callable[[Scene], Proxy]) -> Callable[[Scene], None]:
    def harm(scene: Scene) -> None:
        connection(scene).stall()
        time.sleep(scene.away())
        connection(scene).resume()

    return harm


def _throttle(connection: Callable[[Scene], Proxy]) -> Callable[[Scene], None]:
    def harm(scene: Scene) -> None:
        connection(scene).throttle(scene.dice.choice((5_000, 50_000, 200_000)))
        time.sleep(scene.away())
        connection(scene).resume()

    return harm


def _half_close(connection: Callable[[Scene], Proxy]) -> Callable[[Scene], None]:
    return lambda scene: connection(scene).half_close()


def _refuse(connection: Callable[[Scene], Proxy]) -> Callable[[Scene], None]:
    def harm(scene: Scene) -> None:
        connection(scene).refuse()
        time.sleep(scene.away())
        connection(scene).accept()

    return harm


def _triton(scene: Scene) -> Service:
    return scene.triton


def _milvus(scene: Scene) -> Service:
    return scene.milvus


def _to_triton(scene: Scene) -> Proxy:
    return scene.to_triton


def _to_milvus(scene: Scene) -> Proxy:
    return scene.to_milvus


DISK_FULL: Final = "disk full"
"""Of results and journal: the run begins on a small disk, which grows once a client has given up."""

HARMS: Final[dict[str, Callable[[Scene], None]]] = {
    "client killed": _kill_client,
    "client stopped": _pause_client,
    "client interrupted": _interrupt_client,
    "triton killed": _kill(_triton),
    "triton stopped": _pause(_triton),
    "milvus killed": _kill(_milvus),
    "milvus stopped": _pause(_milvus),
    "triton cut": _cut(_to_triton),
    "triton stalled": _stall(_to_triton),
    "triton throttled": _throttle(_to_triton),
    "triton half-closed": _half_close(_to_triton),
    "triton refused": _refuse(_to_triton),
    "milvus cut": _cut(_to_milvus),
    "milvus stalled": _stall(_to_milvus),
    "milvus throttled": _throttle(_to_milvus),
    "milvus half-closed": _half_close(_to_milvus),
    "milvus refused": _refuse(_to_milvus),
    DISK_FULL: lambda scene: None,
}
