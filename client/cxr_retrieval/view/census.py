"""What the gallery holds, kept in memory for who types a filter or looks at all of it; read in a thread of its own."""

from __future__ import annotations

import threading
import time
from typing import Final

from cxr_retrieval.errors import ServiceError
from cxr_retrieval.gallery.completion import Snapshot
from cxr_retrieval.view.servers import Servers

_LOOK_AGAIN_S: Final = 10.0
"""After so long it is asked whether the gallery holds as many cases as before."""
_READ_AGAIN_S: Final = 600.0
"""After so long all is read again: facts may have been corrected."""


class Census:
    """The latest snapshot of a gallery; safe for threads."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._lock = threading.Lock()
        self._reading: threading.Thread | None = None
        self._closed = threading.Event()
        self._snapshot: Snapshot | None = None
        self._gallery: tuple[str, int] | None = None
        self._looked = self._read = -float("inf")

    def now(self) -> Snapshot | None:
        """The gallery as it was last read; None while it is read for the first time, or cannot be."""
        with self._lock:
            if self._reading is None and not self._closed.is_set() and time.monotonic() - self._looked > _LOOK_AGAIN_S:
                self._reading = threading.Thread(target=self._look, name="cxr-census", daemon=True)
                self._reading.start()
            return self._snapshot

    def close(self) -> None:
        """Reads no more."""
        self._closed.set()
        with self._lock:
            reading = self._reading
        if reading is not None:
            reading.join()

    def _look(self) -> None:
        try:
            with self._servers.reached() as reached:
                gallery = reached.store.collection, reached.store.count()
                if gallery != self._gallery or time.monotonic() - self._read > _READ_AGAIN_S:
                    snapshot = Snapshot.take(reached.store, lambda: not self._closed.is_set())
                    with self._lock:
                        self._snapshot, self._gallery, self._read = snapshot, gallery, time.monotonic()
        except ServiceError:
            pass  # whoever asks a question is told; the next look may find it back
        finally:
            with self._lock:
                self._looked, self._reading = time.monotonic(), None
