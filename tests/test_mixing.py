"""Mixing of every field of a target, the shares masks must have, and strong augmentation against plain definitions."""

from __future__ import annotations

import colorsys
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from ecocseg.codebook import max_min
from ecocseg.coding import EcocCoding, OneHotCoding, Target
from ecocseg.data import mixing


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels_and_pseudo(coding: EcocCoding | OneHotCoding) -> tuple[Target, Target]:
    labels = torch.randint(0, 6, (2, 5, 7), generator=generator()).masked_fill(
        torch.rand(2, 5, 7, generator=generator()) < 0.2, 255)
    pseudo = coding.pseudo_label(3 * torch.randn(2, coding.num_outputs, 5, 7, generator=generator()))
    pseudo.weight = torch.rand(2, 5, 7, generator=generator())
    return coding.encode(labels), pseudo


def class_mix_by_host(labels_BHW: Tensor, generators: list[torch.Generator]) -> Tensor:
    """The obvious way: look which classes there are, then draw half of them."""
    masks = []
    for labels_HW, generator in zip(labels_BHW, generators, strict=True):
        classes = labels_HW.unique()
        chosen = classes[torch.randperm(len(classes), generator=generator)[: (len(classes) + 1) // 2]]
        masks.append(torch.isin(labels_HW, chosen))
    return torch.stack(masks)


@pytest.mark.parametrize(("classes", "most"), [(1, 2), (5, 6), (19, 20), (19, 256), (255, 256)])
def test_class_mix_draws_what_a_host_that_waits_would(classes: int, most: int) -> None:
    labels_BHW = torch.randint(0, classes, (4, 24, 24))
    labels_BHW[0, :3], labels_BHW[1] = 255, 0
    draws = [[generator(i) for i in range(4)] for _ in range(2)]
    assert torch.equal(mixing.class_mix_mask(labels_BHW, draws[0], most=most), class_mix_by_host(labels_BHW, draws[1]))


@pytest.mark.parametrize("coding", [EcocCoding(max_min(8, 70), reliability=0.8), OneHotCoding(6)])
@pytest.mark.parametrize("swap", [False, True])
def test_every_field_comes_from_the_side_the_mask_names(coding, swap):
    a, b = labels_and_pseudo(coding)
    if swap:
        a, b = b, a
    mask = torch.rand(2, 5, 7, generator=generator(1)) < 0.5
    mixed = mixing.mix(a, b, mask)
    for field in dataclasses.fields(Target):
        got, x, y = (getattr(t, field.name) for t in (mixed, a, b))
        if field.name == "metrics":
            assert got == {**x, **y}
        elif x is None and y is None:
            assert got is None
        else:  # what a true label does not have reads 1
            x, y = (torch.ones_like(got) if v is None else v for v in (x, y))
            where = mask[:, None].expand_as(got) if got.dim() == 4 else mask
            assert torch.equal(got[where], x[where]) and torch.equal(got[~where], y[~where]), field.name
    assert torch.equal(mixed.is_true, ~mask if swap else mask)


def test_the_loss_of_a_mix_is_that_of_its_parts():
    coding = EcocCoding(max_min(6, 12), reliability=0.8)
    a, b = labels_and_pseudo(coding)
    logits = torch.randn(2, 12, 5, 7, dtype=torch.float64)
    mask = torch.rand(2, 5, 7, generator=generator(2)) < 0.5
    mixed = coding.loss(logits, mixing.mix(a, b, mask))["loss"]
    a.weight, b.weight = a.weight * mask, b.weight * ~mask
    parts = coding.loss(logits, a)["loss"] + coding.loss(logits, b)["loss"]
    torch.testing.assert_close(mixed, parts, rtol=1e-9, atol=1e-9)


def test_targets_of_two_codings_do_not_mix():
    a, _ = labels_and_pseudo(EcocCoding(max_min(6, 12)))
    _, b = labels_and_pseudo(OneHotCoding(6))
    with pytest.raises(ValueError, match="same coding"):
        mixing.mix(a, b, torch.ones(2, 5, 7, dtype=torch.bool))


def test_moving_a_target_keeps_every_field():
    _, target = labels_and_pseudo(EcocCoding(max_min(6, 12)))
    moved = target.to("cpu")
    for field in dataclasses.fields(Target):
        x, y = getattr(target, field.name), getattr(moved, field.name)
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


def test_images_follow_the_mask():
    a, b = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    mask = torch.rand(2, 4, 5) < 0.5
    mixed = mixing.mix_images(a, b, mask)
    for c in range(3):
        assert torch.equal(mixed[:, c][mask], a[:, c][mask]) and torch.equal(mixed[:, c][~mask], b[:, c][~mask])


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_class_mix_takes_half_of_the_classes_rounded_up(dtype):
    labels = torch.zeros(3, 6, 6, dtype=dtype)
    labels[0] = torch.arange(36).view(6, 6) % 5
    labels[1, :3], labels[1, 3:, :2] = 7, 255  # 0, 7 and ignore: three
    mask = mixing.class_mix_mask(labels, [generator(i) for i in range(3)])
    for image, expected in zip(range(3), (3, 2, 1), strict=True):
        inside, outside = set(labels[image][mask[image]].tolist()), set(labels[image][~mask[image]].tolist())
        assert len(inside) == expected and not inside & outside, "whole classes, half of them"


def test_class_mix_takes_half_of_the_classes_of_a_whole_batch():
    """All eight labels of the batch are drawn from for images that have two of them, or one."""
    labels = torch.zeros(600, 2, 4, dtype=torch.int64)
    labels[:200] = torch.arange(8).view(2, 4)
    labels[200:400, 0] = 3
    labels[:, 1, 3] = torch.where(labels[:, 1, 3] == 7, 255, labels[:, 1, 3])
    present = mixing.classes_present(labels)
    assert present.sum(1).tolist() == [8] * 200 + [2] * 200 + [1] * 200 and present[0, 255] and not present[0, 7]
    mask = mixing.class_mix_mask(labels, [generator(i) for i in range(600)], present.any(0)).flatten(1)
    assert (mask[:200].sum(1) == 4).all()
    for first in (200, 400):  # whole classes, each in half of the images, and not always half of an image's own
        counts = torch.tensor([len(set(row[m].tolist())) for row, m in zip(labels[first:first + 200].flatten(1),
                                                                           mask[first:first + 200], strict=True)])
        most = int(counts.max())
        assert most == (2 if first == 200 else 1) and (counts == 0).sum() > 20 and (counts == most).sum() > 20
    odd = mixing.class_mix_mask(labels[:1], [generator()], present[0] & (torch.arange(256) != 255))
    assert odd.sum() == 4, "half of seven, rounded up"


def test_class_mix_draws_anew_for_each_image_and_every_class_equally():
    labels = (torch.arange(8).view(1, 2, 4)).expand(400, 2, 4)
    mask = mixing.class_mix_mask(labels, [generator(i) for i in range(400)])
    assert mask.flatten(1).sum(1).eq(4).all()
    share = mask.flatten(1).float().mean(0)
    assert (share - 0.5).abs().max() < 0.1 and len(mask.flatten(1).unique(dim=0)) > 50
    again = mixing.class_mix_mask(labels[:3], [generator(i) for i in (2, 1, 0)])
    assert torch.equal(again.flip(0), mask[:3]), "an image's draw is its generator's alone"


def test_cutmix_boxes():
    g, areas, none = generator(), [], 0
    for _ in range(400):
        mask = mixing.cutmix_box((60, 80), g)
        assert mask.shape == (60, 80)
        if not mask.any():
            none += 1
            continue
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        tall, wide = len(rows), len(columns)
        assert mask.sum() == tall * wide == mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].sum()
        assert 0.3 * 0.8 < tall / wide < 1.25 / 0.3
        areas.append(tall * wide / (60 * 80))
    assert 140 < none < 260
    assert 0.01 < min(areas) < 0.05 and 0.3 < max(areas) <= 0.4
    assert not mixing.cutmix_box((60, 80), generator(), p=0).any()
    assert mixing.cutmix_box((60, 80), generator(), p=1).any()


def test_patch_mask_is_made_of_blocks_kept_at_the_given_rate():
    mask = mixing.patch_mask((64 * 30, 64 * 30), generator=generator())
    blocks = mask.view(30, 64, 30, 64)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert abs(mask.float().mean() - 0.3) < 0.05
    odd = mixing.patch_mask((70, 33), block=32, keep=0.5, generator=generator())
    assert odd.shape == (70, 33) and (odd[:32, :32] == odd[0, 0]).all()


def jitter_pixel(rgb: list[float], factors: list[float], order: list[int]) -> list[float]:
    def clip(v: float) -> float:
        return min(max(v, 0.0), 1.0)

    for which in order:
        if which == 0:
            rgb = [clip(v + factors[0] - 1) for v in rgb]
        elif which == 1:
            rgb = [clip(v * factors[1]) for v in rgb]
        else:
            h, s, v = colorsys.rgb_to_hsv(*rgb)
            s, h = (clip(s * factors[2]), h) if which == 2 else (s, (h + factors[3]) % 1)
            rgb = list(colorsys.hsv_to_rgb(h, s, v))
    return rgb


def test_colour_jitter_equals_pixel_arithmetic():
    image = torch.rand(2, 3, 4, 4, generator=generator(1))
    image[0, :, 0, 0], image[0, :, 0, 1] = 0.0, 1.0
    orders = set()
    for seed in range(12):
        got = mixing.color_jitter(image, 0.2, 0.3, 0.4, 0.1, generator=generator(seed))
        g = generator(seed)
        draws = [torch.rand((), generator=g, dtype=torch.float64).item() for _ in range(4)]
        factors = [1 + s * (2 * u - 1) for s, u in zip((0.2, 0.3, 0.4), draws[:3], strict=True)]
        factors.append(0.1 * (2 * draws[3] - 1))
        order = torch.randperm(4, generator=g).tolist()
        orders.add(tuple(order))
        for b in range(2):
            for y in range(4):
                for x in range(4):
                    expected = jitter_pixel(image[b, :, y, x].tolist(), factors, order)
                    torch.testing.assert_close(got[b, :, y, x], torch.tensor(expected), rtol=0, atol=2e-5)
    assert len(orders) > 6
    assert torch.equal(mixing.color_jitter(image, 0, 0, 0, 0, generator=generator()), image) or torch.allclose(
        mixing.color_jitter(image, 0, 0, 0, 0, generator=generator()), image, atol=1e-6)


@pytest.mark.parametrize(("side", "size"), [(512, 51), (530, 53), (320, 31), (25, 3), (8, 1)])
def test_blur_kernel_sizes(side, size):
    assert mixing.blur_size(side) == size


def test_blur_equals_the_full_kernel():
    image = torch.rand(1, 3, 64, 90, generator=generator(2))
    got = mixing.gaussian_blur(image, 1.1)
    expected = image
    for axis, side in ((2, 64), (3, 90)):
        radius = mixing.blur_size(side) // 2
        taps = [math.exp(-0.5 * (i / 1.1) ** 2) for i in range(-radius, radius + 1)]
        n = image.shape[axis]
        mirror = [abs(i) if i < n else 2 * (n - 1) - i for i in range(-radius, n + radius)]
        padded = expected.index_select(axis, torch.tensor(mirror))
        expected = sum(t / sum(taps) * padded.narrow(axis, i, n) for i, t in enumerate(taps))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert torch.equal(mixing.gaussian_blur(image[..., :8, :8], 1.1), image[..., :8, :8]), "a kernel of one pixel"
