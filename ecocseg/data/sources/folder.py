"""A user's own images: images/ and masks/ with files of the same stems, and a list of classes.

The class list is a text file with one name a line, or YAML or JSON:

    names: [background, kidney, tumour]     # in the order of their ids, 0, 1, ...
    palette: [[0, 0, 0], [255, 0, 0], ...]  # optional
    ids: {0: 0, 6: 1, 8: 2, 9: 255}         # optional: id in the mask files -> place in names, or 255 = ignored
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ecocseg.data.classes import CLASS_LISTS, IGNORE, ClassList, Colour, default_palette
from ecocseg.data.sources.pairs import IMAGE_SUFFIXES, MASK_SUFFIXES, Source, find_files, id_table, match, read_pair
from ecocseg.errors import InputError

KEYS = ("name", "names", "palette", "thing_ids", "ids")


@dataclass(frozen=True)
class FolderClasses:
    """A class list, and the train id of each id in the mask files."""

    classes: ClassList
    ids: dict[int, int]


def read_classes(source: str | Path) -> FolderClasses:
    """Read a class list file, or take a built-in list by its name.

    Raises:
        InputError: naming every mistake in the file.
    """
    path = Path(source)
    if not path.is_file():
        if str(source) in CLASS_LISTS:
            classes = CLASS_LISTS[str(source)]
            return FolderClasses(classes, {i: i for i in range(classes.num_classes)})
        raise InputError(f"--classes: there is no file '{source}', nor a built-in list of that name; built in are "
                         f"{', '.join(sorted(CLASS_LISTS))}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".yaml", ".yml", ".json"):
            plain = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
        else:
            plain = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"--classes: {path} cannot be read ({error}); it is text with a name a line, YAML or JSON") from None
    if isinstance(plain, list):
        plain = {"names": plain}
    if not isinstance(plain, dict):
        raise InputError(f"--classes: {path} is neither a list of names nor has 'names'")
    problems: list[str] = []
    result = _build(plain, path.stem, problems)
    if problems:
        raise InputError(f"--classes: {path}:\n  " + "\n  ".join(problems))
    return result


def _build(plain: dict[Any, Any], stem: str, problems: list[str]) -> FolderClasses:
    unknown = [str(key) for key in plain if key not in KEYS]
    if unknown:
        problems.append(f"unknown key(s) {', '.join(unknown)}; known are {', '.join(KEYS)}")
    names = plain.get("names")
    if not isinstance(names, list) or not 2 <= len(names) <= IGNORE:
        problems.append(f"names: give a list of 2 to {IGNORE} names, in the order of their ids")
        names = []
    problems += [f"names: {name!r} is no text; put it in quotes" for name in names if not isinstance(name, str)]
    names = [str(name) for name in names]
    problems += [f"names: '{name}' comes {names.count(name)} times" for name in dict.fromkeys(names) if names.count(name) > 1]
    palette = default_palette(len(names))
    if plain.get("palette") is not None:
        palette = _palette(plain["palette"], len(names), problems)
    things = plain.get("thing_ids") or []
    if not isinstance(things, list) or any(not _is_id(i) or i >= len(names) for i in things):
        problems.append(f"thing_ids: {things!r} is no list of ids 0 to {len(names) - 1}")
        things = []
    ids = {i: i for i in range(len(names))}
    if plain.get("ids") is not None:
        ids = _ids(plain["ids"], len(names), problems)
    return FolderClasses(ClassList(str(plain.get("name") or stem), tuple(names), palette, tuple(things)), ids)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _palette(plain: Any, count: int, problems: list[str]) -> tuple[Colour, ...]:
    colours = plain if isinstance(plain, list) else []
    bad = [c for c in colours if not (isinstance(c, list) and len(c) == 3 and all(map(_is_id, c)))]
    if len(colours) != count or bad:
        problems.append(f"palette: give {count} colours [red, green, blue] of 0 to 255, one a name; "
                        + (f"{bad[0]!r} is none" if bad else f"there are {len(colours)}"))
        return ()
    return tuple((c[0], c[1], c[2]) for c in colours)


def _ids(plain: Any, count: int, problems: list[str]) -> dict[int, int]:
    if not isinstance(plain, dict):
        problems.append("ids: give a map {id in the mask files: place in names}")
        return {}
    ids: dict[int, int] = {}
    for key, train in plain.items():
        raw = int(key) if isinstance(key, str) and key.isdecimal() else key  # the keys of JSON are text
        if not _is_id(raw) or not _is_id(train) or (train >= count and train != IGNORE):
            problems.append(f"ids: {key!r}: {train!r} does not map an id 0 to 255 to one of 0 to {count - 1} or {IGNORE}")
        else:
            ids[raw] = train
    return ids


def source(root: str | Path, classes: str | Path | FolderClasses, name: str | None = None, unlabeled: bool = False) -> Source:
    """Images below `root`/images, and masks of the same stems below `root`/masks unless `unlabeled`.

    `classes` is a class list file or the name of a built-in list, `name` that of the data set (default: the folder's). Image
    ids are paths below images/ without suffix, groups the folders of them.

    Raises:
        InputError: when a folder or the class list is not there, there is no image, or the class list has mistakes.
    """
    if not isinstance(classes, FolderClasses):
        classes = read_classes(classes)
    problems: list[str] = []
    root = Path(root)
    images = find_files(root / "images", IMAGE_SUFFIXES, "the images", problems)
    if not images:
        raise InputError(f"there is no image ({', '.join(IMAGE_SUFFIXES)}) in {root / 'images'}")
    masks = None
    if not unlabeled:
        masks = find_files(root / "masks", MASK_SUFFIXES, "their masks; add it, or pack unlabelled images", problems)
    pairs = [replace(pair, group=pair.image_id.rpartition("/")[0] or None) for pair in match(images, masks, problems)]
    known = sorted(classes.ids)
    return Source(name or root.resolve().name, classes.classes, pairs, partial(read_pair, table=id_table(classes.ids)),
                  problems, f"known ids are {', '.join(map(str, known[:30]))}{' ...' if len(known) > 30 else ''} and {IGNORE} "
                  "(ignored); 'ids' in the class list maps others",
                  {"source": "folder", "unlabeled": unlabeled, "ids": {str(raw): train for raw, train in classes.ids.items()}})
