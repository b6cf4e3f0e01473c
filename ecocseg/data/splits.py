"""Which images of a data set are labelled, unlabelled or kept for evaluation: from lists, or drawn by a seed.

Lists are text files of one image a line, `IMAGE [MASK]`, paths relative to the data set's root, as the semi-supervised
repositories give them away: "JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png". An image id will do for a path.
Masks are those of the data set, whatever a list says of them.

Draws follow from the seed and the image ids alone. They are nested: one seed's 1/16 is in its 1/8.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from ecocseg.data.shards import Record
from ecocseg.data.sources.pairs import NoMask, Pair, Source
from ecocseg.errors import InputError
from ecocseg.storage import Storage

SHOWN_PROBLEMS = 20
PARTS = ("labeled", "unlabeled", "eval")
EMPTY = {"unlabeled": "; a smaller --labeled-fraction or --labeled-count leaves some, --unlabeled-includes-labeled needs none"}


@dataclass(frozen=True)
class Split:
    """What is asked for. Of lists and draws, the labelled part has one; what no part takes is unlabelled, unless that has a
    list.
    """

    labeled_list: str | None = None
    unlabeled_list: str | None = None
    eval_list: str | None = None
    labeled_fraction: Fraction | None = None
    """Share, rounded up, of the images with masks that are not kept for evaluation."""
    labeled_count: int | None = None
    eval_count: int | None = None
    seed: int = 0
    with_labeled: bool = False
    """The unlabelled part refers to the labelled images as well."""

    def check(self) -> None:
        """See that what is asked for is one thing.

        Raises:
            InputError: naming the options that exclude each other, or miss one.
        """
        ways = {"--labeled-list": self.labeled_list, "--labeled-fraction": self.labeled_fraction,
                "--labeled-count": self.labeled_count}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1:
            raise InputError(f"a split takes one of {', '.join(ways)}; given are {', '.join(given) or 'none'}")
        if self.eval_list is not None and self.eval_count is not None:
            raise InputError("--eval-list and --eval-count exclude each other; give one of them")
        if self.labeled_fraction is not None and not 0 < self.labeled_fraction <= 1:
            raise InputError(f"--labeled-fraction: {self.labeled_fraction} is no share above 0 and up to 1; give, say, 1/16")


class _Names:
    """Entries by what a list may call them: their path below the root, their image id, or the end of a path when no other path
    ends so (lists are often relative to a folder inside the root).
    """

    def __init__(self, entries: Collection[Pair], root: str) -> None:
        paths, ends = defaultdict[str, list[Pair]](list), defaultdict[str, list[Pair]](list)
        for entry in entries:
            path = _path(entry, root)
            paths[path].append(entry)
            for slash in re.finditer("/", path):
                ends[path[slash.end():]].append(entry)
        alone = {end: found for end, found in ends.items() if len({entry.image for entry in found}) == 1}
        self.by_name = {**alone, **{entry.image_id: [entry] for entry in entries}, **paths}
        self.example = next(iter(paths), "none")

    def find(self, line: str) -> Sequence[Pair]:
        """Entries of a line. Its path ends where a known name does, so that names may have spaces."""
        ends = [len(line), *(space.start() for space in re.finditer(r"\s+", line))]
        return next((self.by_name[line[:end]] for end in ends if line[:end] in self.by_name), ())


def _path(entry: Pair, root: str) -> str:
    return Path(os.path.relpath(entry.image, root)).as_posix()


def _read_list(where: str, names: _Names, problems: list[str]) -> list[str]:
    """Image ids of a list, in its order. Unknown and repeated lines become problems."""
    try:
        lines = Storage().read_bytes(where).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise InputError(f"there is no list {where}; give a text file of a path a line") from None
    except UnicodeDecodeError:
        raise InputError(f"the list {where} is no text; give a text file of a path a line") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        entries = names.find(line.strip())
        if line.strip() and not entries:
            problems.append(f"{where}:{number}: '{line.strip()}' is no image of the selection")
        for entry in entries:
            if entry.image_id in found:
                problems.append(f"{where}:{number}: '{line.strip()}' comes twice, first in line {found[entry.image_id]}")
            found.setdefault(entry.image_id, number)
    if not found and not problems:
        problems.append(f"{where} is empty")
    return list(found)


def ranking(image_ids: Iterable[str], seed: int) -> list[str]:
    """Image ids in an order that a seed draws; where an id stands among others does not depend on which these are."""
    return sorted(image_ids, key=lambda image_id: hashlib.sha256(f"{seed}\n{image_id}".encode()).digest())


def divide(source: Source, pool: Source, root: str, split: Split) -> dict[str, Source]:
    """Parts `labeled`, `unlabeled` and, when it is asked for, `eval`, each with the definition of the split in its options.

    `source` lists images with masks, `pool` the same selection without: there may be more. No image is in two parts; with
    `split.with_labeled`, the labelled ones belong to `unlabeled` as well and are referred to when that is packed.

    Raises:
        InputError: naming images that lists call and nobody knows, that come twice, that are in two parts, or that have no
            mask and need one; for parts without an image.
    """
    split.check()
    masked = {entry.image_id: entry for entry in source.entries}
    pooled = {entry.image_id: entry for entry in pool.entries}
    every = {**pooled, **{image_id: entry for image_id, entry in masked.items() if image_id not in pooled}}
    chosen = _choose(masked, every, root, split)
    definition = {**_definition(split), "hash": _hash(chosen),
                  "images": {part: len(image_ids) for part, image_ids in chosen.items()}}
    problems = [problem for problem in dict.fromkeys([*source.problems, *pool.problems]) if not isinstance(problem, NoMask)]
    parts = {}
    for part, image_ids in chosen.items():
        wanted = set(image_ids)
        listing, known = (pool, every) if part == "unlabeled" else (source, masked)
        parts[part] = replace(listing, entries=[entry for image_id, entry in known.items() if image_id in wanted],
                              problems=problems if part == "labeled" else (),
                              options={**listing.options, "split": {"part": part, **definition}})
    parts["unlabeled"] = replace(parts["unlabeled"], read=partial(read_without_mask, read=pool.read))
    return parts


def read_without_mask(entry: Pair, read: Callable[[Pair], Record]) -> Record:
    return replace(read(replace(entry, mask=None)), mask=None)


def _choose(masked: Mapping[str, Pair], every: Mapping[str, Pair], root: str, split: Split) -> dict[str, list[str]]:
    """Image ids of each part."""
    names, problems = _Names(every.values(), root), list[str]()
    lists = {"labeled": split.labeled_list, "unlabeled": split.unlabeled_list, "eval": split.eval_list}
    listed = {part: _read_list(where, names, problems) for part, where in lists.items() if where is not None}
    taken = {image_id for image_ids in listed.values() for image_id in image_ids}
    chosen = dict(listed)
    drawn = [image_id for image_id in ranking(masked, split.seed) if image_id not in taken]
    if split.eval_count is not None:
        chosen["eval"] = drawn[max(0, len(drawn) - split.eval_count):]
        drawn = drawn[:len(drawn) - len(chosen["eval"])]
    if split.labeled_list is None:
        count = split.labeled_count or math.ceil((split.labeled_fraction or 0) * len(drawn))
        if count > len(drawn):
            problems.append(f"--labeled-count: {count} images are asked for, {len(drawn)} with masks are left")
        chosen["labeled"] = drawn[:count]
    if split.unlabeled_list is None:
        others = {*chosen["labeled"], *chosen.get("eval", ())}
        chosen["unlabeled"] = [image_id for image_id in every if image_id not in others]
    _check_parts(chosen, masked, split, problems)
    if split.with_labeled:
        labeled = set(chosen["labeled"])
        chosen["unlabeled"] = [image_id for image_id in chosen["unlabeled"] if image_id not in labeled]
    if problems:
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise InputError(f"{len(problems)} problem(s) with the split:\n  " + "\n  ".join([*problems[:SHOWN_PROBLEMS], *more])
                         + f"\npaths are relative to {root}; one there is '{names.example}'")
    return {part: sorted(chosen[part]) for part in PARTS if part in chosen}


def _check_parts(chosen: Mapping[str, Sequence[str]], masked: Mapping[str, Pair], split: Split, problems: list[str]) -> None:
    for part in ("labeled", "eval"):
        unmasked = [image_id for image_id in chosen.get(part, ()) if image_id not in masked]
        problems += [f"'{image_id}' is to be in {part} and has no mask" for image_id in unmasked]
    for first, second in (("labeled", "unlabeled"), ("labeled", "eval"), ("unlabeled", "eval")):
        both = sorted(set(chosen.get(first, ())) & set(chosen.get(second, ())))
        if (first, second) == ("labeled", "unlabeled") and split.with_labeled:
            continue
        remedy = "; --unlabeled-includes-labeled allows that" if second == "unlabeled" else ""
        problems += [f"'{image_id}' is in both {first} and {second}{remedy}" for image_id in both]
    empty = [part for part, image_ids in chosen.items() if not image_ids and not (part == "unlabeled" and split.with_labeled)]
    problems += [f"no image is left for {part}{EMPTY.get(part, '')}" for part in empty]


def _definition(split: Split) -> dict[str, Any]:
    """How the split was asked for, for the manifest."""
    lists = {"labeled_list": split.labeled_list, "unlabeled_list": split.unlabeled_list, "eval_list": split.eval_list}
    drawn = {"labeled_fraction": str(split.labeled_fraction) if split.labeled_fraction is not None else None,
             "labeled_count": split.labeled_count, "eval_count": split.eval_count}
    given = {key: os.path.basename(where) for key, where in lists.items() if where is not None}
    given |= {key: value for key, value in drawn.items() if value is not None}  # type: ignore[misc]
    return {**given, **({"seed": split.seed} if any(drawn.values()) else {}), "unlabeled_includes_labeled": split.with_labeled}


def _hash(chosen: Mapping[str, Sequence[str]]) -> str:
    """sha256 of which images are in which part, in hex."""
    lines = [f"{part} {image_id}" for part in PARTS for image_id in chosen.get(part, ())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def to_list(part: Source, partners: Mapping[str, Pair], root: str) -> bytes:
    """A part as a list file: of each entry the image's path and, where `partners` has one by image id, its mask's."""
    shared: dict[Path, int] = defaultdict(int)
    for entry in part.entries:
        shared[entry.image] += 1
    lines = []
    for entry in part.entries:
        mask = partners.get(entry.image_id, entry).mask
        words = [_path(entry, root) if shared[entry.image] == 1 else entry.image_id]
        lines.append(" ".join(words + ([Path(os.path.relpath(mask, root)).as_posix()] if mask else [])))
    return "".join(f"{line}\n" for line in lines).encode()
