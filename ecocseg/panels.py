"""Pictures of what a run does: image, label or pseudo-label, confidence, reliable bits and prediction, side by side.

Shape legend: H W pixels, C colours (3, RGB). Everything is drawn on the CPU with numpy and PIL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
Palette = Sequence[Sequence[int]]

IGNORE = 255
GAP = 4  # pixels between cells
TITLE_HEIGHT = 20
CELL_WIDTHS = (224, 512)  # smaller cells are enlarged, larger ones made smaller: titles fit, files stay small
BACKGROUND, INK = (24, 24, 28), (235, 235, 235)
# Dark blue over teal to pale yellow: lightness rises all the way, so the order survives grey printing.
_HEAT = np.array([(20, 16, 60), (38, 70, 130), (32, 130, 136), (110, 190, 92), (252, 236, 130)], dtype=np.float64)


def colourise(labels_HW: Any, palette: Palette) -> Picture:
    """uint8 [H, W, 3] of class ids (tensor or array); 255 and ids without a colour are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = palette
    table[IGNORE] = 0
    return table[np.asarray(_array(labels_HW), dtype=np.int64) & 255]


def overlay(image_3HW: Any, labels_HW: Any, palette: Palette, alpha: float = 0.55) -> Picture:
    """uint8 [H, W, 3]: class colours over an image [3, H, W], `alpha` of the colour; ignored pixels stay bare."""
    image_HWC = _image(image_3HW).astype(np.float64)
    mixed = (1 - alpha) * image_HWC + alpha * colourise(labels_HW, palette)
    shown = np.where((_array(labels_HW) == IGNORE)[..., None], image_HWC, mixed)
    return shown.round().astype(np.uint8)


def heat_map(values_HW: Any, low: float = 0.0, high: float = 1.0) -> Picture:
    """uint8 [H, W, 3]: dark blue at `low` and below, pale yellow at `high` and above."""
    position = (_array(values_HW).astype(np.float64) - low) / (high - low)
    position = np.nan_to_num(position).clip(0, 1) * (len(_HEAT) - 1)
    at = np.arange(len(_HEAT))
    return np.stack([np.interp(position, at, _HEAT[:, c]) for c in range(3)], axis=-1).round().astype(np.uint8)


def panel(
    image_3HW: Any,
    palette: Palette,
    *,
    title: str = "image",
    labels: Any = None,
    pseudo_labels: Any = None,
    confidence: Any = None,
    reliable: Any = None,
    prediction: Any = None,
    confidence_range: tuple[float, float] = (0.5, 1.0),
) -> Picture:
    """One picture row, uint8 [H', W', 3]: an image [3, H, W] (uint8, or float 0..1) and any of these [H, W] maps.

    `confidence` is drawn between the ends of `confidence_range` (a mean bit confidence is never below 0.5), `reliable`
    (the share of a pixel's bits that are reliable) from 0 to 1; their titles give the mean. None is left out.
    """
    cells = [(title, _image(image_3HW), False)]
    for name, ids in (("label", labels), ("pseudo-label", pseudo_labels)):
        if ids is not None:
            cells.append((name, colourise(ids, palette), True))
    if confidence is not None:
        low, high = confidence_range
        name = f"confidence {low:g}-{high:g}, mean {_mean(confidence):.2f}"
        cells.append((name, heat_map(confidence, low, high), True))
    if reliable is not None:
        cells.append((f"reliable bits 0-1, mean {_mean(reliable):.2f}", heat_map(reliable), True))
    if prediction is not None:
        cells.append(("prediction", colourise(prediction, palette), True))
    drawn = [_cell(*cell) for cell in cells]
    gap = np.full((drawn[0].shape[0], GAP, 3), BACKGROUND, dtype=np.uint8)
    return np.concatenate([gap, *(part for cell in drawn for part in (cell, gap))], axis=1)


