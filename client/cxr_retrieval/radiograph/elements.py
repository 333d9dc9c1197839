"""Elements of a DICOM data set as text and numbers, whatever their VR and however they were filled in."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import dictionary_description, tag_for_keyword
from pydicom.multival import MultiValue


def named(keyword: str) -> str:
    """An element as messages name it: "Body Part Examined (0018,0015)"."""
    group, element = divmod(tag_for_keyword(keyword) or 0, 0x10000)
    return f"{dictionary_description(keyword)} ({group:04X},{element:04X})"


def values(dataset: pydicom.Dataset, element: str) -> list[Any]:
    """All values of an element; none where it is absent, empty, or what its VR does not allow, such as a decimal comma."""
    try:
        value = dataset.get(element)
    except (ValueError, TypeError, ArithmeticError):
        return [None]
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, MultiValue | list | tuple) else [value]


def items(dataset: pydicom.Dataset, sequence: str) -> list[pydicom.Dataset]:
    """The items of a sequence; none where it is absent, empty or no sequence."""
    return [item for item in dataset.get(sequence) or () if isinstance(item, pydicom.Dataset)]


def numbers(dataset: pydicom.Dataset, element: str) -> list[float]:
    """All values as numbers; NaN in the place of one that is none."""
    return [float(value) if isinstance(value, int | float) else np.nan for value in values(dataset, element)]


def first_number(dataset: pydicom.Dataset, element: str) -> float | None:
    """The first value; None where it is absent, empty or not finite."""
    number = next(iter(numbers(dataset, element)), np.nan)
    return number if np.isfinite(number) else None


def texts(dataset: pydicom.Dataset, element: str) -> list[str]:
    """All values as text, without padding."""
    return [str(value).strip(" \0\t\r\n") for value in values(dataset, element) if value is not None]


def text(dataset: pydicom.Dataset, element: str) -> str:
    """The first value as text, without padding; empty where it is absent."""
    return next(iter(texts(dataset, element)), "")


def coded(value: str, scheme: str, meaning: str) -> pydicom.Dataset:
    """An item of a code sequence (PS3.3 8.8)."""
    item = pydicom.Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def referenced(sop_class: str, instance: str) -> pydicom.Dataset:
    """An item of a sequence of references to instances (PS3.3 10.8)."""
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
    return item


def words(phrase: str) -> set[str]:
    """Whole words in capitals; "p.a.", "P-A" and "A/P" are words, too."""
    joined = re.sub(r"\b([APDV])[./-] ?([APDV])\b", r"\1\2", phrase.upper())
    return set(re.findall(r"[A-ZÀ-Þ]+", joined))
