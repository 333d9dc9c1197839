"""Parcels reach real archives, each once; what is away or refuses is tried again, and given up in the end; nobody waits for another."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
import pytest
import requests
from pydicom.dataset import Dataset
from pydicom.uid import ComprehensiveSRStorage, ExplicitVRLittleEndian
from pynetdicom import AE, evt

from certificates import Certificates
from cxr_retrieval.archive.watching import Delivered
from cxr_retrieval.pacs import delivery as delivery_module
from cxr_retrieval.pacs.arrivals import Arrivals, Outgoing
from cxr_retrieval.pacs.delivery import Delivery
from cxr_retrieval.pacs.dicomweb import Web
from cxr_retrieval.pacs.dimse import Peer
from cxr_retrieval.pacs.node import STORAGE_COMMITMENT
from pacs.peers import instances, orthanc
from tests_support import free_ports, until


@contextmanager
def delivering(
    folder: Path, patience_s: float = 60, **destinations: Peer | Web
) -> Generator[tuple[Arrivals, list[tuple[str, str]], list[str]]]:
    """A spool whose parcels go out, what became of them, and what people are told."""
    seen: list[tuple[str, str]] = []
    told: list[str] = []

    def watch(event: object) -> None:
        assert isinstance(event, Delivered)
        seen.append((event.destination, event.outcome))

    with (
        Arrivals(folder / "spool", folder / "results.jsonl") as arrivals,
        Delivery(arrivals, destinations, "CXR", patience_s, tell=told.append, watch=watch),
    ):
        yield arrivals, seen, told


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "_FIRST_S", 0.1)
    monkeypatch.setattr(delivery_module, "_IDLE_S", 0.05)


def posted(arrivals: Arrivals, destination: str, *films: Path) -> None:
    for film in films:
        arrivals.post(Outgoing(destination, "report", film.read_bytes()))


def empty(arrivals: Arrivals) -> bool:
    return not arrivals.standing().to_send


class Archive:
    """A peer that answers as it is told to; `got`: SOP Instance UIDs."""

    def __init__(self, port: int, statuses: list[int], contexts: tuple[str, ...] = ("1.2.840.10008.5.1.4.1.1.1.1",)) -> None:
        self.got: list[str] = []
        self.reports: list[tuple[int | None, Dataset]] = []
        entity = AE("ARCHIVE")
        entity.acse_timeout = 2  # of a connection that says nothing: we look so whether a peer refuses us
        for context in contexts:
            entity.add_supported_context(context, ExplicitVRLittleEndian)
        entity.add_supported_context(STORAGE_COMMITMENT, scu_role=True, scp_role=True)

        def store(event: evt.Event) -> int:
            status = statuses.pop(0) if statuses else 0
            if status in (0, 0xB000):
                self.got.append(str(event.request.AffectedSOPInstanceUID))  # pyright: ignore[reportAttributeAccessIssue]
            return status

        def report(event: evt.Event) -> tuple[int, None]:
            self.reports.append((event.request.EventTypeID, event.event_information))  # pyright: ignore[reportAttributeAccessIssue]
            return 0, None

        handlers: list[Any] = [(evt.EVT_C_STORE, store), (evt.EVT_N_EVENT_REPORT, report)]
        self.server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves no thread behind, which other tests would count."""
        assert self.server is not None
        left = self.server.active_associations
        self.server.shutdown()
        for association in left:
            association.abort()
            association.join(10)


def peer(port: int, timeout_s: float = 5) -> Peer:
    return Peer("ARCHIVE", "127.0.0.1", port, timeout_s=timeout_s)


