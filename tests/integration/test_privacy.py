"""Identifying strings are planted wherever a film can carry them, and looked for wherever something leaves the reader."""

from __future__ import annotations

import base64
import json
import re
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.datadict import DicomDictionary, keyword_for_tag
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, ExplicitVRLittleEndian

from cxr_retrieval.cases.pseudonyms import Pseudonyms
from cxr_retrieval.contract import LUNG_MASK
from cxr_retrieval.gallery.store import Store
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.phantoms import make_phantom
from cxr_retrieval.serving.server import Endpoints, embedded_milvus
from cxr_retrieval.settings import MilvusSettings, ThumbnailKind
from tests_support import Wire, run_cxr

STEM: Final = "Qzjxvk"
"""Begins everything that is planted as text: six letters that nothing else holds."""
DATE, TIME = "19170309", "031917.917309"
PLANTED: Final = (STEM, DATE, TIME)
MARK: Final = "WardOfTheMark"
"""Of a column that is stored: what is looked for would be found."""
TEXT_VRS: Final = frozenset({"PN", "LO", "SH", "ST", "LT", "UT", "UC", "UR", "AE", "AS", "DA", "TM", "DT", "UI"})
LABELS: Final = ("control", "covid19", "covid19", "non_covid_pneumonia")


def planted_value(vr: str, tag: int) -> str:
    """What no other element of the file has."""
    return {
        "DA": DATE,
        "TM": TIME,
        "DT": f"{DATE}{TIME}",
        "AS": "091Y",
        "UI": f"1.2.826.0.1.{DATE}.{tag}",
        "PN": f"{STEM}{tag:08X}^{STEM}",
        "UR": f"http://{STEM}{tag:08X}/",
    }.get(vr, f"{STEM}{tag:08X}")


def plant(dataset: pydicom.Dataset) -> int:
    """Fills every element of the standard's dictionary that holds text, a date, a time or a UID; returns how many."""
    count = 0
    for tag, (vrs, _, _, _, keyword) in DicomDictionary.items():
        vr = vrs.split(" or ")[0]
        if vr in TEXT_VRS and tag >> 16 not in (0x0000, 0x0002, 0x0004) and keyword and keyword != "SOPClassUID":
            dataset.add_new(tag, vr, planted_value(vr, tag))
            count += 1
    for group in (0x0009, 0x0021, 0x7FE1):
        block = dataset.private_block(group, f"{STEM}PRIVATE", create=True)
        for offset, vr in enumerate(("LO", "PN", "UT", "DA")):
            block.add_new(offset, vr, planted_value(vr, group))
        block.add_new(0x40, "UN", f"{STEM} of unknown kind".encode())
    return count


def write_planted(pixels: NDArray[np.uint8], patient: str, path: Path) -> int:
    dataset = pydicom.Dataset()
    count = plant(dataset)
    inner = pydicom.Dataset()
    plant(inner)
    middle = pydicom.Dataset()
    middle.ReferencedStudySequence = Items([inner])
    for keyword in ("OtherPatientIDsSequence", "RequestAttributesSequence", "ReferencedStudySequence", "OriginalAttributesSequence"):
        setattr(dataset, keyword, Items([middle, inner]))
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.PatientID = patient
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "DX", "CHEST", "PA"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.PixelData = pixels.tobytes()
    meta = dataset.file_meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = UID(planted_value("UI", 1))
    meta.SourceApplicationEntityTitle = f"{STEM}AE"
    meta.ImplementationVersionName = f"{STEM}IMPL"
    meta.PrivateInformationCreatorUID = UID(planted_value("UI", 2))
    meta.PrivateInformation = f"{STEM} private".encode()
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return count


