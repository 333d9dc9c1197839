"""`cxr listen` between real peers: Orthanc sends a study, and finds the answer in it; whatever is killed, what was confirmed is answered once."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
import pytest
import requests
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, evt

from cxr_retrieval.archive.audit import verify
from cxr_retrieval.cases.pseudonyms import SHOWN_DIGITS, Pseudonyms
from cxr_retrieval.pacs.node import STORAGE_COMMITMENT
from cxr_retrieval.retrieval.picture import DISCLAIMER
from cxr_retrieval.serving.server import Endpoints, embedded_milvus
from pacs.peers import Orthanc, dcmtk, instances, orthanc
from tests_support import ENVIRONMENT, cxr_command, free_ports, run_cxr, until

SR, SC, DX = "1.2.840.10008.5.1.4.1.1.88.33", "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.1.1"


@pytest.fixture(scope="module")
def gallery(quick: Endpoints, phantom_manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded_milvus(tmp_path_factory.mktemp("milvus") / "gallery.db", "127.0.0.1", 0) as uri:
        done = run_cxr("ingest", "--no-gate", "--manifest", phantom_manifest, "--triton", quick.grpc, "--milvus", uri)
        assert done.returncode == 0, done.stderr
        yield uri


class Listening:
    """`cxr listen` in the background; there when it says where it listens."""

    def __init__(self, folder: Path, port: int, triton: str, milvus: str, *options: str | Path) -> None:
        self.folder, self.out = folder, folder / "results.jsonl"
        self.command = cxr_command(
            *("listen", "--out", self.out, "--spool", folder / "spool", "--port", f"{port}"),
            *("--triton", triton, "--milvus", milvus, "--audit", folder / "audit.jsonl", *options),
        )
        self.said: list[str] = []
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._listener = threading.Thread(target=lambda stream: self.said.extend(stream), args=(self.process.stderr,), daemon=True)
        self._listener.start()
        self.where = self.process.stdout.readline().strip()
        assert self.where, "".join(self.said)

    def kill(self) -> None:
        self.process.kill()
        self._gone()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self._gone()

    def _gone(self) -> int:
        code = self.process.wait(60)
        self._listener.join(10)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return code

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()] if self.out.exists() else []


@contextmanager
def node(folder: Path, port: int, quick: Endpoints, milvus: str, rules: str, *options: str | Path) -> Generator[Listening]:
    (folder / "rules.toml").write_text(rules)
    running = Listening(folder, port, quick.grpc, milvus, "--rules", folder / "rules.toml", *options)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.kill()


def files(archive: Orthanc, sop_class: str) -> list[tuple[str, Dataset]]:
    """Orthanc's id of each instance of this class, and the instance as it is stored there."""
    found: list[tuple[str, Dataset]] = []
    for one in archive.find():
        data = requests.get(f"{archive.http}/instances/{one['ID']}/file", timeout=20).content
        dataset = pydicom.dcmread(io.BytesIO(data))
        if dataset.SOPClassUID == sop_class:
            found.append((one["ID"], dataset))
    return found


