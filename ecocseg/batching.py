"""Global batches: how workers and micro-batches share them, and what a run says of them and of its learning rate."""

from __future__ import annotations

import math

from ecocseg.config import RunConfig
from ecocseg.errors import InputError
from ecocseg.methods import METHODS
from ecocseg.models.heads import HEADS


def batch_size(config: RunConfig, stream: str) -> int:
    """Images of a stream in a global batch."""
    return config.train.labeled_batch if stream == "labeled" else config.train.unlabeled_batch


def batch_weight_line(config: RunConfig, shares: int) -> str:
    """What method.weighting=batch means where the global batch is taken in more than one share; else nothing."""
    if config.method.weighting != "batch" or not config.needs_unlabeled or shares == 1:
        return ""
    each, whole = config.train.unlabeled_batch // shares, config.train.unlabeled_batch
    return f"; method.weighting=batch: one pseudo-label weight for each {each} image(s) taken at once, not for all {whole}"


def lr_line(config: RunConfig) -> str:
    """The learning rate, and what became of it where the batch is not the one it was chosen for."""
    optim, size = config.optim, config.train.labeled_batch
    text = f"learning rate {optim.lr * config.lr_factor:.3g}"
    if optim.lr_batch in (None, size):
        return text
    kept = "kept as it is (optim.lr_rule=fixed)" if optim.lr_rule == "fixed" else f"by optim.lr_rule={optim.lr_rule}"
    return f"{text}, {kept}: the recipe has {optim.lr:.3g} for {optim.lr_batch} labelled images a step, this run {size}"


def micro_batches(config: RunConfig, workers: int) -> int:
    """Number of micro-batches each worker accumulates over: the least that respects `train.micro_batch`.

    Raises:
        InputError: when the workers cannot share the global batches, with the numbers that would do.
    """
    sizes = {"train.labeled_batch": config.train.labeled_batch}
    if config.needs_unlabeled:
        sizes["train.unlabeled_batch"] = config.train.unlabeled_batch
    for key, size in sizes.items():
        if size % workers:
            fits = [w for w in range(1, size + 1) if all(s % w == 0 for s in sizes.values())]
            raise InputError(f"{key}: {size} images cannot be shared by {workers} workers; use launch.workers of "
                             f"{', '.join(map(str, fits))}, or a multiple of {workers} images")
    share = math.gcd(*(size // workers for size in sizes.values()))
    most = config.train.micro_batch or max(sizes.values())
    in_pairs = config.method.kind == "unimatch_v2"  # images next to one another are pasted on each other
    if in_pairs and config.train.unlabeled_batch // workers % 2:
        raise InputError(f"train.unlabeled_batch: method.kind=unimatch_v2 pastes pairs of images, and {workers} worker(s) get "
                         f"{config.train.unlabeled_batch // workers} of {config.train.unlabeled_batch} each; use fewer "
                         f"launch.workers, or a multiple of {2 * workers} images")
    least = _fewest_images(config, workers)
    enough = False
    for number in range(1, share + 1):
        labeled, unlabeled = (sizes.get(f"train.{kind}_batch", 0) // workers // number for kind in ("labeled", "unlabeled"))
        if share % number or (in_pairs and unlabeled % 2):
            continue
        has_enough = METHODS[config.method.kind].fewest_images(labeled, unlabeled) >= least
        enough = enough or has_enough
        if has_enough and labeled <= most:
            return number
    if not enough:
        raise InputError(f"model.head: {config.model.head} normalises one pooled value an image over the batch, so each pass "
                         f"needs two images or more, and {workers} worker(s) share {sizes}; use fewer launch.workers, larger "
                         "batches, engine.sync_batch_norm=true on GPUs, or another head")
    raise InputError(f"train.micro_batch: {most} cannot be reached: {sizes} over {workers} workers share no such division"
                     + (" into pairs of unlabelled images" if in_pairs else "")
                     + (f" that leaves model.head={config.model.head} two images a pass" if least > 1 else "")
                     + "; raise it, or make the batch sizes multiples of each other")


def _fewest_images(config: RunConfig, workers: int) -> int:
    """Images that each pass in training needs on a worker."""
    head = HEADS.get(config.model.head)
    together = config.engine.sync_batch_norm and workers > 1  # norms see all workers' images
    return 1 if head is None or together else head.fewest_images
