"""The smoke variant of a recipe: its method, coding, decoder and options on toy pictures, in sizes for any machine.

It shows in under a minute that a recipe runs from shards to table, and nothing about how good it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ecocseg import checkpoint
from ecocseg.config import RunConfig
from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.sources import toy
from ecocseg.errors import InputError
from ecocseg.storage import join

SMALL = {"mit_b": "mit_b0", "resnet": "resnet18", "xception": "resnet18", "vit_": "vit_tiny_patch16_224"}
"""What stands in for an encoder, by how its name begins; others stay."""
STEPS, BATCH, SIDE = 4, 2, 64


def smoke(config: RunConfig, folder: str, make: bool = True) -> RunConfig:
    """The smoke variant, its pictures and stand-in encoder weights made under a local folder if `make` is true.

    Raises:
        InputError: when the recipe does not say its classes (`data.classes`).
    """
    name = config.data.classes
    if name not in CLASS_LISTS:
        raise InputError(f"--smoke: data.classes is {name!r}; name a built-in class list to make pictures for: "
                         f"{', '.join(sorted(CLASS_LISTS))}")
    root = str(Path(folder) / name)
    if make:
        toy.prepare(root, CLASS_LISTS[name])
    side = 2 * SIDE if config.model.head == "hrda" else SIDE  # HRDA's detail crop is half of it
    share = side / config.data.crop[0]
    changes = _data(config, root, side, share) | _small_model(config, folder, make)
    return config.updated(run={"name": None if config.run.name is None else f"{config.run.name}-smoke"}, **changes)


def _data(config: RunConfig, root: str, side: int, share: float) -> dict[str, dict[str, Any]]:
    """Toy shards, and everything counted in pixels, rows or steps scaled down with the crop."""
    data, method, window = config.data, config.method, config.eval
    stride = [max(16, int(s * side / c)) for s, c in zip(window.stride, window.crop, strict=True)]
    scaled: dict[str, Any] = {key: int(getattr(method, key) * share) for key in ("ignore_top", "ignore_bottom")}
    scaled["mask_block"] = max(1, int(method.mask_block * share))
    scaled["teacher_steps"] = method.teacher_steps and STEPS
    scaled["label_scales"] = [1.0]
    return {
        "data": {"prepare": None, "labeled": join(root, "labeled"), "crop": [side, side],
                 "unlabeled": join(root, "unlabeled") if data.unlabeled else None,
                 "eval": {next(iter(data.eval), "eval"): join(root, "eval")}, "resize_labeled": None,
                 "resize_unlabeled": None, "rare_min_pixels": max(1, int(data.rare_min_pixels * share**2)),
                 "rare_crop_min_pixels": int(data.rare_crop_min_pixels * share**2),
                 "unlabeled_margins": [int(margin * share) for margin in data.unlabeled_margins]},
        "method": scaled,
        "optim": {"warmup_steps": min(1, config.optim.warmup_steps)},
        "train": {"steps": STEPS, "labeled_batch": min(BATCH, config.train.labeled_batch),
                  "unlabeled_batch": min(BATCH, config.train.unlabeled_batch), "log_every": 1, "eval_every": 0,
                  "checkpoint_every": STEPS // 2, "panels_every": STEPS, "compare_with_source_only": False},
        "eval": {"resize": None, "crop": [side, side], "stride": stride},
    }


def _small_model(config: RunConfig, folder: str, make: bool) -> dict[str, dict[str, Any]]:
    """A small encoder of the same kind; where the recipe takes pretrained weights, a file of fresh ones to load."""
    model = config.model
    encoder = next((small for start, small in SMALL.items() if model.encoder.startswith(start)), model.encoder)
    changes: dict[str, Any] = {"encoder": encoder, "channels": min(model.channels or 32, 32), "pretrained": None,
                               "detail_crop": None}
    if model.pretrained is not None:
        path = Path(folder) / f"{encoder}.safetensors"
        if make:
            fresh = checkpoint.build_model(config.updated(model=changes).model, 2, pretrained=False)
            save_file({key: value.contiguous() for key, value in fresh.encoder.state_dict().items()}, path)
        changes["pretrained"] = str(path.resolve())
    return {"model": changes}
