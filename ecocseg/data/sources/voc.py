"""PASCAL VOC 2012, as its archive unpacks (http://host.robots.ox.ac.uk/pascal/VOC/voc2012):

    VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg
    VOCdevkit/VOC2012/SegmentationClass/2007_000032.png        palette PNGs of ids 0 to 20, 255 on borders
    VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val,trainval}.txt

Most work trains on 10,582 images, with the masks of SBD (Hariharan et al., 2011) beside VOC's own. They come as

    VOCdevkit/VOC2012/SegmentationClassAug/2008_000002.png     grey or palette PNGs of the same ids
    VOCdevkit/VOC2012/ImageSets/{Segmentation,SegmentationAug}/{train_aug,trainaug}.txt     not always
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.sources.lists import list_options, listed, read_names
from ecocseg.data.sources.pairs import Source, id_table, match, read_pair
from ecocseg.data.sources.tree import check_choice, files_ending, inside
from ecocseg.errors import InputError

CLASSES = CLASS_LISTS["voc"]
SPLITS = ("train", "val", "trainval")
INNER = ("VOCdevkit/VOC2012", "VOC2012", ".")
"""Where the images' folder may be below the root that is given."""
AUGMENTED_LISTS = tuple(f"{folder}/{name}.txt" for folder in ("Segmentation", "SegmentationAug")
                        for name in ("train_aug", "trainaug"))


def _base(root: Path) -> Path:
    for inner in INNER:
        if (root / inner / "JPEGImages").is_dir():
            return root / inner
    inside(root, "JPEGImages", what="the images; give the folder VOC2012 or one above it")
    return root


def _augmented_masks(base: Path) -> dict[str, Path]:
    return files_ending(inside(base, "SegmentationClassAug", what="the augmented masks; add it, or pack without"), ".png")


def _augmented_names(base: Path) -> list[str]:
    """VOC's training images and all with a mask of SBD's, less the validation images: what the published lists say."""
    for name in AUGMENTED_LISTS:
        if (base / "ImageSets" / name).is_file():
            return read_names(base / "ImageSets" / name)
    sets = inside(base, "ImageSets", "Segmentation", what="the lists")
    validation, masks = set(read_names(sets / "val.txt")), _augmented_masks(base)
    return [name for name in dict.fromkeys([*read_names(sets / "train.txt"), *masks]) if name not in validation]


def _masks(base: Path, augmented: bool) -> dict[str, Path]:
    if not augmented:
        return files_ending(inside(base, "SegmentationClass", what="their masks; add it, or pack unlabelled images"), ".png")
    masks = _augmented_masks(base)
    own = files_ending(base / "SegmentationClass", ".png") if (base / "SegmentationClass").is_dir() else {}
    # SBD has coarse masks for VOC's training images, too: where they are kept apart, VOC's own are what is trained on
    train = base / "ImageSets" / "Segmentation" / "train.txt"
    official = set(read_names(train)) if train.is_file() else set()
    return {**own, **masks, **{name: path for name, path in own.items() if name in official}}


def source(root: str | Path, split: str = "train", augmented: bool = False, list_file: str | Path | None = None,
           unlabeled: bool = False) -> Source:
    """The images that the list of a split or `list_file` names, and their masks unless `unlabeled`.

    `augmented` adds SBD's masks to the split train, and takes them for `list_file`: its images are named by train_aug.txt,
    or are VOC's training images and all in SegmentationClassAug but the validation images. Image ids are VOC's names.

    Raises:
        InputError: when the root, the split, a list or a folder is not there, naming what is.
    """
    base = _base(Path(root))
    if list_file is not None:
        names = read_names(list_file)
    elif augmented:
        check_choice("split", [split], ["train"], "with augmented masks, the splits")
        names = _augmented_names(base)
    else:
        check_choice("split", [split], SPLITS, "the splits of VOC 2012")
        names = read_names(inside(base, "ImageSets", "Segmentation", what="the lists; or give list_file") / f"{split}.txt")
    problems: list[str] = []
    images = listed(files_ending(base / "JPEGImages", ".jpg"), names, base / "JPEGImages", problems)
    masks = None
    if not unlabeled:
        every = _masks(base, augmented)
        masks = {name: every[name] for name in names if name in every and name in images}
    if not images:
        raise InputError(f"{base / 'JPEGImages'} has none of the {len(names)} listed images; {names[0]}.jpg is one")
    options = {"source": "voc", "split": None if list_file else split, "augmented": augmented, "unlabeled": unlabeled,
               **list_options(list_file, names)}
    return Source("voc", CLASSES, match(images, masks, problems),
                  partial(read_pair, table=id_table({i: i for i in range(CLASSES.num_classes)})), problems,
                  "JPEGImages/x.jpg goes with SegmentationClass/x.png, of ids 0 to 20 and 255", options)
