"""Lists of names in text files, as data sets publish their splits, and the files they choose."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ecocseg.errors import InputError


def read_names(path: str | Path) -> list[str]:
    """Names in a list file, in its order, each once: of every line the first word, without folders and suffix.

    So `2007_000032`, `train_1_1.png` and `train2017/000000000009.jpg masks/000000000009.png` are all lines of lists.

    Raises:
        InputError: when there is no such file, it is no text, or it names nothing.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"the list {path} cannot be read ({reason}); give a text file with a name a line") from None
    names = [PurePosixPath(line.split()[0]).stem for line in lines if line.strip()]
    if not names:
        raise InputError(f"the list {path} is empty; give a text file with a name a line")
    return list(dict.fromkeys(names))


def list_options(path: str | Path | None, names: Sequence[str] | None) -> dict[str, Any]:
    """What a manifest says of a list: its file name, and the sha256 of its sorted names; of no list, nothing."""
    if path is None or names is None:
        return {}
    return {"list": Path(path).name, "list_sha256": hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()}


def listed(files: Mapping[str, Path], names: Sequence[str] | None, folder: Path, problems: list[str]) -> dict[str, Path]:
    """The files of the names, sorted; all of them when there is no list. Names without a file become problems."""
    if names is None:
        return dict(files)
    problems += [f"{folder} has no file of the listed name {name}" for name in names if name not in files]
    return {name: files[name] for name in sorted(names) if name in files}
