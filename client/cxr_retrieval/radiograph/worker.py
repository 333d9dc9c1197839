"""What a worker process does, which `decoding.py` starts and asks: it loads every decoder, and answers about a file at a time."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import resource
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import numpy as np

from cxr_retrieval.errors import CxrError, ImageError
from cxr_retrieval.radiograph.containers import ZipShelf, contents_of
from cxr_retrieval.radiograph.decoding import NO_MEMORY, Answer, Film, Identity, Question, size_of
from cxr_retrieval.radiograph.dicom import read_header
from cxr_retrieval.radiograph.files import HEAD_BYTES, MAX_FILE_BYTES, Contents, is_parquet, opened, unreadable
from cxr_retrieval.radiograph.greys import Greys, greys_of
from cxr_retrieval.radiograph.header import Header
from cxr_retrieval.radiograph.letterbox import letterbox, pixel_digest
from cxr_retrieval.radiograph.parquet import ParquetShelf
from cxr_retrieval.radiograph.reading import MIN_SIDE, read_patient_and_day, read_radiograph

_LOG_BYTES: Final = 2**16
"""What native libraries may print while one file is decoded; also the largest file a worker can write."""
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def work(connection: int, parent: int, memory_bytes: int) -> None:
    """The life of a worker: answers questions that come over a socket until its other end closes.

    Args:
        connection: File descriptor of the socket.
        parent: Process that started it, and that it must not outlive.
        memory_bytes: Address space it may use.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked to be told
        return
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, _LOG_BYTES),
        (resource.RLIMIT_CORE, 0),  # a core dump would hold patient data
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    logging.disable()  # pydicom logs what elements hold
    letterbox(np.zeros((MIN_SIDE, MIN_SIDE), np.uint8))  # the first of a process is slow
    shelves = _Shelves(ZipShelf(), ParquetShelf())
    with Connection(connection) as parent_end, contextlib.suppress(EOFError, OSError):
        parent_end.send(None)
        while True:
            parent_end.send(_answer(parent_end.recv(), shelves))


@dataclass(frozen=True)
class _Shelves:
    """Containers that were opened last."""

    zips: ZipShelf
    parquet: ParquetShelf


def _answer(question: Question, shelves: _Shelves) -> Answer:
    try:
        return Answer(_outcome(question, shelves))
    except CxrError as error:
        return Answer(error, spent=_ran_out_of_memory(error))
    except Exception as error:  # decoders raise anything on a damaged file
        damaged = ImageError(
            f"{question.name}: the file is damaged",
            expected="a complete image",
            got=" ".join(f"{type(error).__name__} {error}".split())[:300],
            next_step="copy or export the file again",
        )
        return Answer(damaged, spent=_ran_out_of_memory(error))


def _outcome(question: Question, shelves: _Shelves) -> Film | Greys | Identity | Header | bytes | Contents:
    started = time.monotonic()
    path, member = question.path, question.member
    if question.kind == "contents":
        return shelves.parquet.file(path).page(question.start) if _is_parquet(path) else contents_of(path, question.start, shelves.zips)
    data = _bytes(path) if member is None else (shelves.parquet.file(path) if _is_parquet(path) else shelves.zips.zip(path)).read(member)
    if question.kind == "identity":
        return Identity(hashlib.sha256(data).hexdigest(), *read_patient_and_day(data))
    if question.kind == "header":
        return read_header(data, question.name)
    if question.rules is not None:
        from cxr_retrieval.radiograph.deidentified import deidentified  # here, because it is rarely asked for, and its library an extra

        return deidentified(data, question.name, question.rules)
    radiograph = read_radiograph(data, question.name)
    if question.kind == "greys":
        return greys_of(radiograph)
    square, box = letterbox(radiograph.pixels)
    return Film(
        square,
        box,
        radiograph.format,
        radiograph.warnings,
        radiograph.patient_id,
        pixels=pixel_digest(square),
        file=hashlib.sha256(data).hexdigest(),
        seconds=time.monotonic() - started,
    )


def _is_parquet(path: Path) -> bool:
    with opened(path) as file:
        return is_parquet(file.read(HEAD_BYTES))


def _bytes(path: Path) -> bytes:
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise ImageError(
                    f"{path.name}: the file is too large",
                    expected=f"at most {size_of(MAX_FILE_BYTES)}",
                    got=size_of(size),
                    next_step="give a single radiograph",
                )
            return file.read(size)  # and no more: some files of /proc have no size, and no end
    except OSError as error:  # while it was read
        raise unreadable(path, error) from error


def _ran_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and _ran_out_of_memory(cause)
