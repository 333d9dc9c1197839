"""The answer to a film as DICOM objects for the archive that sent it: a structured report, and a picture as secondary capture.

Both belong to the film's own study, each in a series of its own. Their UIDs are keyed, of the film, the model version and the kind alone:
what is sent again is the same instance.

The report is a Comprehensive SR: TID 1500 would fit into an Enhanced SR, but Comprehensive is what viewers read and archives take.
The picture says nothing of Burned In Annotation (0028,0301): the strip names nobody, but what is burned into the film itself may.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Final

from pydicom import DataElement, Dataset, dcmwrite
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.uid import ComprehensiveSRStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from cxr_retrieval.pacs.concepts import declared
from cxr_retrieval.pacs.drawn import drawn
from cxr_retrieval.pacs.tree import DEVICE, tree
from cxr_retrieval.radiograph.elements import coded, referenced
from cxr_retrieval.radiograph.file_meta import give_file_meta
from cxr_retrieval.radiograph.header import Header, keyed_uid
from cxr_retrieval.retrieval.picture import DISCLAIMER
from cxr_retrieval.retrieval.query import QueryResult

REPORT_SERIES: Final = 9901
PICTURE_SERIES: Final = 9902
"""Series Number (0020,0011): behind whatever a modality numbers."""
_REPEATED: Final = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
)
"""Elements of patient and study, of type 1 or 2 in both (PS3.3 C.7.1.1, C.7.2.1): empty where the film has none."""
_REPEATED_IF_THERE: Final = ("IssuerOfPatientID", "StudyDescription")
"""The same of type 3."""
_SOURCE_OF_PICTURE: Final = ("121322", "DCM", "Source image for image processing operation")


@dataclass(frozen=True)
class Reporter:
    """Writes answers as DICOM objects; holds nothing of any film.

    Attributes:
        secret: Key of the UIDs; out of `repr`.
        version: Of this software.
    """

    secret: bytes = field(repr=False)
    version: str

    def report(self, result: QueryResult, header: Header, when: datetime) -> bytes:
        """The answer as Comprehensive SR by TID 1500: a file (PS3.10) in Explicit VR Little Endian and UTF-8.

        Args:
            header: Of the film; what it says of patient and study is repeated as it stands.
            when: The time of the answer, in the archive's own time zone: Timezone Offset From UTC (0008,0201) speaks of the study's, too.

        Raises:
            ValueError: `when` has no time zone.
        """
        made = self._instance(result, header, when, "report", ComprehensiveSRStorage, "SR", REPORT_SERIES, "Similar cases")
        made.CodingSchemeIdentificationSequence = [declared()]
        made.ReferencedPerformedProcedureStepSequence = []
        made.PerformedProcedureCodeSequence = []
        made.CurrentRequestedProcedureEvidenceSequence = [_evidence(header)]
        made.CompletionFlag = "COMPLETE"  # all that there will be of it
        made.VerificationFlag = "UNVERIFIED"
        made.PreliminaryFlag = "PRELIMINARY"
        made.update(tree(result, header, self.version, self._device, partial(self._uid, result, header)))
        return _file(made)

    def picture(self, result: QueryResult, header: Header, when: datetime) -> bytes:
        """The film with the lungs' outline, attention and the answer in words, as Secondary Capture in RGB of 8 bits; else as `report`."""
        made = self._instance(result, header, when, "picture", SecondaryCaptureImageStorage, "OT", PICTURE_SERIES, "Lungs and attention")
        if result.prediction.label is None:  # what was refused may be no chest, but a hand
            made.Laterality = ""
        else:
            made.BodyPartExamined = "CHEST"
        made.ConversionType = "WSD"
        made.SecondaryCaptureDeviceManufacturer = made.SecondaryCaptureDeviceManufacturerModelName = DEVICE
        made.SecondaryCaptureDeviceSoftwareVersions = made.SoftwareVersions
        made.DateOfSecondaryCapture, made.TimeOfSecondaryCapture = made.ContentDate, made.ContentTime
        made.ImageType = ["DERIVED", "SECONDARY"]
        made.PatientOrientation = ""
        made.ImageComments = DISCLAIMER
        made.DerivationDescription = "scaled to 256x256, lungs outlined, attention in colour, enlarged; the answer in words below"
        source = referenced(header.sop_class, header.instance)
        source.PurposeOfReferenceCodeSequence = [coded(*_SOURCE_OF_PICTURE)]
        made.SourceImageSequence = [source]
        pixels = drawn(result, self.version)
        made.SamplesPerPixel, made.PhotometricInterpretation, made.PlanarConfiguration = 3, "RGB", 0
        made.Rows, made.Columns = pixels.shape[:2]
        made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 8, 8, 7, 0
        made.PixelData = pixels.tobytes()  # an even number: WIDTH is
        return _file(made)

    def _instance(
        self, result: QueryResult, header: Header, when: datetime, kind: str, sop_class: str, modality: str, series: int, title: str
    ) -> Dataset:
        """What both have in common: patient, study, series, equipment, SOP common."""
        if when.utcoffset() is None:
            raise ValueError("when an answer was given: expected a time with its zone; got none")
        made = Dataset()
        made.SpecificCharacterSet = "ISO_IR 192"
        for keyword in (*_REPEATED, *(name for name in _REPEATED_IF_THERE if header.get(name))):
            # unchecked: `Header` has done that, and pydicom's warnings would name patients
            made.add(DataElement(keyword, dictionary_VR(keyword), header.get(keyword), validation_mode=IGNORE))
        made.SOPClassUID = sop_class
        made.SOPInstanceUID = self._uid(result, header, kind)
        made.SeriesInstanceUID = self._uid(result, header, f"{kind} series")
        made.Modality = modality
        made.SeriesNumber = series
        made.InstanceNumber = 1
        made.SeriesDescription = f"{title}. {DISCLAIMER}"
        made.ContentQualification = "RESEARCH"
        made.Manufacturer = made.ManufacturerModelName = DEVICE
        made.DeviceUID = self._device
        made.SoftwareVersions = [self.version, f"model {result.model_version}"]
        made.ContentDate = made.InstanceCreationDate = made.SeriesDate = when.strftime("%Y%m%d")
        made.ContentTime = made.InstanceCreationTime = made.SeriesTime = when.strftime("%H%M%S")
        made.TimezoneOffsetFromUTC = when.strftime("%z")[:5]
        return made

    @property
    def _device(self) -> str:
        return keyed_uid(self.secret, "device")

    def _uid(self, result: QueryResult, header: Header, kind: str) -> str:
        return keyed_uid(self.secret, "\n".join((header.instance, result.model_version, kind)))


def _evidence(header: Header) -> Dataset:
    """The same as an item of Current Requested Procedure Evidence Sequence (0040,A375)."""
    series = Dataset()
    series.SeriesInstanceUID, series.ReferencedSOPSequence = header.series, [referenced(header.sop_class, header.instance)]
    study = Dataset()
    study.StudyInstanceUID, study.ReferencedSeriesSequence = header.study, [series]
    return study


def _file(made: Dataset) -> bytes:
    give_file_meta(made, ExplicitVRLittleEndian)
    buffer = io.BytesIO()
    dcmwrite(buffer, made, enforce_file_format=True)
    return buffer.getvalue()
