"""The node with dcmtk's tools and hand-made peers: what it takes, what it refuses and with which status, and what a hostile peer costs."""

from __future__ import annotations

import io
import json
import re
import socket
import ssl
import struct
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid
from pynetdicom import AE, _config

from certificates import Certificates
from cxr_retrieval.errors import SetupError
from cxr_retrieval.pacs.node import (
    CANNOT_UNDERSTAND,
    MISMATCH,
    NO_ROOM,
    NOT_AUTHORISED,
    STORAGE_COMMITMENT,
    STORED,
    SYNTAXES,
    VERIFICATION,
    Node,
    NodeSettings,
)
from cxr_retrieval.pacs.rules import Rules
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.file_meta import IMPLEMENTATION
from cxr_retrieval.radiograph.syntaxes import DECODERS
from pacs.arriving import answered, listening, waiting
from pacs.peers import dcmtk, instances
from radiograph.test_syntaxes import CASES, picture

DX = "1.2.840.10008.5.1.4.1.1.1.1"


def rules(**said: Any) -> Rules:
    return Rules.model_validate(said)


def sent(node: Node, dataset: Dataset, *, caller: str = "CR1") -> Dataset:
    """One C-STORE; the response."""
    entity = AE(caller)
    entity.add_requested_context(DX, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    association = entity.associate("127.0.0.1", node.port, ae_title="CXR")
    assert association.is_established
    try:
        return association.send_c_store(dataset)
    finally:
        association.release()
        if association.dul.socket is not None and association.dul.socket.socket is not None:
            association.dul.socket.socket.close()  # pynetdicom leaves it open where the peer has left


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return instances(tmp_path / "films", 1)[0]


def test_echo(tmp_path: Path, reader: FilmReader) -> None:
    with listening(tmp_path, reader) as (node, _, _):
        assert dcmtk("echoscu", "-aec", "CXR", "127.0.0.1", node.port).returncode == 0
        refused = dcmtk("echoscu", "-aec", "OTHER", "127.0.0.1", node.port)
        assert refused.returncode
        assert "Called AE Title Not Recognized" in refused.stderr


def test_what_is_stored_arrives_byte_for_byte(tmp_path: Path, reader: FilmReader) -> None:
    films = instances(tmp_path / "films", 6, per_study=3)
    with listening(tmp_path, reader) as (node, arrivals, told):
        assert dcmtk("storescu", "-aet", "CR1", "-aec", "CXR", "127.0.0.1", node.port, *films).returncode == 0
        found = waiting(arrivals)
        assert told == ["received"] * 6
        assert {one.caller for one in found} == {"CR1"}
        for one, film in zip(found, films, strict=True):
            before, after = pydicom.dcmread(film), pydicom.dcmread(one.path)
            assert before == after
            assert one.header.get("PatientID") == before.PatientID
            assert one.path.stat().st_mode & 0o077 == 0


def test_twice_the_same_is_once(tmp_path: Path, reader: FilmReader, film: Path) -> None:
    with listening(tmp_path, reader) as (node, arrivals, told):
        dataset = pydicom.dcmread(film)
        assert [sent(node, dataset).Status for _ in range(3)] == [0, 0, 0]
        dataset.PatientName = "Corrected^Name"
        assert sent(node, dataset).Status == 0
        assert told == ["received", "again", "again", "again, changed"]
        (one,) = waiting(arrivals)
        assert one.header.get("PatientName") == "SYNTHETIC^PHANTOM"


def test_the_same_from_many_at_once_is_once(tmp_path: Path, reader: FilmReader, film: Path) -> None:
    with listening(tmp_path, reader) as (node, arrivals, told), ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: sent(node, pydicom.dcmread(film)).Status, range(8)))
        assert statuses == [0] * 8
        assert len(waiting(arrivals)) == 1
        assert sorted(told) == ["again"] * 7 + ["received"]


def test_a_caller_that_is_not_in_the_list_is_rejected(tmp_path: Path, reader: FilmReader, film: Path) -> None:
    with listening(tmp_path, reader, rules(node={"callers": ["CR1", "CR2"]})) as (node, arrivals, told):
        refused = dcmtk("storescu", "-aet", "STRANGER", "-aec", "CXR", "127.0.0.1", node.port, film)
        assert "Calling AE Title Not Recognized" in refused.stderr
        assert dcmtk("storescu", "-aet", "CR2", "-aec", "CXR", "127.0.0.1", node.port, film).returncode == 0
        assert told == ["rejected caller", "received"]
        assert arrivals.standing().tally == {"rejected caller": 1}


