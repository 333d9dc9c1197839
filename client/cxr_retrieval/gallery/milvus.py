"""A connection to Milvus, Lite or a server, whose failures come out as ours."""

from __future__ import annotations

import logging
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import grpc
from pymilvus import MilvusClient
from pymilvus.exceptions import ConnectError, MilvusException
from threadpoolctl import threadpool_limits

from cxr_retrieval.errors import StoreAccessError, StoreDownError, StoreError, StoreFullError, UsageError
from cxr_retrieval.handshake import refusal
from cxr_retrieval.settings import MilvusSettings, Tls

_NULLABLE_SINCE: Final = (2, 5)
_QUIET: Final = {"grpc.keepalive_time_ms": 330_000, "grpc.keepalive_permit_without_calls": 0}
"""gRPC servers close a connection that pings more than every five minutes while nothing is asked ("too many pings", Milvus Lite's does);
pymilvus would every ten seconds. A dead peer is noticed by the deadline of each call.
"""
_CONNECT_FAILED: Final = 2
"""Code of a MilvusException: no server there, or credentials refused while connecting (then its cause has the gRPC status)."""
_NOT_LOADED: Final = 101
"""Code of a MilvusException: the collection is there, but not in memory; so it is after Milvus Lite has been started anew."""
_TAKES_NO_MORE: Final = frozenset({3, 4, 7, 8, 9})
"""Its codes since 2.3 (pkg/util/merr): memory, requests, disk, rate, quota."""


@contextmanager
def connected(settings: MilvusSettings, where: str = "") -> Generator[Any]:
    """A client for a while, with its failures translated; `where` is the clause that they may be about."""
    client: Any = connect(settings)
    try:
        with translated(settings, where):
            yield client
    finally:
        close(client, settings)


def connect(settings: MilvusSettings) -> MilvusClient:
    """Opens a client.

    Raises:
        StoreAccessError: It refuses us, or its certificate is not accepted.
        StoreError: Down, or locked.
    """
    if settings.is_lite:
        _refuse_locked(Path(settings.uri))
    elif refused := _refusal(settings):  # before pymilvus tries again and again, up to the deadline
        raise refused
    tls = settings.tls or Tls()
    mutual = tls.certificate is not None
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs the stack of every failure, all of which become ours
    with translated(settings):
        return MilvusClient(
            settings.uri,
            user=settings.user,
            password=settings.password,
            token=settings.token,
            db_name=settings.database,
            timeout=settings.timeout_s,
            grpc_options=_QUIET,
            dedicated=True,  # else it would stay open, and serve whoever names the same address and token, whatever his certificate
            # pymilvus has two names for the authority: with the one it shows no certificate of ours, without ours it ignores the other
            server_pem_path="" if mutual else str(tls.ca or ""),
            ca_pem_path=str(tls.ca or "") if mutual else "",
            client_pem_path=str(tls.certificate or ""),
            client_key_path=str(tls.key or ""),
            server_name=tls.server_name,
        )


def _refusal(settings: MilvusSettings) -> StoreAccessError | None:
    """What keeps us from a server that is there."""
    if settings.is_lite or settings.uri.startswith("unix:"):
        return None
    refused = refusal(*settings.host_and_port, (settings.tls or Tls()) if settings.secure else None, min(5.0, settings.timeout_s))
    if refused is None:
        return None
    how = "https:// in --milvus, --milvus-ca" if not settings.secure else "--milvus-…"
    return StoreAccessError(f"no trusted connection to Milvus at {settings.uri}", got=refused.why, next_step=f"{refused.next_step} ({how})")


def close(client: MilvusClient, settings: MilvusSettings) -> None:
    """Closes a client and, for Milvus Lite, releases the folder."""
    client.close()
    if settings.is_lite:
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(settings.uri)


def _refuse_locked(folder: Path) -> None:
    """Pymilvus says only "Open local milvus failed"; open the folder once ourselves to learn why."""
    from milvus_lite.db import MilvusLite
    from milvus_lite.exceptions import DataDirLockedError

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        MilvusLite(str(folder)).close()
    except DataDirLockedError as error:
        raise StoreError(
            f"{folder}: another process has this gallery open",
            expected="one process at a time for a Milvus Lite file",
            next_step="stop that process, or share the gallery through `cxr serve`",
        ) from error
    except Exception as error:
        raise StoreError(
            f"{folder}: not a usable Milvus Lite folder", got=str(error)[:200], next_step="give another path ending in .db"
        ) from error


def is_lite(client: MilvusClient) -> bool:
    """Whether Milvus Lite answers there, in this process or behind `cxr serve`."""
    return str(client.get_server_version()).startswith("milvus_lite")


