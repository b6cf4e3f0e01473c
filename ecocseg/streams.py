"""The sets of shards that a run reads, checked against its configuration, and the stream of batches of each.

Part of a pixel's path: data/pipeline.py has the streams themselves.
"""

from __future__ import annotations

from ecocseg import checkpoint
from ecocseg.batching import batch_size
from ecocseg.codebook import Codebook
from ecocseg.config import RunConfig
from ecocseg.data import pseudo
from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.order import RareClass
from ecocseg.data.pipeline import Stream
from ecocseg.data.shards import Manifest, read_manifest
from ecocseg.data.transforms import WeakTransform
from ecocseg.engine import World
from ecocseg.errors import InputError


def load_manifests(config: RunConfig) -> dict[str, Manifest]:
    """All manifests of a run by stream name, with one class list.

    Raises:
        InputError: when one is missing or damaged, or their classes differ.
    """
    storage = checkpoint.build_storage(config)
    urls = {"data.labeled": ("labeled", config.data.labeled)}
    if config.needs_unlabeled:
        urls["data.unlabeled"] = ("unlabeled", config.data.unlabeled)
    urls |= {f"data.eval.{name}": (f"eval/{name}", url) for name, url in config.data.eval.items()}
    manifests: dict[str, Manifest] = {}
    for key, (name, url) in urls.items():
        try:
            manifests[name] = read_manifest(str(url), storage)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        _check_pseudo(config, key, name, manifests[name])
        masks = name != "unlabeled" or config.method.pseudo_labels
        if masks and manifests[name].num_labeled < manifests[name].num_rows:
            raise InputError(f"{key}: {manifests[name].num_rows - manifests[name].num_labeled} of {manifests[name].num_rows} "
                             f"images in {url} have no mask; pack them with masks, or use them as data.unlabeled")
        if masks and manifests[name].classes.names != manifests["labeled"].classes.names:
            raise InputError(f"{key}: {url} has the classes of '{manifests[name].classes.name}', data.labeled those of "
                             f"'{manifests['labeled'].classes.name}'; pack both with one class list")
    wanted, found = config.data.classes, manifests["labeled"].classes
    if wanted is not None and CLASS_LISTS[wanted].names != found.names:
        raise InputError(f"data.classes: the recipe is for '{wanted}' ({CLASS_LISTS[wanted].num_classes} classes), "
                         f"data.labeled has '{found.name}' ({found.num_classes}); pack it with that list, or data.classes=null")
    return manifests


def _check_pseudo(config: RunConfig, key: str, name: str, manifest: Manifest) -> None:
    """See that pseudo-labels are where they are learned as such, and true labels where scores are taken.

    Raises:
        InputError: naming the key.
    """
    guessed = pseudo.OPTION in manifest.options
    if name == "unlabeled" and config.method.pseudo_labels and not guessed:
        raise InputError(f"{key}: {manifest.url} has no pseudo-labels; make them with jobs/pseudo_label.py, or set "
                         "method.pseudo_labels=false")
    if name.startswith("eval/") and guessed:
        raise InputError(f"{key}: the masks in {manifest.url} are pseudo-labels, no truth to score by; give annotated shards")
    if name == "labeled" and guessed and config.method.kind != "supervised":
        raise InputError(f"{key}: the masks in {manifest.url} are pseudo-labels, which method.kind={config.method.kind} would "
                         "take for true; use supervised")


def check_codebooks(config: RunConfig, manifests: dict[str, Manifest], book: Codebook | None) -> None:
    """Refuse stored pseudo-labels that are learned and of another codebook than the run's. InputError naming the key."""
    for name in ("labeled", "unlabeled") if config.method.pseudo_labels else ("labeled",):
        pseudo.check_codebook(manifests[name], None if book is None else book.hash, f"data.{name}")


def rare_class(config: RunConfig, name: str, manifest: Manifest) -> RareClass | None:
    """How a stream draws rare classes; None where it is uniform."""
    if name != "labeled" or config.data.sampling == "uniform":
        return None
    # the limit is for labels at their full size; those of a set that was reduced when it was packed have fewer pixels
    scale = float(manifest.options.get("pixel_scale", 1.0))
    return RareClass(config.data.rare_temperature, max(1, round(config.data.rare_min_pixels * scale)))


def open_stream(config: RunConfig, name: str, manifest: Manifest, world: World, start_step: int, micro: int) -> Stream:
    """A worker's part of a stream from the batch of `start_step` on, in `micro` micro-batches a step."""
    data, labeled = config.data, name == "labeled"
    masks = labeled or config.method.pseudo_labels
    planes = pseudo.num_planes(manifest) if masks else None
    rare = rare_class(config, name, manifest)
    transform = WeakTransform(
        resize=data.resize_labeled if labeled else data.resize_unlabeled, scale=data.scale, crop=data.crop, flip=data.flip,
        max_class_share=data.max_class_share, min_class_pixels=data.rare_crop_min_pixels if rare else 0,
        margins=(0, 0, 0, 0) if labeled else data.unlabeled_margins, dates=2 if config.model.siamese else 1, turn=data.turn,
        planes=planes or 0)
    return Stream(
        manifest, name=name, seed=config.train.seed, global_batch=batch_size(config, name),
        sampling="rare_class" if rare else "uniform",
        rare_class=rare, transform=transform,
        rank=world.rank, world=world.size, start_step=start_step, lanes=data.lanes, loader=data.loader,
        micro_batches=micro, prefetch_bytes=data.prefetch_mb << 20, decode=data.decode,
        decode_threads=data.decode_threads, pinned=world.device.type == "cuda",
        read_cpus=data.read_cpus, timeout_s=data.watchdog_seconds, damage_limit=data.damage_limit,
        storage=checkpoint.build_storage(config),
        columns=(*config.model.image_columns, *(("mask",) if masks else ()), *(pseudo.COLUMNS if planes is not None else ())))
