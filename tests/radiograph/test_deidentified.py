"""Identities planted in every element that PS3.15 Table E.1-1 lists, and in the corners that it does not: none is left, and what is to stay does."""

from __future__ import annotations

import io
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Final

import pydicom
import pytest
from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector
from hypothesis import given
from hypothesis import strategies as st
from pydicom import uid
from pydicom.config import disable_value_validation
from pydicom.datadict import DicomDictionary, dictionary_has_tag, dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.encaps import get_frame
from pydicom.tag import Tag

from cxr_retrieval.errors import ImageError, SetupError, UsageError
from cxr_retrieval.radiograph import deidentified as module
from cxr_retrieval.radiograph.decoding import FilmReader
from cxr_retrieval.radiograph.deidentified import MOST_DAYS, deidentified
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom, write_dicom
from cxr_retrieval.radiograph.reading import read_radiograph
from cxr_retrieval.radiograph.retained import KEPT, METHODS, WORDS, Deidentification, Retain
from cxr_retrieval.radiograph.syntaxes import DECODERS, inflated
from hostile_files import dataset, element, film, framed, hostile, valid, with_elements, written

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
BASIC: Final = Deidentification(b"a secret of the hospital's own...")
OTHER: Final = Deidentification(b"the secret of another hospital...")
STEM: Final = "Qzjxvk"
"""Begins everything that is planted as text."""
TABLE: Final = [Tag(*tag) for tag in dicom_anonymization_database_selector("dicomfields_2026c")["ALL_TAGS"] if len(tag) == 2]
FILMS: Final = [name for name in valid() if name.endswith(".dcm")]
PAGE: Final = Path(__file__).parents[2] / "docs" / "deidentification.md"
SCREENSHOT: Final = "1.2.840.10008.5.1.4.1.1.7"


def by(*retain: Retain) -> Deidentification:
    return Deidentification(BASIC.secret, frozenset(retain))


MOVED: Final = by(Retain.longitudinal_modified_dates)


def read(data: bytes) -> pydicom.FileDataset:
    return pydicom.dcmread(io.BytesIO(data))


def changed(data: bytes, **elements: object) -> bytes:
    """With these elements; None takes one away."""
    made = read(data)
    for keyword, value in elements.items():
        if value is None:
            delattr(made, keyword)
        else:
            setattr(made, keyword, value)
    return written(made)


def plain() -> bytes:
    return valid()["explicit.dcm"]


# ------------------------------------------------------------------------------------------------------- planted


def canary(vr: str, number: int) -> Any:
    """What no other element holds, and no film by chance."""
    number %= 10_000
    return {
        "AS": f"{number % 1000:03}D",
        "AT": 0x00100010,
        "DA": f"1917{1 + number // 28 % 12:02}{1 + number % 28:02}",
        "DS": f"31917.{number:04}",
        "DT": f"1917{1 + number // 28 % 12:02}{1 + number % 28:02}031917.91{number:04}",
        "IS": f"31917{number:04}",
        "PN": f"{STEM}{number:04}^{STEM}",
        "TM": f"031917.91{number:04}",
        "UI": f"1.2.826.0.1.1917.{number}.31917",
        "UR": f"http://{STEM}{number:04}/",
    }.get(vr, f"{STEM}{number:04}".encode() if vr in ("OB", "OW", "UN") else f"{STEM}{number:04}")


def planted_in(made: pydicom.Dataset, first: int = 0, *, within: bool = True) -> None:
    """Fills every element of the table; sequences with an item that holds a name, a code and a reference."""
    for number, tag in enumerate(TABLE, first):
        vr = dictionary_VR(tag) if dictionary_has_tag(tag) else "LO"
        if vr == "SQ":
            item = pydicom.Dataset()
            item.PatientName, item.CodeValue = canary("PN", number), canary("SH", number)
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", canary("UI", number)
            made.add_new(tag, vr, [item] if keyword_for_tag(tag) not in ("ReferencedImageSequence", "SourceImageSequence") else [])
        elif vr == "US":
            made.add_new(tag, vr, number)
        elif tag.group >= 8 and (within or tag not in (0x00080018, 0xFFFCFFFC)):
            made.add_new(tag, vr, canary(vr, number))