def test_a_real_archive_gets_everything_by_c_store_and_by_stow(tmp_path: Path) -> None:
    films = instances(tmp_path / "films", 40)
    with orthanc(tmp_path / "orthanc") as archive:
        to = {"dimse": Peer(archive.aet, "127.0.0.1", archive.port), "web": Web(archive.web)}
        with delivering(tmp_path, 60, **to) as (arrivals, seen, told):
            posted(arrivals, "dimse", *films[:30])
            posted(arrivals, "web", *films[30:])
            until(lambda: empty(arrivals) and len(seen) == 40)
            assert sorted(seen) == [("dimse", "sent")] * 30 + [("web", "sent")] * 10
            assert told == []
            assert arrivals.standing().tally == {"sent dimse": 30, "sent web": 10}
        there = {one["MainDicomTags"]["SOPInstanceUID"] for one in archive.find()}
        assert there == {str(pydicom.dcmread(film).SOPInstanceUID) for film in films}
    assert not list((tmp_path / "spool" / "outgoing").iterdir())


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # pynetdicom forgets a socket that did not connect
def test_an_archive_that_is_away_is_waited_for(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    films = instances(tmp_path / "films", 3)
    with delivering(tmp_path, archive=peer(port)) as (arrivals, seen, told):
        posted(arrivals, "archive", *films)
        until(lambda: ("archive", "postponed") in seen)
        with Archive(port, []) as archive:
            until(lambda: empty(arrivals))
            assert len(archive.got) == 3
        assert "archive does not take what it is sent" in told[0]
        assert "ARCHIVE@127.0.0.1" in told[0]
        until(lambda: len(told) == 2)
        assert told[1] == "archive takes what it is sent again"
        assert len(told) == 2, "said once, however often it was tried"


def test_a_slow_archive_holds_up_no_other(tmp_path: Path) -> None:
    away, port = free_ports(2)
    films = instances(tmp_path / "films", 2)
    with socket.create_server(("127.0.0.1", away)) as silent, Archive(port, []) as archive:
        assert silent
        with delivering(tmp_path, slow=peer(away, 3), archive=peer(port)) as (arrivals, _, _):
            posted(arrivals, "slow", films[0])
            posted(arrivals, "archive", films[1])
            until(lambda: len(archive.got) == 1, 2.5)


@pytest.mark.parametrize("status", [0xA700, 0xC000, 0x0110])
def test_what_is_refused_is_sent_again_and_the_others_first(tmp_path: Path, status: int) -> None:
    (port,) = free_ports(1)
    films = instances(tmp_path / "films", 3)
    with Archive(port, [status, status]) as archive, delivering(tmp_path, archive=peer(port)) as (arrivals, seen, _):
        posted(arrivals, "archive", *films)
        until(lambda: empty(arrivals) and seen.count(("archive", "sent")) == 3)
        assert sorted(archive.got) == sorted(str(pydicom.dcmread(film).SOPInstanceUID) for film in films)
        assert ("archive", "postponed") in seen


def test_a_warning_is_no_refusal(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with Archive(port, [0xB000]) as archive, delivering(tmp_path, archive=peer(port)) as (arrivals, seen, _):
        posted(arrivals, "archive", *instances(tmp_path / "films", 1))
        until(lambda: empty(arrivals) and bool(seen))
        assert seen == [("archive", "sent")]
        assert len(archive.got) == 1


def test_what_nobody_takes_is_given_up_and_kept(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    (film,) = instances(tmp_path / "films", 1)
    with Archive(port, [0xC000] * 99), delivering(tmp_path, 0.5, archive=peer(port)) as (arrivals, seen, _):
        posted(arrivals, "archive", film)
        until(lambda: arrivals.standing().given_up == {"archive": 1})
        until(lambda: seen[-1] == ("archive", "given up"))
    (kept,) = (tmp_path / "spool" / "outgoing").iterdir()
    assert kept.read_bytes() == film.read_bytes()


def test_a_class_that_is_not_accepted_holds_up_no_other(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    taken, other = instances(tmp_path / "films", 2)
    dataset = pydicom.dcmread(other)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = ComprehensiveSRStorage
    dataset.save_as(other)
    with Archive(port, []) as archive, delivering(tmp_path, 0.5, archive=peer(port)) as (arrivals, _, _):
        posted(arrivals, "archive", other, taken)
        until(lambda: bool(archive.got) and arrivals.standing().given_up == {"archive": 1})


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_file_that_somebody_took_away_holds_up_no_other(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    films = instances(tmp_path / "films", 2)
    with delivering(tmp_path, 0.5, archive=peer(port)) as (arrivals, seen, _):
        posted(arrivals, "archive", films[0])
        (gone,) = (tmp_path / "spool" / "outgoing").iterdir()
        gone.unlink()
        posted(arrivals, "archive", films[1])
        with Archive(port, []) as archive:
            until(lambda: bool(archive.got) and arrivals.standing().given_up == {"archive": 1})
            until(lambda: seen.count(("archive", "sent")) == 1)


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # pynetdicom forgets a socket that did not connect
def test_over_tls_with_our_certificate(tmp_path: Path, certificates: Certificates) -> None:
    (film,) = instances(tmp_path / "films", 1)
    with orthanc(tmp_path / "orthanc", tls=certificates) as archive:
        good = Peer(archive.aet, "127.0.0.1", archive.port, certificates.tls("client"))
        bad = Peer(archive.aet, "127.0.0.1", archive.port, certificates.tls("client", ca="theirs"), timeout_s=5)
        with delivering(tmp_path, good=good, bad=bad) as (arrivals, _, told):
            posted(arrivals, "good", film)
            until(lambda: empty(arrivals))
            posted(arrivals, "bad", film)
            until(lambda: bool(told))
            assert "bad does not take what it is sent" in told[0]
        assert len(archive.find()) == 1


@pytest.mark.parametrize(
    ("held", "missing", "kind"),
    [([["1.2.840.10008.5.1.4.1.1.1.1", "1.2.3"]], [], 1), ([], [["1.2.840.10008.5.1.4.1.1.1.1", "1.2.4"]], 2)],
)
def test_a_promise_is_reported(tmp_path: Path, held: list[list[str]], missing: list[list[str]], kind: int) -> None:
    (port,) = free_ports(1)
    said = {"transaction": "1.2.3.4", "held": held, "missing": missing}
    with Archive(port, []) as archive, delivering(tmp_path, archive=peer(port)) as (arrivals, _, _):
        arrivals.post(Outgoing("archive", "commitment", json.dumps(said).encode()))
        until(lambda: empty(arrivals))
        ((event, report),) = archive.reports
        assert (event, report.TransactionUID) == (kind, "1.2.3.4")
        named = report.FailedSOPSequence if missing else report.ReferencedSOPSequence
        assert [[item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID] for item in named] == (missing or held)
        assert [item.FailureReason for item in report.get("FailedSOPSequence", [])] == [0x0112] * len(missing)


def test_what_is_sent_is_the_file_as_it_is(tmp_path: Path) -> None:
    (film,) = instances(tmp_path / "films", 1)
    with orthanc(tmp_path / "orthanc") as archive:
        with delivering(tmp_path, archive=Peer(archive.aet, "127.0.0.1", archive.port)) as (arrivals, _, _):
            posted(arrivals, "archive", film)
            until(lambda: empty(arrivals))
        (there,) = archive.find()
        data = requests.get(f"{archive.http}/instances/{there['ID']}/file", timeout=20).content
        assert pydicom.dcmread(io.BytesIO(data)) == pydicom.dcmread(film)
