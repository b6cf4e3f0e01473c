"""HRDA against its formula written out cell by cell, and against itself where it can have only one answer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ecocseg import codebook
from ecocseg.coding import EcocCoding, OneHotCoding
from ecocseg.errors import InputError
from ecocseg.evaluate import EvalSpec, predict_scores
from ecocseg.methods.base import random_generator
from ecocseg.models.hrda import Box, HrdaSegmenter, TwoScaleLogits, fuse, merge_windows, two_scale_loss
from ecocseg.models.segmenter import build_segmenter
from ecocseg.target import Target
from ecocseg.teacher import Teacher

N, K = 5, 8


def tiny(encoder: str = "mit_b0", outputs: int = K, **options: Any) -> HrdaSegmenter:
    torch.manual_seed(0)
    model = build_segmenter(encoder, "hrda", outputs, channels=16, dropout=0.0, **options)
    assert isinstance(model, HrdaSegmenter)
    return model


def step(model: HrdaSegmenter, seed: int = 0, number: int = 0) -> HrdaSegmenter:
    model.begin_step(random_generator(seed, number, 8))
    return model


def upsampled2(map_BKhw: Tensor) -> Tensor:
    """Bilinear interpolation to twice the cells, a neighbour at a time: cell centres, borders repeated."""
    batch, outputs, height, width = map_BKhw.shape
    out = torch.zeros(batch, outputs, 2 * height, 2 * width, dtype=map_BKhw.dtype)
    for y in range(2 * height):
        for x in range(2 * width):
            fy, fx = max((y + 0.5) / 2 - 0.5, 0.0), max((x + 0.5) / 2 - 0.5, 0.0)
            y0, x0 = int(fy), int(fx)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            wy, wx = fy - y0, fx - x0
            out[..., y, x] = ((1 - wy) * ((1 - wx) * map_BKhw[..., y0, x0] + wx * map_BKhw[..., y0, x1])
                              + wy * ((1 - wx) * map_BKhw[..., y1, x0] + wx * map_BKhw[..., y1, x1]))
    return out


@pytest.mark.parametrize("box", [(0, 0, 12, 16), (2, 4, 8, 16), (6, 0, 12, 6)])
def test_fusion_is_the_formula(box: tuple[int, int, int, int]) -> None:
    top, left, bottom, right = box
    generator = torch.Generator().manual_seed(1)
    context, attention = torch.randn(2, 2, 3, 6, 8, generator=generator, dtype=torch.float64)
    attention = attention.sigmoid()
    detail = torch.randn(2, 3, bottom - top, right - left, generator=generator, dtype=torch.float64)
    masked, inserted = torch.zeros_like(attention), torch.zeros(2, 3, 12, 16, dtype=torch.float64)
    for y in range(6):
        for x in range(8):
            if top <= 2 * y < bottom and left <= 2 * x < right:
                masked[..., y, x] = attention[..., y, x]
    for y in range(top, bottom):
        for x in range(left, right):
            inserted[..., y, x] = detail[..., y - top, x - left]
    want = upsampled2((1 - masked) * context) + upsampled2(masked) * inserted
    got = fuse(context, detail, attention, (slice(top, bottom), slice(left, right)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_constant_attention_is_all_context_all_detail_or_their_mean() -> None:
    context, detail = torch.randn(1, 2, 4, 6), torch.randn(1, 2, 8, 12)
    upsampled, everywhere = upsampled2(context), (slice(0, 8), slice(0, 12))
    for a, want in ((0.0, upsampled), (1.0, detail), (0.5, (upsampled + detail) / 2)):
        torch.testing.assert_close(fuse(context, detail, torch.full_like(context, a), everywhere), want)
    part = fuse(context, detail[..., 2:6, 4:10], torch.ones_like(context), (slice(2, 6), slice(4, 10)))
    torch.testing.assert_close(part[..., 3:5, 5:9], detail[..., 3:5, 5:9])  # off its border, the box shows detail alone
    torch.testing.assert_close(part[..., :1, :], upsampled[..., :1, :])  # and what is far from it context alone


def test_merging_windows_is_their_mean() -> None:
    whole = torch.randn(2, 3, 9, 10)
    boxes = [(slice(y, y + 6), slice(x, x + 4)) for y in (0, 3) for x in (0, 2, 4, 6)]
    parts = [whole[..., rows, columns] for rows, columns in boxes]
    torch.testing.assert_close(merge_windows(parts, boxes, (9, 10)), whole)
    shifted = [part + i for i, part in enumerate(parts)]
    got = merge_windows(shifted, boxes, (9, 10)) - whole
    for y, x in ((0, 0), (4, 5), (8, 9), (3, 2)):
        covering = [i for i, (r, c) in enumerate(boxes) if r.start <= y < r.stop and c.start <= x < c.stop]
        assert got[0, 0, y, x].item() == pytest.approx(sum(covering) / len(covering), abs=1e-5)


@pytest.mark.parametrize("encoder", ["mit_b0", "resnet18", "convnext_atto"])
def test_training_gives_two_predictions_and_evaluation_one(encoder: str) -> None:
    model = step(tiny(encoder)).train()
    image = torch.randn(2, 3, 128, 192)
    output, feature = model(image, return_features=True)
    assert isinstance(output, TwoScaleLogits)
    top, left, bottom, right = output.box
    assert output.fused.shape == (2, K, 32, 48) and output.detail.shape == (2, K, (bottom - top) // 4, (right - left) // 4)
    assert (bottom - top, right - left) == (64, 96) and top % 8 == left % 8 == 0 and bottom <= 128 and right <= 192
    assert feature.shape == (2, model.encoder.channels[-1], 2, 3)  # of the half-size image
    loss = output.fused.square().mean() + output.detail.square().mean()
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.eval()
    with torch.no_grad():
        assert model(image).shape == (2, K, 32, 48) and model(image[..., :97, :130]).shape == (2, K, 25, 33)
        torch.testing.assert_close(model.encode(image)[-1], model(image, return_features=True)[1])


def test_evaluation_joins_context_and_overlapping_windows() -> None:
    model, image = tiny(detail_crop=(64, 32)).eval().double(), torch.randn(1, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        small = nn.functional.interpolate(image, scale_factor=0.5, mode="bilinear", align_corners=False)
        maps = model.encoder(small)
        total, count = torch.zeros(1, K, 24, 16, dtype=torch.float64), torch.zeros(24, 16, dtype=torch.float64)
        for top in (0, 32):
            for left in (0, 16, 32):
                window = image[..., top:top + 64, left:left + 32]
                total[..., top // 4:top // 4 + 16, left // 4:left // 4 + 8] += model.decoder(model.encoder(window))
                count[top // 4:top // 4 + 16, left // 4:left // 4 + 8] += 1
        a = model.decoder.attention(maps).sigmoid()
        want = upsampled2((1 - a) * model.decoder(maps)) + upsampled2(a) * (total / count)
        torch.testing.assert_close(model(image), want, rtol=0, atol=1e-10)


def test_the_box_is_a_pure_function_of_seed_and_step() -> None:
    model, image = tiny().train(), torch.randn(1, 3, 256, 256)

    def boxes(seed: int, number: int) -> list[Box]:
        step(model, seed, number)
        torch.manual_seed(int(torch.randint(1000, ())))  # torch's own state does not matter
        return [model._random_box((256, 256)) for _ in range(3)]

    first = boxes(0, 4)
    step(model, 0, 4)
    with torch.no_grad():
        assert [model(image).box for _ in range(3)] == first == boxes(0, 4)
    assert len(set(first)) > 1  # one draw each forward
    assert boxes(1, 4) != first and boxes(0, 5) != first
    corners = {box[:2] for number in range(60) for box in boxes(0, number)}
    rows, columns = {c[0] for c in corners}, {c[1] for c in corners}
    assert min(rows | columns) == 0 and max(rows | columns) == 128 and all(c % 8 == 0 for c in rows | columns)
    assert len(rows) == len(columns) == 17  # every multiple of 8 from 0 to 128


@pytest.mark.parametrize("kind", ["one_hot", "ecoc"])
@pytest.mark.parametrize("average", ["all", "valid"])
def test_the_loss_is_nine_parts_fused_and_one_part_detail(kind: str, average: str) -> None:
    coding: Any = OneHotCoding(N) if kind == "one_hot" else EcocCoding(codebook.max_min(N, K, 0))
    generator = torch.Generator().manual_seed(2)
    outputs, box = coding.num_outputs, Box(8, 16, 24, 40)
    labels = torch.randint(0, N, (2, 32, 48), generator=generator)
    labels[0, :12] = 255
    target = coding.encode(labels)
    target.weight = torch.rand(2, 32, 48, generator=generator, dtype=torch.float64)
    fused = torch.randn(2, outputs, 8, 12, generator=generator, dtype=torch.float64)
    detail = torch.randn(2, outputs, 4, 6, generator=generator, dtype=torch.float64)
    cut = (slice(None), slice(8, 24), slice(16, 40))
    inside = coding.encode(labels[cut])
    inside.weight = target.weight[cut]
    want = (0.9 * coding.loss(fused, target, average=average)["loss"]
            + 0.1 * coding.loss(detail, inside, average=average)["loss"])
    output = TwoScaleLogits(fused, detail, box, 0.1)
    terms = two_scale_loss(coding, output, target, average=average)
    torch.testing.assert_close(terms["loss"], want, rtol=0, atol=1e-12)
    one, other = coding.loss(fused, target, normalizer=900.0), coding.loss(detail, inside, normalizer=900.0 / 4)
    given = two_scale_loss(coding, output, target, normalizer=torch.tensor(900.0, dtype=torch.float64))
    torch.testing.assert_close(given["loss"], 0.9 * one["loss"] + 0.1 * other["loss"], rtol=0, atol=1e-12)


def test_cropped_targets_have_their_part_of_everything() -> None:
    coding = EcocCoding(codebook.max_min(N, K, 0), reliability=0.6)
    target = coding.pseudo_label(torch.randn(2, K, 16, 16))
    part = target.cropped(slice(4, 12), slice(2, 16))
    assert torch.equal(part.dense_bits(K), target.dense_bits(K)[..., 4:12, 2:16])
    for name in ("labels", "weight", "is_true", "confidence", "reliable"):
        assert torch.equal(getattr(part, name), getattr(target, name)[:, 4:12, 2:16])
    assert isinstance(part, Target) and part.metrics is target.metrics


def test_the_teacher_sees_all_detail_and_sliding_evaluation_goes_through() -> None:
    model = step(tiny()).train()
    teacher = Teacher(model, 0.9)
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        first, again = teacher.module(image), copy.deepcopy(teacher.module)(image)
        assert isinstance(first, Tensor) and first.shape == (1, K, 32, 32)
        torch.testing.assert_close(first, again)
    coding = EcocCoding(codebook.max_min(N, K, 0))
    spec = EvalSpec(mode="slide", crop=(128, 128), stride=(64, 64))
    assert predict_scores(model.eval(), coding, torch.randn(1, 3, 128, 256), spec).shape == (1, N, 128, 256)


def test_size_with_mit_b5() -> None:
    with torch.device("meta"):
        model, plain = build_segmenter("mit_b5", "hrda", 19), build_segmenter("mit_b5", "daformer", 19)
    lighter = 256 * (64 + 128 + 320 + 512 + 4) + 4 * 256 * 256 + 2 * 256 + 257 * 19  # embeddings, fusion, norm, outputs
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters()) == lighter
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(85.69, abs=0.005)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(InputError, match="data.crop to 64"):
        tiny().train()(torch.randn(1, 3, 48, 64))
    with pytest.raises(InputError, match="siamese"):
        tiny(siamese=True)
    with pytest.raises(NotImplementedError):
        tiny().decode([], (64, 64))