def release_of(client: MilvusClient) -> tuple[int, int]:
    """Major and minor version of a server; (0, 0) of Milvus Lite, and of what does not say."""
    match = re.match(r"v?(\d+)\.(\d+)", str(client.get_server_version()))
    return (0, 0) if match is None else (int(match[1]), int(match[2]))


def has_nullable(client: MilvusClient) -> bool:
    """Whether fields may be null there: Milvus Lite, and servers from 2.5 on."""
    return is_lite(client) or release_of(client) >= _NULLABLE_SINCE


def one_blas_thread() -> threadpool_limits:
    """While it is open, NumPy of this process multiplies on one thread; for a process in which Milvus Lite searches.

    Milvus Lite compares with every case by a product of NumPy's. The other threads of OpenBLAS, of no use in it, wait for the next by
    spinning: a search of 5,000 cases took 77 ms of CPU time instead of 13, and no less time (two cores), and the networks beside it had
    to do without them.
    """
    return threadpool_limits(1, user_api="blas")


class translated:  # noqa: N801 (read as a verb at its uses)
    """Turns Milvus' exceptions into ours, by what the caller was doing rather than by their text."""

    def __init__(self, settings: MilvusSettings, where: str = "") -> None:
        self._settings = settings
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, grpc.RpcError | grpc.FutureTimeoutError):  # pymilvus passes some on as they are, deadlines above all
            raise self._explained(_status(error), self._reason(str(error))) from error
        if not isinstance(error, MilvusException):
            return
        reason = self._reason(str(error.message))
        if error.code == _NOT_LOADED:
            raise StoreDownError(
                f"Milvus at {self._settings.uri} has been started anew",
                got=reason,
                next_step="give the command again: it loads the gallery",
            ) from error
        if self._where and _is_expression_error(error):
            raise UsageError(
                f"the filter {self._where!r} is not understood",
                expected="a Milvus boolean expression",
                got=reason,
                next_step="for example --where 'age > 60 and sex == \"F\"'",
            ) from error
        if error.code in _TAKES_NO_MORE:
            raise StoreFullError(
                f"Milvus at {self._settings.uri} takes nothing more now",
                expected="room on its disk, in its memory and in its quota",
                got=reason,
                next_step="make room there",
            ) from error
        raise self._explained(_status(error), reason) from error

    def _reason(self, said: str) -> str:
        return self._settings.without_secrets(" ".join(said.split()))[:300]

    def _explained(self, status: grpc.StatusCode, reason: str) -> StoreError:
        uri = self._settings.uri
        if status is grpc.StatusCode.UNAVAILABLE:
            if refused := _refusal(self._settings):
                return refused
            return StoreDownError(f"no Milvus answers at {uri}", got=reason, next_step="start one with `cxr serve`, or give --milvus")
        if status is grpc.StatusCode.DEADLINE_EXCEEDED:
            return StoreDownError(
                f"Milvus at {uri} took too long",
                expected=f"an answer within {self._settings.timeout_s:g} s",
                got=reason,
                next_step="give a longer --timeout, or look at the server's load",
            )
        if status in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return StoreAccessError(
                f"Milvus at {uri} refused access",
                expected="other credentials" if self._settings.token or self._settings.password else "credentials, and none were sent",
                got=reason,
                next_step="give --milvus-token-file, or --milvus-user and --milvus-password-file",
            )
        return StoreError(f"Milvus at {uri} cannot do this", got=reason, next_step="see the reason, and the server's log")


def _status(error: BaseException) -> grpc.StatusCode:
    """Of what pymilvus raises: a gRPC status that it passes on or wraps, or its own failure to connect, whose cause may have one."""
    cause = error.__cause__
    if getattr(error, "code", None) == _CONNECT_FAILED and isinstance(cause, grpc.RpcError):
        return _status(cause)
    if isinstance(error, grpc.FutureTimeoutError | ConnectError) or getattr(error, "code", None) == _CONNECT_FAILED:
        return grpc.StatusCode.UNAVAILABLE
    code: Any = getattr(error, "code", None)
    code = code() if callable(code) else code
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


@contextmanager
def silent(module: str) -> Generator[None]:
    """What pymilvus logs in one of its modules about calls that end as they should does not reach the user."""
    logger = logging.getLogger(module)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _is_expression_error(error: MilvusException) -> bool:
    """Milvus Lite: code 6 (illegal argument); server: 1100 (invalid parameter) or 65535 with an expression in the request."""
    return error.code in (6, 1100, 65535)