def test_orthanc_sends_a_study_and_finds_the_answer_in_it(quick: Endpoints, gallery: str, pseudonyms: Pseudonyms, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    films = instances(tmp_path / "films", 4, per_study=2, PatientName="Planted^Identity", PatientID="PLANTED4711")
    with orthanc(tmp_path / "a", modalities={"cxr": ("CXR", "127.0.0.1", port)}) as archive, orthanc(tmp_path / "b") as second:
        rules = f"""
[destinations.archive]
aet = "{archive.aet}"
host = "127.0.0.1"
port = {archive.port}
[destinations.second]
web = "{second.web}"
[[rules]]
name = "all"
gate = false
to = ["sender", "second"]
"""
        with node(tmp_path, port, quick, gallery, rules, "--metrics", "0", "--log-format", "json") as running:
            assert running.where == f"CXR@127.0.0.1:{port}"
            archive.upload(*films)
            assert archive.store("cxr", *(one["ID"] for one in archive.find()))["FailedInstancesCount"] == 0
            until(lambda: archive.statistics()["CountInstances"] == 12 and second.statistics()["CountInstances"] == 8)
            study = pydicom.dcmread(films[0]).StudyInstanceUID
            keys = ("-k", "QueryRetrieveLevel=SERIES", "-k", f"StudyInstanceUID={study}", "-k", "Modality", "-k", "SeriesDescription")
            asked = dcmtk("findscu", "-v", "-S", "-aet", "CXR", *keys, "-aec", archive.aet, "127.0.0.1", archive.port)
            assert asked.returncode == 0
            found = re.findall(r"\(0008,0060\) CS \[(\w+) *\]", asked.stderr + asked.stdout)
            assert sorted(found) == ["DX", "OT", "OT", "SR", "SR"]
            film = pydicom.dcmread(films[0])
            uids = {"StudyInstanceUID": study, "SeriesInstanceUID": film.SeriesInstanceUID, "SOPInstanceUID": film.SOPInstanceUID}
            one = [part for key in ("QueryRetrieveLevel=IMAGE", *(f"{name}={uid}" for name, uid in uids.items())) for part in ("-k", key)]
            moved = dcmtk("movescu", "-S", "-aet", "CXR", "-aec", archive.aet, "-aem", "CXR", *one, "127.0.0.1", archive.port)
            assert moved.returncode == 0, "Orthanc sends it once more, and the node takes that as no news"
            source = {str(dataset.SOPInstanceUID): dataset for _, dataset in files(archive, DX)}
            assert len(running.lines) == 4
            assert {line["input"] for line in running.lines} == set(source)
            assert {(line["status"], line["caller"], line["rule"]) for line in running.lines} == {("answered", archive.aet, "all")}
            for number, report in files(archive, SR):
                about = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
                film = source[about.ReferencedSOPInstanceUID]
                assert (report.StudyInstanceUID, report.PatientID, report.PatientName) == (
                    film.StudyInstanceUID,
                    "PLANTED4711",
                    "Planted^Identity",
                )
                path = tmp_path / "report.dcm"
                path.write_bytes(requests.get(f"{archive.http}/instances/{number}/file", timeout=20).content)
                dumped = dcmtk("dsrdump", path)
                assert dumped.returncode == 0
                line = next(line for line in running.lines if line["input"] == film.SOPInstanceUID)
                assert all(pseudonyms.image(hit["image_id"])[:SHOWN_DIGITS] in dumped.stdout for hit in line["neighbours"])
                assert line["neighbours"][0]["image_id"] not in dumped.stdout
                assert DISCLAIMER in dumped.stdout
            for number, picture in files(archive, SC):
                assert picture.SourceImageSequence[0].ReferencedSOPInstanceUID in source
                shown = requests.get(f"{archive.http}/instances/{number}/preview", timeout=20)
                assert shown.status_code == 200
                assert shown.content[:8] == b"\x89PNG\r\n\x1a\n"
            assert {str(one.SOPInstanceUID) for _, one in files(second, SR)} == {str(one.SOPInstanceUID) for _, one in files(archive, SR)}
            address = json.loads(next(line for line in running.said if '"metrics"' in line))["address"]
            counted = requests.get(f"http://{address}/metrics", timeout=10).text
            assert 'cxr_dicom_instances_total{outcome="received"} 4.0' in counted
            assert 'cxr_dicom_parcels_total{destination="second",outcome="sent"} 8.0' in counted
            assert 'cxr_dicom_instances_total{outcome="again"} 1.0' in counted
            assert "cxr_dicom_waiting 0.0" in counted
            health = requests.get(f"http://{address}/health", timeout=10).json()
            assert (health["status"], health["waiting"], health["to_send"]) == ("ok", 0, 0)
            assert running.stop() == 0
        status = json.loads(run_cxr("listen", "--status", "--json", "--spool", tmp_path / "spool").stdout)
        assert (status["waiting"], status["counted"]) == (0, {"answered": 4, "sent archive": 8, "sent second": 8})
    told = "".join(running.said) + (tmp_path / "audit.jsonl").read_text()
    left = b"".join(path.read_bytes() for path in (tmp_path / "spool").rglob("*") if path.is_file())
    for planted in ("Planted", "PLANTED4711"):
        assert planted not in told
        assert planted.encode() not in left
        assert planted not in running.out.read_text()
    assert verify(tmp_path / "audit.jsonl").flaw is None


def test_what_is_kept_and_passed_on_says_nobody(quick: Endpoints, gallery: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    films = instances(tmp_path / "films", 3, PatientName="Planted^Identity", PatientID="PLANTED4711", PatientSex="F")
    burned = pydicom.dcmread(films[2])
    burned.BurnedInAnnotation = "YES"
    burned.save_as(films[2])
    with orthanc(tmp_path / "research") as research:
        rules = f"""
[destinations.research]
aet = "{research.aet}"
host = "127.0.0.1"
port = {research.port}
[[rules]]
name = "all"
gate = false
keep = "deidentified"
retain = ["patient_characteristics"]
forward = ["research"]
"""
        with node(tmp_path, port, quick, gallery, rules) as running:
            assert dcmtk("storescu", "-aec", "CXR", "127.0.0.1", port, *films).returncode == 0
            until(lambda: len(running.lines) == 3 and research.statistics()["CountInstances"] == 2)
            assert running.stop() == 0
        forwarded = {str(one.SOPInstanceUID): one for _, one in files(research, DX)}
    kept = [pydicom.dcmread(path) for path in (tmp_path / "spool" / "kept").iterdir()]
    assert {str(one.SOPInstanceUID) for one in kept} == set(forwarded)
    before = {str(pydicom.dcmread(film).SOPInstanceUID) for film in films}
    for one in kept:
        assert one.SOPInstanceUID not in before
        assert "PLANTED" not in one.PatientID
        assert (one.PatientIdentityRemoved, one.PatientSex) == ("YES", "F")
        assert forwarded[str(one.SOPInstanceUID)].PixelData == one.PixelData
    doubts = [doubt for line in running.lines for doubt in line["warnings"] if "identities may remain" in doubt]
    assert len(doubts) == 1


def test_what_is_kept_is_promised(quick: Endpoints, gallery: str, tmp_path: Path) -> None:
    port, ours = free_ports(2)
    films = instances(tmp_path / "films", 2)
    rules = f"""
[destinations.modality]
aet = "CR1"
host = "127.0.0.1"
port = {ours}
[[rules]]
name = "all"
gate = false
keep = "received"
"""
    reports: list[Dataset] = []
    entity = AE("CR1")
    entity.add_supported_context(STORAGE_COMMITMENT, scu_role=True, scp_role=True)

    def report(event: evt.Event) -> tuple[int, None]:
        reports.append(event.event_information)
        return 0, None

    server = entity.start_server(("127.0.0.1", ours), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, report)])
    assert server is not None
    try:
        with node(tmp_path, port, quick, gallery, rules) as running:
            assert dcmtk("storescu", "-aet", "CR1", "-aec", "CXR", "127.0.0.1", port, *films).returncode == 0
            until(lambda: len(running.lines) == 2)
            asked = Dataset()
            asked.TransactionUID = "1.2.3.4"
            asked.ReferencedSOPSequence = [Dataset(), Dataset()]
            uids = [str(pydicom.dcmread(films[0]).SOPInstanceUID), "1.2.3.999"]
            for item, uid in zip(asked.ReferencedSOPSequence, uids, strict=True):
                item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = DX, uid
            requestor = AE("CR1")
            requestor.add_requested_context(STORAGE_COMMITMENT)
            association = requestor.associate("127.0.0.1", port, ae_title="CXR")
            status, _ = association.send_n_action(asked, 1, STORAGE_COMMITMENT, "1.2.840.10008.1.20.1.1")
            association.release()
            assert status.Status == 0
            until(lambda: bool(reports))
            assert running.stop() == 0
    finally:
        server.shutdown()
    (said,) = reports
    assert [item.ReferencedSOPInstanceUID for item in said.ReferencedSOPSequence] == uids[:1]
    assert [item.ReferencedSOPInstanceUID for item in said.FailedSOPSequence] == uids[1:]
    there = {str(pydicom.dcmread(path).SOPInstanceUID) for path in (tmp_path / "spool" / "kept").iterdir()}
    assert there == {str(pydicom.dcmread(film).SOPInstanceUID) for film in films}