def planted(name: str = "explicit.dcm") -> bytes:
    """A film of this syntax that names its patient wherever a file can."""
    made = read(inflated(valid()[name], name))
    made.file_meta.TransferSyntaxUID = read(valid()[name]).file_meta.TransferSyntaxUID
    with disable_value_validation():
        planted_in(made, within=False)
        item = made
        for depth, sequence in enumerate(("ViewCodeSequence", "ViewModifierCodeSequence", "AnatomicRegionModifierSequence")):
            inner = pydicom.Dataset()
            planted_in(inner, 1000 * (depth + 1))
            setattr(item, sequence, [inner])
            item = inner
        for inside in (made, item):
            block = inside.private_block(0x0009, f"{STEM} private", create=True)
            block.add_new(1, "LO", f"{STEM}privateLO")
            block.add_new(2, "UN", f"{STEM}privateUN".encode())
            block.add_new(3, "SQ", [dataset(film(), 12, PatientName=f"{STEM}privateSQ")])
            inside.add_new(0x00180FF0, "UN", f"{STEM}unknown".encode())
            inside.add_new(0x00180FF2, "LO", f"{STEM}unlisted")
            inside.add_new(0x00187006, "LT", f"{STEM}free text")
            inside.add_new(0x0040A067, "PN", f"{STEM}author")
            inside.add_new(0x00081190, "UR", f"http://{STEM}/")
            inside.add_new(0x00080404, "DT", "19170101031917")
            inside.add_new(0x00089123, "UI", "1.2.826.0.1.1917.31917")
            for group, data in ((0x5000, 0x3000), (0x6000, 0x3000), (0x6002, 0x3000)):
                inside.add_new((group, data), "OW", f"{STEM}plane ".encode())
                inside.add_new((group, 0x0022), "LO", f"{STEM}described")
                inside.add_new((group, 0x1500), "LO", f"{STEM}labelled")
                inside.add_new((group, 0x4000), "LT", f"{STEM}comments")
        made.preamble = f"{STEM}preamble".encode().ljust(128, b"\0")
        made.file_meta.SourceApplicationEntityTitle = f"{STEM}AE"
        made.file_meta.ImplementationVersionName = f"{STEM}VERSION"
        made.file_meta.ImplementationClassUID = uid.UID("1.2.826.0.1.1917.919")
        made.file_meta.PrivateInformationCreatorUID = uid.UID("1.2.826.0.1.1917.917")
        made.file_meta.PrivateInformation = f"{STEM}informs".encode()
        return written(made)


PIECES: Final = re.compile(rb"Q\0?z\0?j\0?x|1917(0[1-9]|1[0-2])([01]\d|2[0-8])|03191[67]|31917|1\.2\.826\.0\.1\.1917")
"""What every planted value has in it: text, a date, a time, a number, a UID."""


def elements(made: pydicom.Dataset) -> Iterator[tuple[str, pydicom.DataElement]]:
    """All of a data set, and of its sequences, with the way to each."""
    for held in made:
        yield held.keyword, held
        for item in held.value if held.VR == "SQ" else ():
            yield from ((f"{held.keyword}.{path}", inner) for path, inner in elements(item))


def survivors(before: bytes, after: bytes) -> set[str]:
    """Keywords of the planted elements at the top that have a value afterwards, and that one."""
    old, new = read(before), read(after)
    return {keyword_for_tag(tag) for tag in TABLE if tag in new and tag in old and new[tag].value and new[tag].value == old[tag].value}


@pytest.mark.parametrize("name", FILMS)
def test_nothing_that_was_planted_is_left(name: str) -> None:
    """In every syntax, everywhere in the file; and the film is the same."""
    before = planted(name)
    after = deidentified(before, name, BASIC)
    assert len(PIECES.findall(inflated(before, name))) > 2000
    assert not PIECES.findall(inflated(after, name))
    old, new = read(before), read(after)
    assert new.PixelData == old.PixelData
    assert new.file_meta.TransferSyntaxUID == old.file_meta.TransferSyntaxUID
    assert (read_radiograph(after).pixels == read_radiograph(valid()[name]).pixels).all()
    assert after[:132] == bytes(128) + b"DICM"
    assert survivors(before, after) == set()


