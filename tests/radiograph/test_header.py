"""What a DICOM file says of itself, read in a worker; elements that are not what their VR has are none."""

from __future__ import annotations

import uuid
from pathlib import Path

import pydicom
import pytest
from pydicom.config import disable_value_validation

from cxr_retrieval.errors import ImageError
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.header import FORMS, REQUIRED, keyed_uid
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom, write_dicom


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.dcm"
    write_dicom(make_phantom(5, PHANTOM_LABELS[0]), path)
    return path


def changed(film: Path, **elements: str) -> Path:
    """With these elements, written as they are: files come from others."""
    dataset = pydicom.dcmread(film)
    with disable_value_validation():
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        dataset.save_as(film)
    return film


def test_says_what_an_answer_repeats(film: Path, reader: FilmReader) -> None:
    header = reader.header(film).result()
    dataset = pydicom.dcmread(film)
    assert (header.instance, header.sop_class, header.study, header.series) == tuple(
        str(dataset[keyword].value) for keyword in ("SOPInstanceUID", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID")
    )
    assert header.get("PatientName") == "SYNTHETIC^PHANTOM"
    assert header.get("Modality") == "DX"
    assert header.get("Rows") == str(dataset.Rows)
    assert set(header.elements) <= set(FORMS)
    assert header.get("AccessionNumber") == ""


def test_names_of_any_alphabet_are_read(film: Path, reader: FilmReader) -> None:
    dataset = pydicom.dcmread(film)
    dataset.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    dataset.PatientName = "Yamada^Tarou=山田^太郎"
    dataset.save_as(film)
    assert reader.header(film).result().get("PatientName") == "Yamada^Tarou=山田^太郎"


def test_shows_nobody_in_its_repr(film: Path, reader: FilmReader) -> None:
    assert "PHANTOM" not in repr(reader.header(film).result())


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientBirthDate", "12.03.1950"),
        ("StudyTime", "noon"),
        ("PatientID", "a\nb"),
        ("PatientID", "x" * 65),
        ("AccessionNumber", "12345678901234567"),
        ("Modality", "dx"),
        ("PatientName", "A=B=C=D"),
    ],
)
def test_what_is_malformed_counts_as_absent(film: Path, reader: FilmReader, keyword: str, value: str) -> None:
    assert keyword not in reader.header(changed(film, **{keyword: value})).result().elements


@pytest.mark.parametrize("keyword", REQUIRED)
@pytest.mark.parametrize("value", ["", "1.2.x", "1..2", "1.02", "1" * 65, "../../etc"])
def test_an_instance_that_nobody_could_file_is_refused(film: Path, reader: FilmReader, keyword: str, value: str) -> None:
    with pytest.raises(ImageError, match="no archive could file this instance"):
        reader.header(changed(film, **{keyword: value})).result()


def test_what_is_no_dicom_is_refused(tmp_path: Path, reader: FilmReader) -> None:
    path = tmp_path / "film.dcm"
    path.write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 200)
    with pytest.raises(ImageError):
        reader.header(path).result()


def test_keyed_uids_are_uids_and_differ_by_secret_and_name() -> None:
    made = {keyed_uid(secret, name) for secret in (b"one", b"two") for name in map(str, range(200))}
    assert len(made) == 400
    assert all(FORMS["SOPInstanceUID"].fullmatch(uid) and uid.startswith("2.25.") for uid in made)
    assert keyed_uid(b"one", "1.2.3") == keyed_uid(b"one", "1.2.3")
    assert {uuid.UUID(int=int(uid[5:])).version for uid in made} == {8}
