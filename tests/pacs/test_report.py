"""Answers as DICOM objects, read back by dcmtk, dicom3tools, highdicom and pydicom: none of them is what wrote them, but for the tree."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
import pytest
from highdicom.sr import MeasurementReport, MeasurementsAndQualitativeEvaluations, srread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from cxr_retrieval.cases.pseudonyms import SHOWN_DIGITS
from cxr_retrieval.gallery.store import Case, Neighbour
from cxr_retrieval.pacs import concepts
from cxr_retrieval.pacs.concepts import LABELS, SCHEME, label_code
from cxr_retrieval.pacs.drawn import SCALE, WIDTH
from cxr_retrieval.pacs.report import PICTURE_SERIES, REPORT_SERIES, Reporter
from cxr_retrieval.pacs.tree import MOST_CASES
from cxr_retrieval.radiograph.dicom import read_header
from cxr_retrieval.radiograph.header import FORMS, REQUIRED, Header
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.phantoms import make_phantom
from cxr_retrieval.retrieval.calibration import Trust
from cxr_retrieval.retrieval.gate import Ood
from cxr_retrieval.retrieval.picture import DISCLAIMER, overlay
from cxr_retrieval.retrieval.query import Explanation, QueryResult
from cxr_retrieval.retrieval.voting import NoVote, weighted_vote

WHEN: Final = datetime(2026, 11, 27, 19, 5, 7, tzinfo=timezone(timedelta(hours=-3, minutes=-30)))
REPORTER: Final = Reporter(b"a key of the hospital's", "0.1.0")
REPEATED: Final = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyDescription",
)
UIDS: Final = {
    "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1",
    "SOPInstanceUID": "1.2.826.0.1.3680043.8.498.1",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.2",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.3",
}
WHOLE: Final = {
    "Modality": "DX",
    "BodyPartExamined": "CHEST",
    "Rows": "2000",
    "Columns": "1800",
    "PatientName": "SYNTHETIC^PHANTOM",
    "PatientID": "4711",
    "IssuerOfPatientID": "Clinic",
    "PatientBirthDate": "19500312",
    "PatientSex": "F",
    "StudyID": "12",
    "StudyDate": "20261127",
    "StudyTime": "183000.5",
    "AccessionNumber": "A-77",
    "ReferringPhysicianName": "Quincy^Q",
    "StudyDescription": "Thorax p.a.",
}
HEADERS: Final[Mapping[str, Header]] = {
    "whole": Header(UIDS | WHOLE),
    "nothing known": Header(UIDS),
    "Japanese": Header(UIDS | WHOLE | {"PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう", "ReferringPhysicianName": "=田中"}),
    "one component": Header(UIDS | WHOLE | {"PatientName": "Bono", "StudyDescription": "Thorax ü – α"}),
    "longest": Header(
        {name: f"1.2.{10**59 + number}" for number, name in enumerate(REQUIRED)}
        | {"SOPClassUID": UIDS["SOPClassUID"]}
        | dict.fromkeys(("PatientID", "IssuerOfPatientID", "StudyDescription"), "x" * 64)
        | dict.fromkeys(("StudyID", "AccessionNumber"), "y" * 16)
        | dict.fromkeys(("PatientName", "ReferringPhysicianName"), f"{'N' * 31}^{'M' * 32}")
        | {"PatientBirthDate": "18991231", "PatientSex": "O", "StudyDate": "20000229", "StudyTime": "235959.999999", "Modality": "CR"}
    ),
}
WIDEST: Final = Header(
    UIDS
    | WHOLE
    | dict.fromkeys(("PatientID", "IssuerOfPatientID", "StudyDescription"), "山" * 64)
    | dict.fromkeys(("StudyID", "AccessionNumber"), "山" * 16)
    | dict.fromkeys(("PatientName", "ReferringPhysicianName"), "=".join(["N" * 64, "名" * 64, "ん" * 64]))
)
"""As many letters as the standard has room for, three bytes each; dciodvfy counts bytes, and a name's whole, and calls that invalid."""
ACCEPTED: Final = {
    rf"Warning - Unrecognized defined term <{SCHEME}> for value 1 of attribute <Coding Scheme Designator>": "private, and declared",
    r"Warning - Missing attribute or value that would be needed to build DICOMDIR - .*": "the film has none either",
    r"Warning - Value dubious for this VR - .* PN .* - Retired Person Name form": "the film's name has one component, too",
    r"Warning - is only permitted to be empty when actually unknown; .* - attribute <Laterality>": "what a refused film shows is unknown",
}
"""Warnings of dciodvfy that are right and meant, and why."""
UTF8: Final = "W: The VR checker does not support this Specific Character Set: ISO_IR 192"
"""What dcmtk says of any file in UTF-8."""


