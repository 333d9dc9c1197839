"""The networks as published: stages, sizes, ranges; distinct sizes so that swapped axes fail."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy import ndimage
from torch import nn

from cxr_retrieval_training.embedder import AttentionMapHead, Embedder, SpatialAttention
from cxr_retrieval_training.segmenter import ARCHITECTURES, LungSegmenter, build_member, drop_small_islands


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder().eval()


def test_embedder_outputs(embedder: Embedder) -> None:
    lungs = torch.randint(0, 256, (3, 1, 256, 256), dtype=torch.uint8)
    with torch.inference_mode():
        embedding, features, attention = embedder(lungs)
    assert embedding.shape == (3, 64)
    assert features.shape == (3, 2048)
    assert attention.shape == (3, 1, 16, 16)
    assert embedding.norm(dim=1) == pytest.approx(torch.ones(3))
    assert attention.min() > 0
    assert attention.max() < 1


def test_axes_are_not_swapped(embedder: Embedder) -> None:
    with torch.inference_mode():
        assert embedder(torch.zeros((2, 1, 96, 160), dtype=torch.uint8))[2].shape == (2, 1, 6, 10)


def test_stages_end_where_the_paper_says(embedder: Embedder) -> None:
    """conv3_4 is the 22nd layer and conv4_6 the 40th: 1 + 3·3 + 4·3 and 6·3 more convolutions (shortcuts not counted)."""

    def layers(module: nn.Module) -> int:
        return sum(isinstance(part, nn.Conv2d) and "downsample" not in name for name, part in module.named_modules())

    assert layers(embedder.f1) == 22
    assert layers(embedder.f1) + layers(embedder.f2) == 40
    assert layers(embedder.rest) == 9, "the remaining part of ResNet-50 is conv5_x"
    assert sum(isinstance(part, nn.Linear) for part in embedder.head) == 2
    assert isinstance(embedder.attention, SpatialAttention)
    assert len(embedder.attention.blocks) == 3


def test_equation_4(embedder: Embedder) -> None:
    """f̃(x) = g(α(f1(x)) ⊙ f2(f1(x))), written out step by step."""
    lungs = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        grey = (lungs.float() / 255).expand(-1, 3, -1, -1)
        f1 = embedder.f1((grey - embedder.mean) / embedder.std)
        assert embedder.attention is not None
        projected = embedder.head(embedder.rest(embedder.attention(f1) * embedder.f2(f1)))
        expected = projected / projected.norm(dim=1, keepdim=True)
        assert torch.allclose(embedder(lungs)[0], expected, atol=1e-6)


def test_without_attention_the_mask_is_all_ones() -> None:
    with torch.inference_mode():
        mask = Embedder(attention=False).eval()(torch.zeros((1, 1, 64, 64), dtype=torch.uint8))[2]
    assert (mask == 1).all()


def test_attention_map_head() -> None:
    attention = torch.zeros((2, 1, 16, 16))
    attention[0, 0, 3, 11] = 1.0
    mask = torch.zeros((2, 1, 256, 256), dtype=torch.uint8)
    mask[:, :, :, 128:] = 255
    upsampled, passed = AttentionMapHead(256)(attention, mask)
    assert (passed == mask).all()
    assert (upsampled[:, :, :, :128] == 0).all()
    row, column = divmod(int(upsampled[0, 0].argmax()), 256)
    assert (row // 16, column // 16) == (3, 11)
    assert 0 <= upsampled.min() <= upsampled.max() <= 1


def test_shapes_are_enforced(embedder: Embedder) -> None:
    with pytest.raises(TypeCheckError):
        embedder(torch.zeros((2, 3, 64, 64), dtype=torch.uint8))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_member(architecture: str) -> None:
    member = build_member(architecture).eval()
    with torch.inference_mode():
        assert member(torch.zeros((2, 1, 64, 96))).shape == (2, 1, 64, 96)
    assert all(module.momentum == 0.1 for module in member.modules() if isinstance(module, nn.BatchNorm2d))


def test_ensemble_averages_probabilities_and_blanks_what_is_outside() -> None:
    torch.manual_seed(1)
    segmenter = LungSegmenter(("unet", "linknet")).eval()
    image = torch.randint(1, 256, (2, 1, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        each = [torch.sigmoid(member(image.float())) for member in segmenter.members.values()]
        assert torch.allclose(segmenter.probability(image), (each[0] + each[1]) / 2, atol=1e-6)
        mask, lungs = segmenter(image)
    assert set(mask.unique().tolist()) <= {0, 255}
    assert (lungs == torch.where(mask > 0, image, 0)).all()


def test_small_islands_go_and_lungs_stay_to_the_pixel() -> None:
    mask = torch.zeros((1, 1, 256, 256))
    yy, xx = torch.arange(256)[:, None], torch.arange(256)[None, :]
    lungs = (((xx - 80) / 34) ** 2 + ((yy - 128) / 80) ** 2 < 1) | (((xx - 176) / 34) ** 2 + ((yy - 128) / 80) ** 2 < 1)
    mask[0, 0] = lungs.float()
    noisy = mask.clone()
    noisy[0, 0, 5:15, 5:15] = 1  # an island
    noisy[0, 0, 240, :] = 1  # a line
    noisy[0, 0, 120:126, 78:84] = 0  # a hole in a lung
    assert (drop_small_islands(noisy) == mask).all()


def test_small_islands_against_connected_components() -> None:
    """Where every island is a square, removing those below 13×13 is what labelling components would do."""
    random = np.random.default_rng(0)
    mask = np.zeros((256, 256), np.float32)
    for row in range(4):
        for column in range(4):
            side = int(random.integers(4, 40))
            mask[64 * row + 8 : 64 * row + 8 + side, 64 * column + 8 : 64 * column + 8 + side] = 1
    labelled, count = cast("tuple[Any, int]", ndimage.label(mask))
    sizes = ndimage.sum(mask, labelled, range(1, count + 1))
    expected = np.isin(labelled, 1 + np.flatnonzero(sizes >= 13 * 13))
    assert 0 < expected.sum() < mask.sum()
    assert (drop_small_islands(torch.from_numpy(mask)[None, None])[0, 0].numpy() == expected).all()
