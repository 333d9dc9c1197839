"""The networks as published: stages, sizes, ranges; distinct sizes so that swapped axes fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

import matplotlib as mpl
import numpy as np
import pytest
import timm
import torch
from jaxtyping import TypeCheckError
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import nn

from cxr_retrieval.errors import UsageError
from cxr_retrieval_training.config import BackboneName, SegmenterName
from cxr_retrieval_training.embedding.embedder import (
    AttentionMapHead,
    Embedder,
    EmbedderMember,
    PrincipalAxes,
    SpatialAttention,
    Strata,
)
from cxr_retrieval_training.embedding.normalisation import REACH, between_boxes, from_box, lung_box, sampling, standardised_lungs
from cxr_retrieval_training.imagenet import imagenet_state
from cxr_retrieval_training.segmentation.segmenter import (
    ARCHITECTURES,
    LungSegmenter,
    agreement,
    build_member,
    drop_small_islands,
    expected_dice,
)


@pytest.fixture(scope="module", params=["resnet50", "efficientnet_lite0"])
def member(request: pytest.FixtureRequest) -> EmbedderMember:
    torch.manual_seed(0)
    return EmbedderMember(backbone=request.param).eval()


@pytest.mark.parametrize("backbone", ["resnet50", "efficientnet_lite0"])
def test_embedder_outputs(backbone: BackboneName) -> None:
    embedder = Embedder(backbone=backbone).eval()
    lungs = torch.randint(0, 256, (3, 2, 256, 256), dtype=torch.uint8)
    with torch.inference_mode():
        embedding, appearance, features, attention = embedder(lungs)
    assert embedding.shape == (3, 64)
    assert appearance.shape == (3, 0)
    assert features.shape == (3, 2048)
    assert attention.shape == (3, 1, 16, 16)
    assert embedding.norm(dim=1) == pytest.approx(torch.ones(3))
    assert attention.min() > 0
    assert attention.max() < 1


def test_resnet_stages_end_where_the_paper_says() -> None:
    """conv3_4 is the 22nd layer and conv4_6 the 40th: 1 + 3·3 + 4·3 and 6·3 more convolutions (shortcuts not counted)."""

    def layers(module: nn.Module) -> int:
        return sum(isinstance(part, nn.Conv2d) and "downsample" not in name for name, part in module.named_modules())

    network = EmbedderMember(backbone="resnet50")
    assert layers(network.f1) == 22
    assert layers(network.f1) + layers(network.f2) == 40
    assert layers(network.rest) == 9, "the remaining part of ResNet-50 is conv5_x"
    assert sum(isinstance(part, nn.Linear) for part in network.head) == 2
    assert isinstance(network.attention, SpatialAttention)
    assert len(network.attention.blocks) == 3


def test_equation_4(member: EmbedderMember) -> None:
    """f̃(x) = g(α(f1(x)) ⊙ f2(f1(x))), written out step by step."""
    lungs = torch.randint(0, 256, (2, 2, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        seen = standardised_lungs(lungs.float(), lung_box(lungs[:, 1:].float()), 64).expand(-1, 3, -1, -1)
        f1 = member.f1(seen)
        assert member.attention is not None
        projected = member.head(member.rest(member.attention(f1) * member.f2(f1)))
        expected = projected / projected.norm(dim=1, keepdim=True)
        assert torch.allclose(member(lungs, 64).learned, expected, atol=1e-5)


def test_mirrored_lungs_are_found_the_same() -> None:
    """All numbers but the layout, whose quarters change sides with the lungs, as the attention does; not while training."""
    torch.manual_seed(4)
    network = EmbedderMember(12, mirrored=True, size=64).eval()
    lungs = torch.randint(0, 256, (3, 2, 80, 112), dtype=torch.uint8)
    with torch.inference_mode():
        found, back = network(lungs), network(lungs.flip(3))
        plain = EmbedderMember(12, size=64).eval()
        plain.load_state_dict(network.state_dict())
        alone, alone_back = plain(lungs), plain(lungs.flip(3))
    torch.testing.assert_close(found.learned, back.learned, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.features, back.features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.attention, back.attention.flip(3), atol=1e-4, rtol=0)
    quarters, quarters_back = (part.layout.reshape(3, -1, 2, 2) for part in (found, back))
    torch.testing.assert_close(quarters, quarters_back.flip(3), atol=1e-4, rtol=0)
    mean = nn.functional.normalize(alone.learned + alone_back.learned, dim=1)
    torch.testing.assert_close(found.learned, mean, atol=1e-4, rtol=0)
    assert not torch.allclose(alone.learned, alone_back.learned, atol=1e-3)
    network.train()
    assert network(lungs).learned.shape == (3, 12), "once"


def test_members_share_the_embedding() -> None:
    """The similarity of two embeddings is the mean of the members' similarities; attention and features are means."""
    torch.manual_seed(5)
    network = Embedder(7, sizes=(64, 96, 128)).eval()
    lungs = torch.randint(0, 256, (5, 2, 72, 88), dtype=torch.uint8)
    with torch.inference_mode():
        embedding, appearance, features, attention = network(lungs)
        parts = [member(lungs) for member in network.each()]
    assert [part.learned.shape for part in parts] == [(5, 7)] * 3
    assert [part.attention.shape[2] for part in parts] == [4, 6, 8]
    assert embedding.shape == (5, 21)
    assert appearance.shape == (5, 0), "none is asked for"
    expected = torch.stack([part.learned @ part.learned.T for part in parts]).mean(dim=0)
    torch.testing.assert_close(embedding @ embedding.T, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(features, (parts[0].features + parts[1].features + parts[2].features) / 3)
    assert attention.shape == (5, 1, 16, 16)
    assert 0 < attention.min() < attention.max() < 1


def test_attention_as_published_is_the_sigmoid_of_the_average() -> None:
    """A brighter map is a brighter mask; standardised, it is the same mask, and has a gain to learn."""
    torch.manual_seed(6)
    published, ours = SpatialAttention(8, 32, standardised=False).eval(), SpatialAttention(8, 32).eval()
    assert "gain" not in dict(published.named_parameters())
    assert "gain" in dict(ours.named_parameters())
    ours.load_state_dict({**published.state_dict(), "gain": torch.ones(())})
    x = torch.rand((2, 8, 16, 16))
    with torch.inference_mode():
        averaged = published.squeeze_excitation(published.blocks(x)).mean(dim=1, keepdim=True)
        assert torch.allclose(published(x), torch.sigmoid(averaged))
        z = (averaged - averaged.mean(dim=(2, 3), keepdim=True)) / averaged.std(dim=(2, 3), keepdim=True, correction=0)
        assert torch.allclose(ours(x), torch.sigmoid(z), atol=0.02)


def test_framed_network_sees_where_in_the_frame_the_lungs_lie() -> None:
    """The box forgets position; the frame does not. Its attention still comes over the lungs' box, as the next graph expects it."""
    torch.manual_seed(7)
    here = torch.zeros((1, 2, 128, 128), dtype=torch.uint8)
    here[:, 0, 20:70, 24:64] = torch.randint(60, 200, (50, 40), dtype=torch.uint8)
    here[:, 1, 20:70, 24:64] = 255
    there = here.roll((32, 32), dims=(2, 3))
    boxed, framed = Embedder(sizes=(128,)).eval(), Embedder(sizes=(128,), framed=True).eval()
    framed.load_state_dict(boxed.state_dict())
    with torch.inference_mode():
        assert torch.allclose(boxed(here)[2], boxed(there)[2], atol=1e-3)
        assert not torch.allclose(framed(here)[2], framed(there)[2], atol=1e-3)
        member = framed.each()[0]
        in_frame = nn.functional.interpolate(member(here).attention, size=(16, 16), mode="bilinear", align_corners=False)
        box = lung_box(here[:, 1:].float())
        back, seen = (
            from_box(values, edges, 128, 128)[0, 0, 30:60, 34:54]
            for values, edges in ((framed(here)[3], box), (in_frame, torch.tensor([[0.0, 128.0, 0.0, 128.0]])))
        )
    assert (back - seen).abs().max() < 0.02 + 0.2 * (seen.max() - seen.min())


def test_a_map_between_boxes() -> None:
    """A ramp over rows 0…160 read over rows 40…120, and one over columns likewise; onto its own box it is itself."""
    box, other = torch.tensor([[0.0, 160.0, 0.0, 320.0]]), torch.tensor([[40.0, 120.0, 80.0, 160.0]])
    centres = torch.arange(16) + 0.5
    rows, columns = (10 * centres[:, None].expand(16, 16))[None, None], (20 * centres[None, :].expand(16, 16))[None, None]
    assert torch.allclose(between_boxes(rows, box, other)[0, 0, :, 3], 40 + 5 * centres, atol=1e-3)
    assert torch.allclose(between_boxes(columns, box, other)[0, 0, 5], 80 + 5 * centres, atol=1e-3)
    assert torch.allclose(between_boxes(rows + columns, box, box), rows + columns, atol=1e-3)


def test_without_attention_the_mask_is_all_ones() -> None:
    with torch.inference_mode():
        mask = Embedder(attention=False, sizes=(64,)).eval()(torch.zeros((1, 2, 64, 64), dtype=torch.uint8))[3]
    assert mask.shape == (1, 1, 16, 16), "whatever the size"
    assert (mask == 1).all()


def test_appearance_stands_beside_the_embedding() -> None:
    """And leaves it as it is."""
    torch.manual_seed(2)
    network = Embedder(48, appearance_size=16, sizes=(64,)).eval()
    lungs = torch.randint(0, 256, (5, 2, 64, 64), dtype=torch.uint8)
    assert network.appearance is not None
    with torch.inference_mode():
        embedding, appearance, _, _ = network(lungs)
        assert embedding.shape == (5, 48)
        assert appearance.shape == (5, 16)
        assert appearance.abs().max() == 0, "not fitted yet"
        network.appearance.fit(np.random.default_rng(0).normal(size=(90, 448)).astype(np.float32))
        again, appearance, _, _ = network(lungs)
    assert torch.equal(again, embedding)
    for part in (embedding, appearance):
        assert part.norm(dim=1) == pytest.approx(torch.ones(5), abs=1e-5)


def test_appearance_is_whitened() -> None:
    """No correlation on what it was fitted to, before the length is normalised, and variance 1 / (1 + ridge · largest / own)."""
    layout = (np.random.default_rng(3).normal(size=(300, 448)) @ np.diag(np.linspace(5, 0.1, 448)) + 2.0).astype(np.float32)
    part = Embedder(appearance_size=8).appearance
    assert part is not None
    part.fit(layout)
    white = (torch.from_numpy(layout) - part.mean) @ part.projection
    variance = np.sort(np.linalg.eigvalsh(np.cov(layout.T.astype(np.float64), bias=True)))[::-1][:8]
    expected = torch.from_numpy(np.diag(variance / (variance + 0.1 * variance[0]))).float()
    assert torch.allclose(white.T @ white / len(layout), expected, atol=1e-3)
    with pytest.raises(UsageError, match="too few images"):
        part.fit(layout[:8])


def test_appearance_forgets_the_source() -> None:
    """Sources whose rows are shifted have one mean within a label afterwards; labels stay apart, and too small a source is left alone."""
    random = np.random.default_rng(7)
    strata = Strata(labels=np.arange(603) % 2, sources=np.where(np.arange(603) < 600, np.arange(603) % 3, 3))
    shift, distance = random.normal(size=(2, 4, 40)), random.normal(size=(2, 40))
    rows = (random.normal(size=(603, 40)) + shift[strata.labels, strata.sources] + 3 * distance[strata.labels]).astype(np.float32)

    def means(axes: PrincipalAxes) -> NDArray[np.float32]:
        """By label and source."""
        found = ((torch.from_numpy(rows) - axes.mean) @ axes.projection).numpy()
        return np.array([[found[(strata.labels == y) & (strata.sources == s)].mean(axis=0) for s in range(4)] for y in range(2)])

    plain, forgetting = PrincipalAxes(40, 11), PrincipalAxes(40, 11)
    plain.fit(rows)
    forgetting.fit(rows, strata)
    before, after = means(plain), means(forgetting)
    assert np.ptp(before[:, :3], axis=1).max() > 0.5
    assert np.ptp(after[:, :3], axis=1).max() < 1e-4
    assert np.linalg.norm(after[0, 0] - after[1, 0]) > 0.5
    assert np.linalg.norm(after[0, 3] - after[0, 0]) > 0.1, "three films of source 3"
    assert np.linalg.matrix_rank(forgetting.projection.numpy()) == 11 - 4


def test_frozen_layers_take_no_gradient_and_keep_their_statistics() -> None:
    network = EmbedderMember().train()
    network.keep_frozen(4)
    norm = network.f1[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    before = norm.running_mean.clone()
    network(torch.randint(1, 256, (2, 2, 64, 64), dtype=torch.uint8), 64).learned.sum().backward()
    assert torch.equal(norm.running_mean, before)
    assert all(parameter.grad is None for parameter in network.f1[:4].parameters())
    assert any(parameter.grad is not None for parameter in network.f1[4:].parameters())


def test_attention_map_head_puts_the_box_back_into_the_frame() -> None:
    """Cell (3, 11) of 16 lies at 3.5/16 and 11.5/16 of the lungs' box."""
    attention = torch.zeros((2, 1, 16, 16))
    attention[0, 0, 3, 11] = 1.0
    mask = torch.zeros((2, 1, 256, 256), dtype=torch.uint8)
    mask[:, :, 64:192, 96:224] = 255
    upsampled, passed = AttentionMapHead()(attention, mask)
    assert (passed == mask).all()
    assert (upsampled[:, :, mask[0, 0] == 0] == 0).all()
    row, column = divmod(int(upsampled[0, 0].argmax()), 256)
    top, bottom, left, right = lung_box(mask.float())[0].tolist()
    assert row == pytest.approx(top + (bottom - top) * 3.5 / 16, abs=1)
    assert column == pytest.approx(left + (right - left) * 11.5 / 16, abs=1)
    assert 0 <= upsampled.min() <= upsampled.max() <= 1


# ------------------------------------------------------------------------------------------------------ normalisation


def test_box_of_the_lungs() -> None:
    """Of an even rectangle a side's mean square is a 24th of the side's square."""
    inside = torch.zeros((2, 1, 60, 100))
    inside[0, 0, 10:50, 20:70] = 1
    above, below, left, right = (deviations / 24**0.5 for deviations in REACH)
    expected = [30 - 40 * above, 30 + 40 * below, 45 - 50 * left, 45 + 50 * right]
    assert lung_box(inside)[0].tolist() == pytest.approx(expected, abs=1e-3)
    assert (lung_box(255 * inside) - lung_box(inside)).abs().max() < 1e-3, "on any scale"
    assert expected[0] < 10, "beyond the rectangle"
    whole = [30 - 60 * above, 30 + 60 * below, 50 - 100 * left, 50 + 100 * right]
    assert lung_box(inside)[1].tolist() == pytest.approx(whole, abs=1e-3), "no lung: the whole frame"


def test_box_of_two_lungs_apart_reaches_around_both() -> None:
    inside = torch.zeros((1, 1, 100, 100))
    inside[..., 20:80, 10:40] = 1
    inside[..., 20:80, 60:90] = 1
    _, _, left, right = lung_box(inside)[0].tolist()
    assert left < 10
    assert right > 90


def test_a_pixel_more_or_less_hardly_moves_the_box() -> None:
    """At the tip of a lung it would move the outermost row by ten; the box minds its share of all pixels."""
    inside = torch.zeros((1, 1, 256, 256))
    inside[..., 60:200, 40:210] = 1
    more = inside.clone()
    more[..., 50, 100] = 1
    assert (lung_box(more) - lung_box(inside)).abs().max() < 0.05


def test_position_size_and_exposure_are_forgotten() -> None:
    """The same texture elsewhere, larger, brighter and with more contrast looks the same to the network."""
    torch.manual_seed(0)
    texture = nn.functional.interpolate(torch.rand((1, 1, 6, 6)), size=(64, 64), mode="bicubic", align_corners=False).clamp(0, 1)
    small, large = torch.zeros((1, 2, 256, 256)), torch.zeros((1, 2, 256, 256))
    small[:, :1, 20:84, 30:94] = 40 + 60 * texture
    large[:, :1, 100:228, 110:238] = 90 + 140 * nn.functional.interpolate(texture, scale_factor=2, mode="bilinear", align_corners=False)
    for lungs in (small, large):
        lungs[:, 1] = 255.0 * (lungs[:, 0] > 0)
    seen = [standardised_lungs(lungs, lung_box(lungs[:, 1:]), 96) for lungs in (small, large)]
    assert nn.functional.cosine_similarity(seen[0].flatten(1), seen[1].flatten(1)).item() > 0.99


def test_standardised_inside_and_zero_outside() -> None:
    torch.manual_seed(1)
    lungs = torch.zeros((1, 2, 128, 128))
    lungs[:, :1] = 200.0
    lungs[:, :1, 40:80, 30:60] = nn.functional.interpolate(torch.rand((1, 1, 8, 6)), size=(40, 30), mode="bilinear") * 200 + 20
    lungs[:, 1, 40:80, 30:60] = 255.0
    seen = standardised_lungs(lungs, torch.tensor([[0.0, 128.0, 0.0, 128.0]]), 128)[0, 0]
    reached = torch.zeros_like(seen, dtype=torch.bool)
    reached[39:81, 29:61] = True
    assert (seen[~reached] == 0).all(), "whatever is outside, but for the pixel that the tent is wider"
    assert seen.sum().item() / (40 * 30) == pytest.approx(0, abs=1e-3)
    assert seen[40:80, 30:60].std().item() == pytest.approx(1, abs=0.05), "a little less: the tent smooths"
    even = torch.cat([torch.full((1, 1, 64, 64), 77.0), torch.full((1, 1, 64, 64), 255.0)], dim=1)
    assert (standardised_lungs(even, lung_box(even[:, 1:]), 64).abs() < 1e-4).all(), "no texture"


def test_a_pixel_counts_by_its_share() -> None:
    """Of two halves, one of which counts by a third: weighted mean 40, weighted variance (10² + 30² / 3) / (4 / 3) = 300."""
    lungs = torch.zeros((1, 2, 64, 64))
    lungs[:, 0, :, :32], lungs[:, 0, :, 32:] = 30.0, 70.0
    lungs[:, 1, :, :32], lungs[:, 1, :, 32:] = 255.0, 85.0
    seen = standardised_lungs(lungs, torch.tensor([[0.0, 64.0, 0.0, 64.0]]), 64)[0, 0]
    deviation = (300 + 2.0**2) ** 0.5
    assert seen[32, 8].item() == pytest.approx(-10 / deviation, rel=1e-4)
    assert seen[32, 56].item() == pytest.approx(30 / deviation / 3, rel=1e-4)


def test_an_even_picture_stays_even_wherever_the_box_lies() -> None:
    """Weights of a cell sum to one: no moiré between cells and pixels."""
    ones = torch.ones((5, 1, 256, 256))
    box = torch.tensor([[20.0 + 0.13 * i, 220.0 + 0.29 * i, 31.0 + 0.07 * i, 200.5 - 0.31 * i] for i in range(5)])
    for size in (96, 128, 192, 256):
        rows, columns = sampling(box[:, 0], box[:, 1], 256, size), sampling(box[:, 2], box[:, 3], 256, size)
        assert (rows @ ones[:, 0] @ columns.transpose(1, 2) - 1.0).abs().max() < 1e-5


def test_there_and_back() -> None:
    """A map taken over the box and put back peaks where it was."""
    box = torch.tensor([[20.0, 180.0, 40.0, 200.0]])
    blob = torch.zeros((1, 1, 16, 16))
    blob[0, 0, 5, 9] = 1
    row, column = divmod(int(from_box(blob, box, 256, 240)[0, 0].argmax()), 240)
    assert (row, column) == (pytest.approx(20 + 160 * 5.5 / 16, abs=5), pytest.approx(40 + 160 * 9.5 / 16, abs=5))


def test_shapes_are_enforced() -> None:
    with pytest.raises(TypeCheckError):
        Embedder()(torch.zeros((2, 3, 64, 64), dtype=torch.uint8))


def test_configs_know_the_networks_that_there_are() -> None:
    assert tuple(ARCHITECTURES) == get_args(SegmenterName)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_member(architecture: str) -> None:
    member = build_member(architecture).eval()
    with torch.inference_mode():
        assert member(torch.zeros((2, 1, 64, 96))).shape == (2, 1, 64, 96)


def test_imagenet_weights_know_imagenet() -> None:
    """The published file in timm's network: a portrait in uniform (matplotlib's sample picture) is class 652, military uniform."""
    network = timm.create_model("efficientnet_lite0").eval()
    network.load_state_dict(imagenet_state(), strict=False)
    with Image.open(Path(mpl.get_data_path()) / "sample_data" / "grace_hopper.jpg") as picture:
        pixels = np.array(picture.convert("RGB").resize((224, 260)).crop((0, 0, 224, 224)))
    with torch.inference_mode():
        logits = network((torch.from_numpy(pixels).permute(2, 0, 1)[None].float() - 127) / 128)
    assert int(logits.argmax()) == 652
    grey = torch.rand((1, 1, 64, 64))
    first = nn.functional.conv2d(grey.expand(-1, 3, -1, -1), imagenet_state()["conv_stem.weight"])
    assert torch.allclose(first, nn.functional.conv2d(grey, imagenet_state(channels=1)["conv_stem.weight"]), atol=1e-4)
    member = build_member("unet", imagenet=True).state_dict()
    assert torch.equal(member["encoder.model.blocks.3.0.conv_pw.weight"], imagenet_state()["blocks.3.0.conv_pw.weight"])


def test_expected_dice_falls_with_doubt() -> None:
    inside = torch.zeros(3, 1, 8, 8)
    inside[:2, :, 2:6] = 1.0
    probability = torch.stack([inside[0], 0.6 * inside[1], inside[2]])
    assert expected_dice(probability, inside)[:, 0].tolist() == pytest.approx([1.0, 2 * 0.6 / 1.6, 0.0])


def test_agreement_is_the_mean_dice_with_the_ensemble() -> None:
    inside = torch.zeros((2, 1, 8, 8))
    inside[0, 0, :4] = 1
    members = torch.zeros((2, 2, 1, 8, 8))
    members[0, 0, 0, :4] = 0.9
    members[1, 0, 0, :2] = 0.9
    found = agreement(members, inside)
    assert found[0].item() == pytest.approx((1 + 2 * 16 / (16 + 32)) / 2)
    assert found[1].item() == 0, "no lung at all"


def test_ensemble_averages_probabilities_and_blanks_what_is_outside() -> None:
    torch.manual_seed(1)
    segmenter = LungSegmenter(("unet", "linknet")).eval()
    image = torch.randint(1, 256, (2, 1, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        each = [torch.sigmoid(member(image.float())) for member in segmenter.members.values()]
        assert torch.allclose(segmenter.member_probabilities(image), torch.stack(each), atol=1e-6)
        mask, lungs, agreed = segmenter(image)
        expected = drop_small_islands(((each[0] + each[1]) / 2 >= 0.5).float())
    assert ((mask > 0) == (expected > 0)).all()
    assert agreed.shape == (2, 1)
    assert set(mask.unique().tolist()) <= {0, 255}
    pixels, share = lungs[:, :1], lungs[:, 1:]
    assert (pixels == torch.where(share > 0, image, 0)).all()


def test_lungs_are_soft_at_the_outline() -> None:
    """Where a network is sure a pixel is lung or none, as the mask has it; between, by how sure it is."""
    segmenter = LungSegmenter(("unet",)).eval()

    def half_lung(_: torch.Tensor) -> torch.Tensor:
        probability = ((torch.arange(96) - 36) / 8).clamp(1e-6, 1 - 1e-6)
        return torch.logit(probability).expand(1, 1, 64, 96)

    segmenter.members["unet"].forward = half_lung
    with torch.inference_mode():
        mask, lungs, _ = segmenter(torch.full((1, 1, 64, 96), 99, dtype=torch.uint8))
    assert mask[0, 0, 32].tolist() == [0] * 40 + [255] * 56
    share = lungs[0, 1, 32].tolist()
    assert share[:39] == [0] * 39, "to a probability of a quarter"
    assert share[39:42] == pytest.approx([64, 128, 191], abs=1)
    assert share[42:] == [255] * 54, "from three quarters"
    assert lungs[0, 0, 32].tolist() == [0] * 39 + [99] * 57


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


def test_small_islands_of_probabilities_go_at_every_threshold() -> None:
    """Grey-scale reconstruction commutes with thresholding (Vincent 1993, section 2.2)."""
    torch.manual_seed(2)
    probability = nn.functional.interpolate(torch.rand((2, 1, 24, 24)), size=(256, 256), mode="bicubic").clamp(0, 1)
    cleaned = drop_small_islands(probability)
    assert (cleaned != probability).any()
    for threshold in (0.1, 0.35, 0.5, 0.8):
        assert ((cleaned >= threshold).float() == drop_small_islands((probability >= threshold).float())).all()


def test_small_islands_against_morphology_by_its_definition() -> None:
    """SciPy's erosion and geodesic dilation of grey values, to the bit; sides prime, so that swapped axes and edges would show."""
    torch.manual_seed(3)
    probability = nn.functional.interpolate(torch.rand((3, 1, 17, 23)), size=(131, 97), mode="bicubic").clamp(0, 1)
    expected = [-opened_by_definition(-opened_by_definition(one)) for one in probability[:, 0].numpy()]
    assert np.array_equal(drop_small_islands(probability)[:, 0].numpy(), np.stack(expected))


def opened_by_definition(values: Any) -> Any:
    grown = ndimage.grey_erosion(values, size=13, mode="constant", cval=9.0)
    for _ in range(24):
        grown = np.minimum(ndimage.grey_dilation(grown, size=3, mode="constant", cval=-9.0), values)
    return grown


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