@cache
def explanation() -> Explanation:
    phantom = make_phantom(1, "covid19")
    square, box = letterbox(phantom.pixels)
    mask = letterbox(phantom.lung_mask)[0]
    return Explanation(square, box, mask, np.linspace(0, 1, 256 * 256, dtype=np.float32).reshape(256, 256) * (mask > 0))


def result_of(labels: list[str], **changes: Any) -> QueryResult:
    """An answer on a phantom; its neighbours have every secret that a case can have."""
    hits = tuple(
        Neighbour(
            Case(
                f"{rank + 0xA1B2C3D4E500:x}{'f' * 20}",
                f"IMAGE-ID-{rank}",
                label,
                f"PATIENT-{rank}",
                "SOURCE",
                "SPLIT",
                Path(f"/PATH/{rank}.png"),
                {"age": 61.0, "clinical_notes": "NOTES", "own": "FACT"},
                "FILE-DIGEST",
                "PIXEL-DIGEST",
                "MEMBER",
                "CLUSTER",
            ),
            0.99 - rank / 128,
            0.9,
            0.8,
        )
        for rank, label in enumerate(labels)
    )
    made = QueryResult(
        "FILM-ID",
        "0123456789ab",
        weighted_vote([(hit.case.label, hit.similarity) for hit in hits]),
        hits,
        hits[:1],
        {"total": 2.0},
        ("a warning",),
        Ood(0.125, False, None),
        explanation(),
        Trust(0.6875, ("covid19",), None),
        0.25,
    )
    return replace(made, **changes)


LETTERS: Final = ["covid19"] * 6 + ["control", "non_covid_pneumonia", "tuberculosis", "covid19"]
RESULTS: Final[Mapping[str, QueryResult]] = {
    "answered": result_of(LETTERS),
    "refused": result_of(
        LETTERS,
        prediction=NoVote(),
        trust=Trust(None, (), "it seems to lie on its side"),
        ood=Ood(0.9, True, "it seems to lie on its side"),
    ),
    "abstained": result_of(LETTERS, trust=Trust(0.5, ("covid19", "control"), "control cannot be excluded at an error rate of 10 %")),
    "none is sure": result_of(LETTERS, trust=Trust(0.5, (), "no label is sure enough at an error rate of 10 %")),
    "not measured": result_of(LETTERS, trust=Trust(None, None, None, "no calibration is here")),
    "without code": result_of(["sarcoidosis", "Bronchiektasen, beidseits – nach Entlassung" * 3, r"a\b" + "\t\x00c", "\\", "肺炎" * 40]),
    "several findings": result_of(["effusion|consolidation", "effusion", "nodule|effusion"]),
    "many": result_of(["covid19"] * 40, warnings=tuple(f"warning {number}: {'words ' * 60}" for number in range(50))),
    "no attention": result_of(LETTERS, explanation=replace(explanation(), attention=None)),
}


def tool(*command: str) -> str:
    """What a program says, of both streams; it must end well."""
    ended = subprocess.run(command, capture_output=True, check=False)
    said = (ended.stdout + ended.stderr).decode()
    assert ended.returncode == 0, said
    return said


def written(folder: Path, data: bytes) -> str:
    path = folder / "object.dcm"
    path.write_bytes(data)
    return str(path)


