"""An archive as its user names it, put together: how it is searched, how its films are fetched, and whether it answers at all."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import partial

from cxr_retrieval.errors import UsageError
from cxr_retrieval.pacs import dimse
from cxr_retrieval.pacs.dicomweb import Web, answered, opened, session
from cxr_retrieval.pacs.fetching import get_fetcher, move_fetcher, web_fetcher
from cxr_retrieval.pacs.pulling import Archive
from cxr_retrieval.pacs.searching import dimse_search, web_search
from cxr_retrieval.settings import Tls


@contextmanager
def on_the_web(
    url: str, tls: Tls | None, user: str, password: str, token: str, timeout_s: float, insecure: bool, connections: int
) -> Generator[Archive]:
    """By QIDO-RS and WADO-RS; options as of `Web`.

    Raises:
        SetupError: One of them is malformed.
    """
    web = Web(url, tls, user, password, token, timeout_s, insecure)

    def probe() -> None:
        with answered(web), opened(web, 1) as client:
            client.search_for_studies(limit=1)

    with session(web, connections) as through:
        yield Archive(partial(web_search, web), web_fetcher(web, through), probe)


@contextmanager
def by_dimse(
    address: str, tls: Tls | None, timeout_s: float, calling: str, *, get: bool = False, move_port: int | None = None
) -> Generator[Archive]:
    """By C-FIND, and C-GET or C-MOVE to a port of ours.

    Raises:
        SetupError: An address or AE title is malformed, or the port cannot be listened on.
        UsageError: Neither, or both.
    """
    peer, calling = dimse.peer(address, tls, timeout_s), dimse.checked_title(calling, "--calling")
    if get == (move_port is not None):
        raise UsageError(
            "how films come from --peer", expected="one of --get and --move-port", got="both" if get else "neither", next_step="give one"
        )

    def probe() -> None:
        with dimse_search(peer, calling):
            pass

    fetcher = nullcontext(get_fetcher(peer, calling)) if move_port is None else move_fetcher(peer, calling, move_port)
    with fetcher as connect:
        yield Archive(partial(dimse_search, peer, calling), connect, probe)