@pytest.mark.parametrize("syntax", [syntax for syntax in DECODERS if uid.UID(syntax).is_encapsulated])
def test_frames_of_every_syntax_stay_as_they_are(syntax: str) -> None:
    frame = film().tobytes()
    after = read(deidentified(framed(frame, syntax, film(), 12), "film", BASIC))
    assert after.file_meta.TransferSyntaxUID == syntax
    assert get_frame(after.PixelData, 0, number_of_frames=1) == frame


def test_what_says_nothing_of_anybody_stays() -> None:
    before, after = read(planted()), read(deidentified(planted(), "film", BASIC))
    for keyword in (
        "Rows",
        "Columns",
        "BitsStored",
        "PhotometricInterpretation",
        "Modality",
        "ViewPosition",
        "WindowCenter",
        "SOPClassUID",
    ):
        assert after[keyword].value == before[keyword].value
    paths = {path for path, _ in elements(after)}
    assert "ViewCodeSequence.ViewModifierCodeSequence.AnatomicRegionModifierSequence" in paths
    assert not [path for path, held in elements(after) if held.tag.is_private or "Comments" in path]


def implicit_item(text: bytes) -> bytes:
    """An item in Implicit VR, as a sequence has it that is written as UN (PS3.5 6.2.2): a name, and a code that may stay."""
    inner = struct.pack("<HHI", 0x0010, 0x0010, len(text)) + text + struct.pack("<HHI", 0x0008, 0x0100, 4) + b"T-D3"
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(inner)) + inner


@pytest.mark.parametrize(
    ("vr", "value"),
    [
        ("UN", implicit_item(f"{STEM}name".encode())),
        ("UN", f"{STEM}name".encode()),
        ("OB", f"{STEM}name".encode()),
        ("LO", f"{STEM}name".encode()),
        ("UT", f"{STEM}name".encode()),
    ],
)
def test_a_sequence_that_is_called_something_else_hides_nothing(vr: str, value: bytes) -> None:
    before = with_elements(element(0x00082218, vr, value))
    assert PIECES.search(before)
    try:
        after = deidentified(before, "film", BASIC)
    except ImageError:
        return
    assert not PIECES.search(after)
    if value.startswith(struct.pack("<HH", 0xFFFE, 0xE000)):
        assert read(after).AnatomicRegionSequence[0].CodeValue == "T-D3"


@pytest.mark.parametrize("tag", [0x00180015, 0x00280010, 0x00187006, 0x00100010, 0x00080020])
def test_what_is_called_a_sequence_and_is_none_goes(tag: int) -> None:
    """With a name in it, which the file may hide in any element."""
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 18) + element(0x00181020, "LO", f"{STEM}name".encode())
    made = with_elements(element(tag, "SQ", item))
    assert not PIECES.search(deidentified(made, "film", BASIC))


@pytest.mark.parametrize("implicit", [True, False])
def test_a_file_without_file_meta_gets_one(implicit: bool) -> None:
    made = read(plain())
    del made.file_meta
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, made, implicit_vr=implicit, little_endian=True)
    after = read(deidentified(buffer.getvalue(), "film", BASIC))
    assert after.PixelData == read(plain()).PixelData
    assert after.file_meta.TransferSyntaxUID == (uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian)


