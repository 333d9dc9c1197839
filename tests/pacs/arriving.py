"""What tests of a node share: headers without files, and a node that nobody answers for."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from pydicom.uid import generate_uid

from cxr_retrieval.pacs.arrivals import ANSWERED, Arrival, Arrivals, Outcome
from cxr_retrieval.pacs.node import Node, NodeSettings
from cxr_retrieval.pacs.rules import Rules
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.header import Header
from cxr_retrieval.settings import Tls


def header(**elements: str) -> Header:
    """Of a DX film with UIDs of its own."""
    return Header(
        {
            "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1",
            "SOPInstanceUID": generate_uid(),
            "StudyInstanceUID": "1.2.3",
            "SeriesInstanceUID": "1.2.3.4",
            "Modality": "DX",
            "BodyPartExamined": "CHEST",
            "PatientName": "Doe^Jane",
            **elements,
        }
    )


def admitted(arrivals: Arrivals, about: Header, data: bytes = b"a film", caller: str = "CR1", rule: str = "all") -> bool:
    """As a node does it."""
    with arrivals.partial(data) as partial:
        return arrivals.admit(partial, hashlib.sha256(data).hexdigest(), caller, rule, about)


def waiting(arrivals: Arrivals) -> list[Arrival]:
    """What a pipeline would be fed, until there is nothing for the moment."""
    found: list[Arrival] = []
    for one in arrivals.feed(threading.Event()):
        if one is None:
            break
        found.append(one)
    return found


def answered(arrival: Arrival, **parts: object) -> Outcome:
    return Outcome(arrival, ANSWERED, {"input": arrival.header.instance, "status": ANSWERED}, **parts)  # pyright: ignore[reportArgumentType]


@contextmanager
def listening(
    folder: Path, reader: FilmReader, rules: Rules | None = None, tls: Tls | None = None, **limits: int
) -> Generator[tuple[Node, Arrivals, list[str]]]:
    """A node, its spool, and what it tells; nothing of what comes is answered."""
    told: list[str] = []
    with (
        Arrivals(folder / "spool", folder / "results.jsonl", **limits) as arrivals,
        Node(NodeSettings("CXR", "127.0.0.1", 0, tls), rules or Rules(), arrivals, reader, told.append) as node,
    ):
        yield node, arrivals, told


def lines(path: Path) -> Iterable[str]:
    return path.read_text().splitlines()
