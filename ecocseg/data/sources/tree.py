"""Folders of raw data sets: quick listings by how names end, and errors that say what is there instead."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ecocseg.data.sources.pairs import Pair, match
from ecocseg.errors import InputError

NO_MASKS = "their masks; add it, or pack unlabelled images"
"""What a missing folder of masks is to hold, for `inside`."""


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def inside(root: str | Path, *parts: str, what: str) -> Path:
    """The folder `root`/parts[0]/parts[1]/...

    Raises:
        InputError: when it does not exist, naming the first folder that is missing, `what` it is to hold, and the folders
            that are there instead.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise InputError(f"there is no local folder {root} with {what}")
    for part in parts:
        if not (folder / part).is_dir():
            raise InputError(f"there is no folder '{part}' in {folder} with {what}; folders there: "
                             f"{', '.join(subfolders(folder)) or 'none'}")
        folder = folder / part
    return folder


def check_choice(option: str, chosen: Sequence[str], known: Sequence[str], what: str) -> None:
    """See that something is chosen, and nothing unknown.

    Raises:
        InputError: naming the option, what is unknown, and what is known.
    """
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise InputError(f"{option}: {', '.join(unknown) or 'none given'}; {what} are {', '.join(known) or 'none'}")


def files_ending(folder: Path, suffix: str, stems: str = r".*") -> dict[str, Path]:
    """Files below a folder whose names end in `suffix`, by their path in it without it, sorted; hidden ones are left out,
    and those whose path does not match the regular expression `stems`.

    Directories are read, files are not: 25,000 take a fraction of a second. Linked folders are followed.
    """
    found: dict[str, Path] = {}
    wanted = re.compile(stems)
    top = len(str(folder)) + 1
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = where[top:].replace(os.sep, "/")
        for name in names:
            stem = f"{inner}/{name[:-len(suffix)]}" if inner else name[:-len(suffix)]
            if name.endswith(suffix) and not name.startswith(".") and wanted.fullmatch(stem):
                found[stem] = Path(where, name)
    return dict(sorted(found.items()))


def pairs_ending(images: Path, image_suffix: str, masks: Path | None, mask_suffixes: Sequence[str],
                 problems: list[str], stems: str = r".*", all_masked: bool = True) -> list[Pair]:
    """Images below one folder, and masks of the same stems below another unless it is None; of several mask suffixes the
    first counts. Files without a partner become problems, except images without a mask where not `all_masked`: they are
    left out. Files that do not match `stems` are not looked at.

    Raises:
        InputError: when there is no image or no mask of these names at all.
    """
    found = files_ending(images, image_suffix, stems)
    if not found:
        raise InputError(f"there is no image *{image_suffix} in {images}")
    if masks is None:
        return match(found, None, problems)
    partners: dict[str, Path] = {}
    for suffix in reversed(mask_suffixes):
        partners.update(files_ending(masks, suffix, stems))
    if not partners:
        raise InputError(f"there is no mask *{' or *'.join(mask_suffixes)} in {masks}; add them, or pack unlabelled images")
    if not all_masked:
        found = {stem: path for stem, path in found.items() if stem in partners}
    return match(found, partners, problems)


def last_number(name: str) -> int | None:
    """The digits at the end of a name, as a number."""
    digits = re.search(r"(\d+)$", name)
    return int(digits[1]) if digits else None
