"""Transforms: crops, redraws, padding and flips against what the pixels themselves tell."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ecocseg.data import transforms
from ecocseg.data.transforms import MAX_REDRAWS, WeakTransform
from ecocseg.errors import InputError


def encode(array, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, "PNG") if mode is None else Image.fromarray(array).convert(mode).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def coordinates(height, width):
    """An image whose pixels tell where they come from, and a mask that tells the same modulo 64."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([y % 256, x % 256, (y + x) % 256], -1).astype(np.uint8)
    return image, ((y + x) % 64).astype(np.uint8)


def test_crop_is_a_part_of_the_image_with_its_labels():
    image, mask = coordinates(50, 70)
    transform = WeakTransform(crop=(20, 30))
    tops, flips = set(), 0
    for seed in range(40):
        sample = transform(encode(image), encode(mask), np.random.default_rng(seed))
        assert sample.image.shape == (3, 20, 30) and sample.image.dtype == np.uint8
        assert sample.labels.shape == (20, 30) and sample.valid.all()
        y, x = sample.image[0].astype(int), sample.image[1].astype(int)
        assert (sample.labels == (y + x) % 64).all()
        assert (np.diff(y, axis=0) == 1).all() and len(set(np.diff(x, axis=1).ravel())) == 1
        flips += x[0, 1] < x[0, 0]
        tops.add(y[0, 0])
    assert 8 < flips < 32 and len(tops) > 15


def test_the_same_generator_gives_the_same_sample_and_another_another():
    image, mask = coordinates(50, 70)
    transform = WeakTransform(crop=(20, 30), scale=(0.5, 2.0))
    one, same, other = (transform(encode(image), encode(mask), np.random.default_rng([1, 2, s])) for s in (3, 3, 4))
    assert (one.image == same.image).all() and (one.labels == same.labels).all()
    assert (one.image != other.image).any()


def test_padding_is_black_ignored_and_invalid():
    image, mask = np.full((10, 12, 3), 200, np.uint8), np.ones((10, 12), np.uint8)
    for flip in (0.0, 1.0):
        sample = WeakTransform(crop=(16, 20), flip=flip)(encode(image), encode(mask), np.random.default_rng(0))
        columns = slice(0, 12) if not flip else slice(8, 20)
        inside = np.zeros((16, 20), bool)
        inside[:10, columns] = True
        assert (sample.valid == inside).all()
        assert (sample.labels == np.where(inside, 1, 255)).all()
        assert (sample.image == np.where(inside, 200, 0)).all()


def test_resized_crop_equals_the_crop_of_the_resized_image():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (90, 130, 3), np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
    for size in ((150, 200), (211, 333), (450, 640)):
        full = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR)).astype(int)
        crop = transforms._crop_resized(image, size, (31, 47, 131, 177)).astype(int)
        difference = np.abs(crop - full[31:131, 47:177])
        assert difference.max() <= 1  # rounding


def test_labels_are_resized_to_the_nearest_and_stay_aligned():
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 30:] = 7
    image = np.repeat((mask * 30)[..., None], 3, -1)
    sample = WeakTransform(crop=(80, 120), resize=(80, 120), max_class_share=1)(
        encode(image), encode(mask), np.random.default_rng(1)
    )
    assert set(np.unique(sample.labels)) == {0, 7}
    agree = (sample.image[0] > 105) == (sample.labels == 7)
    assert agree.mean() > 0.98


def test_random_scale_changes_the_size():
    image = np.full((20, 20, 3), 9, np.uint8)
    transform = WeakTransform(crop=(64, 64), scale=(0.5, 2.0), flip=0)
    widths = {int(transform(encode(image), None, np.random.default_rng(s)).valid.sum(1).max()) for s in range(60)}
    assert min(widths) <= 12 and max(widths) >= 37 and all(10 <= w <= 40 for w in widths)


def count_draws(monkeypatch):
    calls = []
    draw = WeakTransform._draw_box

    def counted(self, *args):
        calls.append(1)
        return draw(self, *args)

    monkeypatch.setattr(WeakTransform, "_draw_box", counted)
    return calls


@pytest.mark.parametrize(
    "fill, share, focus, min_pixels, expected",
    [
        (0, 0.75, None, 0, 1 + MAX_REDRAWS),  # one class everywhere: redrawn as often as allowed
        (0, 1.0, None, 0, 1),  # no limit on the share
        (255, 0.75, None, 0, 1 + MAX_REDRAWS),  # nothing labelled
        ("stripes", 0.75, None, 0, 1),
        ("stripes", 0.75, 1, 40, 1),  # enough of the focus class at once
        ("stripes", 0.75, 9, 40, 1 + MAX_REDRAWS),  # never enough
        ("stripes", 0.75, -1, 40, 1),
        (0, 0.75, 9, 40, (1 + MAX_REDRAWS) ** 2),  # both rules at once nest
    ],
)
def test_redraws(monkeypatch, fill, share, focus, min_pixels, expected):
    mask = np.full((40, 40), 0 if fill == "stripes" else fill, np.uint8)
    if fill == "stripes":
        mask[::2] = 1
    calls = count_draws(monkeypatch)
    transform = WeakTransform(crop=(10, 10), max_class_share=share, min_class_pixels=min_pixels)
    transform(encode(np.zeros((40, 40, 3), np.uint8)), encode(mask), np.random.default_rng(0), focus)
    assert len(calls) == expected