def test_an_ae_title_may_be_bound_to_an_address(tmp_path: Path, reader: FilmReader, film: Path) -> None:
    with listening(tmp_path, reader, rules(node={"addresses": {"CR1": "10.0.0.7", "CR2": "127.0.0.1"}})) as (node, _, told):
        assert sent(node, pydicom.dcmread(film)).Status == NOT_AUTHORISED
        assert sent(node, pydicom.dcmread(film), caller="CR2").Status == 0
        assert told == ["rejected address", "received"]


def test_an_instance_of_no_rule_is_refused(tmp_path: Path, reader: FilmReader, film: Path) -> None:
    with listening(tmp_path, reader, rules(rules=[{"name": "cr", "modalities": ["CR"]}])) as (node, arrivals, _):
        answer = sent(node, pydicom.dcmread(film))
        assert (answer.Status, answer.ErrorComment) == (NOT_AUTHORISED, "no rule of this node is for such an instance")
        assert waiting(arrivals) == []


def test_a_full_node_says_so_and_takes_it_later(tmp_path: Path, reader: FilmReader) -> None:
    first, second = (pydicom.dcmread(path) for path in instances(tmp_path / "films", 2))
    with listening(tmp_path, reader, most_waiting=1) as (node, arrivals, told):
        assert sent(node, first).Status == 0
        answer = sent(node, second)
        assert (answer.Status, answer.ErrorComment) == (NO_ROOM, "no room now: send it again later")
        arrivals.record([answered(waiting(arrivals)[0])])
        assert sent(node, second).Status == 0
        assert told == ["received", "rejected no room (queue)", "received"]


def test_a_full_disk_is_refused_with_a700(tmp_path: Path, reader: FilmReader, film: Path) -> None:
    with listening(tmp_path, reader, free_bytes=2**62) as (node, arrivals, _):
        assert sent(node, pydicom.dcmread(film)).Status == NO_ROOM
        assert waiting(arrivals) == []
        assert not list((tmp_path / "spool" / "incoming").iterdir())


def test_a_spool_that_breaks_confirms_nothing(tmp_path: Path, reader: FilmReader, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(tmp_path, reader) as (node, arrivals, told):
        monkeypatch.setattr(arrivals, "admit", lambda *_: 1 / 0)
        assert sent(node, pydicom.dcmread(film)).Status == NO_ROOM
        assert told == ["rejected failure"]


@pytest.mark.parametrize("element", ["StudyInstanceUID", "SeriesInstanceUID"])
def test_an_instance_that_nobody_could_file_is_refused(tmp_path: Path, reader: FilmReader, film: Path, element: str) -> None:
    dataset = pydicom.dcmread(film)
    del dataset[element]
    with listening(tmp_path, reader) as (node, _, told):
        answer = sent(node, dataset)
        assert (answer.Status, answer.ErrorComment) == (CANNOT_UNDERSTAND, "the data set cannot be read, or lacks a UID")
        assert told == ["rejected malformed"]


def test_an_instance_under_another_name_is_refused(tmp_path: Path, reader: FilmReader, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request has its UID of the file's meta information, which says something else than the data set."""
    dataset = pydicom.dcmread(film)
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.save_as(film, enforce_file_format=False)
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)
    with listening(tmp_path, reader) as (node, _, told):
        entity = AE("CR1")
        entity.add_requested_context(DX, ExplicitVRLittleEndian)
        association = entity.associate("127.0.0.1", node.port, ae_title="CXR")
        assert association.send_c_store(film).Status == MISMATCH
        association.release()
        assert told == ["rejected mismatch"]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda syntax: UID(syntax).name)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_film_of_every_syntax_is_taken_as_it_came_and_read(
    tmp_path: Path, reader: FilmReader, syntax: UID, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[syntax][0]
    kind = "u8" if case.kinds == ("u8",) else "u12" if "u12" in case.kinds else "u16"
    film, before = tmp_path / "film.dcm", case.write(picture(kind), int(kind[1:]), syntax, "MONOCHROME2")
    dataset = pydicom.dcmread(io.BytesIO(before))
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    pydicom.dcmwrite(film, dataset, enforce_file_format=True)
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)  # as it is: pydicom would write it anew
    with listening(tmp_path, reader) as (node, arrivals, _):
        entity = AE("CR1")
        entity.add_requested_context(DX, syntax)
        association = entity.associate("127.0.0.1", node.port, ae_title="CXR")
        assert association.send_c_store(film).Status == 0
        association.release()
        (one,) = waiting(arrivals)
        assert pydicom.dcmread(one.path, stop_before_pixels=True).file_meta.TransferSyntaxUID == syntax
        assert one.path.read_bytes().endswith(film.read_bytes()[-200:])
        assert (reader.read(one.path).square == reader.read(film).square).all()


