"""`jobs/benchmark.py label`: images a second that a pool is labelled with, beside the bare forward pass of the same model.

Both have the same cores (or GPU), in one process, by turns. The bare loop predicts decoded images that lie on the device and
does nothing else; labelling reads shards, decodes, predicts, makes hybrid labels and writes shards, as jobs/pseudo_label.py.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_ingest import photo

from ecocseg import checkpoint
from ecocseg.config import validate
from ecocseg.data.classes import CLASS_LISTS
from ecocseg.data.shards import Record, write_shards
from ecocseg.evaluate import Normalize, image_tensor, predict_logits
from ecocseg.labelling import Plan, Workers, label_pool
from ecocseg.labelling_shard import GPU_BATCH, Labeler
from ecocseg.storage import Storage

NAMES = {"forward": "forward pass alone", "labels": "forward pass and hybrid labels", "shards": "shards to labelled shards"}
SURE = 20.0  # standard deviation given to the outputs: as after training, most pixels are sure of all bits


def untrained(args: argparse.Namespace, device: torch.device) -> Labeler:
    """A labeler of a fresh network whose outputs are as sure as a trained one's."""
    classes = CLASS_LISTS["cityscapes"]
    config = validate({"data": {"labeled": "none", "unlabeled": "none"}, "model": {"encoder": args.encoder, "head": args.head},
                       "coding": {"codebook": {"length": args.bits}}})
    torch.manual_seed(0)
    coding = checkpoint.build_coding(config.coding, checkpoint.build_codebook(config.coding, classes), classes.num_classes)
    model = checkpoint.build_model(config.model, coding.num_outputs, pretrained=False).to(device).eval()
    last = [one for one in model.modules() if isinstance(one, torch.nn.Conv2d) and one.out_channels == coding.num_outputs][-1]
    with torch.no_grad():
        logits_BKhw = model(Normalize()(image_tensor(photo(0), "").to(device)[None]))
        mean_K, std_K = logits_BKhw.mean((0, 2, 3)), logits_BKhw.std((0, 2, 3)).clamp_min(1e-6)
        last.weight.mul_((SURE / std_K).view(-1, 1, 1, 1))
        if last.bias is not None:
            last.bias.sub_(mean_K).mul_(SURE / std_K)
    spec = checkpoint.build_spec(config)
    loaded = checkpoint.Loaded(model, coding, config, classes, Normalize(), spec, 0)
    return Labeler(loaded, spec, 0.95, batch=GPU_BATCH if device.type == "cuda" else 1)


def label_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    device, threads = torch.device(args.device), torch.get_num_threads()
    labeler, number = untrained(args, device), args.images
    one = labeler.last
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        photos = [photo(index) for index in range(min(number, 64))]
        pool = write_shards((Record(f"{i:06d}", photos[i % len(photos)]) for i in range(number)), f"{root}/pool",
                            dataset="label", classes=one.class_list)
        images = torch.stack([image_tensor(data, "") for data in photos]).to(device)
        batches = [images[torch.arange(at, min(at + labeler.batch, number)) % len(images)]
                   for at in range(0, number, labeler.batch)]

        def forward() -> None:
            for image_BCHW in batches:
                predict_logits(one.model, one.coding, one.normalize(image_BCHW), labeler.spec)

        def labels() -> None:
            for image_BCHW in batches:
                with torch.no_grad():
                    labeler.target(image_BCHW)

        def shards() -> None:
            out = tempfile.mkdtemp(dir=root)
            label_pool(labeler, Plan(pool, str(Path(out, "out")), Storage(), told, one.class_list), Workers(1, threads), device)

        told = labeler.describe()
        runs: dict[str, Callable[[], None]] = {"forward": forward, "labels": labels, "shards": shards}
        labeler.target(batches[0])  # kernels and tables are made once
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                with torch.no_grad():
                    run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
    rates = {name: number / statistics.median(each) for name, each in seconds.items()}
    print(f"{'':<34}{'images/s':>10}{'of forward':>12}")
    for name, rate in rates.items():
        print(f"{NAMES[name]:<34}{rate:>10.2f}{100 * rate / rates['forward']:>10.0f} %")
    return [{"case": name, "images_per_second": rate, "share": rate / rates["forward"], "seconds": seconds[name]}
            for name, rate in rates.items()]
