"""ADE20K in its 150-class form, as the scene parsing challenge's archive unpacks (http://sceneparsing.csail.mit.edu):

    ADEChallengeData2016/images/{training,validation}/ADE_train_00000001.jpg
    ADEChallengeData2016/annotations/{training,validation}/ADE_train_00000001.png

Masks are 8-bit grey PNGs of 1 to 150 for the classes and 0 for all else, which becomes 255; classes become 0 to 149.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ecocseg.data.classes import CLASS_LISTS, IGNORE
from ecocseg.data.sources.lists import list_options, listed, read_names
from ecocseg.data.sources.pairs import UNKNOWN, Source, id_table, match, read_pair
from ecocseg.data.sources.tree import check_choice, files_ending, inside
from ecocseg.errors import InputError

CLASSES = CLASS_LISTS["ade20k"]
SPLITS = ("training", "validation")
# 255 is in no published mask: it is in masks of train ids alone, which must not be mapped a second time
IDS = {0: IGNORE, **{raw: raw - 1 for raw in range(1, CLASSES.num_classes + 1)}, IGNORE: UNKNOWN}
REDUCED_IDS = {i: i for i in range(CLASSES.num_classes)}


def source(root: str | Path, split: str = "training", reduced: bool = False, list_file: str | Path | None = None,
           unlabeled: bool = False) -> Source:
    """The images of a split, of them those that `list_file` names when it is given, and their masks unless `unlabeled`.

    `reduced`: the masks hold train ids 0 to 149 and 255 already, as some repositories give them away. Image ids are names.

    Raises:
        InputError: when the root, the split or a list is not there, naming what is.
    """
    check_choice("split", [split], SPLITS, "the splits of ADE20K")
    base = Path(root)
    base = base / "ADEChallengeData2016" if (base / "ADEChallengeData2016").is_dir() else base
    folder = inside(base, "images", split, what="the images; give ADEChallengeData2016")
    names = None if list_file is None else read_names(list_file)
    problems: list[str] = []
    images = listed(files_ending(folder, ".jpg"), names, folder, problems)
    if not images:
        raise InputError(f"there is no image *.jpg in {folder}" + (f" that {list_file} names" if list_file else ""))
    masks = None
    if not unlabeled:
        masks = files_ending(inside(base, "annotations", split, what="their masks; add it, or pack unlabelled images"), ".png")
        masks = masks if names is None else {name: path for name, path in masks.items() if name in images}
    options = {"source": "ade20k", "split": split, "reduced": reduced, "unlabeled": unlabeled,
               **list_options(list_file, names)}
    return Source("ade20k", CLASSES, match(images, masks, problems),
                  partial(read_pair, table=id_table(REDUCED_IDS if reduced else IDS)), problems,
                  "masks hold 0 to 150 as published; with 'reduced', train ids 0 to 149 and 255", options)