def test_of_all_text_that_the_table_leaves_out_a_few_words_stay() -> None:
    """Of the whole dictionary of the standard: names, text, dates and times."""
    made, texts = read(plain()), ("AE", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UR", "UT")
    with disable_value_validation():
        for number, (tag, entry) in enumerate(DicomDictionary.items()):
            if entry[0] in texts and tag not in TABLE and tag >> 16 >= 8:
                made.add_new(tag, entry[0], canary(entry[0], number))
        before = read(written(made))
    after = read(deidentified(written(made), "film", BASIC))
    stay = {held.keyword for held in after if held.VR in texts and held.tag not in TABLE and held.value == before[held.tag].value}
    assert stay == WORDS


def test_every_action_of_the_table_leaves_no_value_as_it_was() -> None:
    """Of each element, at the top and three sequences deep: it is gone, empty, or another one."""
    before, after = dict(elements(read(planted()))), dict(elements(read(deidentified(planted(), "film", BASIC))))
    alike = {path for path, held in after.items() if held.tag in TABLE and held.value and held.value == before[path].value}
    assert alike == set()


@pytest.mark.parametrize("option", Retain)
def test_an_option_keeps_what_the_standard_says_and_no_more(option: Retain) -> None:
    before = planted()
    kept = set(KEPT[option])
    listed = {keyword_for_tag(tag): dictionary_VR(tag) for tag in TABLE if dictionary_has_tag(tag)}
    if option is Retain.longitudinal_full_dates:
        kept |= {keyword for keyword, vr in listed.items() if vr in ("DA", "DT", "TM")}
        kept -= {"PatientBirthDate", "PatientBirthTime", "GPSTimeStamp"}
    if option is Retain.longitudinal_modified_dates:
        kept |= {keyword for keyword, vr in listed.items() if vr == "TM"} - {"PatientBirthTime"}
    if option is Retain.uids:
        kept |= {keyword for keyword, vr in listed.items() if vr == "UI" and (tag_for_keyword(keyword) or 0) >> 16 >= 8}
        kept -= {"DigitalSignatureUID", "UID"}
    sequences = {keyword for keyword in kept if listed[keyword] == "SQ"}
    after = deidentified(before, "film", by(option))
    assert survivors(before, after) == kept - sequences - {"ReferencedImageSequence", "SourceImageSequence"}
    new = read(after)
    for keyword in sequences - {"ReferencedImageSequence", "SourceImageSequence"}:
        item = new[keyword].value[0]
        assert STEM not in str(item.PatientName)
        assert item.CodeValue.startswith(STEM)
    assert {item.CodeValue for item in new.DeidentificationMethodCodeSequence} == {"113100", METHODS[option][0]}


def test_what_options_keep_is_in_the_table() -> None:
    listed = {keyword_for_tag(tag) for tag in TABLE if dictionary_has_tag(tag)}
    assert set(chain.from_iterable(KEPT.values())) <= listed
    assert set(KEPT) == set(Retain) == set(METHODS) - {None}
    for option, some in {  # the columns of PS3.15 Table E.1-1, by hand
        Retain.patient_characteristics: {"PatientSex", "PatientAge", "PatientSize", "PatientWeight", "EthnicGroup", "PregnancyStatus"},
        Retain.device_identity: {"StationName", "DeviceSerialNumber", "DetectorID", "PlateID", "CassetteID", "DeviceUID", "UDISequence"},
        Retain.institution_identity: {"InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "InstitutionCodeSequence"},
        Retain.longitudinal_full_dates: {"TimezoneOffsetFromUTC"},
    }.items():
        assert some <= KEPT[option]
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "OtherPatientIDs", "AccessionNumber", "OperatorsName", "Allergies"):
        assert all(keyword not in kept for kept in KEPT.values())


def test_the_page_lists_what_options_keep() -> None:
    """Each row of docs/deidentification.md that lists keywords, against the code."""
    rows = dict[str, set[str]]()
    for line in PAGE.read_text("utf-8").splitlines():
        if cells := re.fullmatch(r"\| `(\w+)` \|.*\| (.*) \|", line):
            rows[cells[1]] = set(re.findall(r"[A-Z]\w+", cells[2]))
    assert rows == {**{option.value: KEPT[option] for option in Retain}, "words": WORDS}


def test_dates_cannot_be_both_kept_and_moved() -> None:
    with pytest.raises(UsageError, match="dates cannot be both kept and moved"):
        by(Retain.longitudinal_full_dates, Retain.longitudinal_modified_dates)


def test_the_secret_stays_out_of_repr() -> None:
    assert "secret of" not in repr(BASIC)


# ------------------------------------------------------------------------------------------- what is put instead


@pytest.mark.parametrize(
    ("retain", "said"),
    [
        ((), "REMOVED"),
        ((Retain.longitudinal_full_dates,), "UNMODIFIED"),
        ((Retain.longitudinal_modified_dates, Retain.device_identity), "MODIFIED"),
    ],
)
def test_the_file_says_how_it_was_made(retain: tuple[Retain, ...], said: str) -> None:
    after = read(deidentified(plain(), "film", by(*retain)))
    assert (after.PatientIdentityRemoved, after.LongitudinalTemporalInformationModified) == ("YES", said)
    assert [(item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning) for item in after.DeidentificationMethodCodeSequence] == [
        (code, "DCM", meaning) for option, (code, meaning) in METHODS.items() if option is None or option in retain
    ]
    assert after.DeidentificationMethod
    assert after.file_meta.MediaStorageSOPInstanceUID == after.SOPInstanceUID
    assert set(after.file_meta.keys()) == {0x00020000 + number for number in (0x00, 0x01, 0x02, 0x03, 0x10, 0x12, 0x13)}


def test_dates_that_somebody_else_moved_are_not_called_unmoved() -> None:
    once = deidentified(plain(), "film", MOVED)
    assert read(deidentified(once, "film", by(Retain.longitudinal_full_dates))).LongitudinalTemporalInformationModified == "MODIFIED"


def study() -> tuple[bytes, bytes]:
    """Two films of it; the second names the first, in sequences and in sequences within them."""
    first = changed(plain(), SOPInstanceUID="1.2.3.1", SeriesInstanceUID="1.2.3.10", StudyInstanceUID="1.2.3.100", StudyDate="20200315")
    second = read(changed(first, SOPInstanceUID="1.2.3.2", StudyDate="20200320"))
    reference, deep = pydicom.Dataset(), pydicom.Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = second.SOPClassUID, "1.2.3.1"
    deep.SourceImageSequence = [reference]
    second.ReferencedImageSequence, second.SourceImageSequence, second.ViewCodeSequence = [reference], [reference], [deep]
    second.IrradiationEventUID = ["1.2.3.1", "1.2.3.2"]
    return first, written(second)


def test_a_uid_becomes_the_same_one_everywhere() -> None:
    first, second = (read(deidentified(data, "film", BASIC)) for data in study())
    assert first.StudyInstanceUID == second.StudyInstanceUID != "1.2.3.100"
    assert first.SeriesInstanceUID == second.SeriesInstanceUID
    assert first.SOPInstanceUID != second.SOPInstanceUID
    references = [second.ReferencedImageSequence, second.SourceImageSequence, second.ViewCodeSequence[0].SourceImageSequence]
    assert {sequence[0].ReferencedSOPInstanceUID for sequence in references} == {first.SOPInstanceUID}
    assert {sequence[0].ReferencedSOPClassUID for sequence in references} == {first.SOPClassUID}
    assert list(second.IrradiationEventUID) == [first.SOPInstanceUID, second.SOPInstanceUID]
    elsewhere = read(deidentified(study()[0], "film", OTHER))
    assert not {elsewhere.SOPInstanceUID, elsewhere.StudyInstanceUID} & {first.SOPInstanceUID, first.StudyInstanceUID}


@pytest.mark.parametrize("well_known", ["1.2.840.10008.1.4.1.1", "2.16.840.1.113883.6.96", "1.2.840.10008.2.16.4"])
def test_uids_of_the_standard_stay(well_known: str) -> None:
    after = read(deidentified(changed(plain(), FrameOfReferenceUID=well_known), "film", BASIC))
    assert after.FrameOfReferenceUID == well_known


def test_a_patient_has_one_pseudonym() -> None:
    first, second = (read(deidentified(data, "film", BASIC)) for data in study())
    assert first.PatientID == second.PatientID == str(first.PatientName)
    assert re.fullmatch("[0-9a-f]{32}", first.PatientID)
    other = read(deidentified(changed(plain(), PatientID="another"), "film", BASIC))
    assert first.PatientID not in (other.PatientID, read(deidentified(plain(), "film", OTHER)).PatientID)


@pytest.mark.parametrize("charset", ["", "ISO_IR 192", "ISO_IR 13", "GB18030", ["", "ISO 2022 IR 87"], "ISO_IR 99999"])
def test_a_pseudonym_can_be_read_in_any_alphabet(charset: str | list[str]) -> None:
    after = read(deidentified(changed(plain(), SpecificCharacterSet=charset), "film", BASIC))
    assert re.fullmatch("[0-9a-f]{32}", str(after.PatientName))


def test_who_has_no_id_is_told_by_name_or_study() -> None:
    nobody = changed(plain(), PatientID="", PatientName="", StudyInstanceUID="1.2.3")
    named = changed(nobody, PatientName="SYNTHETIC^A", PatientBirthDate="19500101")
    films = (nobody, changed(nobody, StudyInstanceUID="1.2.4"), named, changed(named, PatientBirthDate="19500102"))
    assert len({read(deidentified(data, "film", BASIC)).PatientID for data in films}) == 4
    assert (
        read(deidentified(changed(named, StudyInstanceUID="1.2.4"), "film", BASIC)).PatientID
        == read(deidentified(named, "film", BASIC)).PatientID
    )


# ----------------------------------------------------------------------------------------------------------- dates


def moved(data: bytes, **elements: object) -> pydicom.FileDataset:
    return read(deidentified(changed(data, **elements), "film", MOVED))


def day(text: str) -> date:
    return date(int(text[:4]), int(text[4:6]), int(text[6:8]))


@given(
    st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=64),
    st.dates(date(1900, 1, 1), date(2100, 1, 1)),
    st.dates(date(1900, 1, 1), date(2100, 1, 1)),
)
def test_all_dates_of_a_patient_move_alike(patient: str, one: date, other: date) -> None:
    written_as = [f"{when:%Y%m%d}" for when in (one, other)]
    first = moved(plain(), PatientID=patient, StudyDate=written_as[0], StudyTime="101112.5")
    second = moved(plain(), PatientID=patient, StudyDate=written_as[1], AcquisitionDateTime=f"{written_as[1]}101112.123456+0100")
    days = (one - day(first.StudyDate)).days
    assert 1 <= days <= MOST_DAYS
    assert (other - day(second.StudyDate)).days == days
    assert first.StudyTime == "101112.5"
    assert second.AcquisitionDateTime == f"{second.StudyDate}101112.123456+0100"


