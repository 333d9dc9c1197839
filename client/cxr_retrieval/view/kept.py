"""What is held in memory while the page is served, and gone when it ends: uploaded files, and what was worked out of them."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Generic, TypeVar

from cxr_retrieval.errors import GoneError

UPLOADED_BYTES: Final = 2**29
"""Of uploaded files that are held at the same time."""

Name = TypeVar("Name")
Thing = TypeVar("Thing")


class Kept(Generic[Name, Thing]):
    """At most so many things; the one that was used longest ago goes first. Safe for threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._things: OrderedDict[Name, Thing] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: Name) -> Thing | None:
        """The thing, used just now; None where it is not, or no longer, here."""
        with self._lock:
            if name not in self._things:
                return None
            self._things.move_to_end(name)
            return self._things[name]

    def put(self, name: Name, thing: Thing) -> Thing:
        """Keeps it, in the place of what had the name before."""
        with self._lock:
            self._things[name] = thing
            self._things.move_to_end(name)
            if len(self._things) > self._most:
                self._things.popitem(last=False)
            return thing

    def get_or(self, name: Name, make: Callable[[], Thing]) -> Thing:
        """The thing, or what `make` makes of it; two that ask at once may both make it."""
        found = self.get(name)
        return self.put(name, make()) if found is None else found


class Uploads:
    """Files that have no place on a disk (memfd_create(2)), read by the path under which the kernel shows them to this user alone.

    The one that was used longest ago goes first. Safe for threads; `close` forgets all.
    """

    def __init__(self, most_bytes: int = UPLOADED_BYTES) -> None:
        self._most_bytes = most_bytes
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, data: bytes, name: str = "") -> str:
        """Keeps a file; by default it is called as its film will be (`Film.film_id`). Returns the name."""
        name = name or f"film-{hashlib.sha256(data).hexdigest()[:16]}"
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return name
            file = os.memfd_create("cxr-film")
            with os.fdopen(os.dup(file), "wb") as into:
                into.write(data)
            self._files[name] = file
            while len(self._files) > 1 and self._bytes() > self._most_bytes:
                os.close(self._files.popitem(last=False)[1])
        return name

    @contextmanager
    def lent(self, name: str) -> Generator[Path]:
        """Where the file can be read, until the block ends, whatever is forgotten meanwhile.

        Raises:
            GoneError: It is no longer here.
        """
        with self._lock:
            if name not in self._files:
                raise GoneError(
                    "this film is no longer in memory",
                    expected="one of the films dropped last since the page's server was started",
                    next_step="drop the file again",
                )
            self._files.move_to_end(name)
            held = os.dup(self._files[name])  # a number of its own: no other file can come to be read under it
        try:
            yield Path(f"/proc/{os.getpid()}/fd/{held}")
        finally:
            os.close(held)

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._files

    def close(self) -> None:
        """Forgets all files."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _bytes(self) -> int:
        return sum(os.fstat(file).st_size for file in self._files.values())