def with_burned_in_text(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A name across the top and the bottom of the film, where no lung is."""
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for y in (2, image.height - 40):
        draw.text((10, y), f"{STEM.upper()}, JOHN  9 MAR 1917", fill=255, font=ImageFont.load_default(32), stroke_width=2)
    return np.asarray(image)


def forms(text: str) -> list[bytes]:
    """A string in small letters as it may be written: UTF-8, UTF-16 both ways, hex, and base64 from each place of a group of three."""
    plain = [text.encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be")]
    inside = [
        base64.b64encode(b"\0" * before + text.encode())[-(-before * 4 // 3) + bool(before) :].rstrip(b"=")[:-1] for before in range(3)
    ]
    return [form.lower() for form in (*plain, text.encode().hex().encode(), *inside)]


def found_in(*blobs: bytes | bytearray) -> list[str]:
    """What is planted that stands in one of these, in whatever form, in capitals or small letters."""
    lower = [bytes(blob).lower() for blob in blobs]
    return [text for text in PLANTED if any(form in blob for form in forms(text) for blob in lower)]


@dataclass(frozen=True)
class Ran:
    """What the commands left: what passed each wire, what each said, and where their files lie."""

    films: Path
    out: Path
    triton: Wire
    milvus: Wire
    store: Path
    said: dict[str, str]
    elements: int

    def without_names(self, data: bytes) -> bytes:
        """What is left beside the names of the inputs' files and folder, which local files may hold."""
        for path in sorted(self.films.rglob("*"), key=lambda path: -len(path.name)):
            data = data.replace(path.name.encode(), b"")
        return data.replace(str(self.films).encode(), b"").replace(self.films.name.encode(), b"")


@pytest.fixture(scope="module")
def ran(student_server: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """Ingest with thumbnails, query with page and picture, batch with and without the table, removal; through proxies that keep all."""
    base = tmp_path_factory.mktemp("privacy")
    films, out, store = base / f"{STEM}, John", base / "out", base / "gallery.db"
    (films / "new").mkdir(parents=True)
    out.mkdir()
    lines = [
        "image_id,path,label,patient_id,source,PatientName,birth_date,accession no.,StudyInstanceUID,phone,Home-Address,MRN,dicom_path,ward"
    ]
    elements = 0
    for number, label in enumerate(LABELS):
        pixels = with_burned_in_text(make_phantom(80 + number, label).pixels)
        name, patient = f"{STEM}-{number}.dcm", f"{STEM}-P{number}"
        elements = write_planted(pixels, patient, films / name)
        told = [f"{STEM}^John", DATE, f"{STEM}77", f"1.2.{DATE}", f"{STEM}55", f"{STEM} street", f"{STEM}MRN", f"/x/{STEM}"]
        lines.append(",".join([f"{STEM}-img-{number}", name, label, patient, "north", *told, f"{MARK}{number}"]))
    (films / f"{STEM}.csv").write_text("\n".join(lines) + "\n")
    later = make_phantom(80, LABELS[0]).pixels.copy()
    later[:9] = 7
    write_planted(with_burned_in_text(later), f"{STEM}-P0", films / "new" / f"{STEM}-later.dcm")
    whole = (films / "new" / f"{STEM}-later.dcm").read_bytes()
    (films / "new" / f"{STEM}-cut.dcm").write_bytes(whole[: len(whole) - 70_000])
    dataset = pydicom.dcmread(films / "new" / f"{STEM}-later.dcm")
    dataset.BitsAllocated = 13
    pydicom.dcmwrite(films / "new" / f"{STEM}-odd.dcm", dataset)

    said: dict[str, str] = {}
    with embedded_milvus(store, "127.0.0.1", 0) as uri, Wire(student_server.grpc) as triton, Wire(uri) as milvus:
        servers = ("--triton", triton.address, "--milvus", f"http://{milvus.address}")
        audit, later_film = out / "audit.jsonl", films / "new" / f"{STEM}-later.dcm"

        def run(name: str, *arguments: str | Path, code: int = 0) -> None:
            done = run_cxr(*arguments, *(servers if name != "remove" else servers[2:]), "--audit", audit)
            assert done.returncode == code, done.stderr
            said[name], said[f"{name} to stderr"] = done.stdout, done.stderr

        run("ingest", "ingest", "--manifest", films / f"{STEM}.csv", "--thumbnails", "lungs", "--prune")
        page, picture = out / "page.html", out / "picture.png"
        run("query", "query", later_film, "--html", page, "--picture", picture, "--json", "--where", f'image_id != "{STEM}-img-9"')
        run("batch", "batch", films, "--out", out / "results.jsonl", "--attention", out / "drawn", code=1)
        run("batch as a table", "batch", films, "--out", out / "table.parquet", "--format", "parquet", code=1)
        as_log = ("--log-format", "json")
        run("strangers", "batch", films, "--out", out / "strangers.jsonl", "--pseudonym-table", out / "none", *as_log, code=1)
        run("unlisted", "ingest", films / "new", "--label", "control", *as_log, code=1)
        run("remove", "gallery", "remove", "--patient", f"{STEM}-P3")
        yield Ran(films, out, triton, milvus, store, said, elements)


def test_enough_is_planted(ran: Ran) -> None:
    """Every file holds it all, so that a reader which looked for one would find it."""
    assert ran.elements > 1000
    assert {keyword_for_tag(tag) for tag in (0x00100010, 0x00100030, 0x00080050, 0x0020000D)} == {
        "PatientName",
        "PatientBirthDate",
        "AccessionNumber",
        "StudyInstanceUID",
    }
    for path in ran.films.rglob("*.dcm"):
        data = path.read_bytes()
        assert data.count(STEM.encode()) > 3000
        assert found_in(data) == list(PLANTED)


def test_forms_are_recognised() -> None:
    for code in ("utf-8", "utf-16-le", "utf-16-be"):
        assert found_in(b"\x01" + f"a{STEM}b".upper().encode(code) + b"\0") == [STEM]
    for before in range(7):
        assert found_in(base64.b64encode(b"." * before + STEM.encode() + b"....")) == [STEM], before
    assert found_in(STEM.encode().hex().encode()) == [STEM]
    assert found_in(b"Qzjxv", b"k", bytes(range(256)) * 50) == []


def test_nothing_of_it_is_on_a_wire(ran: Ran, student_server: Endpoints, reader: FilmReader) -> None:
    assert found_in(*ran.triton.streams, *ran.milvus.streams) == []
    square = reader.read(ran.films / "new" / f"{STEM}-later.dcm").square
    assert any(square[128].tobytes() in stream for stream in ran.triton.streams), "the proxy saw the pictures"
    assert any(MARK.encode() in stream for stream in ran.milvus.streams), "and what is stored"


def test_the_proxy_would_have_seen_it(ran: Ran) -> None:
    """The positive control, last of those that look at this wire: a string that is sent is found."""
    with Wire(ran.milvus.address) as wire:
        asked = run_cxr("gallery", "remove", "--where", f'source == "{STEM}"', "--dry-run", "--milvus", f"http://{wire.address}")
        assert asked.returncode == 1, asked.stderr
        assert found_in(*wire.streams) == [STEM]


def test_nothing_of_it_is_in_milvus(ran: Ran) -> None:
    files = [path for path in ran.store.rglob("*") if path.is_file()]
    blobs = [path.read_bytes() for path in files]
    for path in files:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            blobs.append(repr(pq.read_table(path).to_pydict()).encode())
    assert found_in(*blobs, *(str(path).encode() for path in files)) == []
    assert any(f"{MARK}0".encode() in blob for blob in blobs), "what is stored is found in these files"


def test_commands_say_nothing_of_it(ran: Ran) -> None:
    """An ingest's words can go into any log; what is not stored is named by columns alone."""
    for name in ("ingest", "ingest to stderr", "batch as a table", "remove", "remove to stderr"):
        assert found_in(ran.said[name].encode()) == [], name
    for name, words in ran.said.items():
        if name != "query":
            assert found_in(ran.without_names(words.encode())) == [], name
    for name in ("strangers to stderr", "unlisted to stderr"):
        assert found_in(ran.said[name].encode()) == [], "not even names of files, in lines for a log"
        assert any("event" in json.loads(line) for line in ran.said[name].splitlines() if line.startswith("{"))
    told = ran.said["ingest to stderr"]
    assert "not stored" in told
    for column in ("PatientName", "birth_date", "accession no.", "StudyInstanceUID", "phone", "Home-Address", "MRN", "dicom_path"):
        assert column in told
    assert "ward" not in told


def parts_without_ids(result: dict[str, Any]) -> dict[str, Any]:
    """A result but for what the contract names: the input, its overlay, and image_ids that the table leads back."""
    hits = [
        {name: value for name, value in hit.items() if name != "image_id"}
        for part in ("neighbours", "earlier_films")
        for hit in result.get(part, [])
    ]
    return {name: value for name, value in result.items() if name not in ("input", "neighbours", "earlier_films")} | {"hits": hits}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_results_name_inputs_and_nothing_else(ran: Ran, pseudonyms: Pseudonyms) -> None:
    answer = json.loads(ran.said["query"])
    assert re.fullmatch("film-[0-9a-f]{16}", answer["image_id"])
    assert answer["earlier_films"][0]["image_id"] == f"{STEM}-img-0", "the patient is known by the pseudonym"
    assert answer["earlier_films"][0]["metadata"]["patient_id"] == pseudonyms.patient(f"{STEM}-P0")
    assert found_in(json.dumps(parts_without_ids(answer)).encode()) == []

    for name, known in (("results.jsonl", True), ("strangers.jsonl", False)):
        results = lines(ran.out / name)
        assert {line["status"] for line in results} == {"answered", "failed"}
        assert len(results) == len(LABELS) + 3
        for line in results:
            assert found_in(ran.without_names(json.dumps(parts_without_ids(line)).encode())) == [], line["input"]
            for hit in [*line.get("neighbours", []), *line.get("earlier_films", [])]:
                assert hit["image_id"].startswith(f"{STEM}-img-") == known
                assert re.fullmatch("[0-9a-f]{32}", hit["image_id"]) or known
    dead = (ran.out / "results.jsonl.failed.jsonl").read_bytes()
    assert dead.count(b"\n") == 2
    assert found_in(ran.without_names(dead)) == []


def test_the_journal_holds_paths_and_nothing_else(ran: Ran) -> None:
    base = sqlite3.connect(ran.out / "results.jsonl.journal")
    try:
        cells = [repr(row).encode() for table in ("input", "about") for row in base.execute(f"SELECT * FROM {table}")]
    finally:
        base.close()
    assert found_in(*cells) == [STEM], "the paths"
    assert found_in(*map(ran.without_names, cells)) == []


def test_the_audit_log_names_pseudonyms(ran: Ran, pseudonyms: Pseudonyms) -> None:
    log = (ran.out / "audit.jsonl").read_bytes()
    assert found_in(log) == []
    assert pseudonyms.image(f"{STEM}-img-3").encode() in log
    assert pseudonyms.originals([pseudonyms.image(f"{STEM}-img-3")]) == {}, "who was removed is forgotten"


def test_pages_and_pictures_hold_no_words_of_it(ran: Ran, pseudonyms: Pseudonyms) -> None:
    page = (ran.out / "page.html").read_text("utf-8")
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)]
    assert len(pictures) > 4
    drawn = [path.read_bytes() for path in (ran.out / "drawn").iterdir()]
    assert found_in(page.encode(), (ran.out / "picture.png").read_bytes(), *pictures, *drawn) == []
    assert pseudonyms.image(f"{STEM}-img-0")[:12] in page


