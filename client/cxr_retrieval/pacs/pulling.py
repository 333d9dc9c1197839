"""An archive searched and its instances fetched, at once: one that cannot be had is noted, an archive that goes away is waited for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.archive.watching import Expected, Failed, Settled
from cxr_retrieval.errors import CxrError, ImageError, PeerDownError, PeerError, SetupError
from cxr_retrieval.pacs.fetching import Connect, Fetch
from cxr_retrieval.pacs.pulled import FAILED, PENDING, THERE, Found, Pulled
from cxr_retrieval.pacs.searching import Search, Wanted
from cxr_retrieval.radiograph.decoding import FilmReader

_ATTEMPTS: Final = 3
"""For one instance, while the archive answers other questions."""
_SLICE_S: Final = 0.1
SERVICE: Final = "archive"
"""What watchers and people are told it is."""


@dataclass(frozen=True)
class Archive:
    """How one is reached.

    Attributes:
        search: Entered for a search, anew after a PeerDownError. connect: The same for fetching, by each thread.
        probe: Returns if it answers at all.
    """

    search: Callable[[], AbstractContextManager[Search]]
    connect: Connect
    probe: Callable[[], None]


def pull(
    archive: Archive,
    wanted: Wanted,
    pulled: Pulled,
    reader: FilmReader,
    patience: Patience,
    *,
    workers: int = 4,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
    found: Callable[[int, bool], None] = lambda count, all_found: None,
) -> tuple[bool, int]:
    """Searches, and fetches what is pending; ends early, with nothing lost, once `patience.stop` is set.

    Args:
        reader: Says of each file which instance it is.
        workers: Fetch so many at a time.
        limit: Of instances in the folder, those of earlier runs included.
        found: Told how many are known so far, and whether these are all.

    Returns:
        Whether the search came to its end and nothing is pending; the bytes fetched.

    Raises:
        PeerError: The archive refuses us, or was away for longer than patience lasts.
        SetupError: The folder cannot be written to, or the archive not told where to send to.
    """
    return _Pull(archive, wanted, pulled, reader, patience, limit, advance, found).run(workers)


class _Pull:
    def __init__(
        self,
        archive: Archive,
        wanted: Wanted,
        pulled: Pulled,
        reader: FilmReader,
        patience: Patience,
        limit: int | None,
        advance: Callable[[int], None],
        found: Callable[[int, bool], None],
    ) -> None:
        self._archive, self._wanted, self._pulled, self._reader, self._patience = archive, wanted, pulled, reader, patience
        self._limit, self._advance, self._found = limit, advance, found
        self._ended = threading.Event()
        self._probing, self._taking, self._counting = threading.Lock(), threading.Lock(), threading.Lock()
        self._bytes = 0

    def run(self, workers: int) -> tuple[bool, int]:
        with ThreadPoolExecutor(workers + 1, "cxr-pull") as pool:
            search = pool.submit(self._search)
            pending = self._pending(search)
            every: list[Future[Any]] = [search, *(pool.submit(self._work, pending) for _ in range(workers))]
            try:
                wait(every, return_when=FIRST_EXCEPTION)
            finally:
                self._ended.set()
        for task in every:
            task.result()
        return search.result() and not self._pulled.counts()[PENDING], self._bytes

    @property
    def _over(self) -> bool:
        return self._ended.is_set() or self._patience.stop.is_set()

    # ------------------------------------------------------------------------------------------------------ search

    def _search(self) -> bool:
        """Whether it came to its end. Begun anew where the archive went away, but for the studies that were looked into."""
        known, looked_into = sum(self._pulled.counts().values()), set[str]()
        attempts, before = 0, 0
        while not self._over:
            try:
                with self._archive.search() as search:
                    for study in search.studies(self._wanted):
                        if self._over:
                            return False
                        if self._limit is not None and known >= self._limit:
                            break
                        if study not in looked_into:
                            instances = search.instances(study, self._wanted)
                            known += self._pulled.add(instances, None if self._limit is None else self._limit - known)
                            looked_into.add(study)
                            self._found(known, False)
            except PeerDownError as error:
                attempts = 1 if len(looked_into) > before else attempts + 1
                before = len(looked_into)
                if not self._was_away(error) and attempts == _ATTEMPTS:
                    raise
            else:
                self._found(known, True)
                self._patience.watch(Expected(self._pulled.counts()[PENDING]))
                return True
        return False

    def _pending(self, search: Future[bool]) -> Iterator[Found]:
        """What is to be fetched, and what the search still adds."""
        last = 0
        while True:
            searched = search.done()
            for number, found in self._pulled.pending(last):
                last = number
                yield found
            if searched or self._over:
                return
            wait([search], timeout=_SLICE_S)

    # ------------------------------------------------------------------------------------------------------- fetch

    def _work(self, pending: Iterator[Found]) -> None:
        with ExitStack() as connection:
            fetch: Fetch | None = None
            while not self._over:
                with self._taking:
                    found = next(pending, None)
                if found is None:
                    return
                if self._pulled.has(found):
                    self._settled(THERE)
                    continue
                attempts = 0
                while attempts < _ATTEMPTS and not self._over:
                    try:
                        if fetch is None:
                            fetch = connection.enter_context(self._archive.connect())
                        self._fetch(fetch, found)
                        break
                    except ImageError as error:
                        self._fail(found, error)
                        break
                    except PeerError as error:
                        if fetch is None and not error.may_pass:
                            raise
                        fetch = None
                        connection.close()
                        attempts += not self._was_away(error)
                        if attempts and (attempts == _ATTEMPTS or not error.may_pass) and not self._over:
                            self._fail(found, error)
                            break

    def _fetch(self, fetch: Fetch, found: Found) -> None:
        partial: Path | None = None
        try:
            partial = self._pulled.partial(found)
            fetch(found, partial)
            header = self._reader.header(partial, found.name).result()
            if header.instance != found.instance:
                raise ImageError(
                    f"{found.name}: another instance than was asked for",
                    expected="the SOP Instance UID that the archive itself named",
                    got="another one",
                    next_step="see the archive's log",
                )
            size = self._pulled.keep(found, partial)
        except OSError as error:
            raise SetupError(
                f"{self._pulled.out}: an instance cannot be written",
                expected="room on the disk",
                got=error.strerror or type(error).__name__,
                next_step="repair that, then give the same command again: it goes on where it was",
            ) from error
        finally:
            if partial is not None:
                partial.unlink(missing_ok=True)
        with self._counting:
            self._bytes += size
        self._settled(THERE)

    def _fail(self, found: Found, error: CxrError) -> None:
        self._pulled.fail(found, str(error))
        self._patience.watch(Failed(error))
        self._settled(FAILED)

    def _settled(self, state: str) -> None:
        self._advance(1)
        self._patience.watch(Settled(Counter({state: 1})))

    def _was_away(self, error: PeerError) -> bool:
        """Waits until the archive answers, one thread for all. One that does at once has nothing against us: it was this instance, or a
        moment.

        Raises:
            PeerError: It refuses us, or patience has ended.
        """
        with self._probing:
            if self._over:
                return True
            try:
                self._archive.probe()
            except PeerDownError as away:
                try:
                    self._patience.until(SERVICE, self._archive.probe, self._ended, because=away)
                except PeerDownError:
                    if not self._over:
                        raise
                return True
        if error.may_pass:
            self._patience.stop.wait(_SLICE_S)
        return False
