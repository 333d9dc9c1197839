"""The gate on real films: what it refuses of val, and of val spoilt. `cxr train gate` has seen train; from val it has its lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from cxr_retrieval.cases.manifest import ManifestRow, read_manifest
from cxr_retrieval.contract import LUNG_AGREEMENT, LUNG_MASK
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.reading import read_radiograph
from cxr_retrieval.retrieval.gate import Ood, judge
from hostile_pictures import Picture, hostile_pictures, inverted, turned_left, turned_right, upside_down

pytestmark = pytest.mark.real_data


def judged(pictures: Iterable[Picture], triton: TritonClient) -> Iterator[Ood]:
    """Verdicts, in order; drawn as they are asked for."""
    left = iter(pictures)
    with ThreadPoolExecutor(1) as pool:
        chunk = list(islice(left, 8))
        while chunk:
            framed = [letterbox(np.ascontiguousarray(pixels)) for pixels in chunk]
            asked = pool.submit(triton.infer, np.stack([square for square, _ in framed])[:, None], (LUNG_MASK, LUNG_AGREEMENT))
            chunk = list(islice(left, 8))
            outputs = asked.result()
            for (square, box), mask, agreement in zip(framed, outputs[LUNG_MASK.name], outputs[LUNG_AGREEMENT.name], strict=True):
                yield judge(square, box, np.asarray(mask[0], np.uint8), float(agreement[0]))


@pytest.fixture(scope="module")
def val(real_data: Path) -> Sequence[ManifestRow]:
    return read_manifest(real_data / "manifest.csv").require(split="val")


def pixels_of(row: ManifestRow) -> Picture:
    return read_radiograph(row.path).pixels


def test_two_hundred_hostile_pictures_of_real_films(val: Sequence[ManifestRow], triton: TritonClient) -> None:
    """Of twenty-five kinds, nine of them made of val films: at least 99 % are refused."""
    chosen = np.random.default_rng(43).choice(len(val), 72, replace=False)
    pictures = hostile_pictures([pixels_of(val[i]) for i in chosen], each=8, seed=90125)
    assert len(pictures) == 200
    found = judged((pixels for _, pixels in pictures), triton)
    through = Counter(kind for (kind, _), ood in zip(pictures, found, strict=True) if not ood.refused)
    print("through:", dict(through))
    assert through.total() <= 2, dict(through)


def test_a_sample_of_val_passes(val: Sequence[ManifestRow], triton: TritonClient) -> None:
    """Every fifth film, of each source: at most one in a hundred is refused."""
    some = val[::5]
    refused = [row.image_id for row, ood in zip(some, judged(map(pixels_of, some), triton), strict=True) if ood.refused]
    assert len(refused) <= len(some) / 100, refused


@pytest.mark.whole
@pytest.mark.timeout(3600)
def test_all_of_val_as_it_is_and_spoilt(val: Sequence[ManifestRow], triton: TritonClient) -> None:
    """All 759: refused by source and label; and turned, upside down, inverted (docs/results.md, "When it refuses")."""
    refused = Counter(f"{row.source} {row.label}" for row, ood in zip(val, judged(map(pixels_of, val), triton), strict=True) if ood.refused)
    print("val:", dict(refused))
    assert refused.total() <= len(val) / 100, dict(refused)
    none = np.random.default_rng(0)
    for spoil in (turned_left, turned_right, upside_down, inverted):
        spoilt = (spoil([pixels_of(row)], none) for row in val)
        through = [row.image_id for row, ood in zip(val, judged(spoilt, triton), strict=True) if not ood.refused]
        print(spoil.__name__, len(through), "of", len(val), "through")
        assert len(through) <= len(val) / 100, (spoil.__name__, through)