def test_dates_that_another_option_keeps_move_too() -> None:
    """A detector is calibrated on the day of the film, or on a day before it: unmoved, it would tell by how much the others moved."""
    before = changed(plain(), StudyDate="20200315", DateOfLastDetectorCalibration="20200314")
    after = read(deidentified(before, "film", by(Retain.longitudinal_modified_dates, Retain.device_identity)))
    assert (day(after.StudyDate) - day(after.DateOfLastDetectorCalibration)).days == 1
    assert after.StudyDate != "20200315"
    assert read(deidentified(before, "film", by(Retain.device_identity))).DateOfLastDetectorCalibration == "20200314"


def test_patients_move_by_different_days() -> None:
    dates = {str(moved(plain(), PatientID=f"patient {number}", StudyDate="20200315").StudyDate) for number in range(40)}
    assert len(dates) > 35


@pytest.mark.parametrize("option", [Retain.longitudinal_full_dates, Retain.longitudinal_modified_dates])
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("StudyDate", "20200230"),
        ("StudyDate", "2020.03.15"),
        ("StudyDate", f"{STEM}"),
        ("StudyDate", f"20200315{STEM}"),
        ("AcquisitionDateTime", f"20200315{STEM}"),
        ("AcquisitionDateTime", "2020"),
        ("StudyTime", f"1011{STEM}"),
        ("StudyTime", "2561"),
    ],
)
def test_dates_that_are_none_are_emptied(option: Retain, keyword: str, value: str) -> None:
    with disable_value_validation():
        before = changed(plain(), **{keyword: value})
    assert not read(deidentified(before, "film", by(option)))[keyword].value


