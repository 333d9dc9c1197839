"""The gate beside real networks: films pass, what is none is refused, in words that fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cxr_retrieval.contract import LUNG_AGREEMENT, LUNG_MASK
from cxr_retrieval.inference.triton import TritonClient
from cxr_retrieval.radiograph.letterbox import letterbox
from cxr_retrieval.radiograph.phantoms import PHANTOM_LABELS, make_phantom
from cxr_retrieval.retrieval.gate import COEFFICIENTS, Gate, Ood, described, judge, shipped, too_far
from hostile_pictures import SPOILT_FILMS, Picture, hostile_pictures

Judged = Callable[[Sequence[Picture]], list[Ood]]


@pytest.fixture(scope="module")
def judged(triton: TritonClient) -> Judged:
    def of(pictures: Sequence[Picture]) -> list[Ood]:
        framed = [letterbox(np.ascontiguousarray(pixels)) for pixels in pictures]
        found: list[Ood] = []
        for start in range(0, len(framed), 8):
            some = framed[start : start + 8]
            outputs = triton.infer(np.stack([square for square, _ in some])[:, None], (LUNG_MASK, LUNG_AGREEMENT))
            for (square, box), mask, agreement in zip(some, outputs[LUNG_MASK.name], outputs[LUNG_AGREEMENT.name], strict=True):
                found.append(judge(square, box, np.asarray(mask[0], np.uint8), float(agreement[0])))
        return found

    return of


@pytest.fixture(scope="module")
def films() -> list[Picture]:
    """Phantoms that the gate has not seen."""
    return [make_phantom(300 + number, label).pixels for number in range(6) for label in PHANTOM_LABELS]


@pytest.mark.parametrize("each", [2, pytest.param(8, marks=pytest.mark.whole)])
def test_hostile_pictures_are_refused(each: int, judged: Judged, films: list[Picture]) -> None:
    """Of twenty-five kinds, nine of them made of phantoms: at least 99 % of two hundred, and of fifty all."""
    pictures = hostile_pictures(films, each, seed=2024)
    assert len(pictures) == 25 * each
    through = Counter(kind for (kind, _), ood in zip(pictures, judged([pixels for _, pixels in pictures]), strict=True) if not ood.refused)
    print("through:", dict(through))
    assert through.total() <= len(pictures) // 100, dict(through)


def test_phantoms_pass_however_they_are_framed(judged: Judged, films: list[Picture]) -> None:
    """As they are, mirrored, darker, with a black frame, cut a little closer."""
    for change in (
        lambda film: film,
        lambda film: film[:, ::-1],
        lambda film: film // 2,
        lambda film: np.pad(film, 24),
        lambda film: film[16:-16, 16:-16],
    ):
        found = judged([change(film) for film in films[::2]])
        assert [ood.reason for ood in found] == [None] * len(films[::2])
        assert max(ood.score for ood in found) <= 0.5


@pytest.mark.parametrize(
    ("kind", "words"),
    [("turned_left", "on its side"), ("turned_right", "on its side"), ("upside_down", "upside down"), ("inverted", "inverted")],
)
def test_the_reason_says_what_is_wrong(kind: str, words: str, judged: Judged, films: list[Picture]) -> None:
    spoil = next(spoil for spoil in SPOILT_FILMS if spoil.__name__ == kind)
    said = [ood.reason or "" for ood in judged([spoil([film], np.random.default_rng(0)) for film in films[:3]])]
    assert all(words in reason for reason in said), said


def test_no_lung_is_named(judged: Judged) -> None:
    (ood,) = judged([np.tile(np.arange(100, 200, dtype=np.uint8), (100, 1))])
    assert ood.refused
    assert ood.score > 0.5


def test_overridden_it_still_says_what_it_found() -> None:
    square, box = letterbox(np.tile(np.arange(200, dtype=np.uint8), (200, 1)))
    none = np.zeros((256, 256), np.uint8)
    enforced, overridden = judge(square, box, none, 0.0), judge(square, box, none, 0.0, enforced=False)
    assert enforced.refused
    assert not overridden.refused
    assert (overridden.score, overridden.reason) == (enforced.score, enforced.reason)
    assert "hardly any lung was found" in (enforced.reason or "")
    assert enforced.as_json().keys() == {"score", "refused", "reason"}


@given(st.integers(0, 2**32 - 1), st.integers(64, 256), st.booleans(), st.floats(0, 1))
def test_any_picture_gets_a_score(seed: int, width: int, wide: bool, agreement: float) -> None:
    """Noise, flat, any shape: finite, in [0, 1], and a reason just where it is above one half."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, int(random.integers(1, 257)), (256, width) if wide else (width, 256), np.uint8)
    square, box = letterbox(pixels)
    mask = (255 * (random.random((256, 256)) < random.random())).astype(np.uint8)
    assert np.isfinite(described(square, box, mask, agreement)).all()
    ood = judge(square, box, mask, agreement)
    assert 0 <= ood.score <= 1
    assert (ood.reason is not None) == ood.refused == (ood.score > 0.5)


def test_far_from_a_large_gallery_only(squares: NDArray[np.uint8], triton: TritonClient) -> None:
    """A film like no case is refused; not where the gallery is small, filled by other weights, or the nearest is near enough."""
    gate = shipped()
    version, low = gate.about["model_version"], gate.least_similarity - 0.1
    assert too_far(low, lambda: gate.similarity_from, version) == low
    assert too_far(low, lambda: gate.similarity_from - 1, version) is None
    assert too_far(low, lambda: gate.similarity_from, "another") is None
    assert too_far(gate.least_similarity, lambda: pytest.fail("no need to count"), version) is None
    found = triton.infer(squares[:1], (LUNG_MASK, LUNG_AGREEMENT))
    pixels = make_phantom(11, "control").pixels
    square, box = letterbox(pixels)
    mask, agreement = np.asarray(found[LUNG_MASK.name][0, 0], np.uint8), float(found[LUNG_AGREEMENT.name][0, 0])
    assert np.array_equal(square, squares[0, 0])
    assert judge(square, box, mask, agreement).reason is None
    far = judge(square, box, mask, agreement, far=low)
    assert far.refused
    assert "no case in the gallery is like it" in (far.reason or "")


def test_coefficients_survive_the_file(tmp_path: Path) -> None:
    """What is read is what was written, to the byte; and it says what it was made of."""
    shipped().save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == COEFFICIENTS.read_bytes()
    again = Gate.load(tmp_path / "again.npz")
    assert again.about == shipped().about
    assert {"manifest_sha256", "model_version", "train_films", "val_films"} <= again.about.keys()