def test_of_several_syntaxes_the_node_takes_explicit_little_endian(tmp_path: Path, reader: FilmReader) -> None:
    with listening(tmp_path, reader) as (node, _, _):
        entity = AE("CR1")
        entity.add_requested_context(DX, [ImplicitVRLittleEndian, JPEGBaseline8Bit, ExplicitVRLittleEndian])
        association = entity.associate("127.0.0.1", node.port, ae_title="CXR")
        assert [context.transfer_syntax for context in association.accepted_contexts] == [[ExplicitVRLittleEndian]]
        association.release()


def test_the_page_tells_which_syntaxes_are_accepted() -> None:
    page = (Path(__file__).parents[2] / "docs" / "hospital.md").read_text("utf-8")
    rows = re.findall(r"^\| [^|]+ \| (1\.2\.840\.10008\.1\.2[.0-9]*) \| yes \| no \|", page, re.MULTILINE)
    assert rows == [str(syntax) for syntax in SYNTAXES]
    for status in (NO_ROOM, MISMATCH, CANNOT_UNDERSTAND, NOT_AUTHORISED):
        assert f"| {status:04X}H |" in page
    for kind in (*STORED, VERIFICATION, STORAGE_COMMITMENT):
        assert f"| {kind} |" in page
    assert f"`{IMPLEMENTATION}`" in page


def test_contexts_are_those_that_are_read_here() -> None:
    assert set(SYNTAXES) == set(DECODERS)
    assert SYNTAXES[0] == ExplicitVRLittleEndian
    assert SYNTAXES[-1] == ImplicitVRLittleEndian
    assert len(STORED) == 3


def test_ct_is_not_accepted(tmp_path: Path, reader: FilmReader) -> None:
    with listening(tmp_path, reader) as (node, _, _):
        entity = AE("CT1")
        entity.add_requested_context("1.2.840.10008.5.1.4.1.1.2")
        entity.add_requested_context(VERIFICATION)
        association = entity.associate("127.0.0.1", node.port, ae_title="CXR")
        assert [context.abstract_syntax for context in association.accepted_contexts] == [VERIFICATION]
        association.release()


def test_too_many_associations_are_rejected_for_now(tmp_path: Path, reader: FilmReader) -> None:
    with listening(tmp_path, reader, rules(node={"associations": 2})) as (node, _, told):
        entity = AE("CR1")
        entity.add_requested_context(VERIFICATION)
        open_ones = [entity.associate("127.0.0.1", node.port, ae_title="CXR") for _ in range(2)]
        assert node.associations == 2
        third = entity.associate("127.0.0.1", node.port, ae_title="CXR")
        assert third.is_rejected
        assert getattr(third.acceptor.primitive, "result", None) == 2, "transient"
        for one in open_ones:
            one.release()
        until = time.monotonic() + 10
        while not (fourth := entity.associate("127.0.0.1", node.port, ae_title="CXR")).is_established and time.monotonic() < until:
            time.sleep(0.05)
        assert fourth.is_established
        fourth.release()
        assert told[0] == "rejected associations"


def test_a_storm_of_associations_loses_nothing_and_leaves_nothing_behind(tmp_path: Path, reader: FilmReader) -> None:
    films = [pydicom.dcmread(path) for path in instances(tmp_path / "films", 60)]
    with listening(tmp_path, reader, rules(node={"associations": 8})) as (node, arrivals, _):

        def insist(dataset: Dataset) -> int:
            while True:
                try:
                    return int(sent(node, dataset).Status)
                except AssertionError:  # rejected for now
                    time.sleep(0.05)

        with ThreadPoolExecutor(24) as pool:
            assert list(pool.map(insist, films)) == [0] * 60
        assert {one.header.instance for one in waiting(arrivals)} == {str(film.SOPInstanceUID) for film in films}
        until = time.monotonic() + 10
        while node.associations and time.monotonic() < until:
            time.sleep(0.05)
        assert node.associations == 0


