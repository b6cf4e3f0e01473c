"""What can be found wrong with a run before Ray starts, the cheap questions first: settings, storage, then data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ecocseg import batching, checkpoint, streams, trackers
from ecocseg.config import RunConfig
from ecocseg.data.classes import CLASS_LISTS, ClassList
from ecocseg.data.pipeline import make_order
from ecocseg.data.shards import MANIFEST, Manifest, check_files
from ecocseg.errors import InputError
from ecocseg.storage import Storage, join


def preflight(config: RunConfig, run_url: str, workers: Sequence[int] = ()) -> None:
    """Everything that can be checked before a worker is placed: settings, output, data, sample order. `workers` are the
    numbers of them that the run may have.

    Raises:
        InputError: naming the key or file and the remedy.
    """
    trackers.check(config)
    storage = checkpoint.build_storage(config)
    if config.data.classes is not None:  # before anything is made, or a bucket asked
        check_task(config, CLASS_LISTS[config.data.classes])
    for url in (config.data.labeled, config.data.unlabeled, *config.data.eval.values(), run_url):
        if url is not None:
            storage.check(url)
    storage.check_writable(run_url)
    prepare_data(config, storage)
    manifests = streams.load_manifests(config)
    for manifest in manifests.values():
        check_files(manifest, storage)
    classes = manifests["labeled"].classes
    if config.data.classes is None:
        check_task(config, classes)
    streams.check_codebooks(config, manifests, checkpoint.build_codebook(config.coding, classes))
    check_orders(config, manifests, storage, workers)


def check_task(config: RunConfig, classes: ClassList) -> None:
    """See that evaluation, coding and model fit together and to a class list. InputError naming the key."""
    checkpoint.build_spec(config)
    ids = {"method.feature_distance_classes": config.method.feature_distance_classes,
           "eval.scored_classes": config.eval.scored_classes or ()}
    for key, given in ids.items():
        bad = [c for c in given if c >= classes.num_classes]
        if bad:
            raise InputError(f"{key}: {bad} are no ids of '{classes.name}', which has {classes.num_classes} classes; use 0 to "
                             f"{classes.num_classes - 1}")
    book = checkpoint.build_codebook(config.coding, classes)
    coding = checkpoint.build_coding(config.coding, book, classes.num_classes)
    with torch.device("meta"):
        checkpoint.build_model(config.model, coding.num_outputs, pretrained=False)


def check_orders(config: RunConfig, manifests: dict[str, Manifest], storage: Storage, workers: Sequence[int]) -> None:
    """See that every stream has a sample order that so many workers can share. InputError naming the key."""
    for name in config.streams:
        manifest = manifests["labeled" if name == "labeled" else "unlabeled"]
        order = make_order(manifest, name, config.train.seed, batching.batch_size(config, name), config.data.lanes,
                           streams.rare_class(config, name, manifest), storage)
        for number in workers:
            order.check_world(number)


def prepare_data(config: RunConfig, storage: Storage) -> None:
    """Make the built-in data set where the recipe wants it and it is not yet."""
    if config.data.prepare is None or storage.exists(join(str(config.data.labeled), MANIFEST)):
        return
    from ecocseg.data.sources import demo

    root = str(config.data.labeled).rstrip("/").rpartition("/")[0]
    print(f"making the demo scenes in {root}")
    demo.prepare(root, demo.SSL_PARTS if config.data.prepare == "demo_ssl" else demo.PARTS, storage=storage)
