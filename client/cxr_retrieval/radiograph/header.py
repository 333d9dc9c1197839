"""What a DICOM file says of itself, as far as an answer to it must repeat it: whose it is, and where in their records it belongs.

It holds identities. It stays in this process and in what is written for the archive that sent the file; no log, message or wire gets it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_UI: Final = re.compile(r"(?=.{1,64}$)(0|[1-9]\d*)(\.(0|[1-9]\d*))+")
_DA: Final = re.compile(r"\d{8}")
_TM: Final = re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?")
_CS: Final = re.compile(r"[A-Z0-9 _]{1,16}")
_IS: Final = re.compile(r"\d{1,9}")
_SH: Final = re.compile(r"[^\\\x00-\x1f\x7f]{1,16}")
_LO: Final = re.compile(r"[^\\\x00-\x1f\x7f]{1,64}")
_PN: Final = re.compile(r"(?!.*=.*=.*=)[^\\\x00-\x1f\x7f]{1,194}")

FORMS: Final[Mapping[str, re.Pattern[str]]] = {
    "SOPClassUID": _UI,
    "SOPInstanceUID": _UI,
    "StudyInstanceUID": _UI,
    "SeriesInstanceUID": _UI,
    "Modality": _CS,
    "BodyPartExamined": _CS,
    "Rows": _IS,
    "Columns": _IS,
    "PatientName": _PN,
    "PatientID": _LO,
    "IssuerOfPatientID": _LO,
    "PatientBirthDate": _DA,
    "PatientSex": _CS,
    "StudyID": _SH,
    "StudyDate": _DA,
    "StudyTime": _TM,
    "AccessionNumber": _SH,
    "ReferringPhysicianName": _PN,
    "StudyDescription": _LO,
}
"""Keyword of each element that is read → what it must be (PS3.5 6.2, by VR)."""
REQUIRED: Final = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
"""Without these no archive could file an instance (PS3.3 C.7.2.1, C.7.3.1, C.12.1)."""


@dataclass(frozen=True)
class Header:
    """Elements of one instance.

    Attributes:
        elements: Keyword of `FORMS` → value as text, of those that have one of the right form; all of `REQUIRED`. Out of `repr`.
    """

    elements: Mapping[str, str]

    def __repr__(self) -> str:
        """Names nobody."""
        return f"<Header of {len(self.elements)} elements>"

    def get(self, keyword: str) -> str:
        """One element; empty where it is absent or malformed."""
        return self.elements.get(keyword, "")

    @property
    def instance(self) -> str:
        """SOP Instance UID (0008,0018)."""
        return self.elements["SOPInstanceUID"]

    @property
    def sop_class(self) -> str:
        """SOP Class UID (0008,0016)."""
        return self.elements["SOPClassUID"]

    @property
    def study(self) -> str:
        """Study Instance UID (0020,000D)."""
        return self.elements["StudyInstanceUID"]

    @property
    def series(self) -> str:
        """Series Instance UID (0020,000E)."""
        return self.elements["SeriesInstanceUID"]


def keyed_uid(secret: bytes, name: str) -> str:
    """A UID that only who knows the secret can make of a name, always the same: 2.25 and a UUID (PS3.5 B.2), of version 8 (RFC 9562)."""
    digest = bytearray(hmac.new(secret, name.encode(), hashlib.sha256).digest()[:16])
    digest[6], digest[8] = 0x80 | digest[6] & 0x0F, 0x80 | digest[8] & 0x3F
    return f"2.25.{uuid.UUID(bytes=bytes(digest)).int}"
