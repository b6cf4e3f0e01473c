"""From encoded bytes to a crop of fixed size: decode, resize, random scale, crop, pad, flip; one sample, seeded by
the caller.

Crops are tried out on the mask alone; the image is decoded once and only the chosen crop of it is resized or converted.
Legend: H W pixels of the crop.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ecocseg.data.pseudo import decode_bits
from ecocseg.errors import InputError

IGNORE = 255
MAX_REDRAWS = 10  # DAFormer and mmseg: crops redrawn at most this often, the last is taken as it is

UInt8 = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, left, bottom, right


@dataclass(frozen=True)
class Sample:
    """One crop: `image` uint8 [3, H, W] RGB, [6, H, W] of two dates; `labels` uint8 [H, W], 255 = ignored, None without a
    mask; `valid` bool [H, W], False on padding and margins; `changes` uint8 [L, H, W], a pseudo-label's changed bits, None
    without. `image` may be a transposed view."""

    image: UInt8
    labels: UInt8 | None
    valid: NDArray[np.bool_]
    changes: UInt8 | None = None


@dataclass(frozen=True)
class WeakTransform:
    """Geometric augmentation of one sample. Calling it is a pure function of the bytes and the generator's state.

    `rng` is consumed alike whether or not there is padding: scale, crops, flip.
    """

    crop: tuple[int, int]  # height, width of the result in pixels
    resize: tuple[int, int] | None = None  # height, width to which every image is brought first; None = as packed
    scale: tuple[float, float] = (1.0, 1.0)  # range of a uniform factor on that size
    flip: float = 0.5  # probability of a horizontal flip; DAFormer
    max_class_share: float = 0.75  # of labelled pixels; crops in which one class fills this are redrawn; DAFormer
    min_class_pixels: int = 0  # of the focus class; crops with no more are redrawn; DAFormer 1500, HRDA 6000
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right pixels of the resized image; not valid; HRDA
    dates: int = 1  # images behind one another in a sample: 2 for change pairs
    turn: bool = False  # quarter turns and small rotations, as UniMatch turns cardiac slices
    planes: int = 0  # of 8 changed bits each, which pseudo-labels of ECOC have beside their mask

    def __call__(
        self,
        image_bytes: bytes,
        mask_bytes: bytes | None,
        rng: np.random.Generator,
        focus_class: int | None = None,
        image_id: str = "",
        image_b_bytes: bytes | None = None,
        bits_bytes: bytes | None = None,
    ) -> Sample:
        """Crop of one image. `focus_class`: the class a rare-class stream drew this row for; `image_b_bytes`: the second date;
        `bits_bytes`: what belongs to the mask of a pseudo-label.

        Raises InputError naming `image_id` if image, mask or bits do not decode or their sizes differ.
        """
        images = [_open_image(image_bytes, image_id)]
        if self.dates == 2:
            images.append(second_date(image_b_bytes, images[0].size, image_id))
        mask = None if mask_bytes is None else decode_mask(mask_bytes, image_id)
        image = images[0]
        if mask is not None and mask.size != image.size:
            raise InputError(
                f"image_id {image_id!r}: the image is {image.size[0]}x{image.size[1]} but its mask is "
                f"{mask.size[0]}x{mask.size[1]} (width x height); pack the pair again with equal sizes"
            )
        maps = [] if mask is None else [mask]  # what goes through the same nearest-pixel steps
        if mask is not None and bits_bytes is not None:
            planes_LHW = decode_bits(bits_bytes, (self.planes, mask.size[1], mask.size[0]), image_id)
            maps += [Image.fromarray(plane_HW) for plane_HW in planes_LHW]
        if self.turn:
            images, maps = _turned(images, maps, rng)
            image = images[0]
        height, width = self._size(image, rng)
        labels_HW = changes_LHW = None
        if not maps:
            box = self._draw_box((height, width), rng)
        else:
            if maps[0].size != (width, height):
                maps = [one.resize((width, height), Image.Resampling.NEAREST) for one in maps]
            box = self._choose_box(maps[0], rng, focus_class)
            labels_HW = np.asarray(_crop(maps[0], box))
            changes_LHW = np.stack([np.asarray(_crop(one, box)) for one in maps[1:]]) if maps[1:] else None
        image_HWC = np.concatenate([_crop_resized(one, (height, width), box, image_id) for one in images], axis=2)
        inside = self._inside_margins(box, (height, width), image.size)
        return self._finish(image_HWC, labels_HW, changes_LHW, inside, flip=bool(rng.random() < self.flip))

    def _inside_margins(self, box: Box, size: tuple[int, int], packed: tuple[int, int]) -> Box:
        """The part of a crop off the margins of an image of `size` (height, width), scaled from `packed` (width, height)."""
        base = self.resize or (packed[1], packed[0])
        near, far = self.margins[::2], self.margins[1::2]
        first = [max(0, round(near[axis] * size[axis] / base[axis]) - box[axis]) for axis in (0, 1)]
        last = [min(box[axis + 2], size[axis] - round(far[axis] * size[axis] / base[axis])) - box[axis] for axis in (0, 1)]
        return first[0], first[1], max(first[0], last[0]), max(first[1], last[1])

    def _size(self, image: Image.Image, rng: np.random.Generator) -> tuple[int, int]:
        height, width = self.resize or (image.size[1], image.size[0])
        factor = rng.uniform(*self.scale)
        return max(1, round(height * factor)), max(1, round(width * factor))

    def _draw_box(self, size: tuple[int, int], rng: np.random.Generator) -> Box:
        """A random crop of an image of `size` (height, width), smaller than `crop` where the image is."""
        height, width = size
        top = int(rng.integers(max(0, height - self.crop[0]) + 1))
        left = int(rng.integers(max(0, width - self.crop[1]) + 1))
        return top, left, min(height, top + self.crop[0]), min(width, left + self.crop[1])

    def _varied_box(self, mask: Image.Image, rng: np.random.Generator) -> tuple[Box, NDArray[np.int64] | None]:
        """A crop that no single class dominates, if 1 + MAX_REDRAWS draws give one, and its counts if they were made.

        mmseg RandomCrop, cat_max_ratio.
        """
        size = mask.size[1], mask.size[0]
        box = self._draw_box(size, rng)
        if self.max_class_share >= 1:
            return box, None
        for _ in range(MAX_REDRAWS):
            counts = label_counts(_crop(mask, box))
            if class_share(counts) < self.max_class_share:
                return box, counts
            box = self._draw_box(size, rng)
        return box, None

    def _choose_box(self, mask: Image.Image, rng: np.random.Generator, focus_class: int | None) -> Box:
        """A crop with enough of the focus class, if 1 + MAX_REDRAWS draws give one (DAFormer's rare class sampling)."""
        box, counts = self._varied_box(mask, rng)
        if focus_class is None or focus_class < 0 or self.min_class_pixels <= 0:
            return box
        for _ in range(MAX_REDRAWS):
            counts = label_counts(_crop(mask, box)) if counts is None else counts
            if counts[focus_class] > self.min_class_pixels:
                break
            box, counts = self._varied_box(mask, rng)
        return box

    def _finish(self, image_HWC: UInt8, labels_HW: UInt8 | None, changes_LHW: UInt8 | None, inside: Box, flip: bool) -> Sample:
        """Pad at the bottom and the right (image and changes 0, labels 255), then flip. Valid is what lies in `inside`."""
        height, width = image_HWC.shape[:2]
        valid_HW = np.zeros(self.crop, bool)
        valid_HW[inside[0] : inside[2], inside[1] : inside[3]] = True
        if (height, width) != self.crop:
            rest = ((0, self.crop[0] - height), (0, self.crop[1] - width))
            image_HWC = np.pad(image_HWC, (*rest, (0, 0)))
            if labels_HW is not None:
                labels_HW = np.pad(labels_HW, rest, constant_values=IGNORE)
            if changes_LHW is not None:
                changes_LHW = np.pad(changes_LHW, ((0, 0), *rest))
        if flip:
            image_HWC, valid_HW = image_HWC[:, ::-1], valid_HW[:, ::-1]
            labels_HW = None if labels_HW is None else labels_HW[:, ::-1]
            changes_LHW = None if changes_LHW is None else changes_LHW[..., ::-1]
        return Sample(image_HWC.transpose(2, 0, 1), labels_HW, valid_HW, changes_LHW)


def second_date(image_b_bytes: bytes | None, size: tuple[int, int], image_id: str) -> Image.Image:
    """The second date of a change pair. InputError if there is none, or of another (width, height)."""
    if image_b_bytes is None:
        raise InputError(f"image_id {image_id!r}: there is no second date; pack pairs (jobs/prepare_shards.py change), or use "
                         "model.siamese=false")
    image = _open_image(image_b_bytes, f"{image_id}, second date")
    if image.size != size:
        raise InputError(f"image_id {image_id!r}: the dates are {size[0]}x{size[1]} and {image.size[0]}x{image.size[1]} "
                         "(width x height); pack the pair again with equal sizes")
    return image


def _turned(images: list[Image.Image], maps: list[Image.Image],
            rng: np.random.Generator) -> tuple[list[Image.Image], list[Image.Image]]:
    """With probability 1/2 quarter turns and a flip, else with 1/2 a rotation within 20 degrees; corners become 0."""
    which, quarters, axis, angle = rng.random(), int(rng.integers(4)), int(rng.integers(2)), float(rng.uniform(-20, 20))

    def turn(image: Image.Image) -> Image.Image:
        if which < 0.5:
            flip = (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.FLIP_LEFT_RIGHT)[axis]
            return image.rotate(90 * quarters, expand=True).transpose(flip)
        return image.rotate(angle, Image.Resampling.NEAREST) if which < 0.75 else image

    return [turn(image) for image in images], [turn(one) for one in maps]


def label_counts(mask: Image.Image) -> NDArray[np.int64]:
    """Pixels of each label of an 8-bit mask, int64 [256]. Pillow's histogram takes a quarter of bincount's time."""
    return np.asarray(mask.histogram(), np.int64)


def class_share(counts: NDArray[np.int64]) -> float:
    """Share of the most frequent class among the labelled pixels, from counts [256]; 1 if none is labelled."""
    total = int(counts[:IGNORE].sum())
    return float(counts[:IGNORE].max() / total) if total else 1.0


def _crop(image: Image.Image, box: Box) -> Image.Image:
    top, left, bottom, right = box
    return image.crop((left, top, right, bottom))


def decode_image(data: bytes, image_id: str = "") -> Image.Image:
    """Decoded RGB image. InputError naming `image_id` if it is no 8-bit image, nor one of 16-bit grey."""
    image = _open_image(data, image_id)
    try:
        image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise _undecodable(image_id, error) from error
    return image if image.mode == "RGB" else image.convert("RGB")


def _undecodable(image_id: str, error: Exception) -> InputError:
    return InputError(f"image_id {image_id!r}: the image does not decode ({error}); pack it again")


def _open_image(data: bytes, image_id: str) -> Image.Image:
    """Image of which only the header is read yet; one of 16-bit grey is read, as the high bytes of its values."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _undecodable(image_id, error) from error
    if image.mode.startswith(("I", "F")):
        raise InputError(f"image_id {image_id!r}: image mode {image.mode} is not 8-bit; convert it to 8-bit RGB")
    return image


def decode_mask(data: bytes, image_id: str = "") -> Image.Image:
    """Decoded mask of class indices, mode L or P. InputError naming `image_id` if it is something else."""
    try:
        mask = Image.open(io.BytesIO(data))
        mask.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"image_id {image_id!r}: the mask does not decode ({error}); pack it again") from error
    if mask.mode not in ("L", "P"):
        raise InputError(
            f"image_id {image_id!r}: mask mode {mask.mode} is not 8-bit class indices; pack a grey or palette PNG"
        )
    return mask


def _crop_resized(image: Image.Image, size: tuple[int, int], box: Box, image_id: str = "") -> UInt8:
    """Crop `box` (top, left, bottom, right) of the image resized to `size` (height, width); uint8 [h, w, 3].

    Pillow's `box` argument resamples the crop alone, with the source pixels around it at hand: the same pixels as
    resizing everything. Its bilinear filter widens with the reduction (antialias), unlike OpenCV's, which mmseg uses.
    """
    top, left, bottom, right = box
    try:
        if size == (image.size[1], image.size[0]):
            part = _crop(image, box)
            return np.asarray(part if part.mode == "RGB" else part.convert("RGB"))
        down, across = image.size[1] / size[0], image.size[0] / size[1]
        source = (left * across, top * down, min(right * across, image.size[0]), min(bottom * down, image.size[1]))
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(rgb.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=source))
    except (OSError, ValueError, SyntaxError) as error:
        raise _undecodable(image_id, error) from error
