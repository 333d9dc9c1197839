"""Radiographs and masks from a manifest into memory, through the same decoding and letterbox as the client's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cxr_retrieval.cases.manifest import ManifestRow
from cxr_retrieval.contract import IMAGE_SIZE
from cxr_retrieval.errors import CxrError, ImageError, InputError, ManifestError
from cxr_retrieval.progress import track
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.reading import read_radiograph

Images = NDArray[np.uint8]
"""`[n, 1, 256, 256]`, 0…255."""


def load_images(rows: Sequence[ManifestRow], what: str = "") -> Images:
    """Reads and letterboxes every row's image, in order; shows progress when told what they are.

    Raises:
        ImageError: The first unreadable image (training on a silently shrunken set would not be repeatable).
    """
    return _load(rows, lambda row: letterbox(read_radiograph(row.path).pixels)[0], what)


def pixels_of(row: ManifestRow) -> NDArray[np.uint8]:
    """One row's image as it was read, of its own size.

    Raises:
        ManifestError: It cannot be used.
    """
    try:
        return read_radiograph(row.path).pixels
    except CxrError as error:
        raise ManifestError(f"{row.image_id} cannot be used", got=str(error), next_step="take the row out of the manifest") from error


def load_lung_masks(rows: Sequence[ManifestRow]) -> Images:
    """Reads the masks named in `lung_mask_path`, letterboxed like their images, 0 or 255."""
    return _load(rows, lambda row: _mask(row, "lung_mask_path"), "lung masks")


def load_lesion_masks(rows: Sequence[ManifestRow]) -> Images:
    """Reads the masks named in `lesion_mask_path`, letterboxed like their images, 0 or 255; all 0 where none is named."""
    empty = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    return _load(rows, lambda row: _mask(row, "lesion_mask_path") if row.fields.get("lesion_mask_path") else empty, "lesion masks")


def with_lung_masks(rows: Sequence[ManifestRow], manifest: Path) -> tuple[ManifestRow, ...]:
    """Rows that name a lung mask.

    Raises:
        ManifestError: There are none.
    """
    chosen = tuple(row for row in rows if row.fields.get("lung_mask_path"))
    if not chosen:
        raise ManifestError(
            f"{manifest.name}: no lung masks", expected="a column lung_mask_path", next_step="add the masks, or use weights already trained"
        )
    return chosen


def _mask(row: ManifestRow, column: str) -> NDArray[np.uint8]:
    path = row.folder / row.fields[column]
    try:
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"))
    except OSError as error:
        raise ImageError(
            f"{path.name}: the mask cannot be read", expected="a PNG", got=str(error), next_step="check the manifest"
        ) from error
    square, _ = letterbox(grey)
    return np.where(square > 127, 255, 0).astype(np.uint8)


def _load(rows: Sequence[ManifestRow], read: Callable[[ManifestRow], NDArray[np.uint8]], what: str) -> Images:
    out = np.empty((len(rows), 1, IMAGE_SIZE, IMAGE_SIZE), np.uint8)

    def fill(index: int) -> None:
        out[index, 0] = read(rows[index])

    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(fill, index) for index in range(len(rows))]
        for row, future in zip(rows, track(futures, f"reading {what}") if what else futures, strict=True):
            try:
                future.result()
            except InputError as error:
                pool.shutdown(cancel_futures=True)
                raise type(error)(
                    f"{row.image_id}: {error.what}", expected=error.expected, got=error.got, next_step=error.next_step
                ) from error
    return out
