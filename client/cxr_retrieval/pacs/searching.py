"""What to look for in an archive, and where it says that this is: QIDO-RS (PS3.18 10.6) or C-FIND (PS3.4 C.4.1), study by study.

An archive may ignore a key that it does not know; what it returns is held against the same criteria here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime, timedelta
from typing import Any, Final, Protocol

from dicomweb_client.api import DICOMwebClient
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pynetdicom.association import Association
from pynetdicom.presentation import build_context

from cxr_retrieval.errors import PeerDownError, PeerError, UsageError
from cxr_retrieval.pacs.dicomweb import Web, answered, objects, opened
from cxr_retrieval.pacs.dimse import NO_ROOM, PENDING, Peer, associated, lost
from cxr_retrieval.pacs.pulled import Found
from cxr_retrieval.radiograph.header import FORMS, Header

_PAGE: Final = 100
_FEW: Final = 10
"""A page of less is the last one: no archive cuts its pages as short as that."""
_FIND: Final = "1.2.840.10008.5.1.4.1.2.2.1"
"""Study Root Query/Retrieve Information Model - FIND."""

Answer = Mapping[str, str]
"""Keyword → value as text; absent or empty: unknown."""


@dataclass(frozen=True)
class Wanted:
    """Criteria, all of which an instance meets.

    Args:
        modalities: One of these (0008,0060).
        body_part: (0018,0015); an archive that does not say it is believed.
        since, until: Study Date (0008,0020), both included.
        description: Words that Study Description (0008,1030) holds one behind the other; some archives want them in the case written there.
        patient, issuer: Patient ID (0010,0020), exactly; the issuer (0010,0021) only where the archive says it.

    Raises:
        UsageError: One of them is malformed, or has a wildcard.
    """

    modalities: tuple[str, ...] = ("CR", "DX")
    body_part: str = ""
    since: date | None = None
    until: date | None = None
    description: str = ""
    patient: str = ""
    issuer: str = ""

    def __post_init__(self) -> None:
        checks = {
            **{f"--modality {modality}": ("Modality", modality) for modality in self.modalities or ("",)},
            **({"--body-part": ("BodyPartExamined", self.body_part)} if self.body_part else {}),
            **({"--description": ("StudyDescription", self.description)} if self.description else {}),
            **({"the Patient ID": ("PatientID", self.patient)} if self.patient else {}),
        }
        for option, (keyword, value) in checks.items():
            if not FORMS[keyword].fullmatch(value) or "*" in value or "?" in value:
                raise UsageError(
                    f"{option}: cannot be looked for",
                    expected=f"a value of {keyword} (PS3.5 6.2) without wildcards",
                    next_step="correct it",
                )
        if self.since and self.until and self.since > self.until:
            raise UsageError("no day lies between these", got=f"{self.since} and {self.until}", next_step="correct --since or --until")

    @property
    def days(self) -> str:
        """As a range of DICOM dates (PS3.4 C.2.2.2.5); empty: any."""
        ends = [f"{day:%Y%m%d}" if day else "" for day in (self.since, self.until)]
        return "-".join(ends) if any(ends) else ""

    def of_journal(self) -> dict[str, Any]:
        """What a journal compares; of a patient only a digest."""
        known = asdict(self) | {"since": str(self.since or ""), "until": str(self.until or ""), "modalities": list(self.modalities)}
        whose = {"patient": self.patient, "issuer": self.issuer}
        return known | {name: hashlib.sha256(value.encode()).hexdigest()[:16] if value else "" for name, value in whose.items()}

    def is_met_by_study(self, answer: Answer) -> bool:
        """Whether a study is one of these, by what an archive says of it."""
        day, held = answer.get("StudyDate", ""), answer.get("ModalitiesInStudy", "")
        return (
            (not held or bool(set(self.modalities) & set(held.split("\\"))))
            and (not self.patient or answer.get("PatientID", "") == self.patient)
            and (not self.issuer or answer.get("IssuerOfPatientID", "") in ("", self.issuer))
            and (not self.since or (bool(day) and day >= f"{self.since:%Y%m%d}"))
            and (not self.until or (bool(day) and day <= f"{self.until:%Y%m%d}"))
            and self.description.casefold() in answer.get("StudyDescription", "").casefold()
        )

    def is_met_by_series(self, answer: Answer) -> bool:
        """The same of a series."""
        part = answer.get("BodyPartExamined", "").upper()
        return answer.get("Modality", "") in self.modalities and (not self.body_part or part in ("", self.body_part))

    def study_keys(self) -> dict[str, str]:
        """Of a search for studies, whatever they hold."""
        return {"StudyDate": self.days, "PatientID": _left_open(self.patient)}

    def series_keys(self) -> dict[str, str]:
        """Of a search for series in a study; several modalities would be several searches, and are sorted out here."""
        return {
            "Modality": self.modalities[0] if len(self.modalities) == 1 else "",
            "BodyPartExamined": self.body_part,
        }


def prior_to(header: Header, wanted: Wanted) -> Wanted:
    """The same, of the patient of this film, from the days before it.

    Raises:
        UsageError: The film does not say whose it is, or of which day.
    """
    patient, day = header.get("PatientID"), header.get("StudyDate")
    try:
        before = datetime.strptime(day, "%Y%m%d").date() - timedelta(days=1)  # noqa: DTZ007 (a day has no zone)
    except ValueError:
        before = None
    if not patient or before is None:
        raise UsageError(
            "the film of --prior-to does not say whose it is, and of which day",
            expected="Patient ID and Study Date",
            got="no Patient ID" if not patient else "no Study Date",
            next_step="give --patient and --until instead",
        )
    until = min(before, wanted.until) if wanted.until else before
    return replace(wanted, patient=patient, issuer=header.get("IssuerOfPatientID"), until=until)


class Search(Protocol):
    """An archive that is being asked. Both raise PeerError, or PeerDownError where the same may succeed later."""

    def studies(self, wanted: Wanted) -> Iterator[str]:
        """Study Instance UIDs; some may come twice."""
        ...

    def instances(self, study: str, wanted: Wanted) -> list[Found]:
        """Those in the series of a study that are wanted."""
        ...


class WebSearch:
    """By QIDO-RS, page by page. Studies are asked for by date and patient alone: of what it must look into further, such as the modalities
    of a study, Orthanc 1.10 returns the first page and no other; these are compared here.
    """

    def __init__(self, web: Web, client: DICOMwebClient) -> None:
        self._web, self._client = web, client

    def studies(self, wanted: Wanted) -> Iterator[str]:
        """See `Search`."""
        fields = ["StudyDescription", "IssuerOfPatientID", "ModalitiesInStudy"]
        for answer in self._pages(self._client.search_for_studies, wanted.study_keys(), fields, "StudyInstanceUID"):
            if wanted.is_met_by_study(answer):
                yield answer["StudyInstanceUID"]

    def instances(self, study: str, wanted: Wanted) -> list[Found]:
        """See `Search`."""

        def series(**page: Any) -> Any:
            return self._client.search_for_series(study, **page)

        found: list[Found] = []
        for answer in self._pages(series, wanted.series_keys(), ["BodyPartExamined"], "SeriesInstanceUID"):
            if wanted.is_met_by_series(answer):
                uid = answer["SeriesInstanceUID"]

                def instances(uid: str = uid, **page: Any) -> Any:
                    return self._client.search_for_instances(study, uid, **page)

                found += [Found(study, uid, one["SOPInstanceUID"]) for one in self._pages(instances, {}, [], "SOPInstanceUID")]
        return found

    def _pages(self, ask: Callable[..., Any], keys: Mapping[str, str], fields: Sequence[str], uid: str) -> Iterator[Answer]:
        """Answers with a usable UID, until a page brings none that the one before had not: archives may ignore limit and offset."""
        filters, offset, before = {keyword: value for keyword, value in keys.items() if value}, 0, frozenset[str]()
        while True:
            with answered(self._web):
                page = ask(limit=_PAGE, offset=offset, fields=list(fields), search_filters=filters)
                answers = [_from_json(one) for one in objects(self._web, page or [])]
            new = [answer for answer in answers if FORMS[uid].fullmatch(answer.get(uid, "")) and answer[uid] not in before]
            yield from new
            if not new or len(answers) < min(_FEW, _PAGE):
                return
            offset, before = offset + len(answers), frozenset(answer[uid] for answer in new)


class DimseSearch:
    """By C-FIND in the Study Root model, level by level, in one association."""

    def __init__(self, peer: Peer, association: Association) -> None:
        self._peer, self._association = peer, association

    def studies(self, wanted: Wanted) -> Iterator[str]:
        """See `Search`. All are known before the first is yielded: an association answers one question at a time."""
        for modality in wanted.modalities:
            words = _left_open(f" {wanted.description} ") if wanted.description else ""
            further = {"ModalitiesInStudy": modality, "StudyDescription": words, "IssuerOfPatientID": ""}
            keys = {"StudyInstanceUID": "", **wanted.study_keys(), **further}
            yield from [
                answer["StudyInstanceUID"]
                for answer in self._find("STUDY", keys)
                if FORMS["StudyInstanceUID"].fullmatch(answer["StudyInstanceUID"]) and wanted.is_met_by_study(answer)
            ]

    def instances(self, study: str, wanted: Wanted) -> list[Found]:
        """See `Search`."""
        found: list[Found] = []
        for series in self._find("SERIES", {"StudyInstanceUID": study, "SeriesInstanceUID": "", **wanted.series_keys()}):
            uid = series["SeriesInstanceUID"]
            if FORMS["SeriesInstanceUID"].fullmatch(uid) and wanted.is_met_by_series(series):
                images = self._find("IMAGE", {"StudyInstanceUID": study, "SeriesInstanceUID": uid, "SOPInstanceUID": ""})
                uids = [image["SOPInstanceUID"] for image in images]
                found += [Found(study, uid, instance) for instance in uids if FORMS["SOPInstanceUID"].fullmatch(instance)]
        return found

    def _find(self, level: str, keys: Mapping[str, str]) -> list[Answer]:
        identifier = Dataset()
        identifier.QueryRetrieveLevel = level
        for keyword, value in keys.items():
            setattr(identifier, keyword, value)
        found: list[Answer] = []
        if not self._association.is_established:
            raise lost(self._peer)
        for status, answer in self._association.send_c_find(identifier, _FIND):
            code = status.get("Status")
            if code is None:
                raise lost(self._peer)
            if code in PENDING and answer is not None:
                found.append({keyword: _as_text(answer.get(keyword)) for keyword in keys})
            elif code not in (0, *PENDING):
                kind = PeerDownError if code in NO_ROOM else PeerError
                raise kind(f"{self._peer.address}: refuses a search", got=f"status 0x{code:04X}", next_step="see the peer's log")
        return found


@contextmanager
def web_search(web: Web) -> Generator[Search]:
    """A search by QIDO-RS."""
    with opened(web, 1) as client:
        yield WebSearch(web, client)


@contextmanager
def dimse_search(peer: Peer, calling: str) -> Generator[Search]:
    """A search by C-FIND, in an association of its own.

    Raises:
        PeerError: As `associated`.
    """
    with associated(peer, calling, [build_context(_FIND)]) as association:
        yield DimseSearch(peer, association)


def _left_open(value: str) -> str:
    """With a wildcard for what archives decode or compare each in their own way; what they return is held against the value itself."""
    return re.sub(r"[^A-Za-z0-9._-]+", "*", value)


def _from_json(answer: Mapping[str, Any]) -> Answer:
    """Of DICOM JSON (PS3.18 F.2) what is compared here."""
    read: dict[str, str] = {}
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", *_COMPARED):
        values: Any = answer.get(f"{Tag(keyword):08X}", {}).get("Value")
        read[keyword] = _as_text([value for value in values or () if isinstance(value, str)])
    return read


def _as_text(value: Any) -> str:
    """Several values with a backslash between, as they stand in a file."""
    several = value if isinstance(value, (list, MultiValue)) else [] if value is None else [value]
    return "\\".join(str(one).strip() for one in several)


_COMPARED: Final = (
    *("StudyDate", "StudyDescription", "PatientID", "IssuerOfPatientID", "ModalitiesInStudy"),
    *("Modality", "BodyPartExamined"),
)