def dataset_of(data: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(BytesIO(data))


def groups_of(data: bytes) -> list[MeasurementsAndQualitativeEvaluations]:
    """The measurement groups, as highdicom reads them."""
    content = srread(BytesIO(data)).content
    assert isinstance(content, MeasurementReport)
    return list(content.get_image_measurement_groups())


def numbers_of(group: MeasurementsAndQualitativeEvaluations, name: Code) -> list[float]:
    return [float(one.value) for one in group.get_measurements(name=name)]


def codes_of(group: MeasurementsAndQualitativeEvaluations, name: Code) -> list[str]:
    return [str(one[0].value.value) for one in group.get_qualitative_evaluations(name=name)]


def texts_of(data: bytes, name: Code) -> list[str]:
    """Of the items of this name right below the root."""
    items = dataset_of(data).ContentSequence
    return [str(item.TextValue) for item in items if item.ConceptNameCodeSequence[0].CodeValue == name.value]


@pytest.mark.parametrize(("answer", "header"), [*((name, "whole") for name in RESULTS), *(("answered", name) for name in HEADERS)])
def test_is_valid_to_dicom3tools(answer: str, header: str, tmp_path: Path) -> None:
    for made, name in ((REPORTER.report, "ComprehensiveSR"), (REPORTER.picture, "SCImage")):
        lines = tool("dciodvfy", written(tmp_path, made(RESULTS[answer], HEADERS[header], WHEN))).splitlines()
        assert name in lines
        said = [line for line in lines if line != name and not any(re.fullmatch(known, line) for known in ACCEPTED)]
        assert not said


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_dcmtk_reads_the_report(result: QueryResult, tmp_path: Path) -> None:
    path = written(tmp_path, REPORTER.report(result, HEADERS["Japanese"], WHEN))
    said = tool("dsrdump", "+Pl", "+Pn", path)
    assert [line for line in said.splitlines() if line.startswith(("W:", "E:", "F:"))] == [UTF8]
    assert DISCLAIMER in said
    assert concepts.cleaned(result.sentence) in said
    assert "Yamada^Tarou=山田^太郎" in said
    for warning in result.warnings:
        assert warning.strip() in said
    numbers = [float(number) for number in re.findall(r'="([\d.]+)" \(1,UCUM', said)]
    for label, share in result.prediction.scores.items():
        assert f'"{label_code(label).meaning}"' in said
        assert any(number == pytest.approx(share) for number in numbers)
    shown = [hit.case.key[:SHOWN_DIGITS] for hit in result.neighbours[:MOST_CASES]]
    assert all((pseudonym in said) == (result.prediction.label is not None) for pseudonym in shown)
    page = tool("dsr2html", path)
    assert DISCLAIMER in page
    assert "</html>" in page


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_highdicom_reads_back_what_the_json_says(result: QueryResult) -> None:
    data = REPORTER.report(result, HEADERS["whole"], WHEN)
    said, told = result.as_json(), result.as_json()["prediction"]
    dataset = dataset_of(data)
    assert dataset.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    vote, *cases = groups_of(data)
    assert numbers_of(vote, concepts.STRANGENESS) == [said["ood"]["score"]]
    if told["label"] is None:
        assert codes_of(vote, concepts.STATE) == ["state-refused"]
        assert texts_of(data, concepts.IN_WORDS) == [f"no label, refused: {said['ood']['reason']}"]
        assert not cases
        assert not any(code.value.encode() in data for code in LABELS.values())
        return
    assert codes_of(vote, concepts.STATE) == ["state-abstained" if told["abstained"] else "state-answered"]
    assert codes_of(vote, concepts.LABEL) == [label_code(told["label"]).value]
    assert numbers_of(vote, concepts.CASES) == [len(said["neighbours"])]
    assert numbers_of(vote, concepts.SHARE) == list(told["scores"].values())
    assert numbers_of(vote, concepts.FINDING_SHARE) == list(told.get("findings", {}).values())
    assert [of.value.value for share in vote.get_measurements(name=concepts.SHARE) for of in share[0].ContentSequence] == [
        label_code(label).value for label in told["scores"]
    ]
    assert numbers_of(vote, concepts.RIGHT) == ([] if told["calibrated"] is None else [told["calibrated"]])
    none = [concepts.NONE.value] if told["set"] == [] else []
    assert codes_of(vote, concepts.POSSIBLE) == [label_code(label).value for label in told["set"] or []] + none
    assert numbers_of(vote, concepts.ERROR_RATE) == ([] if told["set"] is None else [0.1])
    assert texts_of(data, concepts.DOUBT) == [f"do not rely on the label: {told['abstained']}"] * bool(told["abstained"])
    assert texts_of(data, concepts.WARNING) == [warning.strip() for warning in said["warnings"]]
    assert len(cases) == min(len(said["neighbours"]), MOST_CASES)
    for case, hit, known in zip(cases, result.neighbours, said["neighbours"], strict=False):
        assert case.tracking_identifier == hit.case.key[:SHOWN_DIGITS]
        assert case.finding_type == concepts.CASE
        assert numbers_of(case, concepts.RANK) == [known["rank"]]
        assert numbers_of(case, concepts.SIMILARITY) == [known["similarity"]]
        assert codes_of(case, concepts.CASE_LABEL) == [label_code(known["label"]).value]


def test_the_label_is_no_finding_and_a_control_not_normal() -> None:
    """What a radiologist would say of a film (Finding) is not what a vote says."""
    data = REPORTER.report(RESULTS["answered"], HEADERS["whole"], WHEN)
    found = [group.finding_type for group in groups_of(data)]
    assert all(code is not None and code.scheme_designator == SCHEME for code in found)
    assert label_code("control").scheme_designator == SCHEME
    assert codes.SCT.Normal.value.encode() not in data


def test_declares_its_scheme_and_who_observed() -> None:
    dataset = dataset_of(REPORTER.report(RESULTS["answered"], HEADERS["whole"], WHEN))
    (scheme,) = dataset.CodingSchemeIdentificationSequence
    assert (scheme.CodingSchemeDesignator, scheme.CodingSchemeVersion, scheme.CodingSchemeResponsibleOrganization) == (
        SCHEME,
        "1",
        "cxr-retrieval",
    )
    assert (dataset.CompletionFlag, dataset.VerificationFlag, dataset.PreliminaryFlag) == ("COMPLETE", "UNVERIFIED", "PRELIMINARY")
    observer = srread(BytesIO(REPORTER.report(RESULTS["answered"], HEADERS["whole"], WHEN))).content.get_observer_contexts()[0]  # pyright: ignore
    device = observer.observer_identifying_attributes
    assert (device.name, device.manufacturer_name, device.model_name) == ("cxr-retrieval", "cxr-retrieval", "0.1.0, model 0123456789ab")
    assert device.uid == dataset.DeviceUID


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_the_picture_is_the_overlay_to_pydicom_and_dcmtk(result: QueryResult, tmp_path: Path) -> None:
    path = written(tmp_path, REPORTER.picture(result, HEADERS["whole"], WHEN))
    pixels = pydicom.dcmread(path).pixel_array
    seen = result.explanation
    shown = overlay(seen.square, seen.lung_mask, seen.attention)
    box = seen.box
    film = shown[box.top : box.top + box.height, box.left : box.left + box.width]
    left = (WIDTH - SCALE * box.width) // 2
    enlarged = pixels[: SCALE * box.height, left : left + SCALE * box.width]
    for row in range(SCALE):
        for column in range(SCALE):
            assert (enlarged[row::SCALE, column::SCALE] == film).all()
    strip = pixels[SCALE * box.height :]
    assert strip.shape[0] > 100
    assert (strip != strip[0, 0]).any(), "there is text"
    assert (strip[:, -10:] == strip[0, 0]).all(), "none runs off"
    tool("dcmj2pnm", "--write-png", path, str(tmp_path / "picture.png"))
    assert (np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")) == pixels).all()


def test_a_narrow_film_stands_in_the_middle() -> None:
    square, box = letterbox(np.full((400, 100), 200, np.uint8))
    narrow = replace(RESULTS["answered"], explanation=Explanation(square, box, np.zeros_like(square), None))
    pixels = dataset_of(REPORTER.picture(narrow, HEADERS["whole"], WHEN)).pixel_array
    assert pixels.shape[1] == WIDTH
    bright = np.flatnonzero((pixels[100] == 200).all(axis=1))
    assert (bright[0], bright[-1]) == (WIDTH // 2 - 96, WIDTH // 2 + 95)


def test_the_same_again_is_the_same_instance() -> None:
    header, answered = HEADERS["whole"], RESULTS["answered"]
    for make in (REPORTER.report, REPORTER.picture):
        assert make(answered, header, WHEN) == make(answered, header, WHEN)
        first, later = dataset_of(make(answered, header, WHEN)), dataset_of(make(RESULTS["refused"], header, WHEN + timedelta(days=3)))
        assert (first.SOPInstanceUID, first.SeriesInstanceUID) == (later.SOPInstanceUID, later.SeriesInstanceUID)
        assert first.file_meta.MediaStorageSOPInstanceUID == first.SOPInstanceUID


def test_another_film_model_or_key_gives_other_uids() -> None:
    answered, header = RESULTS["answered"], HEADERS["whole"]
    other = Reporter(b"another key", REPORTER.version)
    made = [
        *(make(answered, header, WHEN) for make in (REPORTER.report, REPORTER.picture, other.report, other.picture)),
        *(make(replace(answered, model_version="ba9876543210"), header, WHEN) for make in (REPORTER.report, REPORTER.picture)),
        *(make(answered, Header({**header.elements, "SOPInstanceUID": "1.2.3"}), WHEN) for make in (REPORTER.report, REPORTER.picture)),
    ]
    uids = [uid for data in made for uid in (dataset_of(data).SOPInstanceUID, dataset_of(data).SeriesInstanceUID)]
    assert len(set(uids)) == len(uids) == 16


def test_refers_to_the_film_and_belongs_to_its_study() -> None:
    header = HEADERS["whole"]
    report, picture = (dataset_of(make(RESULTS["answered"], header, WHEN)) for make in (REPORTER.report, REPORTER.picture))
    for made, series in ((report, REPORT_SERIES), (picture, PICTURE_SERIES)):
        assert {name: str(made[name].value) for name in REPEATED} == {name: header.get(name) for name in REPEATED}
        assert made.SeriesInstanceUID not in (header.series, header.study)
        assert made.SeriesNumber == series
        assert DISCLAIMER in made.SeriesDescription
        assert made.ContentQualification == "RESEARCH"
        assert (made.ContentDate, made.ContentTime, made.TimezoneOffsetFromUTC) == ("20261127", "190507", "-0330")
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    (series_item,) = study.ReferencedSeriesSequence
    (instance,) = series_item.ReferencedSOPSequence
    (source,) = picture.SourceImageSequence
    assert (study.StudyInstanceUID, series_item.SeriesInstanceUID) == (header.study, header.series)
    for found in (instance, source):
        assert (found.ReferencedSOPClassUID, found.ReferencedSOPInstanceUID) == (header.sop_class, header.instance)
    assert header.instance.encode() in tree_bytes(report)
    assert (picture.ImageComments, picture.ConversionType, list(picture.ImageType)) == (DISCLAIMER, "WSD", ["DERIVED", "SECONDARY"])
    assert picture.BodyPartExamined == "CHEST"
    assert "BurnedInAnnotation" not in picture, "what is burned into the film itself is not known"
    assert "BodyPartExamined" not in dataset_of(REPORTER.picture(RESULTS["refused"], header, WHEN))


def test_letters_of_any_alphabet_are_repeated_up_to_the_last(tmp_path: Path) -> None:
    for make in (REPORTER.report, REPORTER.picture):
        data = make(RESULTS["answered"], WIDEST, WHEN)
        again = read_header(data, "answer")
        assert {name: again.get(name) for name in REPEATED} == {name: WIDEST.get(name) for name in REPEATED}
    assert WIDEST.get("PatientName") in tool("dsrdump", "+Pl", written(tmp_path, REPORTER.report(RESULTS["answered"], WIDEST, WHEN)))


def tree_bytes(report: pydicom.Dataset) -> bytes:
    """The content tree alone."""
    return json.dumps([item.to_json_dict() for item in report.ContentSequence]).encode()


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_names_no_patient_file_or_fact_of_the_gallery(result: QueryResult) -> None:
    for make in (REPORTER.report, REPORTER.picture):
        data = make(result, HEADERS["whole"], WHEN)
        for secret in (
            b"IMAGE-ID",
            b"PATIENT-",
            b"SOURCE",
            b"SPLIT",
            b"/PATH",
            b"NOTES",
            b"FACT",
            b"DIGEST",
            b"MEMBER",
            b"CLUSTER",
            b"FILM-ID",
        ):
            assert secret not in data
        assert not any(hit.case.key[: SHOWN_DIGITS + 1].encode() in data for hit in result.neighbours)


def test_labels_without_code_get_one_that_stays() -> None:
    assert label_code("sarcoidosis") == Code("sarcoidosis", SCHEME, "sarcoidosis")
    odd = ["x" * 17, "effusion|nodule", "vote-label", r"a\b", "肺炎", " a", "", "\\"]
    made = [label_code(label) for label in odd]
    assert len({code.value for code in made}) == len(odd)
    assert all(re.fullmatch(r"[0-9a-f]{16}", code.value) and 1 <= len(code.meaning) <= 64 for code in made)
    assert all(len(code.meaning.encode()) <= 64 for code in map(label_code, ["肺炎" * 40, "ä" * 64]))
    assert label_code("x" * 17).value == "d04fd59f3d9a1fd4", "whatever the version of this software"


def test_every_code_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "answers-in-pacs.md").read_text("utf-8")
    ours = [code for code in (*vars(concepts).values(), *LABELS.values()) if isinstance(code, Code)]
    assert len(ours) > 25
    assert not [code.value for code in ours if code != concepts.NO_UNITS and f"`{code.value}`" not in page]
    assert len({(code.value, code.scheme_designator) for code in ours}) == len(ours)
    assert all(len(code.value) <= 16 and ("-" in code.value) == (code.scheme_designator == SCHEME) for code in ours)


def test_a_time_without_zone_is_refused() -> None:
    for make in (REPORTER.report, REPORTER.picture):
        with pytest.raises(ValueError, match="zone"):
            make(RESULTS["answered"], HEADERS["whole"], WHEN.replace(tzinfo=None))


def test_the_secret_is_not_shown() -> None:
    assert "hospital" not in repr(REPORTER)


TEXT: Final = st.characters(codec="utf-8", exclude_characters="\\", exclude_categories=("Cc", "Cs"))
NUMBERS: Final = st.integers(0, 10**12).map(str)


def form_of(keyword: str) -> st.SearchStrategy[str]:
    """Values that `FORMS` lets through."""
    if keyword in UIDS:
        return st.lists(NUMBERS, min_size=2, max_size=4).map(".".join)
    if keyword in ("Rows", "Columns", "PatientBirthDate", "StudyDate", "StudyTime"):
        return st.from_regex(FORMS[keyword], fullmatch=True).filter(str.isascii)
    drawn = (
        st.from_regex(r"[A-Z0-9 _]{1,16}", fullmatch=True)
        if keyword in ("Modality", "BodyPartExamined", "PatientSex")
        else st.text(TEXT, max_size=64)
    )
    return drawn.filter(lambda value: value == value.strip().strip("=^") and FORMS[keyword].fullmatch(value) is not None)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    there = draw(st.sets(st.sampled_from(sorted(set(FORMS) - set(REQUIRED)))))
    return Header({keyword: draw(form_of(keyword)) for keyword in (*REQUIRED, *sorted(there))} | {"SOPClassUID": UIDS["SOPClassUID"]})


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(headers())
def test_whatever_a_header_holds_is_repeated_and_readable(tmp_path: Path, header: Header) -> None:
    """No value becomes a warning, either: warnings are errors here."""
    for make in (REPORTER.report, REPORTER.picture):
        data = make(RESULTS["answered"], header, WHEN)
        again = read_header(data, "answer")
        assert {name: again.get(name) for name in REPEATED} == {name: header.get(name) for name in REPEATED}
    assert DISCLAIMER in tool("dsrdump", "+Pl", written(tmp_path, REPORTER.report(RESULTS["answered"], header, WHEN)))