def test_a_date_that_would_be_before_the_calendar_is_emptied() -> None:
    assert not moved(plain(), StudyDate="00010101").StudyDate


def test_the_day_of_birth_is_never_kept() -> None:
    before = changed(plain(), PatientBirthDate="19500102", PatientBirthTime="1011")
    for option in Retain:
        after = read(deidentified(before, "film", by(option)))
        assert not after.PatientBirthDate
        assert "PatientBirthTime" not in after


# --------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("elements", "said"),
    [
        ({"BurnedInAnnotation": "YES"}, "without burned-in text; got Burned In Annotation (0028,0301) YES"),
        ({"SOPClassUID": SCREENSHOT}, "(0028,0301) not NO, in a Secondary Capture"),
        ({"SOPClassUID": SCREENSHOT, "BurnedInAnnotation": STEM}, "(0028,0301) not NO, in a Secondary Capture"),
        ({"RecognizableVisualFeatures": "YES"}, "(0028,0302) YES"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "not a projection radiograph"),
        ({"SOPClassUID": "1.2.826.0.1.1917"}, "got SOP Class UID (0008,0016) none of the standard's"),
        ({"PixelData": None}, "no whole DICOM image"),
        ({"SOPInstanceUID": None}, "no whole DICOM image"),
    ],
)
def test_what_is_refused(elements: dict[str, object], said: str) -> None:
    with disable_value_validation():
        made = read(plain())
        for keyword, value in elements.items():
            if value is None:
                delattr(made, keyword)
            else:
                setattr(made, keyword, value)
        data = io.BytesIO()
        pydicom.dcmwrite(data, made)
    with pytest.raises(ImageError, match=re.escape(said)) as caught:
        deidentified(data.getvalue(), "film", BASIC)
    assert STEM not in str(caught.value)
    assert caught.value.next_step


