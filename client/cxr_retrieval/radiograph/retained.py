"""What stays of a DICOM file that is de-identified, for whoever needs it: options of PS3.15 E.3, and the elements that each retains.

The columns are those of PS3.15 Table E.1-1 in September 2024. Where one says that an element is to be cleaned, not kept as it is, it is
not here: free text cannot be cleaned without reading it, so it goes. A sequence that is kept is gone through like the rest of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from cxr_retrieval.errors import UsageError


class Retain(str, Enum):
    """Options that may be added to the Basic Application Level Confidentiality Profile."""

    longitudinal_full_dates = "longitudinal_full_dates"
    """Dates and times as they are (E.3.6), but those of birth."""
    longitudinal_modified_dates = "longitudinal_modified_dates"
    """Dates moved back, by the same number of days for all films of a patient; times as they are (E.3.6)."""
    patient_characteristics = "patient_characteristics"
    """Sex, age, size, weight and the like (E.3.7)."""
    device_identity = "device_identity"
    """Which machine made the film (E.3.8)."""
    uids = "uids"
    """UIDs as they are (E.3.9): whoever has the archive finds the film there."""
    institution_identity = "institution_identity"
    """Where it was made (E.3.11)."""


METHODS: Final[Mapping[Retain | None, tuple[str, str]]] = {
    None: ("113100", "Basic Application Confidentiality Profile"),
    Retain.longitudinal_full_dates: ("113106", "Retain Longitudinal Temporal Information Full Dates Option"),
    Retain.longitudinal_modified_dates: ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    Retain.patient_characteristics: ("113108", "Retain Patient Characteristics Option"),
    Retain.device_identity: ("113109", "Retain Device Identity Option"),
    Retain.uids: ("113110", "Retain UIDs Option"),
    Retain.institution_identity: ("113112", "Retain Institution Identity Option"),
}
"""Option → code and meaning in DCM (PS3.16 CID 7050); None is the profile itself."""

KEPT: Final[Mapping[Retain, frozenset[str]]] = {
    Retain.longitudinal_full_dates: frozenset({"TimezoneOffsetFromUTC"}),
    Retain.longitudinal_modified_dates: frozenset({"TimezoneOffsetFromUTC"}),
    Retain.patient_characteristics: frozenset(
        {
            "EthnicGroup",
            "EthnicGroupCodeSequence",
            "PatientAge",
            "PatientSex",
            "PatientSexNeutered",
            "PatientSize",
            "PatientWeight",
            "PregnancyStatus",
            "SelectorASValue",
            "SmokingStatus",
        }
    ),
    Retain.device_identity: frozenset(
        {
            "BeamHoldTransitionDateTime",
            "CalibrationDate",
            "CalibrationDateTime",
            "CalibrationTime",
            "CassetteID",
            "DateOfInstallation",
            "DateOfLastCalibration",
            "DateOfLastDetectorCalibration",
            "DateOfManufacture",
            "DateTimeOfLastCalibration",
            "DetectorID",
            "DeviceDescription",
            "DeviceLabel",
            "DeviceSerialNumber",
            "DeviceUID",
            "GantryID",
            "GeneratorID",
            "LensMake",
            "LensModel",
            "LensSerialNumber",
            "LensSpecification",
            "ManufacturerDeviceClassUID",
            "ManufacturerDeviceIdentifier",
            "ModifyingDeviceID",
            "ModifyingSystem",
            "PerformedStationGeographicLocationCodeSequence",
            "PerformedStationName",
            "PerformedStationNameCodeSequence",
            "PlateID",
            "ScheduledProcedureStepLocation",
            "ScheduledStationGeographicLocationCodeSequence",
            "ScheduledStationName",
            "ScheduledStationNameCodeSequence",
            "ScheduledStudyLocation",
            "SourceManufacturer",
            "SourceSerialNumber",
            "StationName",
            "TimeOfLastCalibration",
            "TimeOfLastDetectorCalibration",
            "TransducerIdentificationSequence",
            "TreatmentMachineName",
            "UDISequence",
            "UniqueDeviceIdentifier",
            "XRayDetectorID",
            "XRayDetectorLabel",
            "XRaySourceID",
        }
    ),
    Retain.uids: frozenset(
        {
            "ReferencedImageSequence",
            "ReferencedPatientSequence",
            "ReferencedPerformedProcedureStepSequence",
            "ReferencedStudySequence",
            "SourceImageSequence",
        }
    ),
    Retain.institution_identity: frozenset(
        {
            "ClinicalTrialCoordinatingCenterName",
            "ClinicalTrialProtocolEthicsCommitteeName",
            "ClinicalTrialSiteID",
            "ClinicalTrialSiteName",
            "InstitutionAddress",
            "InstitutionCodeSequence",
            "InstitutionName",
            "InstitutionalDepartmentName",
            "InstitutionalDepartmentTypeCodeSequence",
            "SourceOfPreviousValues",
        }
    ),
}
"""Option → keywords that it keeps; beside them the first two keep all dates and times but `NO_DATES`, and `uids` all UIDs but `NO_UIDS`."""
WORDS: Final = frozenset(
    {
        "AcquisitionDeviceProcessingCode",
        "CodeMeaning",
        "CodeValue",
        "CodingSchemeDesignator",
        "CodingSchemeVersion",
        "CollimatorGridName",
        "DetectorManufacturerModelName",
        "DetectorManufacturerName",
        "DigitalImageFormatAcquired",
        "FilterType",
        "LUTExplanation",
        "LongCodeValue",
        "Manufacturer",
        "ManufacturerModelName",
        "ModalityLUTType",
        "PhosphorType",
        "PixelSpacingCalibrationDescription",
        "PlateType",
        "RescaleType",
        "SecondaryCaptureDeviceManufacturer",
        "SecondaryCaptureDeviceManufacturerModelName",
        "SecondaryCaptureDeviceSoftwareVersions",
        "SoftwareVersions",
        "TypeOfFilters",
        "URNCodeValue",
        "VideoImageFormatAcquired",
        "WindowCenterWidthExplanation",
    }
)
"""Keywords of text that the table does not list and that stays: how the film was made and is shown. Others go, such as order numbers."""
NO_DATES: Final = frozenset({"GPSTimeStamp", "PatientBirthDate", "PatientBirthTime"})
"""Dates and times that no option keeps."""
NO_UIDS: Final = frozenset({"DigitalSignatureUID", "UID"})
"""UIDs that no option keeps."""


@dataclass(frozen=True)
class Deidentification:
    """How films are de-identified.

    Attributes:
        secret: What UIDs, pseudonyms and days are made with: the same ones for the same patient, and nobody else can make them.
        retain: Options in use.

    Raises:
        UsageError: Dates are to be both kept and moved.
    """

    secret: bytes = field(repr=False)
    retain: frozenset[Retain] = frozenset()

    def __post_init__(self) -> None:
        if {Retain.longitudinal_full_dates, Retain.longitudinal_modified_dates} <= self.retain:
            raise UsageError(
                "dates cannot be both kept and moved",
                expected="longitudinal_full_dates or longitudinal_modified_dates, or neither",
                got="both",
                next_step="leave one of them out",
            )
