"""Films in S3-compatible storage: which there are under a name, and a reader that fetches them first.

Through Arrow's file system for S3. Credentials, region and endpoint are found as every AWS tool finds them: AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, a profile, the role of a pod or machine; AWS_ENDPOINT_URL where the storage is not AWS. They never become arguments
of a process. A storage that does not answer is waited for, as servers are; a film that it refuses has failed, and others go on.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.errors import ImageError, StorageDownError
from cxr_retrieval.radiograph.decoding import DecodingLimits, FilmReader, Question, size_of
from cxr_retrieval.radiograph.files import (
    HEAD_BYTES,
    MAX_FILE_BYTES,
    OBJECT_SCHEME,
    SUFFIXES,
    base_name,
    is_dicom,
    is_left_out,
    is_object,
    object_key,
    object_path,
    printable,
)

_AT_ONCE: Final = 16
"""Objects on their way here; each answer of a storage takes tens of milliseconds, whatever its size."""
_PASSES: Final = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT|REQUEST_EXPIRED|HTTP status 5\d\d"
)
"""In the words of a failure that may be over a minute later."""
_PIECE: Final = 1 << 20

T = TypeVar("T")


class Storage:
    """A connection, made at the first use; thread-safe."""

    def find(self, uri: str, stop: threading.Event) -> Iterator[tuple[str, Path | ImageError]]:
        """Films under a name that ends in "/", one folder after the other, as a search of folders takes them up; else the object itself.

        Yields:
            Its name, and where it lies, or why it cannot be had.

        Raises:
            StorageDownError: It does not answer.
        """
        try:
            if not uri.endswith("/"):
                yield printable(uri), object_path(uri)
                return
            folders = [uri.removeprefix(OBJECT_SCHEME).rstrip("/")]
            while folders and not stop.is_set():
                below: list[str] = []
                for entry in self._listed(folders.pop()):
                    if is_left_out(base_name(entry.path)):
                        continue
                    if entry.type.name == "Directory":
                        below.append(entry.path)
                    elif self._can_be_film(entry.path):
                        yield printable(OBJECT_SCHEME + entry.path), object_path(OBJECT_SCHEME + entry.path)
                folders += sorted(below, reverse=True)
        except ImageError as error:
            yield printable(uri), error

    def fetch(self, path: Path, into: Path, name: str) -> None:
        """Writes an object into a file.

        Raises:
            ImageError: It is not there, is refused, or is too large.
            StorageDownError: The storage does not answer.
        """
        key = object_key(path)

        def copy() -> None:
            with self._files.open_input_file(key) as source, into.open("wb") as target:
                if source.size() > MAX_FILE_BYTES:
                    got, most = size_of(source.size()), size_of(MAX_FILE_BYTES)
                    raise ImageError(f"{name}: the file is too large", expected=f"at most {most}", got=got, next_step="give a radiograph")
                while piece := source.read(_PIECE):
                    target.write(piece)

        _asked(name, copy)

    @cached_property
    def _files(self) -> Any:
        from pyarrow import fs

        return fs.S3FileSystem(endpoint_override=_endpoint(), connect_timeout=10, request_timeout=60)

    def _listed(self, folder: str) -> list[Any]:
        from pyarrow import fs

        found: list[Any] = _asked(OBJECT_SCHEME + folder, lambda: self._files.get_file_info(fs.FileSelector(folder)))
        return sorted(found, key=lambda entry: entry.path)

    def _can_be_film(self, key: str) -> bool:
        """By its name; one without an ending is looked into."""
        suffix = Path(key).suffix.lower()
        if suffix:
            return suffix in SUFFIXES

        def head() -> bytes:
            with self._files.open_input_file(key) as source:
                return bytes(source.read(HEAD_BYTES))

        return is_dicom(_asked(OBJECT_SCHEME + key, head))


def _endpoint() -> str | None:
    """Of the storage; None: AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _asked(name: str, call: Callable[[], T]) -> T:
    """What a storage says, with its failures as ours."""
    try:
        return call()
    except FileNotFoundError as error:
        raise ImageError(
            f"{printable(name)}: is not there", expected="an object, or a name that ends in /", next_step="correct it"
        ) from error
    except OSError as error:
        said = " ".join(str(error).split())
        if _PASSES.search(said):
            raise StorageDownError(
                f"the storage at {_endpoint() or 'AWS'} does not answer", got=said[-200:], next_step="start it, or correct AWS_ENDPOINT_URL"
            ) from error
        raise ImageError(
            f"{printable(name)}: the storage refuses it",
            expected="an object that these credentials may read",
            got=said[-200:],
            next_step="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they are allowed",
        ) from error


class ObjectReader(FilmReader):
    """A FilmReader that also reads objects: each is fetched into a file of its own, which is gone when it has been read.

    Args:
        patience: With which a storage is waited for.
    """

    def __init__(self, limits: DecodingLimits, patience: Patience) -> None:
        super().__init__(limits)
        self._patience = patience
        self.storage = Storage()
        self._fetching = ThreadPoolExecutor(_AT_ONCE, "cxr-fetching")  # starts no thread before it is needed

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="cxr-objects-")

    def _ask(self, question: Question) -> Future[Any]:
        if not is_object(question.path):
            return super()._ask(question)
        answer: Future[Any] = Future()
        self._fetching.submit(self._fetch, question, answer)
        return answer

    def _fetch(self, question: Question, answer: Future[Any]) -> None:
        if not answer.set_running_or_notify_cancel():
            return
        name = base_name(object_key(question.path))
        try:
            descriptor, file = tempfile.mkstemp(dir=self._folder.name, suffix=Path(name).suffix[:16])
            os.close(descriptor)
            local = Path(file)
            try:
                self._patience.until("storage", lambda: self.storage.fetch(question.path, local, name))
                answer.set_result(super()._ask(replace(question, path=local, called=name)).result())
            finally:
                local.unlink(missing_ok=True)
        except BaseException as error:  # belongs to who asked, and this thread must live
            answer.set_exception(error)

    def close(self) -> None:
        """Also forgets what was fetched."""
        super().close()
        self._fetching.shutdown(wait=True, cancel_futures=True)
        if "_folder" in self.__dict__:
            self._folder.cleanup()

    def __enter__(self) -> ObjectReader:
        return self