def test_overlays_in_the_unused_bits_of_pixels_are_refused() -> None:
    made = read(plain())
    made.add_new(0x60000100, "US", 16)
    made.add_new(0x60000102, "US", 12)
    with pytest.raises(ImageError, match="an overlay without Overlay Data"):
        deidentified(written(made), "film", BASIC)


@pytest.mark.parametrize("elements", [{"BurnedInAnnotation": "NO"}, {"SOPClassUID": SCREENSHOT, "BurnedInAnnotation": "NO"}])
def test_what_says_that_nothing_is_burned_in_is_not_refused(elements: dict[str, object]) -> None:
    assert read(deidentified(changed(plain(), **elements), "film", BASIC)).BurnedInAnnotation == "NO"


def test_a_message_quotes_nothing(reader: FilmReader, tmp_path: Path) -> None:
    made = bytearray(planted())
    at = made.index(b"\x28\x00\x10\x00US")
    made[at + 4 : at + 6] = b"\xff\xff"
    path = tmp_path / "film.dcm"
    path.write_bytes(made[: len(made) // 2])
    with pytest.raises(ImageError) as caught:
        reader.deidentified(path, BASIC).result()
    assert not PIECES.search(str(caught.value).encode())


def test_hostile_files_end_as_a_film_or_an_error(reader: FilmReader, tmp_path: Path) -> None:
    for name, data in hostile(number=200).items():
        if name.endswith(".dcm"):
            (tmp_path / name).write_bytes(data)
    futures = {path.name: reader.deidentified(path, BASIC) for path in sorted(tmp_path.iterdir())}
    assert len(futures) > 400
    outcomes = {name: future.exception(240) for name, future in futures.items()}
    assert {type(outcome) for outcome in outcomes.values()} == {ImageError, type(None)}
    for name, outcome in outcomes.items():
        if outcome is None:
            assert read(futures[name].result()).PatientIdentityRemoved == "YES"
        else:
            assert str(outcome).startswith(f"{name}: "), name


# ------------------------------------------------------------------------------------------------- as others see it


def test_a_worker_answers(reader: FilmReader, tmp_path: Path) -> None:
    """With the same bytes as here: nothing is drawn by chance, and nothing is kept from file to file."""
    path = tmp_path / "film.dcm"
    path.write_bytes(planted())
    for rules in (BASIC, OTHER, by(*KEPT.keys() - {Retain.longitudinal_full_dates}), BASIC):
        assert reader.deidentified(path, rules).result() == deidentified(planted(), "film", rules)
    path.write_bytes(b"no film")
    with pytest.raises(ImageError, match="sent: "):
        reader.deidentified(path, BASIC, called="sent").result()


def test_twice_is_no_harm(capfd: pytest.CaptureFixture[str]) -> None:
    once = deidentified(planted(), "film", BASIC)
    twice = deidentified(once, "film", BASIC)
    assert [held.tag for held in read(once)] == [held.tag for held in read(twice)]
    assert read(once).SOPInstanceUID != read(twice).SOPInstanceUID
    assert capfd.readouterr() == ("", "")


def test_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dicomanonymizer.dicomfields_selector", None)
    monkeypatch.setattr(module, "_actions", cache(module._actions.__wrapped__))  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(SetupError, match=re.escape("pip install 'cxr-retrieval[dicom]'")):
        deidentified(plain(), "film", BASIC)


def full(phantom: pydicom.Dataset) -> None:
    """A detector's film with most of what a DX may have."""
    code = pydicom.Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "399348003", "SCT", "antero-posterior"
    code.ContextIdentifier, code.MappingResource, code.ContextGroupVersion = "4010", "DCMR", "20020904"
    request, reference = pydicom.Dataset(), pydicom.Dataset()
    request.RequestedProcedureID, request.ScheduledProcedureStepID = "R1", "S1"
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = phantom.SOPClassUID, "1.2.3.4"
    phantom.ViewCodeSequence, phantom.RequestAttributesSequence, phantom.ReferencedPerformedProcedureStepSequence = (
        [code],
        [request],
        [reference],
    )
    phantom.AcquisitionContextSequence, phantom.ReferencedStudySequence = [], [reference]
    phantom.SeriesDate = phantom.ContentDate = phantom.AcquisitionDate = phantom.InstanceCreationDate = "20200101"
    phantom.SeriesTime = phantom.ContentTime = phantom.AcquisitionTime = phantom.InstanceCreationTime = "120000"
    phantom.Manufacturer, phantom.InstitutionName, phantom.StationName = "SYNTHETIC", "SYNTHETIC", "SYNTHETIC"
    phantom.DeviceSerialNumber, phantom.DetectorID, phantom.DateOfLastDetectorCalibration = "1", "1", "20191231"
    phantom.ProtocolName, phantom.SeriesDescription, phantom.OperatorsName, phantom.PatientAge = "CHEST", "PA", "SYNTHETIC^A", "050Y"
    phantom.ClinicalTrialSponsorName, phantom.ClinicalTrialProtocolID, phantom.ClinicalTrialSubjectID = "SYNTHETIC", "1", "1"
    phantom.ClinicalTrialProtocolName = phantom.ClinicalTrialSiteID = phantom.ClinicalTrialSiteName = ""
    phantom.BurnedInAnnotation, phantom.PresentationIntentType, phantom.FrameOfReferenceUID = "NO", "FOR PRESENTATION", "1.2.3.5"


def computed(phantom: pydicom.Dataset) -> None:
    """A film of a storage phosphor."""
    full(phantom)
    phantom.SOPClassUID, phantom.Modality, phantom.PlateID, phantom.CassetteID = "1.2.840.10008.5.1.4.1.1.1", "CR", "1", "1"
    phantom.BodyPartExamined, phantom.ViewPosition = "CHEST", "PA"


def captured(phantom: pydicom.Dataset) -> None:
    """A scan of a film."""
    full(phantom)
    phantom.SOPClassUID, phantom.ConversionType, phantom.PhotometricInterpretation = SCREENSHOT, "DF", "MONOCHROME2"
    phantom.DateOfSecondaryCapture, phantom.TimeOfSecondaryCapture, phantom.SecondaryCaptureDeviceID = "20200101", "120000", "1"


def verified(data: bytes, path: Path) -> set[str]:
    """Errors that dciodvfy finds."""
    path.write_bytes(data)
    said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
    lines = {line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")}
    assert re.search("^(DXImageForPresentation|CRImage|SCImage)$", said.stdout + said.stderr, re.MULTILINE)
    return lines


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")
@pytest.mark.parametrize("change", [lambda _: None, full, computed, captured], ids=["plain", "full", "computed", "captured"])
@pytest.mark.parametrize("retain", [(), *((option,) for option in Retain), tuple(set(Retain) - {Retain.longitudinal_full_dates})])
def test_as_valid_as_before(retain: tuple[Retain, ...], change: Callable[[pydicom.Dataset], None], tmp_path: Path) -> None:
    path = tmp_path / "film.dcm"
    write_dicom(make_phantom(5, PHANTOM_LABELS[0]), path)
    phantom = pydicom.dcmread(path)
    change(phantom)
    before = written(phantom)
    assert verified(deidentified(before, "film", by(*retain)), path) <= verified(before, path)


@pytest.mark.real_data
def test_real_dicom_files(real_data: Path, reader: FilmReader, tmp_path: Path) -> None:
    """Both are Secondary Captures that do not say whether text is burned in: refused, until somebody has looked at them."""
    path, sources = tmp_path / "film.dcm", sorted((real_data / "dicom").glob("*.dcm"))
    assert sources
    for data in (source.read_bytes() for source in sources):
        path.write_bytes(data)
        with pytest.raises(ImageError, match="not NO, in a Secondary Capture"):
            reader.deidentified(path, BASIC).result()
        path.write_bytes(changed(data, BurnedInAnnotation="NO"))
        after = reader.deidentified(path, BASIC).result()
        assert (read_radiograph(after).pixels == read_radiograph(data).pixels).all()
        for keyword in ("PatientID", "PatientName", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
            value = str(read(data).get(keyword, "")).encode()
            assert not value or value not in after