def test_thumbnails_of_lungs_hold_nothing_outside_them(ran: Ran, pseudonyms: Pseudonyms, reader: FilmReader, student: TritonClient) -> None:
    """Burned-in text is gone; the case that was removed has no picture any more."""
    keys = [pseudonyms.image(f"{STEM}-img-{number}") for number in range(4)]
    with Store(MilvusSettings(f"http://{ran.milvus.address}"), student.model_version, pseudonyms) as store:
        kept = store.thumbnails(keys)
    assert kept.keys() == set(keys[:3])
    for number, key in enumerate(keys[:3]):
        square = reader.read(ran.films / f"{STEM}-{number}.dcm").square
        mask = student.infer(square[None, None], (LUNG_MASK,))[LUNG_MASK.name][0, 0] > 0
        assert kept[key].kind is ThumbnailKind.lungs
        assert np.array_equal(kept[key].square, np.where(mask, square, 0))
        text = np.concatenate([square[:20], square[-20:]])
        assert (text == 255).sum() > 200, "the name is in the film"
        assert not np.concatenate([kept[key].square[:20], kept[key].square[-20:]]).any(), "and not in the thumbnail"


def test_what_stays_here_is_its_owners_alone(ran: Ran, pseudonyms: Pseudonyms) -> None:
    files: Sequence[Path] = [path for path in ran.out.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"page.html", "picture.png", "results.jsonl", "results.jsonl.journal", "results.jsonl.failed.jsonl", "audit.jsonl"} <= names
    assert {"table.parquet", "table.jsonl", "table.jsonl.journal"} <= names
    for path in [*files, pseudonyms.table]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
    assert "none" not in names, "who has no table makes none by asking"


