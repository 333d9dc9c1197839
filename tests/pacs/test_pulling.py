"""Films pulled out of real archives: Orthanc by DICOMweb and DIMSE, dcmtk's dcmqrscp; and out of servers that answer as none should."""

from __future__ import annotations

import json
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import UID
from typer.testing import CliRunner

from certificates import LOCAL, Certificates
from cxr_retrieval.archive.patience import Patience
from cxr_retrieval.cli.app import app
from cxr_retrieval.errors import PeerDownError, PeerError, SetupError, UsageError
from cxr_retrieval.pacs import dicomweb, searching
from cxr_retrieval.pacs.archives import by_dimse, on_the_web
from cxr_retrieval.pacs.pulled import Found, Pulled
from cxr_retrieval.pacs.pulling import Archive, pull
from cxr_retrieval.pacs.searching import Wanted, prior_to
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.settings import Tls
from pacs.peers import Orthanc, answering, dcmtk, instances, orthanc, passing, says, secured
from tests_support import ENVIRONMENT, at_a_terminal, cxr_command, free_ports, run_cxr

pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed <(ssl.SSL|)[sS]ocket:ResourceWarning")
"""pynetdicom forgets the socket of a connection that failed."""
USERS = {"reader": "planted-71c0e2"}
UTF8: Mapping[str, Any] = {"SpecificCharacterSet": "ISO_IR 192"}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "dx": {"count": 12, "per_study": 2},
    "cr": {"count": 4, "Modality": "CR", "StudyDate": "20210505", "StudyDescription": "Röntgen Thorax p.a."},
    "hand": {"count": 3, "BodyPartExamined": "HAND"},
    "mg": {"count": 2, "Modality": "MG"},
}