# ---------------------------------------------------------------------------------------------- hostile peers


def connected(node: Node) -> socket.socket:
    return socket.create_connection(("127.0.0.1", node.port), 20)


def ended(peer: socket.socket) -> bool:
    """Whether the other side has closed it, or does within its patience."""
    peer.settimeout(20)
    try:
        while peer.recv(4096):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">BBL", 1, 0, 2**32 - 1),
        struct.pack(">BBL", 4, 0, 2**31) + b"x" * 100,
        struct.pack(">BBL", 1, 0, 200) + b"\xff" * 200,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 506,
    ],
)
def test_what_is_no_association_ends_soon_and_costs_nobody_else(tmp_path: Path, reader: FilmReader, said: bytes) -> None:
    with listening(tmp_path, reader, rules(node={"idle_s": 2})) as (node, _, _), connected(node) as peer:
        peer.sendall(said)
        assert dcmtk("echoscu", "-aec", "CXR", "127.0.0.1", node.port).returncode == 0
        assert ended(peer)


def test_silent_peers_hold_up_nobody_and_are_let_go(tmp_path: Path, reader: FilmReader) -> None:
    with listening(tmp_path, reader, rules(node={"associations": 4, "idle_s": 2})) as (node, _, told):
        silent = [connected(node) for _ in range(3)]
        half = connected(node)
        half.sendall(struct.pack(">BBL", 1, 0, 300)[:4])
        assert all(ended(peer) for peer in (*silent, half))
        assert dcmtk("echoscu", "-aec", "CXR", "127.0.0.1", node.port).returncode == 0
        for peer in (*silent, half):
            peer.close()
        crowd = [connected(node) for _ in range(24)]
        assert sum(ended(peer) for peer in crowd) == 24
        assert "rejected connections" in told
        for peer in crowd:
            peer.close()


def test_an_instance_that_is_larger_than_allowed_ends_the_association(tmp_path: Path, reader: FilmReader, film: Path) -> None:
    dataset = pydicom.dcmread(film)
    dataset.Rows, dataset.Columns = 1024, 1024
    dataset.PixelData = bytes(2 * 1024 * 1024)
    with listening(tmp_path, reader, rules(node={"instance_mib": 1})) as (node, arrivals, _):
        assert "Status" not in sent(node, dataset)
        assert waiting(arrivals) == []
        assert dcmtk("echoscu", "-aec", "CXR", "127.0.0.1", node.port).returncode == 0


def test_many_instances_in_one_association_are_not_one_large_one(tmp_path: Path, reader: FilmReader) -> None:
    films = instances(tmp_path / "films", 60)
    total = sum(path.stat().st_size for path in films)
    assert total > 1.1 * 2**20 > max(path.stat().st_size for path in films)
    with listening(tmp_path, reader, rules(node={"instance_mib": 1})) as (node, arrivals, _):
        assert dcmtk("storescu", "-aec", "CXR", "127.0.0.1", node.port, *films).returncode == 0
        assert len(waiting(arrivals)) == 60


# ---------------------------------------------------------------------------------------------- TLS


def test_tls_asks_every_caller_for_a_certificate(tmp_path: Path, reader: FilmReader, certificates: Certificates, film: Path) -> None:
    ours = ("+tls", certificates.path("client.key"), certificates.path("client.pem"))
    trusting = ("+cf", certificates.path("ours.pem"))
    with listening(tmp_path, reader, tls=certificates.tls("server")) as (node, arrivals, told):
        to = ("-aec", "CXR", "127.0.0.1", node.port)
        assert dcmtk("storescu", *ours, *trusting, *to, film).returncode == 0
        assert len(waiting(arrivals)) == 1
        assert dcmtk("echoscu", *to).returncode, "no TLS"
        assert dcmtk("echoscu", "+tla", *trusting, *to).returncode, "no certificate"
        stranger = ("+tls", certificates.path("stranger.key"), certificates.path("stranger.pem"))
        assert dcmtk("echoscu", *stranger, *trusting, *to).returncode, "a certificate of somebody else"
        assert "rejected handshake" in told
        stalled = [connected(node) for _ in range(3)]
        assert dcmtk("echoscu", *ours, *trusting, *to).returncode == 0, "handshakes that stall hold up nobody"
        for peer in stalled:
            peer.close()