class Modality:
    """Sends films, each until it is confirmed, as a modality does."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.confirmed: set[str] = set()

    def send(self, film: Path) -> None:
        uid = str(pydicom.dcmread(film, stop_before_pixels=True).SOPInstanceUID)
        while "Received Store Response (Success)" not in dcmtk("storescu", "-v", "-aec", "CXR", "127.0.0.1", self._port, film).stderr:
            time.sleep(0.1)
        self.confirmed.add(uid)


@pytest.mark.parametrize(("films", "kills"), [(40, 3), pytest.param(1000, 20, marks=[pytest.mark.whole, pytest.mark.timeout(3600)])])
def test_kills_lose_nothing_that_was_confirmed(films: int, kills: int, quick: Endpoints, gallery: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    chance = random.Random(int(os.environ.get("SEED") or 7))
    paths = instances(tmp_path / "films", films)
    uids = {str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in paths}
    with orthanc(tmp_path / "orthanc") as archive:
        rules = f"""
[destinations.archive]
aet = "{archive.aet}"
host = "127.0.0.1"
port = {archive.port}
[[rules]]
name = "all"
gate = false
send = ["report"]
to = ["archive"]
"""
        with node(tmp_path, port, quick, gallery, rules) as running, ThreadPoolExecutor(3) as pool:
            modality = Modality(port)
            sending = [pool.submit(modality.send, path) for path in paths]
            for kill in range(kills):
                share = (kill + 0.2 + 0.6 * chance.random()) / kills
                until(lambda share=share: len(modality.confirmed) >= share * films, 600)
                running.kill()
                running.start()
            for one in sending:
                one.result(600)
            until(lambda: len(running.lines) >= films, 600)
            until(lambda: archive.statistics()["CountInstances"] >= films, 600)
            assert running.stop() == 0
        answered = [line["input"] for line in running.lines]
        lost, twice = modality.confirmed - set(answered), len(answered) - len(set(answered))
        print(f"{films} instances, {kills} kills: {len(modality.confirmed)} confirmed, {len(lost)} lost, {twice} answered twice")
        assert modality.confirmed == uids
        assert not lost
        assert not twice
        assert archive.statistics()["CountInstances"] == films, "each report is there once"
        assert not list((tmp_path / "spool" / "incoming").iterdir())


def test_films_are_taken_before_triton_is_there_and_answered_once_it_is(quick: Endpoints, gallery: str, tmp_path: Path) -> None:
    port, nobody, metrics = free_ports(3)
    films = instances(tmp_path / "films", 2)
    hurt = tmp_path / "films" / "9999.dcm"
    dataset = pydicom.dcmread(films[0])
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID("1.2.3.4.5")
    dataset.PixelData = dataset.PixelData[:100]
    dataset.save_as(hurt)
    arguments = ("--metrics", f"{metrics}")
    without = Listening(tmp_path, port, f"127.0.0.1:{nobody}", gallery, *arguments)
    try:
        assert dcmtk("storescu", "-aec", "CXR", "127.0.0.1", port, *films, hurt).returncode == 0

        def health() -> dict[str, Any]:
            return requests.get(f"http://127.0.0.1:{metrics}/health", timeout=10).json()

        until(lambda: "triton" in health()["waiting_for"])
        assert (health()["status"], health()["waiting"]) == ("waiting", 3)
        assert requests.get(f"http://127.0.0.1:{metrics}/health", timeout=10).status_code == 503
        assert "3" in run_cxr("listen", "--status", "--spool", tmp_path / "spool").stdout
        assert without.stop() in (0, 130)
        assert without.lines == []
    finally:
        if without.process.poll() is None:
            without.kill()
    (tmp_path / "rules.toml").write_text('[[rules]]\nname = "all"\ngate = false')
    running = Listening(tmp_path, port, quick.grpc, gallery, "--rules", tmp_path / "rules.toml")
    try:
        until(lambda: len(running.lines) == 3)
        assert sorted(line["status"] for line in running.lines) == ["answered", "answered", "failed"]
        (failed,) = (line for line in running.lines if line["status"] == "failed")
        assert failed["input"] == "1.2.3.4.5"
        assert "error" in failed
        assert running.stop() == 0
    finally:
        if running.process.poll() is None:
            running.kill()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "no --out"),
        (("--out", "results.jsonl", "--aet", "AN AE TITLE TOO LONG"), "an AE title is malformed"),
        (("--out", "results.jsonl", "--host", "0.0.0.0"), "say --unencrypted where the network is the PACS's own"),
        (("--out", "results.jsonl", "--keep", "all"), "--keep cannot be meant"),
        (("--out", "results.jsonl", "--rules", "nothing.toml"), "the rules cannot be read"),
        (("--status",), "no spool of a node"),
    ],
)
def test_what_cannot_be_meant_is_said_at_once(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = run_cxr("listen", "--spool", tmp_path / "spool", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert not done.stdout