def made(folder: Path) -> dict[str, list[Path]]:
    return {kind: instances(folder / kind, **UTF8, **options) for kind, options in KINDS.items()}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    return made(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def move_port() -> int:
    return free_ports(1)[0]


@pytest.fixture(scope="module")
def archive(films: dict[str, list[Path]], move_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with orthanc(tmp_path_factory.mktemp("archive"), modalities={"cxr": ("CXR", LOCAL, move_port)}) as running:
        running.upload(*(path for paths in films.values() for path in paths))
        yield running


@contextmanager
def dcmqrscp(folder: Path, films: list[Path], move_port: int) -> Generator[str]:
    """dcmtk's archive with these films in it; its address."""
    (port,) = free_ports(1)
    (folder / "base").mkdir(parents=True)
    (folder / "dcmqrscp.cfg").write_text(
        f"NetworkTCPPort = {port}\nMaxPDUSize = 16384\nMaxAssociations = 16\n"
        f"HostTable BEGIN\ncxr = (CXR, {LOCAL}, {move_port})\nHostTable END\nVendorTable BEGIN\nVendorTable END\n"
        f"AETable BEGIN\nDCMTK {folder / 'base'} RW (500, 1024mb) ANY\nAETable END\n"
    )
    with subprocess.Popen(["dcmqrscp", "-c", str(folder / "dcmqrscp.cfg")], stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                if dcmtk("echoscu", "-aec", "DCMTK", LOCAL, port).returncode == 0:
                    break
                time.sleep(0.05)
            assert dcmtk("storescu", "-aec", "DCMTK", LOCAL, port, *films).returncode == 0
            yield f"DCMTK@{LOCAL}:{port}"
        finally:
            process.kill()


def web(url: str, timeout_s: float = 20.0) -> AbstractContextManager[Archive]:
    return on_the_web(url, None, "", "", "", timeout_s, insecure=False, connections=4)


def pulled(
    opened: AbstractContextManager[Archive],
    out: Path,
    reader: FilmReader,
    wanted: Wanted,
    *,
    patience_s: float = 20,
    limit: int | None = None,
) -> dict[str, int]:
    """State → how many, after a pull that came to its end."""
    with opened as archive, Pulled(out, wanted.of_journal()) as into:
        complete, _ = pull(archive, wanted, into, reader, Patience(threading.Event(), patience_s), limit=limit)
        assert complete
        return into.counts()


def cxr(*arguments: str | Path) -> tuple[str, str]:
    """What a command says on stdout and stderr, without a process of its own; the error that ended it on the latter."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.stdout, done.stderr + (f"{type(done.exception).__name__}: {done.exception}" if done.exception else "")


def uids(paths: list[Path]) -> set[str]:
    return {str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in paths}


def in_folder(out: Path) -> set[str]:
    return uids(sorted(out.glob("*.dcm")))


def test_a_folder_of_films_that_names_nobody(archive: Orthanc, films: dict[str, list[Path]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_cxr("pull", "--web", archive.web, "--out", out, "--body-part", "CHEST", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["found"], said["pulled"], said["already_there"], said["failed"]) == (16, 16, 0, 0)
    assert said["bytes"] == sum(path.stat().st_size for path in out.glob("*.dcm"))
    assert in_folder(out) == uids([*films["dx"], *films["cr"]])
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o600}
    assert all(re.fullmatch(r"[0-9a-f]{32}\.dcm", path.name) for path in out.iterdir() if path.name != "pull.journal")
    for path in out.glob("*.dcm"):
        first, again = pydicom.dcmread(path), next(one for one in films["dx"] + films["cr"] if uids([one]) == uids([path]))
        assert first.PixelData == pydicom.dcmread(again).PixelData
    told = done.stdout + done.stderr + (out / "pull.journal").read_bytes().decode("latin-1")
    assert not any(str(pydicom.dcmread(path).PatientID) in told for path in films["dx"])
    again = cxr("pull", "--web", archive.web, "--out", out, "--body-part", "chest", "--log-format", "json")
    assert all(json.loads(line) for line in again[1].splitlines())
    assert again[0].startswith("16 films found: 0 pulled, 16 already there, 0 failed; 0.0 MB")
    other = cxr("pull", "--web", archive.web, "--out", out)[1]
    assert "was begun with other options; expected body_part 'CHEST'; got body_part ''" in other


@pytest.mark.parametrize(
    ("wanted", "kinds"),
    [
        (Wanted(), ("dx", "cr", "hand")),
        (Wanted(("DX",)), ("dx", "hand")),
        (Wanted(("CR",), "CHEST"), ("cr",)),
        (Wanted(since=date(2020, 1, 2)), ("cr",)),
        (Wanted(until=date(2020, 1, 1)), ("dx", "hand")),
        (Wanted(since=date(2020, 1, 1), until=date(2020, 1, 1)), ("dx", "hand")),
        (Wanted(description="Röntgen Thorax"), ("cr",)),
        (Wanted(("MG", "CR"), since=date(2020, 1, 1), description="Thorax"), ("cr",)),
        (Wanted(("CT",)), ()),
    ],
)
def test_only_what_is_wanted(
    archive: Orthanc,
    films: dict[str, list[Path]],
    tmp_path: Path,
    reader: FilmReader,
    monkeypatch: pytest.MonkeyPatch,
    wanted: Wanted,
    kinds: tuple[str, ...],
) -> None:
    monkeypatch.setattr(searching, "_PAGE", 4)
    expected = uids([path for kind in kinds for path in films[kind]])
    assert pulled(web(archive.web), tmp_path / "web", reader, wanted)["there"] == len(expected)
    assert in_folder(tmp_path / "web") == expected
    by_get = by_dimse(f"{archive.aet}@{LOCAL}:{archive.port}", None, 20, "CXR", get=True)
    pulled(by_get, tmp_path / "get", reader, wanted)
    assert in_folder(tmp_path / "get") == expected


def test_by_move_from_orthanc(archive: Orthanc, films: dict[str, list[Path]], move_port: int, tmp_path: Path) -> None:
    peer = f"{archive.aet}@{LOCAL}:{archive.port}"
    said = cxr("pull", "--peer", peer, "--move-port", str(move_port), "--modality", "CR", "--out", tmp_path / "out")
    assert said[0].startswith("4 films found: 4 pulled"), said
    assert in_folder(tmp_path / "out") == uids(films["cr"])


def test_from_dcmtk_by_get_and_by_move(films: dict[str, list[Path]], tmp_path: Path, reader: FilmReader) -> None:
    (port,) = free_ports(1)
    wanted = Wanted(("DX",), since=date(2020, 1, 1))
    with dcmqrscp(tmp_path / "dcmtk", [*films["dx"], *films["cr"]], port) as address:
        for way, opened in (
            ("get", by_dimse(address, None, 20, "CXR", get=True)),
            ("move", by_dimse(address, None, 20, "CXR", move_port=port)),
        ):
            assert pulled(opened, tmp_path / way, reader, wanted)["there"] == 12
            assert in_folder(tmp_path / way) == uids(films["dx"])


def test_by_get_and_by_move_over_tls(certificates: Certificates, tmp_path: Path, reader: FilmReader) -> None:
    """With C-MOVE, both sides are client once and server once."""
    (port,) = free_ports(1)
    ours = {"cxr": {"AET": "CXR", "Host": LOCAL, "Port": port, "UseDicomTls": True}}
    path = certificates.path
    shown = Tls(path("ours.pem"), path("server.pem"), path("server.key"))
    with orthanc(tmp_path / "orthanc", tls=certificates, dicomweb=False, DicomModalities=ours) as running:
        running.upload(*instances(tmp_path / "films", 3))
        address = f"{running.aet}@{LOCAL}:{running.port}"
        assert pulled(by_dimse(address, shown, 20, "CXR", get=True), tmp_path / "get", reader, Wanted())["there"] == 3
        assert pulled(by_dimse(address, shown, 20, "CXR", move_port=port), tmp_path / "move", reader, Wanted())["there"] == 3
        with pytest.raises(PeerError, match="certificate was not accepted"):
            pulled(by_dimse(address, certificates.tls("client", "theirs"), 20, "CXR", get=True), tmp_path / "no", reader, Wanted())
    with pytest.raises(SetupError, match="C-MOVE over TLS without a certificate of ours"):
        by_dimse(address, certificates.tls(), 20, "CXR", move_port=port).__enter__()


def test_what_was_not_asked_for_is_not_taken(films: dict[str, list[Path]]) -> None:
    (port,) = free_ports(1)
    with by_dimse(f"ARCHIVE@{LOCAL}:104", None, 20, "CXR", move_port=port):
        for calling, called, said in (("ARCHIVE", "CXR", "0x124"), ("ELSEWHERE", "CXR", "Calling AE"), ("ARCHIVE", "OTHER", "Called AE")):
            sent = dcmtk("storescu", "-v", "-aet", calling, "-aec", called, LOCAL, port, films["cr"][0])
            assert sent.returncode != 0
            assert said in sent.stdout + sent.stderr
    with pytest.raises(SetupError, match=r"port \d+: cannot be listened on"), socket.create_server(("", port)):
        by_dimse(f"ARCHIVE@{LOCAL}:104", None, 20, "CXR", move_port=port).__enter__()


def test_an_archive_that_does_not_know_where_to_send_to(films: dict[str, list[Path]], tmp_path: Path, reader: FilmReader) -> None:
    said = "does not know where to send to; got status 0xA801"
    with dcmqrscp(tmp_path / "dcmtk", films["cr"], free_ports(1)[0]) as address, pytest.raises(SetupError, match=said):
        pulled(by_dimse(address, None, 20, "STRANGER", move_port=free_ports(1)[0]), tmp_path / "out", reader, Wanted())


@pytest.fixture
def older(tmp_path: Path) -> Iterator[Orthanc]:
    with orthanc(tmp_path / "older", modalities={"cxr": ("CXR", LOCAL, 1)}) as running:
        yield running


def test_priors_of_a_film(older: Orthanc, tmp_path: Path, reader: FilmReader) -> None:
    days = ("20180203", "20190405", "20200607", "20210809")
    whose = {day: instances(tmp_path / day, 1, PatientID="PRIOR 1/ä", StudyDate=day, IssuerOfPatientID="HERE", **UTF8)[0] for day in days}
    alike = instances(tmp_path / "alike", 1, PatientID="PRIOR 11/ä", StudyDate="20180203", **UTF8)
    older.upload(*whose.values(), *alike)
    said = "".join(cxr("pull", "--web", older.web, "--out", tmp_path / "out", "--prior-to", whose["20200607"]))
    assert in_folder(tmp_path / "out") == uids([whose["20180203"], whose["20190405"]])
    wanted = prior_to(reader.header(whose["20190405"]).result(), Wanted())
    assert (wanted.patient, wanted.issuer, wanted.until) == ("PRIOR 1/ä", "HERE", date(2019, 4, 4))
    get = by_dimse(f"{older.aet}@{LOCAL}:{older.port}", None, 20, "CXR", get=True)
    pulled(get, tmp_path / "get", reader, wanted)
    assert in_folder(tmp_path / "get") == uids([whose["20180203"]])
    assert "PRIOR 1/ä" not in json.dumps(wanted.of_journal()) + said
    nobody = instances(tmp_path / "nobody", 1, PatientID="")[0]
    with pytest.raises(UsageError, match="does not say whose it is"):
        prior_to(reader.header(nobody).result(), Wanted())


def test_killed_again_and_again_nothing_is_lost_or_asked_for_twice(tmp_path: Path) -> None:
    out, kills = tmp_path / "out", 2
    with orthanc(tmp_path / "orthanc") as running, passing(running.web) as proxy:
        films = instances(tmp_path / "films", 60, per_study=3)
        running.upload(*films)
        command = cxr_command("pull", "--web", proxy.url, "--out", out, "--json")
        proxy.delay_s = 0.1
        there: set[str] = set()
        for kill in range(kills):
            asked_before = len(proxy.instances())
            with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                while len(proxy.instances()) < asked_before + 11 + kill:
                    assert process.poll() is None
                    time.sleep(0.002)
                process.kill()
            assert not there & set(proxy.instances()[asked_before:])
            there |= in_folder(out)
        proxy.delay_s = 0
        asked_before = len(proxy.instances())
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        assert not there & set(proxy.instances()[asked_before:])
        assert json.loads(done.stdout)["found"] == 60
        assert in_folder(out) == uids(films)
        assert not list(out.glob(".*.partial"))
        again = Counter(proxy.instances())
        assert sum(count - 1 for count in again.values()) <= kills * 4  # at most what was in flight when it was killed
        assert len(again) == 60


def test_ctrl_c_keeps_what_was_fetched(archive: Orthanc, tmp_path: Path) -> None:
    with passing(archive.web) as proxy:
        proxy.delay_s = 0.2
        command = at_a_terminal(*cxr_command("pull", "--web", proxy.url, "--out", tmp_path / "out", "--workers", "1"))
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while len(proxy.instances()) < 3:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert "interrupted; what was fetched is kept" in stderr
        kept = len(in_folder(tmp_path / "out"))
        assert f": {kept} pulled, 0 already there, 0 failed" in stdout
        assert 2 <= kept < 19


def test_an_archive_that_goes_away_is_waited_for(tmp_path: Path, reader: FilmReader) -> None:
    with orthanc(tmp_path / "orthanc") as running, passing(running.web) as proxy:
        films = instances(tmp_path / "films", 30, per_study=3)
        running.upload(*films)
        proxy.delay_s = 0.03

        def outage() -> None:
            while len(proxy.instances()) < 8:
                time.sleep(0.005)
            running.stop()
            time.sleep(0.7)
            running.start()

        thread = threading.Thread(target=outage)
        thread.start()
        counts = pulled(web(proxy.url), tmp_path / "out", reader, Wanted(), patience_s=60)
        thread.join()
        assert counts == {"pending": 0, "there": 30, "failed": 0}
        assert in_folder(tmp_path / "out") == uids(films)


def test_patience_ends(archive: Orthanc, tmp_path: Path, reader: FilmReader) -> None:
    with pytest.raises(PeerDownError, match="does not answer"):
        pulled(web(f"http://{LOCAL}:{free_ports(1)[0]}"), tmp_path / "web", reader, Wanted(), patience_s=1)
    with pytest.raises(PeerDownError, match="no DICOM peer answers"):
        pulled(by_dimse(f"A@{LOCAL}:{free_ports(1)[0]}", None, 5, "CXR", get=True), tmp_path / "get", reader, Wanted(), patience_s=1)


def test_locked_with_tls_and_a_password(certificates: Certificates, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text(USERS["reader"])
    with orthanc(tmp_path / "orthanc", users=USERS) as running, secured(running.web, certificates, mutual=True) as url:
        running.upload(*instances(tmp_path / "films", 3))
        path = certificates.path
        shown = ("--ca", path("ours.pem"), "--cert", path("client.pem"), "--key", path("client.key"), "--user", "reader")
        said = cxr("pull", "--web", url, *shown, "--password-file", password, "--out", tmp_path / "out")
        assert said[0].startswith("3 films found: 3 pulled"), said
        assert len(in_folder(tmp_path / "out")) == 3
        password.write_text("wrong")
        refused = cxr("pull", "--web", url, *shown, "--password-file", password, "--out", tmp_path / "none")[1]
        assert "PeerError" in refused
        assert "does not let us in; got HTTP 401" in refused
        assert "wrong" not in refused


# -------------------------------------------------------------------------------------------------------- hostile


def uid_json(tag: str, value: str, **more: str) -> bytes:
    return json.dumps([{tag: {"vr": "UI", "Value": [value]}, **{tag: {"vr": "CS", "Value": [one]} for tag, one in more.items()}}]).encode()


def one_film(retrieved: Callable[[BaseHTTPRequestHandler], None]) -> Callable[[BaseHTTPRequestHandler], None]:
    """An archive of one film, 1.2.3.4, which ignores limit and offset, and answers its retrieval so."""

    def answer(to: BaseHTTPRequestHandler) -> None:
        path = to.path.split("?")[0]
        if path.endswith("/studies"):
            says(200, uid_json("0020000D", "1.2.3"))(to)
        elif path.endswith("/series"):
            says(200, uid_json("0020000E", "1.2.3.3", **{"00080060": "DX"}))(to)
        elif path.endswith("/instances"):
            says(200, uid_json("00080018", "1.2.3.4"))(to)
        else:
            retrieved(to)

    return answer


def part(
    body: bytes, end: bytes = b"\r\n--b--\r\n", begin: bytes = b"--b\r\nContent-Type: application/dicom\r\n\r\n"
) -> Callable[[BaseHTTPRequestHandler], None]:
    return says(200, begin + body + end, Content_Type='multipart/related; type="application/dicom"; boundary=b')


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return instances(tmp_path_factory.mktemp("one"), 1, StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.3.3")[0].read_bytes()


@pytest.fixture(scope="module")
def right(film: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("right") / "film.dcm"
    path.write_bytes(film)
    dataset = pydicom.dcmread(path)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    dataset.save_as(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda film, right: part(film), "another instance than was asked for"),
        (lambda film, right: part(right, end=b""), "ends early"),
        (lambda film, right: part(right[:5000], end=b""), "ends early"),
        (lambda film, right: part(right, end=b"\r\n--b\r\n\r\n"), "several instances"),
        (lambda film, right: part(b"", end=b"", begin=b""), "ends early"),
        (lambda film, right: part(right, begin=b"x" * 400_000), "no part where one begins"),
        (lambda film, right: part(b"\0" * 128 + b"DICM" + b"\xff" * 300), "1.2.3.4|dcm"),
        (lambda film, right: says(200, b"<html>sign in</html>", Content_Type="text/html"), "another type of content"),
        (lambda film, right: says(404), "refuses the request; got HTTP 404"),
        (lambda film, right: says(500), "cannot serve now; got HTTP 500"),
        (lambda film, right: says(302, Location="http://127.0.0.2:1/"), "leads elsewhere"),
    ],
)
def test_one_film_that_cannot_be_had_is_noted(
    film: bytes,
    right: bytes,
    tmp_path: Path,
    reader: FilmReader,
    answer: Callable[[bytes, bytes], Callable[[BaseHTTPRequestHandler], None]],
    reason: str,
) -> None:
    with answering(one_film(answer(film, right))) as (url, _):
        assert pulled(web(url), tmp_path / "out", reader, Wanted()) == {"pending": 0, "there": 0, "failed": 1}
    with Pulled(tmp_path / "out", Wanted().of_journal()) as into:
        assert re.search(reason, into.failures(1)[0][1])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pull.journal"]


def test_what_failed_is_asked_for_again_if_that_is_wanted(right: bytes, tmp_path: Path) -> None:
    broken = True
    with answering(one_film(lambda to: (says(404) if broken else part(right))(to))) as (url, _):
        command = ("pull", "--web", url, "--out", tmp_path / "out")
        said = cxr(*command)[1]
        assert "InputError: 1 films could not be had. Next: see the reasons; --retry-failed asks for them again" in said
        assert "failed 1.2.3.4: " in said
        broken = False
        assert cxr(*command)[0].startswith("1 films found: 0 pulled, 0 already there, 1 failed")
        assert cxr(*command, "--retry-failed")[0].startswith("1 films found: 1 pulled, 0 already there, 0 failed")


def test_a_film_without_end_is_cut_off(tmp_path: Path, reader: FilmReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomweb, "MAX_BYTES", 1 << 20)

    def forever(to: BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.send_header("Content-Type", "multipart/related; boundary=b")
        to.end_headers()
        to.wfile.write(b"--b\r\n\r\n")
        while True:
            to.wfile.write(b"x" * 65536)

    with answering(one_film(forever)) as (url, _):
        assert pulled(web(url), tmp_path / "out", reader, Wanted())["failed"] == 1


def test_a_film_that_comes_without_multipart_and_in_small_pieces(right: bytes, tmp_path: Path, reader: FilmReader) -> None:
    with answering(one_film(says(200, right, Content_Type="application/dicom"))) as (url, _):
        assert pulled(web(url), tmp_path / "plain", reader, Wanted())["there"] == 1

    def trickle(to: BaseHTTPRequestHandler) -> None:
        to.send_response(200)
        to.send_header("Content-Type", 'Multipart/Related; Boundary="b"; type="application/dicom"')
        to.end_headers()
        whole = b"preamble\r\n--b\r\nContent-Type: application/dicom\r\n\r\n" + right + b"\r\n--b--"
        for start in range(0, len(whole), 997):
            to.wfile.write(whole[start : start + 997])

    with answering(one_film(trickle)) as (url, _):
        assert pulled(web(url), tmp_path / "pieces", reader, Wanted())["there"] == 1
    for way in ("plain", "pieces"):
        assert next((tmp_path / way).glob("*.dcm")).read_bytes() == right


def test_no_token_goes_elsewhere(tmp_path: Path, reader: FilmReader) -> None:
    with answering(says(200)) as (elsewhere, there):
        with answering(one_film(lambda to: says(307, Location=elsewhere)(to))) as (url, asked):
            token = on_the_web(url, None, "", "", "planted-1", 20, insecure=False, connections=1)
            assert pulled(token, tmp_path / "out", reader, Wanted())["failed"] == 1
        assert asked[-1]["Authorization"] == "Bearer planted-1"
    assert not there


def test_an_archive_that_refuses_us_in_the_middle_ends_the_run(tmp_path: Path, reader: FilmReader) -> None:
    let_in = True

    def answer(to: BaseHTTPRequestHandler) -> None:
        nonlocal let_in
        if "/instances/" in to.path:
            let_in = False
        (one_film(says(401)) if let_in else says(401))(to)

    with answering(answer) as (url, _), pytest.raises(PeerError, match="does not let us in"):
        pulled(web(url), tmp_path / "out", reader, Wanted())
    with Pulled(tmp_path / "out", Wanted().of_journal()) as into:
        assert into.counts()["pending"] == 1


def test_a_search_that_always_fails_ends(tmp_path: Path, reader: FilmReader) -> None:
    """While the archive answers other questions."""

    def answer(to: BaseHTTPRequestHandler) -> None:
        (says(500) if "/series" in to.path else one_film(says(404)))(to)

    with answering(answer) as (url, asked), pytest.raises(PeerDownError, match="HTTP 500"):
        pulled(web(url), tmp_path / "out", reader, Wanted())
    assert len(asked) < 20


# --------------------------------------------------------------------------------------------------------- folder


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="has something in it"):
        Pulled(tmp_path, {})


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Pulled(tmp_path / "out", {}), pytest.raises(SetupError, match="another process pulls into it"):
        Pulled(tmp_path / "out", {})


def test_killed_between_file_and_journal(archive: Orthanc, tmp_path: Path, reader: FilmReader) -> None:
    """Whole files that the journal does not know of are not asked for again."""
    wanted = Wanted(("CR",))
    with passing(archive.web) as proxy:
        pulled(web(proxy.url), tmp_path / "out", reader, wanted)
        with sqlite3.connect(tmp_path / "out" / "pull.journal") as base:
            base.execute("UPDATE instance SET state = 'pending'")
        base.close()
        (tmp_path / "out" / f".{Found('1', '1', '1.2').name}.partial").write_bytes(b"half")
        assert pulled(web(proxy.url), tmp_path / "out", reader, wanted) == {"pending": 0, "there": 4, "failed": 0}
        assert len(proxy.instances()) == 4
        assert not list((tmp_path / "out").glob(".*.partial"))


def test_a_limit_holds_over_runs(archive: Orthanc, tmp_path: Path, reader: FilmReader) -> None:
    for _ in range(2):
        assert pulled(web(archive.web), tmp_path / "out", reader, Wanted(), limit=5)["there"] == 5


@pytest.mark.parametrize(
    "options",
    [{"modalities": ("dx",)}, {"modalities": ()}, {"patient": "P*"}, {"patient": "a\\b"}, {"description": "?"}, {"body_part": "lung!"}],
)
def test_what_cannot_be_looked_for_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="cannot be looked for"):
        Wanted(**options)  # pyright: ignore[reportArgumentType]


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    for arguments, said in (
        ((), "where from"),
        (("--web", "http://127.0.0.1:1", "--peer", "A@b:1"), "where from"),
        (("--peer", "A@127.0.0.1:1"), "how films come from --peer"),
        (("--web", "http://pacs.example/dicom-web"), "would cross the network unencrypted"),
    ):
        assert said in cxr("pull", "--out", tmp_path / "out", *arguments)[1]
