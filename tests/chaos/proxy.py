"""A TCP proxy that fails as networks do: it cuts in the middle of a message, stalls, slows down, half-closes, refuses; and it can record."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Final

_PIECE: Final = 1 << 14
"""Bytes forwarded at a time, so that a cut falls anywhere in a message."""


class Proxy:
    """Forwards connections to a port of this machine, in a thread of its own. Use as a context manager.

    Args:
        port: Where it listens.
        target: Where it connects to, each time anew: whoever listens there by then.
        record: Folder that gets every connection's bytes, a file for each direction; None: nothing is kept.
    """

    def __init__(self, port: int, target: int, record: Path | None = None) -> None:
        self.port, self._target, self._record = port, target, record
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._open = asyncio.Event()
        self._open.set()
        self._rate: float | None = None
        self._fuse: int | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._towards_clients: set[asyncio.StreamWriter] = set()
        self._connections = 0
        self.passed_bytes = 0

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self, after_bytes: int) -> None:
        """Resets every connection once so many further bytes have passed in either direction; the next ones are let through."""
        self._loop.call_soon_threadsafe(setattr, self, "_fuse", after_bytes)

    def stall(self) -> None:
        """Nothing passes, nothing is closed, until `resume`."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def throttle(self, bytes_per_s: float) -> None:
        """So many bytes a second for each direction of each connection, until `resume`."""
        self._loop.call_soon_threadsafe(setattr, self, "_rate", bytes_per_s)

    def resume(self) -> None:
        """Everything passes again, also what a fuse had been lit for."""
        self._loop.call_soon_threadsafe(self._pass_all)

    def half_close(self) -> None:
        """Clients hear no more on the connections there are, while what they say still passes."""
        self._call(self._half_close())

    def refuse(self) -> None:
        """Resets every connection and listens no more, until `accept`."""
        self._call(self._close())

    def accept(self) -> None:
        """Listens again, on the same port."""
        self._call(self._listen())

    def _call(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(timeout=30)

    def _pass_all(self) -> None:
        self._rate = self._fuse = None
        self._open.set()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._reset_all()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _reset_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _half_close(self) -> None:
        for writer in self._towards_clients:
            with contextlib.suppress(OSError, RuntimeError):
                writer.write_eof()

    async def _connected(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self._connections += 1
        number = self._connections
        self._writers.add(client)
        try:
            server_reader, server = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            client.transport.abort()
            self._writers.discard(client)
            return
        self._writers.add(server)
        self._towards_clients.add(client)
        try:
            await asyncio.gather(  # cancelled where the proxy closes
                self._pump(client_reader, server, f"{number:04d}-sent"), self._pump(server_reader, client, f"{number:04d}-received")
            )
        except asyncio.CancelledError:
            pass
        finally:
            for writer in (client, server):
                writer.transport.abort()
                self._writers.discard(writer)
            self._towards_clients.discard(client)

    async def _pump(self, source: asyncio.StreamReader, to: asyncio.StreamWriter, name: str) -> None:
        with contextlib.ExitStack() as kept, contextlib.suppress(OSError, RuntimeError):  # whichever end went away, the other learns it
            log = kept.enter_context((self._record / name).open("wb")) if self._record else None
            while piece := await source.read(_PIECE):
                await self._open.wait()
                if self._rate is not None:
                    await asyncio.sleep(len(piece) / self._rate)
                self.passed_bytes += len(piece)
                if log is not None:
                    log.write(piece)
                if self._fuse is not None:
                    self._fuse -= len(piece)
                    if self._fuse <= 0:
                        to.write(piece[: max(0, self._fuse + len(piece))])
                        await to.drain()
                        self._fuse = None
                        self._reset_all()
                        return
                to.write(piece)
                await to.drain()
            to.write_eof()
