"""Several Triton servers of the same weights, asked as one.

In the place of a bare client: `triton.py` knows no difference. Each request goes to the server that has the fewest of ours; one that cannot
be answered there goes to another. A server that is gone, stalls, fails again and again or serves other weights is left out, what it had is
asked elsewhere at once, and it is tried again ever more seldom, at random moments, so that clients do not come back to it all together. One
that is back gets one request, then two, then four.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from tritonclient.utils import InferenceServerException

from cxr_retrieval.contract import ENSEMBLE, MODEL_VERSION_PARAMETER
from cxr_retrieval.settings import DNS, Tls, TritonSettings

T = TypeVar("T")

_LOOK_S: Final = 0.25
"""Between two looks at all servers."""
_SILENT_S: Final = 2.0
"""A server that has requests and has answered none for so long is asked whether it lives."""
_ALIVE_S: Final = 2.0
"""It has so long to say so."""
_FIRST_S, _LONGEST_S = 0.5, 15.0
"""Before a server that was left out is tried again."""
_RESOLVED_S: Final = 30.0
"""How long the addresses of a name are believed."""
_FAULTS: Final = 3
"""In a row, after which a server is left out."""
_ELSEWHERE: Final = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL", "UNKNOWN", "NOT_FOUND"})
"""What another server may answer; all else is said of the request."""
_WIDE: Final = 64


@dataclass
class _Server:
    """One of them. `client` None: left out, until `due`.

    Attributes:
        open: Requests that it has. window: As many as it should have, while it is new.
        faults: Failures since it last answered. answered: When that was, or when it was taken in.
        pause_s: The last time before it was tried again.
    """

    address: str
    client: Any = None
    open: int = 0
    window: int = _WIDE
    faults: int = 0
    answered: float = 0.0
    due: float = 0.0
    pause_s: float = 0.0
    why: str = "not tried yet"
    looking: threading.Lock = field(default_factory=threading.Lock)

    def put_off(self, why: str) -> None:
        """It is tried again later, each time twice as late, and not at the same moment by everybody."""
        self.why = why
        self.pause_s = min(_LONGEST_S, 2 * self.pause_s or _FIRST_S)
        self.due = time.monotonic() + self.pause_s * random.uniform(0.5, 1.5)  # noqa: S311


class Balanced:
    """As `tritonclient.grpc.InferenceServerClient`, of which it has what `TritonClient` asks for; safe for threads.

    Args:
        connect: Opens a bare client of one server.
    """

    def __init__(self, settings: TritonSettings, connect: Callable[[TritonSettings], Any]) -> None:
        self._settings, self._connect = settings, connect
        self._lock = threading.Lock()
        self._version: str | None = None
        self._closed = threading.Event()
        self._servers: dict[str, _Server] = {}
        self._resolve()
        self._meet()
        self._watching = threading.Thread(target=self._watch, name="cxr-endpoints", daemon=True)
        self._watching.start()

    def close(self) -> None:
        """Closes all channels."""
        self._closed.set()
        self._watching.join()
        for server in self._servers.values():
            if server.client is not None:
                server.client.close()

    # ------------------------------------------------------------------------------------------ what TritonClient asks

    def infer(self, model: str, inputs: Any, **how: Any) -> Any:
        """A request to the server with the fewest."""
        return self._asked(lambda client: client.infer(model, inputs, **how))

    def is_model_ready(self, model: str, client_timeout: float | None = None) -> bool:
        """Of a server that is asked at all."""
        self._meet()
        return self._asked(lambda client: bool(client.is_model_ready(model, client_timeout=client_timeout)))

    def get_model_config(self, model: str, client_timeout: float | None = None) -> Any:
        """The same on all, as far as versions go."""
        return self._asked(lambda client: client.get_model_config(model, client_timeout=client_timeout))

    def get_model_repository_index(self, client_timeout: float | None = None) -> Any:
        """Of one of them."""
        return self._asked(lambda client: client.get_model_repository_index(client_timeout=client_timeout))

    def is_server_live(self, client_timeout: float | None = None) -> bool:
        """Whether any is."""
        self._meet()
        return self._asked(lambda client: bool(client.is_server_live(client_timeout=client_timeout)))

    # ------------------------------------------------------------------------------------------ choosing

    def _asked(self, call: Callable[[Any], T]) -> T:
        """The first answer; what the last one said, where no server has any.

        Raises:
            InferenceServerException: That.
        """
        tried: set[str] = set()
        last: InferenceServerException | None = None
        while (server := self._chosen(tried)) is not None:
            client = server.client
            if client is None:  # left out meanwhile
                self._done(server)
                continue
            tried.add(server.address)
            try:
                answer = call(client)
            except InferenceServerException as error:
                last = error
                status = str(error.status() or "").rpartition(".")[2]
                if status not in _ELSEWHERE:
                    raise
                self._doubt(server, client, status)
            except ValueError as error:  # gRPC, of a channel that was closed when the server was left out
                if server.client is client:
                    raise
                last = InferenceServerException(str(error), status="StatusCode.CANCELLED")
            else:
                self._well(server)
                return answer
            finally:
                self._done(server)
        raise last or InferenceServerException(self.why(), status="StatusCode.UNAVAILABLE")

    def _chosen(self, tried: Collection[str]) -> _Server | None:
        """The one with the fewest requests, by chance among several; a new one only as far as its window goes, if there is another."""
        with self._lock:
            usable = [one for one in self._servers.values() if one.client is not None and one.address not in tried]
            if not usable:
                return None
            roomy = [one for one in usable if one.open < one.window] or usable
            fewest = min(one.open for one in roomy)
            chosen = random.choice([one for one in roomy if one.open == fewest])  # noqa: S311
            if not chosen.open:
                chosen.answered = time.monotonic()
            chosen.open += 1
            return chosen

    def _done(self, server: _Server) -> None:
        with self._lock:
            server.open -= 1

    def _well(self, server: _Server) -> None:
        with self._lock:
            server.faults, server.answered = 0, time.monotonic()
            server.window = min(_WIDE, 2 * server.window)

    def _doubt(self, server: _Server, client: Any, status: str) -> None:
        """It has failed: is it there at all, or has it no room, which is no fault; and how often did it fail?"""
        if status == "RESOURCE_EXHAUSTED":
            return
        if not _lives(client):
            self._leave_out(server, client, "it does not answer")
        elif status != "UNAVAILABLE":  # which is what Triton says, too, when a queue is full
            with self._lock:
                server.faults += 1
                often = server.faults >= _FAULTS
            if often:
                self._leave_out(server, client, f"{status.lower().replace('_', ' ')}, {_FAULTS} times in a row")

    def _leave_out(self, server: _Server, client: Any, why: str) -> None:
        """What it has is cancelled, so that it is asked elsewhere."""
        with self._lock:
            if server.client is not client:
                return
            server.client, server.faults = None, 0
            server.put_off(why)
        client.close()

    def why(self) -> str:
        """What became of each server that was left out the last time."""
        with self._lock:
            return "; ".join(f"{one.address}: {one.why}" for one in self._servers.values() if one.client is None) or "no address"

    # ------------------------------------------------------------------------------------------ looking after them

    def _watch(self) -> None:
        resolved = time.monotonic()
        while not self._closed.wait(_LOOK_S):
            if time.monotonic() > resolved + _RESOLVED_S:
                self._resolve()
                resolved = time.monotonic()
            for server in list(self._servers.values()):
                client, now = server.client, time.monotonic()
                if client is None and now >= server.due:
                    self._meet_one(server)
                elif client is not None and server.open and now > server.answered + _SILENT_S and not _lives(client):
                    self._leave_out(server, client, "it has requests, and does not answer")

    def _meet(self) -> None:
        """Whoever is left out is tried now, if nobody is not."""
        if all(server.client is None for server in self._servers.values()):
            for server in list(self._servers.values()):
                self._meet_one(server)

    def _meet_one(self, server: _Server) -> None:
        """Takes it in if its models are ready and its weights those of the others."""
        with server.looking:
            if server.client is not None:
                return
            client = self._connect(self.settings_of(server.address))
            why = "its models are not ready"
            try:
                if client.is_model_ready(ENSEMBLE, client_timeout=_ALIVE_S):
                    config: Any = client.get_model_config(ENSEMBLE, client_timeout=_ALIVE_S)
                    version = config.config.parameters[MODEL_VERSION_PARAMETER].string_value
                    why = f"it serves the weights {version or 'of no name'}, and others {self._version}"
                    with self._lock:
                        self._version = self._version or version
                        if version == self._version:
                            server.client, server.answered = client, time.monotonic()
                            server.window = 1 if server.pause_s else _WIDE
                            server.pause_s = 0.0
                            return
            except InferenceServerException as error:
                why = str(error.status() or "no answer").rpartition(".")[2].lower().replace("_", " ")
            with contextlib.suppress(Exception):
                client.close()
            with self._lock:
                server.put_off(why)

    def _resolve(self) -> None:
        """The addresses of today; servers that are no longer among them get no more requests."""
        addresses: list[str] = []
        for address in self._settings.addresses:
            if not address.startswith(DNS):
                addresses.append(address)
                continue
            host, _, port = address.removeprefix(DNS).rpartition(":")
            with contextlib.suppress(OSError):  # a name server that is away: what was known is still believed
                found = {str(info[4][0]) for info in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)}
                addresses += [f"[{one}]:{port}" if ":" in one else f"{one}:{port}" for one in sorted(found)]
        if not addresses:
            return
        with self._lock:
            gone = [server for address, server in self._servers.items() if address not in addresses]
            self._servers = {address: self._servers.get(address) or _Server(address) for address in addresses}
        for server in gone:
            if server.client is not None:
                self._leave_out(server, server.client, "its name has other addresses now")

    def settings_of(self, address: str) -> TritonSettings:
        """The same for one server; where its address was found by name, its certificate is still for that name."""
        tls, names = self._settings.tls, [one for one in self._settings.addresses if one.startswith(DNS)]
        if tls is not None and not tls.server_name and names and address not in self._settings.addresses:
            tls = Tls(tls.ca, tls.certificate, tls.key, names[0].removeprefix(DNS).rpartition(":")[0])
        return replace(self._settings, url=address, tls=tls)


def _lives(client: Any) -> bool:
    try:
        return bool(client.is_server_live(client_timeout=_ALIVE_S))
    except (InferenceServerException, ValueError):
        return False
