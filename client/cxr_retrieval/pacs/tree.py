"""An answer as the content of a structured report: TID 1500 (PS3.16), with the sentence and the limits of use before all else.

Of a neighbour it says rank, pseudonym, similarity and label: what else is known of it is another patient's. Of a refused film it names no
neighbour, for each of them has a label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from highdicom.sr import (
    AlgorithmIdentification,
    CodeContentItem,
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    ImageContentItem,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    NumContentItem,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RelationshipTypeValues,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from cxr_retrieval.cases.pseudonyms import SHOWN_DIGITS
from cxr_retrieval.gallery.store import Neighbour
from cxr_retrieval.pacs import concepts
from cxr_retrieval.pacs.concepts import cleaned, label_code
from cxr_retrieval.radiograph.header import Header
from cxr_retrieval.retrieval.picture import DISCLAIMER
from cxr_retrieval.retrieval.query import QueryResult

DEVICE: Final = "cxr-retrieval"
"""Name and manufacturer of the device that observes."""
MOST_CASES: Final = 20
"""Neighbours that are named."""
_MODALITIES: Final[Mapping[str, str]] = {
    "CR": "Computed Radiography",
    "DX": "Digital Radiography",
    "RF": "Radiofluoroscopy",
    "RG": "Radiographic imaging",
    "XA": "X-Ray Angiography",
    "OT": "Other Modality",
}
"""Of CID 29, those of films that are read (docs/dicom.md)."""
_PIXELS: Final = Code("{pixels}", "UCUM", "Pixels")
_SOURCE: Final = Code("260753009", "SCT", "Source")

Uids = Callable[[str], str]
"""What it is for → the UID: the same each time."""


def tree(result: QueryResult, header: Header, version: str, device: str, uids: Uids) -> Dataset:
    """The root CONTAINER, with all below it.

    Args:
        header: Of the film that was asked about.
        version: Of this software.
        device: UID of what runs it.
        uids: Makes those of the vote and of cases.
    """
    observer = DeviceObserverIdentifyingAttributes(device, DEVICE, DEVICE, f"{version}, model {result.model_version}")
    groups = [_answer(result, version, uids)]
    if result.prediction.label is not None:
        groups += [_case(rank, hit, uids) for rank, hit in enumerate(result.neighbours[:MOST_CASES], start=1)]
    report = MeasurementReport(ObservationContext(ObserverContext(codes.DCM.Device, observer)), concepts.PROCEDURE, groups)
    root = report[0]
    for item in (*_said(result), _library(header)):
        root.ContentSequence.insert(-1, item)  # before the measurements: 6.2.5 lets additions stand where they make sense
    return root


def _said(result: QueryResult) -> list[ContentItem]:
    """What a reader must see, in words."""
    refused = "no label, refused: " if result.prediction.label is None else ""
    texts = [(concepts.LIMITS, DISCLAIMER), (concepts.IN_WORDS, refused + result.sentence)]
    if result.trust.abstained and not refused:
        texts.append((concepts.DOUBT, f"do not rely on the label: {result.trust.abstained}"))
    texts += [(concepts.WARNING, warning) for warning in result.warnings]
    return [_text(name, words) for name, words in texts]


def _text(name: Code, words: str) -> ContentItem:
    return TextContentItem(name, cleaned(words) or "-", RelationshipTypeValues.CONTAINS)


def _library(header: Header) -> ContentItem:
    """TID 1600 with the one film. highdicom's own asks for spacing and orientation, which a film need not have."""
    acquired = RelationshipTypeValues.HAS_ACQ_CONTEXT
    modality = header.get("Modality") if header.get("Modality") in _MODALITIES else "OT"
    sides = ((codes.DCM.PixelDataRows, header.get("Rows")), (codes.DCM.PixelDataColumns, header.get("Columns")))
    counts = [NumContentItem(name, int(side), _PIXELS, relationship_type=acquired) for name, side in sides if side]
    for item in counts:
        _make_plain(item)
    image = ImageContentItem(_SOURCE, header.sop_class, header.instance, relationship_type=RelationshipTypeValues.CONTAINS)
    image.ContentSequence = ContentSequence(
        [CodeContentItem(codes.DCM.Modality, Code(modality, "DCM", _MODALITIES[modality]), acquired), *counts]
    )
    group = _container(codes.DCM.ImageLibraryGroup, [image])
    return _container(codes.DCM.ImageLibrary, [group])


def _container(name: Code, content: Sequence[ContentItem]) -> ContentItem:
    item = ContainerContentItem(name, relationship_type=RelationshipTypeValues.CONTAINS)
    item.ContentSequence = ContentSequence(content)
    return item


def _answer(result: QueryResult, version: str, uids: Uids) -> MeasurementsAndQualitativeEvaluations:
    """TID 1501 of the vote; its label is no Finding (121071), which would be a reader's word for what a film shows."""
    vote, known = result.prediction, result.trust
    measured = [_number(concepts.STRANGENESS, result.ood.score)]
    state = concepts.REFUSED
    said: list[QualitativeEvaluation] = []
    if vote.label is not None:
        state = concepts.ABSTAINED if known.abstained else concepts.ANSWERED
        said.append(QualitativeEvaluation(concepts.LABEL, label_code(vote.label)))
        measured.append(_number(concepts.CASES, len(result.neighbours)))
        measured += [_number(concepts.SHARE, share, label) for label, share in vote.scores.items()]
        measured += [_number(concepts.FINDING_SHARE, share, finding) for finding, share in vote.findings.items()]
        if known.calibrated is not None:
            measured.append(_number(concepts.RIGHT, known.calibrated))
        if known.labels is not None:
            measured.append(_number(concepts.ERROR_RATE, known.error_rate))
            possible = [label_code(label) for label in known.labels] or [concepts.NONE]
            said += [QualitativeEvaluation(concepts.POSSIBLE, code) for code in possible]
    return MeasurementsAndQualitativeEvaluations(
        TrackingIdentifier(uids("vote"), "vote"),
        finding_type=concepts.ANSWER,
        algorithm_id=AlgorithmIdentification(DEVICE, version, [f"model version {result.model_version}", result.voter]),
        measurements=measured,
        qualitative_evaluations=[QualitativeEvaluation(concepts.STATE, state), *said],
    )


def _case(rank: int, hit: Neighbour, uids: Uids) -> MeasurementsAndQualitativeEvaluations:
    return MeasurementsAndQualitativeEvaluations(
        TrackingIdentifier(uids(f"case {rank}"), hit.case.key[:SHOWN_DIGITS]),
        finding_type=concepts.CASE,
        measurements=[_number(concepts.RANK, rank), _number(concepts.SIMILARITY, hit.similarity)],
        qualitative_evaluations=[QualitativeEvaluation(concepts.CASE_LABEL, label_code(hit.case.label))],
    )


def _number(name: Code, value: float, label: str | None = None) -> Measurement:
    """TID 300; what it is of, if a label is given, modifies its name."""
    made = Measurement(name, value if isinstance(value, int) else float(value), concepts.NO_UNITS)
    _make_plain(made[0])
    if label is not None:
        made[0].ContentSequence = ContentSequence(
            [CodeContentItem(concepts.OF_LABEL, label_code(label), RelationshipTypeValues.HAS_CONCEPT_MOD)]
        )
    return made


def _make_plain(item: Dataset) -> None:
    """Writes a whole number as such: highdicom writes 10.0 for ten."""
    measured = item.MeasuredValueSequence[0]
    if "FloatingPointValue" not in measured:
        measured.NumericValue = str(int(measured.NumericValue))
