"""A DICOM file without identities: PS3.15 Annex E, the Basic Application Level Confidentiality Profile and the options of `retained.py`.

Which element the profile removes, empties or replaces is read from dicom-anonymizer's copy of Table E.1-1 (2026c); that is done here, for
its own actions leave sequences out and draw UIDs by chance. Where the table has a choice, the one is taken that CR, DX and Secondary
Capture allow. Beyond the profile goes what nobody can vouch for: elements that PS3.6 does not list, names, text but `WORDS`, binary data
but pixels and LUTs, overlays and curves as a whole. Pixels are not touched; a film that says that its patient can be seen there is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from typing import Final

import pydicom
from pydicom import uid
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag
from pydicom.tag import BaseTag, Tag

from cxr_retrieval.errors import CxrError, ImageError, SetupError
from cxr_retrieval.radiograph.dicom import without_values
from cxr_retrieval.radiograph.elements import coded, named, text, texts
from cxr_retrieval.radiograph.file_meta import give_file_meta
from cxr_retrieval.radiograph.header import keyed_uid
from cxr_retrieval.radiograph.retained import KEPT, METHODS, NO_DATES, NO_UIDS, WORDS, Deidentification, Retain
from cxr_retrieval.radiograph.syntaxes import inflated, transfer_syntax
from cxr_retrieval.radiograph.terms import PROJECTION_CLASSES

MOST_DAYS: Final = 3650
"""Dates are moved back by 1 to so many days."""
_TABLE: Final = "dicomfields_2026c"
_ACTIONS: Final = {
    "X_TAGS": "remove",
    "X_Z_TAGS": "remove",
    "X_D_TAGS": "remove",
    "X_Z_D_TAGS": "remove",
    "Z_TAGS": "empty",
    "Z_D_TAGS": "empty",
    "D_TAGS": "replace",
    "U_TAGS": "replace",
    "X_Z_U_STAR_TAGS": "keep",
}
"""Categories of the table → what is done. Kept are sequences of references, whose UIDs are replaced in them."""
_TYPE_2: Final[Mapping[int, str]] = {Tag(keyword): "empty" for keyword in ("AcquisitionContextSequence", "PatientSexNeutered")}
"""Of those that the table has removed unless something must be there: what must (PS3.3 C.7.6.14, C.7.2.2)."""
_CODE_SYSTEM: Final = re.compile(r"2\.16\.840\.1\.113883\.6\.[0-9]{1,3}")
"""UIDs that HL7 gave to SNOMED CT, LOINC, RadLex and the like (PS3.16 8); those of PS3.6 Annex A, pydicom knows."""
_DUMMIES: Final = {
    **dict.fromkeys(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"), "REMOVED"),
    "AS": "000Y",
    "DA": "19000101",
    "DT": "19000101000000",
    "TM": "000000",
}
_DATES: Final = frozenset({Retain.longitudinal_full_dates, Retain.longitudinal_modified_dates})
_TEMPORAL: Final = frozenset({"DA", "DT", "TM"})
_UNVOUCHED: Final = frozenset({"AE", "LO", "LT", "PN", "SH", "ST", "UC", "UN", "UR", "UT", *_TEMPORAL})
"""VRs of names, text and time: what has one, and is neither in the table nor one of `WORDS`, is removed."""
_FIRST_GROUP: Final = 0x0008
_PIXEL_GROUPS: Final = (0x0028, 0x7FE0)
_OVERLAYS: Final = 0x60
_OVERLAY_DATA: Final = 0x3000
_TIME: Final = re.compile(r"([01][0-9]|2[0-3])([0-5][0-9](([0-5][0-9]|60)(\.[0-9]{1,6})?)?)?")
_DATE: Final = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})(.*)")
_ZONE: Final = re.compile(r"[+-][0-9]{4}")
_SECONDARY_CAPTURES: Final = frozenset(
    {
        uid.SecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
        uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
    }
)


def deidentified(data: bytes, name: str, rules: Deidentification) -> bytes:
    """The file without identities, in the same transfer syntax and with the same bytes of pixels.

    Raises:
        ImageError: It cannot be read as DICOM, is no projection radiograph, or says that its picture may show who it is.
        SetupError: dicom-anonymizer is not installed.
    """
    actions = _actions()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = inflated(data, name)
            dataset = pydicom.dcmread(io.BytesIO(plain), force=data[128:132] != b"DICM")
            _refuse_what_pixels_may_tell(dataset, name)
            syntax = transfer_syntax(dataset, name) if plain is data else uid.DeflatedExplicitVRLittleEndian
            _Cleaner(actions, rules, _patient(dataset)).clean(dataset)
            file = io.BytesIO()
            give_file_meta(dataset, syntax)
            pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    except CxrError:
        raise
    except Exception as error:  # whatever pydicom raises on a damaged file
        raise ImageError(
            f"{name}: cannot be de-identified",
            expected="a complete DICOM file",
            got=without_values(error),
            next_step="export the image again",
        ) from error
    return file.getvalue()


@cache
def _actions() -> Mapping[int, str]:
    """Tag → action, of Table E.1-1; its repeating groups, curves and overlays, go as a whole."""
    try:
        from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector
    except ImportError as error:
        raise SetupError(
            "DICOM files cannot be de-identified here",
            expected="the package dicom-anonymizer",
            got=str(error),
            next_step="pip install 'cxr-retrieval[dicom]'",
        ) from error
    table = dicom_anonymization_database_selector(_TABLE)
    listed: dict[int, str] = {Tag(*tag): action for category, action in _ACTIONS.items() for tag in table[category] if len(tag) == 2}
    return {**listed, **_TYPE_2}


def _refuse_what_pixels_may_tell(dataset: pydicom.Dataset, name: str) -> None:
    """PS3.15 E.3.1 to E.3.3, of which no option is offered. A Secondary Capture, often a screenshot, must say that nothing is burned in."""
    kind, burned = uid.UID(text(dataset, "SOPClassUID")), text(dataset, "BurnedInAnnotation").upper()
    if kind not in PROJECTION_CLASSES:
        shown = kind if kind.name != kind else "none of the standard's"
        raise _refusal(name, "not a projection radiograph", "a CR, DX or Secondary Capture image", f"{named('SOPClassUID')} {shown}")
    for keyword in ("SOPInstanceUID", "PixelData"):
        if keyword not in dataset:
            raise _refusal(name, "no whole DICOM image", named(keyword), "none")
    if burned == "YES" or (burned != "NO" and kind in _SECONDARY_CAPTURES):
        got = f"{named('BurnedInAnnotation')} {'YES' if burned == 'YES' else 'not NO, in a Secondary Capture'}"
        raise _refusal(name, "text in the picture may name the patient", "a picture without burned-in text", got)
    if text(dataset, "RecognizableVisualFeatures").upper() == "YES":
        got = f"{named('RecognizableVisualFeatures')} YES"
        raise _refusal(name, "the patient may be recognised in the picture", "a picture of nobody's face", got)
    for group in {tag.group for tag in list(dataset.keys()) if tag.group >> 8 == _OVERLAYS}:
        if Tag(group, _OVERLAY_DATA) not in dataset:
            got = f"an overlay without Overlay Data ({group:04X},{_OVERLAY_DATA:04X}), so in the unused bits of the pixels"
            raise _refusal(name, "text drawn over the picture may name the patient", "overlays beside the pixels, or none", got)


def _refusal(name: str, what: str, expected: str, got: str) -> ImageError:
    return ImageError(
        f"{name}: {what}", expected=expected, got=got, next_step="it cannot be de-identified here; have it looked at by a person"
    )


def _patient(dataset: pydicom.Dataset) -> str:
    """What tells one patient's films from another's: the Patient ID, else name and birth date, else the study."""
    for keywords in (("PatientID",), ("PatientName", "PatientBirthDate"), ("StudyInstanceUID",)):
        found = ["\\".join(texts(dataset, keyword)) for keyword in keywords]
        if found[0]:
            return "\0".join((keywords[0], *found))
    return ""


@dataclass(frozen=True)
class _Cleaner:
    """The profile, as it applies to the films of one patient."""

    actions: Mapping[int, str]
    rules: Deidentification
    patient: str

    def clean(self, dataset: pydicom.Dataset) -> None:
        """Leaves no identity in a whole data set, and says so in it (PS3.3 C.7.1.1, C.12.1)."""
        self._clean(dataset)
        retain, dates = self.rules.retain, "REMOVED"
        if Retain.longitudinal_modified_dates in retain:
            dates = "MODIFIED"
        elif Retain.longitudinal_full_dates in retain:  # whoever had the file before may have moved or removed them
            said = text(dataset, "LongitudinalTemporalInformationModified")
            dates = said if said in ("MODIFIED", "REMOVED") else "UNMODIFIED"
        dataset.PatientID = dataset.PatientName = self._keyed("patient").hex()[:32]
        dataset.PatientIdentityRemoved = "YES"
        dataset.DeidentificationMethod = "DICOM PS3.15 2026c Annex E"
        dataset.DeidentificationMethodCodeSequence = [
            coded(value, "DCM", meaning) for option, (value, meaning) in METHODS.items() if option is None or option in retain
        ]
        dataset.LongitudinalTemporalInformationModified = dates

    def _clean(self, dataset: pydicom.Dataset, *, within: bool = False) -> None:
        for tag in list(dataset.keys()):
            if tag.group < _FIRST_GROUP or tag.is_private or not dictionary_has_tag(tag) or (within and tag.group == _PIXEL_GROUPS[1]):
                del dataset[tag]
                continue
            keyword, vr = keyword_for_tag(tag), dictionary_VR(tag)
            action = self._action(tag, keyword, vr)
            if action == "remove" or (vr == "SQ") != _is_sequence(dataset, tag, vr):
                del dataset[tag]
            elif action == "empty":
                dataset.add_new(tag, vr, [] if vr == "SQ" else None)
            elif action == "replace":
                self._replace(dataset, tag, keyword, vr)
            elif vr == "SQ":
                for item in dataset[tag].value:
                    self._clean(item, within=True)
            elif vr in _TEMPORAL:
                dataset.add_new(tag, vr, self._moved(texts(dataset, keyword), vr))

    def _action(self, tag: BaseTag, keyword: str, vr: str) -> str:
        """One of those of `_ACTIONS`; what the table does not list is kept where it can be vouched for."""
        retain = self.rules.retain
        if any(keyword in KEPT[option] for option in retain):
            return "keep"
        if vr in _TEMPORAL and keyword not in NO_DATES and retain & _DATES:
            return "keep"
        if vr == "UI":
            return "keep" if Retain.uids in retain and keyword not in NO_UIDS else self.actions.get(tag, "replace")
        binary = vr.startswith("O") and tag.group not in _PIXEL_GROUPS
        return self.actions.get(tag, "remove" if binary or (vr in _UNVOUCHED and keyword not in WORDS) else "keep")

    def _replace(self, dataset: pydicom.Dataset, tag: BaseTag, keyword: str, vr: str) -> None:
        """UIDs by keyed ones, but those that stand for the same thing everywhere; all else by the same for everybody."""
        if vr == "UI":
            dataset.add_new(tag, vr, "\\".join(self._uid(value) for value in texts(dataset, keyword) if value))
        elif vr in _DUMMIES:
            dataset.add_new(tag, vr, _DUMMIES[vr])
        else:
            del dataset[tag]

    def _uid(self, value: str) -> str:
        return value if value in uid.UID_dictionary or _CODE_SYSTEM.fullmatch(value) else keyed_uid(self.rules.secret, value)

    def _moved(self, values: list[str], vr: str) -> str | None:
        """Dates and times as they may be shown; None, thus no value, where one is not as its VR has it (PS3.5 6.2)."""
        days = 0
        if Retain.longitudinal_modified_dates in self.rules.retain:
            days = 1 + int.from_bytes(self._keyed("days")[:8], "big") % MOST_DAYS
        moved = [_time(value) if vr == "TM" else _earlier(value, days, vr) for value in values]
        return "\\".join(value for value in moved if value is not None) if None not in moved else None

    def _keyed(self, purpose: str) -> bytes:
        return hmac.new(self.rules.secret, f"{purpose}\0{self.patient}".encode(), hashlib.sha256).digest()


def _is_sequence(dataset: pydicom.Dataset, tag: BaseTag, vr: str) -> bool:
    """Whether it is one, whatever the file calls it; nothing else is decoded, so that it is written as it was."""
    return "SQ" in (vr, dataset.get_item(tag).VR) and isinstance(dataset[tag].value, pydicom.Sequence)


def _time(value: str) -> str | None:
    return value if _TIME.fullmatch(value) else None


def _earlier(value: str, days: int, vr: str) -> str | None:
    """A date, or a date and time with or without its zone, so many days before; None where it is none, or no longer one."""
    found = _DATE.fullmatch(value)
    if not found:
        return None
    rest = found[4]
    time = rest[: -len("+0000")] if _ZONE.fullmatch(rest[-len("+0000") :]) else rest
    if rest and (vr == "DA" or (time and not _time(time))):
        return None
    try:
        day = date(int(found[1]), int(found[2]), int(found[3])) - timedelta(days)
    except (ValueError, OverflowError):
        return None
    return f"{day.year:04}{day.month:02}{day.day:02}{rest}"
