"""Predict images with a checkpoint: a mask of class ids and an overlay for each. Runs without Ray.

Examples:
  python jobs/predict.py runs/demo street.jpg --out predictions
  python jobs/predict.py runs/demo photos/ --out predictions --flip --which student
  python jobs/predict.py runs/whu_cd 2012/ --second 2016/ --out changes      what has changed; the dates have the same names

Writes OUT/masks/NAME.png (8-bit class ids with the class colours as palette), OUT/overlays/NAME.jpg and
OUT/classes.json (id, name and colour of each class). Folders are searched for images, subfolders too, and their
layout is kept. A file that is no readable image does not stop the others; it is named at the end, with exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed

from ecocseg.errors import InputError, run_main

if TYPE_CHECKING:
    from torch import Tensor

    from ecocseg.checkpoint import Loaded
    from ecocseg.evaluate import EvalSpec

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    from ecocseg import inference

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest checkpoint)")
    parser.add_argument("images", help=f"an image, or a folder of images ({' '.join(SUFFIXES)})")
    parser.add_argument("--second", metavar="PATH", help="the second date: an image, or a folder with the same names")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; made if missing")
    parser.add_argument("--which", default="auto", choices=["auto", "student", "teacher"],
                        help="weights to use (default: the teacher if there is one)")
    parser.add_argument("--alpha", type=float, default=0.55, help="strength of overlay colours, 0 to 1 (default: 0.55)")
    inference.add_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from ecocseg import inference
    from ecocseg.storage_options import storage_of

    if not 0 <= options.alpha <= 1:
        raise InputError(f"--alpha {options.alpha} is not a share; give 0 (image alone) to 1 (classes alone)")
    names = output_names(find_images(options.images), Path(options.images))
    out = make_folder(options.out)
    device = inference.choose_device(options.device)
    loaded = inference.load(options.checkpoint, options.which, storage_of(options), device)
    spec = inference.override(loaded.spec, options)
    check_dates(loaded, options.second)
    write_classes(out, loaded)
    unreadable = []
    for number, (path, name) in enumerate(names.items(), start=1):
        try:
            dates = read_dates(path, Path(options.images), options.second)
        except (OSError, InputError) as error:
            unreadable.append(f"  {path}: {error.__cause__ or error}")
            continue
        predict_image(dates, out, name, loaded, spec, device, options.alpha)
        print(f"{number}/{len(names)}  {path}")
    print(f"written: {len(names) - len(unreadable)} masks in {out / 'masks'}, overlays in {out / 'overlays'}")
    if unreadable:
        count = f"{len(unreadable)} of {len(names)} files are no readable images"
        raise InputError(f"{count}; mend or remove them:\n" + "\n".join(unreadable))
    return 0


def find_images(given: str) -> list[Path]:
    """The image itself, or all below a folder, sorted."""
    path = Path(given)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{given} does not exist; give an image or a folder of images")
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{given} holds no images ({' '.join(SUFFIXES)}); give an image or a folder of images")
    return found


def check_dates(loaded: Loaded, second: str | None) -> None:
    """InputError unless there are as many dates as the model compares."""
    if loaded.config.model.siamese and second is None:
        raise InputError("this model compares two dates; give the second one with --second")
    if second is not None and not loaded.config.model.siamese:
        raise InputError("--second: this model looks at one image; leave it out")


def read_dates(path: Path, root: Path, second: str | None) -> list[Tensor]:
    """uint8 [3, H, W] of the image, and of its second date: the file given, or that of the same name in the folder given."""
    from ecocseg.evaluate import image_tensor

    dates = [image_tensor(path.read_bytes(), str(path))]
    if second is not None:
        other = Path(second) / path.relative_to(root) if Path(second).is_dir() else Path(second)
        dates.append(image_tensor(other.read_bytes(), str(other)))
        if dates[0].shape != dates[1].shape:
            sizes = " and ".join(f"{date.shape[2]}x{date.shape[1]}" for date in dates)
            raise InputError(f"{other}: the dates are {sizes} (width x height); give pairs of one size")
    return dates


def output_names(paths: list[Path], root: Path) -> dict[Path, Path]:
    """Where each image's results go, without suffix; images of one name but different types keep theirs in the name."""
    relative = {path: path.relative_to(root) if root.is_dir() else Path(path.name) for path in paths}
    counts = Counter(name.with_suffix("") for name in relative.values())
    return {
        path: name.with_suffix("") if counts[name.with_suffix("")] == 1 else name for path, name in relative.items()
    }


def make_folder(given: str) -> Path:
    out = Path(given)
    try:
        for name in ("masks", "overlays"):
            (out / name).mkdir(parents=True, exist_ok=True)
            probe = out / name / ".writable"
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise InputError(f"--out {given} cannot be written ({error}); give a folder you may write to") from None
    return out


def write_classes(out: Path, loaded: Loaded) -> None:
    classes = loaded.class_list
    pairs = zip(classes.names, classes.palette, strict=True)
    entries = [{"id": i, "name": name, "colour": list(colour)} for i, (name, colour) in enumerate(pairs)]
    (out / "classes.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def predict_image(
    dates: list[Tensor], out: Path, name: Path, loaded: Loaded, spec: EvalSpec, device: Any, alpha: float
) -> None:
    """Predict a uint8 image [3, H, W], or two dates, and write the mask and its overlay on the last one under `name`."""
    import numpy as np
    import torch
    from PIL import Image

    from ecocseg import inference, panels
    from ecocseg.evaluate import predict_scores

    image_B3HW = loaded.normalize(torch.cat(dates).to(device).unsqueeze(0))
    autocast = inference.autocast_dtype(loaded)
    scores_BNHW = predict_scores(loaded.model, loaded.coding, image_B3HW, spec, autocast=autocast)
    labels_HW = scores_BNHW.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
    mask = Image.fromarray(labels_HW)  # putpalette turns grey into palette mode and keeps the ids
    mask.putpalette(np.asarray(loaded.class_list.palette, dtype=np.uint8).tobytes())
    picture = Image.fromarray(panels.overlay(dates[-1], labels_HW, loaded.class_list.palette, alpha))
    for folder, suffix, content in (("masks", ".png", mask), ("overlays", ".jpg", picture)):
        target = out / folder / name.with_name(name.name + suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        content.save(target, quality=92)  # PNG has no quality and ignores it


if __name__ == "__main__":
    sys.exit(run_main(main))
