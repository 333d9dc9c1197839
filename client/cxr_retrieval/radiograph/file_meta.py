"""What stands before every DICOM data set that this project writes (PS3.10 7.1)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Final

import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID

IMPLEMENTATION: Final = UID("2.25.216410219263186453374083274316180923641")
"""Implementation Class UID (0002,0012); the conformance statement in docs/hospital.md has it, too."""


def give_file_meta(dataset: pydicom.Dataset, syntax: str) -> None:
    """Of this instance in this transfer syntax, with nothing of what was there: no preamble, no titles of who sent or wrote it."""
    dataset.preamble = bytes(128)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.file_meta.ImplementationClassUID = IMPLEMENTATION
    dataset.file_meta.ImplementationVersionName = f"CXR {version('cxr-retrieval')}"[:16]
