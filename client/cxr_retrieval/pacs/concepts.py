"""The coded terms of an answer: of SNOMED CT where it has one that says the same, else of a private scheme, which each object declares.

A code of ours has a hyphen, which no code that is made of a label has; so the two never meet.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Final

from pydicom import Dataset
from pydicom.sr.coding import Code

SCHEME: Final = "99CXRRETR"
"""Coding Scheme Designator (0008,0102); 99 stands before private ones (PS3.16 8)."""
SCHEME_VERSION: Final = "1"
ORGANISATION: Final = "cxr-retrieval"
LONGEST_MEANING: Final = 64
"""Of Code Meaning (0008,0104): characters to the standard, bytes to many a program; we keep to both."""
_LONGEST_CODE: Final = 16
_LABEL_AS_CODE: Final = re.compile(r"[A-Za-z0-9_]{1,16}")
_NOT_TEXT: Final = re.compile(r"[\\\x00-\x1f\x7f]+")


def _own(code: str, meaning: str) -> Code:
    return Code(code, SCHEME, meaning)


PROCEDURE: Final = Code("399208008", "SCT", "Plain chest X-ray")
NONE: Final = Code("260413007", "SCT", "None")
NO_UNITS: Final = Code("1", "UCUM", "no units")

LIMITS: Final = _own("use-limits", "Limits of use")
IN_WORDS: Final = _own("in-words", "Answer in words")
DOUBT: Final = _own("reason-abstained", "Why the label should not be relied on")
WARNING: Final = _own("warning-text", "Warning")

ANSWER: Final = _own("case-vote", "Vote by similar cases")
STATE: Final = _own("answer-state", "State of the answer")
ANSWERED: Final = _own("state-answered", "Label given")
ABSTAINED: Final = _own("state-abstained", "Label given, not to be relied on")
REFUSED: Final = _own("state-refused", "Film refused, no label")
LABEL: Final = _own("vote-label", "Label that won the vote")
SHARE: Final = _own("vote-share", "Share of the vote")
FINDING_SHARE: Final = _own("finding-share", "Share of the vote for labels with the finding")
OF_LABEL: Final = _own("of-label", "Label or finding that it is the share of")
RIGHT: Final = _own("right-often", "Probability that the vote's label is right")
POSSIBLE: Final = _own("label-set", "Label that cannot be excluded")
ERROR_RATE: Final = _own("error-rate", "Error rate at which labels were excluded")
CASES: Final = _own("case-count", "Number of most similar cases")
STRANGENESS: Final = _own("ood-score", "Out-of-distribution score; refused above 0.5")

CASE: Final = _own("similar-case", "Similar case of the gallery")
RANK: Final = _own("case-rank", "Rank by similarity")
SIMILARITY: Final = _own("case-similarity", "Similarity to the film")
CASE_LABEL: Final = _own("case-label", "Label of the case")

LABELS: Final[Mapping[str, Code]] = {
    "control": _own("label-control", "Control case"),
    "covid19": Code("840539006", "SCT", "COVID-19"),
    "non_covid_pneumonia": Code("233604007", "SCT", "Pneumonia"),
    "tuberculosis": Code("154283005", "SCT", "Pulmonary tuberculosis"),
}
"""Labels that have a code. A control has none of SNOMED CT: a vote for controls does not say that a film is normal. The pneumonia is the
wider term, for none excludes one cause; what the label itself says stands in the sentence.
"""


def label_code(label: str) -> Code:
    """Of any label, always the same: of LABELS, else private: the label itself where it can be a Code Value (0008,0100), else a digest."""
    if label in LABELS:
        return LABELS[label]
    code = label if _LABEL_AS_CODE.fullmatch(label) else hashlib.sha256(label.encode()).hexdigest()[:_LONGEST_CODE]
    meaning = cleaned(label).encode()[:LONGEST_MEANING].decode(errors="ignore").strip()
    return _own(code, meaning or "Label without text")


def cleaned(words: str) -> str:
    """What an element of text may hold: without backslashes, which separate values, and control characters."""
    return _NOT_TEXT.sub(" ", words).strip()


def declared() -> Dataset:
    """The item of Coding Scheme Identification Sequence (0008,0110) that says whose SCHEME is."""
    item = Dataset()
    item.CodingSchemeDesignator = SCHEME
    item.CodingSchemeName = "Similar chest radiographs and their vote"
    item.CodingSchemeVersion = SCHEME_VERSION
    item.CodingSchemeResponsibleOrganization = ORGANISATION
    return item