def test_redraws_find_the_rare_class():
    """A class in 6 % of the image: with redraws its crops hold enough of it far more often."""
    mask = (np.arange(64)[:, None] // 2 % 2 * np.ones((1, 64))).astype(np.uint8)
    mask[:16, :16] = 5
    image = encode(np.zeros((64, 64, 3), np.uint8))

    def found(min_pixels):
        transform = WeakTransform(crop=(16, 16), min_class_pixels=min_pixels)
        samples = [transform(image, encode(mask), np.random.default_rng(s), 5) for s in range(60)]
        return np.mean([(s.labels == 5).sum() > 60 for s in samples])

    assert found(60) > found(0) + 0.3


def test_class_share_ignores_unlabelled_pixels():
    for labels, share in (([[255, 255, 255, 1], [1, 1, 2, 255]], 0.75), ([[255, 255]], 1.0)):
        counts = transforms.label_counts(Image.fromarray(np.array(labels, np.uint8)))
        assert transforms.class_share(counts) == share


def test_palette_masks_are_read_as_indices_and_grey_images_as_rgb():
    index = np.tile(np.array([[0, 3], [200, 255]], np.uint8), (5, 5))
    palette = Image.fromarray(index, "P")
    palette.putpalette(list(range(256)) * 3)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    transform = WeakTransform(crop=(10, 10), flip=0)
    sample = transform(encode(np.full((10, 10), 77, np.uint8)), buffer.getvalue(), np.random.default_rng(0))
    assert (sample.labels == index).all() and (sample.image == 77).all()


def test_whole_images_decode_to_rgb():
    grey = transforms.decode_image(encode(np.full((4, 6), 77, np.uint8)))
    assert (np.asarray(grey) == 77).all() and np.asarray(grey).shape == (4, 6, 3)
    with pytest.raises(InputError, match="image_id 'x'"):
        transforms.decode_image(b"", "x")


def test_bad_rows_name_their_image():
    image, mask = encode(np.zeros((8, 8, 3), np.uint8)), encode(np.zeros((8, 8), np.uint8))
    rng, transform = np.random.default_rng(0), WeakTransform(crop=(4, 4))
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(jpeg, "JPEG")
    tiff = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.int32)).save(tiff, "TIFF")
    cases = [
        (b"nonsense", mask, "image does not decode"),
        (jpeg.getvalue()[:300], None, "image does not decode"),
        (image, b"nonsense", "mask does not decode"),
        (image, mask[:40], "mask does not decode"),
        (image, encode(np.zeros((8, 9), np.uint8)), "8x8 but its mask is 9x8"),
        (image, image, "mask mode RGB"),
        (encode(np.arange(4096, dtype=np.uint16).reshape(64, 64))[:100], None, "image does not decode"),
        (tiff.getvalue(), None, "not 8-bit"),
    ]
    for image_bytes, mask_bytes, message in cases:
        with pytest.raises(InputError, match=f"image_id 'a/b'.*{message}"):
            transform(image_bytes, mask_bytes, rng, image_id="a/b")


def test_16_bit_grey_becomes_its_high_byte_in_three_channels():
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    assert Image.open(io.BytesIO(encode(grey))).mode == "I;16"
    decoded = transforms.decode_image(encode(grey))
    assert decoded.mode == "RGB" and (np.asarray(decoded) == (grey >> 8)[..., None]).all()
    mask = (grey >> 10).astype(np.uint8)
    sample = WeakTransform(crop=(20, 30))(encode(grey), encode(mask), np.random.default_rng(3))
    assert sample.image.shape == (3, 20, 30) and sample.image.dtype == np.uint8
    assert (sample.image == sample.image[:1]).all() and (sample.image[0] >> 2 == sample.labels).all()


def test_margins_are_marked_before_cropping():
    """Against the margins drawn on the image itself: marked pixels are those of a border of 1s on an image of 0s."""
    image = np.ones((40, 60, 3), np.uint8) * 255
    image[4:-12, 6:-2] = 0  # at twice the packed size: 8, 24, 12, 4
    for seed in range(30):
        transform = WeakTransform(crop=(32, 40), resize=(80, 120), margins=(8, 24, 12, 4))
        sample = transform(encode(image), None, np.random.default_rng(seed))
        near = (sample.image[0] > 127) != ~sample.valid  # resizing blurs the border by a pixel
        assert near.mean() < 0.05 and sample.valid.shape == (32, 40)
    whole = WeakTransform(crop=(90, 120), resize=(80, 120), margins=(8, 24, 12, 4), flip=0)
    valid = whole(encode(image), None, np.random.default_rng(0)).valid
    want = np.zeros((90, 120), bool)
    want[8:56, 12:116] = True
    assert (valid == want).all()
    scaled = WeakTransform(crop=(160, 240), resize=(80, 120), scale=(2, 2), margins=(8, 24, 12, 4), flip=0)
    assert (scaled(encode(image), None, np.random.default_rng(0)).valid[::2, ::2] == want[:80]).all()
    nothing = WeakTransform(crop=(10, 120), margins=(39, 0, 0, 0))(encode(image), None, np.random.default_rng(0))
    assert nothing.valid.shape == (10, 120) and not nothing.valid[:-1].any()