def test_whoever_has_the_table_is_led_back_and_the_log_says_so(ran: Ran, pseudonyms: Pseudonyms, tmp_path: Path) -> None:
    key, patient = pseudonyms.image(f"{STEM}-img-1"), pseudonyms.patient(f"{STEM}-P1")
    told = run_cxr("gallery", "whois", key[:12], patient, "--json", "--audit", tmp_path / "audit.jsonl")
    assert told.returncode == 0, told.stderr
    log = (tmp_path / "audit.jsonl").read_bytes()
    assert key.encode() in log
    assert patient.encode() in log
    assert found_in(log) == []
    path = str((ran.films / f"{STEM}-1.dcm").resolve())
    assert json.loads(told.stdout)["known"] == [
        {"pseudonym": key, "image_id": f"{STEM}-img-1", "path": path, "member": None, "patient_id": f"{STEM}-P1"},
        {"pseudonym": patient, "patient_id": f"{STEM}-P1", "images": [f"{STEM}-img-1"]},
    ]
    assert f"image_id {STEM}-img-1" in run_cxr("gallery", "whois", key).stdout
    stranger = run_cxr("gallery", "whois", key, "--pseudonym-table", ran.out / "none")
    assert stranger.returncode == 1
    assert "unknown pseudonym" in stranger.stderr
    assert run_cxr("gallery", "whois", "no-pseudonym").returncode == 2