def training_picture(pictures: Mapping[str, Any], coding: Any, classes: Any, rows: int = 2) -> Picture:
    """A sheet of the first `rows` images of each kind that a method drew, and the class legend.

    `pictures` holds, for `labeled` and `mixed`: `<kind>_image` [B, 3, H, W] (uint8, or float 0..1), `<kind>_labels`
    [B, H, W] and the student's `<kind>_logits` [B, K, h, w]; for the unlabelled images `unlabeled_image` and the
    teacher's `pseudo` Target. What is missing is left out.
    """
    sheet = []
    for kind, title in (("labeled", "labelled"), ("mixed", "mixed")):
        if f"{kind}_image" not in pictures:
            continue
        images, labels = pictures[f"{kind}_image"], pictures[f"{kind}_labels"]
        predicted = _predicted(pictures[f"{kind}_logits"][:rows], coding, tuple(images.shape[-2:]))
        for image, ids, prediction in zip(images, labels, predicted, strict=False):
            sheet.append(panel(image, classes.palette, title=title, labels=ids, prediction=prediction))
    if "unlabeled_image" in pictures:
        pseudo = pictures["pseudo"]
        low = 0.5 if pseudo.bits is not None else 0.0
        for i, image in enumerate(pictures["unlabeled_image"][:rows]):
            sheet.append(panel(
                image, classes.palette, title="unlabelled", pseudo_labels=pseudo.labels[i],
                confidence=None if pseudo.confidence is None else pseudo.confidence[i],
                reliable=None if pseudo.reliable is None else pseudo.reliable[i],
                confidence_range=(low, 1.0),
            ))  # fmt: skip
    width = max(row.shape[1] for row in sheet)
    return stack([*sheet, legend(classes.names, classes.palette, width)])


def _predicted(logits_BKhw: Any, coding: Any, size: tuple[int, int]) -> Any:
    from torch.nn.functional import interpolate

    logits_BKHW = interpolate(logits_BKhw.float(), size=size, mode="bilinear", align_corners=coding.align_corners)
    return coding.scores(logits_BKHW).argmax(dim=1)


def legend(names: Sequence[str], palette: Palette, width: int) -> Picture:
    """uint8 [H', width, 3]: a swatch and the name of each class, in as many lines as they need."""
    font, line_height, swatch = _font(), 22, 14
    x, y, places = GAP, 0, []
    for name in names:
        taken = swatch + 6 + int(font.getlength(name)) + 16
        if x + taken > width and x > GAP:
            x, y = GAP, y + line_height
        places.append((x, y))
        x += taken
    strip = Image.new("RGB", (width, y + line_height + GAP), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for (x, y), name, colour in zip(places, names, palette, strict=False):
        top = y + (line_height - swatch) // 2
        draw.rectangle((x, top, x + swatch - 1, top + swatch - 1), fill=(colour[0], colour[1], colour[2]))
        draw.text((x + swatch + 6, y + line_height // 2), name, fill=INK, font=font, anchor="lm")
    return np.asarray(strip)


def stack(pictures: Sequence[Picture]) -> Picture:
    """Pictures below each other, the narrower ones filled up with background on the right."""
    width = max(picture.shape[1] for picture in pictures)
    rows = []
    for picture in pictures:
        row = np.full((picture.shape[0], width, 3), BACKGROUND, dtype=np.uint8)
        row[:, : picture.shape[1]] = picture
        rows.append(row)
    return np.concatenate(rows)


def _cell(title: str, picture_HWC: Picture, sharp: bool) -> Picture:
    """A picture at a handy size below its title."""
    height, width = picture_HWC.shape[:2]
    low, high = CELL_WIDTHS
    factor = low / width if width < low else high / width if width > high else 1.0
    picture = Image.fromarray(picture_HWC)
    if factor != 1.0:  # classes must not blend into colours of other classes
        method = Image.Resampling.NEAREST if sharp else Image.Resampling.BILINEAR
        picture = picture.resize((round(width * factor), max(1, round(height * factor))), method)
    cell = Image.new("RGB", (picture.width, picture.height + TITLE_HEIGHT), BACKGROUND)
    cell.paste(picture, (0, TITLE_HEIGHT))
    ImageDraw.Draw(cell).text((2, TITLE_HEIGHT // 2), title, fill=INK, font=_font(), anchor="lm")
    return np.asarray(cell)


def _font() -> Any:
    return ImageFont.load_default(size=13)


def _array(values: Any) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _image(image_3HW: Any) -> Picture:
    image_3HW = _array(image_3HW)
    if image_3HW.dtype != np.uint8:
        image_3HW = (image_3HW.astype(np.float64) * 255).round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(image_3HW, 0, -1)[..., :3])  # of two dates the first


def _mean(values: Any) -> float:
    return float(_array(values).astype(np.float64).mean())