def test_old_tls_is_not_spoken(tmp_path: Path, reader: FilmReader, certificates: Certificates) -> None:
    with listening(tmp_path, reader, tls=certificates.tls("server")) as (node, _, _):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        with connected(node) as plain, pytest.raises(ssl.SSLError):
            context.wrap_socket(plain)


# ---------------------------------------------------------------------------------------------- commitment, stopping


def promised(node: Node, *references: tuple[str, str], action: int = 1, transaction: str = "1.2.3.4") -> int:
    said = Dataset()
    said.TransactionUID = transaction
    said.ReferencedSOPSequence = []
    for sop_class, instance in references:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
        said.ReferencedSOPSequence.append(item)
    entity = AE("CR1")
    entity.add_requested_context(STORAGE_COMMITMENT)
    association = entity.associate("127.0.0.1", node.port, ae_title="CXR")
    status, _ = association.send_n_action(said, action, STORAGE_COMMITMENT, "1.2.840.10008.1.20.1.1")
    association.release()
    return int(status.Status)


DESTINATIONS = {"cr1": {"aet": "CR1", "host": "127.0.0.1", "port": 104}}


def test_storage_commitment_becomes_a_report_to_the_caller(tmp_path: Path, reader: FilmReader) -> None:
    with listening(tmp_path, reader, rules(destinations=DESTINATIONS)) as (node, arrivals, _):
        assert promised(node, (DX, "1.2.3"), (DX, "1.2.4")) == 0
        (parcel,) = arrivals.due("cr1", 9)
        assert parcel.kind == "commitment"
        assert json.loads(parcel.path.read_text()) == {"transaction": "1.2.3.4", "held": [], "missing": [[DX, "1.2.3"], [DX, "1.2.4"]]}


def test_commitment_that_cannot_be_reported_or_meant_is_refused(tmp_path: Path, reader: FilmReader) -> None:
    with listening(tmp_path, reader) as (node, _, _):
        assert promised(node, (DX, "1.2.3")) == 0x0110
    with listening(tmp_path, reader, rules(destinations=DESTINATIONS)) as (node, arrivals, _):
        assert promised(node, (DX, "1.2.3"), action=2) == 0x0123
        assert promised(node, (DX, "")) == 0x0115
        assert arrivals.due("cr1", 9) == []


def test_open_associations_may_end_when_it_stops(tmp_path: Path, reader: FilmReader) -> None:
    first, second = (pydicom.dcmread(path) for path in instances(tmp_path / "films", 2))
    with listening(tmp_path, reader) as (node, arrivals, _):
        entity = AE("CR1")
        entity.add_requested_context(DX, ExplicitVRLittleEndian)
        association = entity.associate("127.0.0.1", node.port, ae_title="CXR")
        assert association.send_c_store(first).Status == 0
        closing = threading.Thread(target=node.close, args=(20,))
        closing.start()
        time.sleep(0.5)
        with pytest.raises(OSError):
            connected(node)
        assert association.send_c_store(second).Status == 0
        association.release()
        closing.join(5)
        assert not closing.is_alive()
        assert len(waiting(arrivals)) == 2


def test_an_association_that_does_not_end_is_aborted(tmp_path: Path, reader: FilmReader) -> None:
    with listening(tmp_path, reader) as (node, _, _):
        entity = AE("CR1")
        entity.add_requested_context(VERIFICATION)
        association = entity.associate("127.0.0.1", node.port, ae_title="CXR")
        node.close(0.2)
        association.join(10)
        assert association.is_aborted


def test_an_address_that_is_taken_is_said_so(tmp_path: Path, reader: FilmReader) -> None:
    with (
        listening(tmp_path, reader) as (node, arrivals, _),
        pytest.raises(SetupError, match=f"no node can listen at 127.0.0.1, port {node.port}"),
    ):
        Node(NodeSettings("CXR", "127.0.0.1", node.port), Rules(), arrivals, reader)
