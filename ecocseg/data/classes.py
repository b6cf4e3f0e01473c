"""Class lists as the data sets publish them: names in the order of their train ids, and colours."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

IGNORE = 255
"""Id of pixels that count neither in a loss nor in a score."""

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ClassList:
    """Names and colours (RGB) by class id; `thing_ids` are the countable classes."""

    name: str
    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    thing_ids: tuple[int, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @property
    def hash(self) -> str:
        """sha256 of the names, in hex: two data sets with one hash mean the same ids."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()


def _listed(name: str, *classes: tuple[str, int], thing_ids: tuple[int, ...] = ()) -> ClassList:
    """A list from (class name, 0xRRGGBB) pairs."""
    colours = tuple(((c >> 16) & 255, (c >> 8) & 255, c & 255) for _, c in classes)
    return ClassList(name, tuple(n for n, _ in classes), colours, thing_ids)


def default_palette(count: int) -> tuple[Colour, ...]:
    """PASCAL VOC's colour map: the bits of an id, spread over the channels from their highest bit down."""
    colours = []
    for index in range(count):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colours.append((rgb[0], rgb[1], rgb[2]))
    return tuple(colours)


_CITYSCAPES = (("road", 0x804080), ("sidewalk", 0xF423E8), ("building", 0x464646), ("wall", 0x66669C),
               ("fence", 0xBE9999), ("pole", 0x999999), ("traffic light", 0xFAAA1E), ("traffic sign", 0xDCDC00),
               ("vegetation", 0x6B8E23), ("terrain", 0x98FB98), ("sky", 0x4682B4), ("person", 0xDC143C),
               ("rider", 0xFF0000), ("car", 0x00008E), ("truck", 0x000046), ("bus", 0x003C64), ("train", 0x005064),
               ("motorcycle", 0x0000E6), ("bicycle", 0x770B20))

_VOC = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")

_COCO = ("background", "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
         "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep",
         "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
         "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
         "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
         "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
         "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
         "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush")

_ADE20K = (
    "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet", "sidewalk",
    "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water", "painting", "sofa",
    "shelf", "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp",
    "bathtub", "railing", "cushion", "base", "box", "column", "signboard", "chest of drawers", "counter", "sand", "sink",
    "skyscraper", "fireplace", "refrigerator", "grandstand", "path", "stairs", "runway", "case", "pool table", "pillow",
    "screen door", "stairway", "river", "bridge", "bookcase", "blind", "coffee table", "toilet", "flower", "book", "hill",
    "bench", "countertop", "stove", "palm", "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine",
    "hovel", "bus", "towel", "light", "truck", "tower", "chandelier", "awning", "streetlight", "booth", "television",
    "airplane", "dirt track", "apparel", "pole", "land", "bannister", "escalator", "ottoman", "bottle", "buffet", "poster",
    "stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool",
    "barrel", "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank",
    "trade name", "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture", "hood",
    "sconce", "vase", "traffic light", "tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor", "bulletin board",
    "shower", "radiator", "glass", "clock", "flag")
# of the 150, these 50 are no instances in the data set's instance task
_ADE20K_STUFF = (
    0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68, 77, 79, 84,
    91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145)

CLASS_LISTS: dict[str, ClassList] = {
    "cityscapes": _listed("cityscapes", *_CITYSCAPES, thing_ids=(6, 7, 11, 12, 13, 14, 15, 16, 17, 18)),
    # the 16 classes SYNTHIA shares with Cityscapes: all but terrain, truck and train
    "synthia16": _listed("synthia16", *(c for c in _CITYSCAPES if c[0] not in ("terrain", "truck", "train")),
                         thing_ids=(6, 7, 10, 11, 12, 13, 14, 15)),
    "camvid": _listed(
        "camvid", ("sky", 0x808080), ("building", 0x800000), ("pole", 0xC0C080), ("road", 0x804080),
        ("pavement", 0x3C28DE), ("tree", 0x808000), ("sign symbol", 0xC08080), ("fence", 0x404080), ("car", 0x400080),
        ("pedestrian", 0x404000), ("bicyclist", 0x0080C0), thing_ids=(6, 8, 9, 10)),
    "demo": _listed(
        "demo", ("road", 0x804080), ("sidewalk", 0xF423E8), ("building", 0x464646), ("fence", 0xBE9999),
        ("pole", 0x999999), ("vegetation", 0x6B8E23), ("sky", 0x4682B4), ("person", 0xDC143C), ("car", 0x00008E),
        ("truck", 0x000046), ("traffic sign", 0xDCDC00), thing_ids=(7, 8, 9, 10)),
    "voc": ClassList("voc", _VOC, default_palette(21), tuple(range(1, 21))),
    "coco": ClassList("coco", _COCO, default_palette(81), tuple(range(1, 81))),
    "ade20k": ClassList("ade20k", _ADE20K, default_palette(151)[1:],  # black is kept for other things, the masks' id 0
                        tuple(i for i in range(150) if i not in _ADE20K_STUFF)),
    "change": _listed("change", ("unchanged", 0x000000), ("changed", 0xFFFFFF)),
    "acdc_cardiac": _listed("acdc_cardiac", ("background", 0x000000), ("right ventricle", 0xE6194B),
                            ("myocardium", 0x3CB44B), ("left ventricle", 0x4363D8), thing_ids=(1, 2, 3)),
}
