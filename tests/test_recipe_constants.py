"""The constants of every published recipe, from the papers and their released code; a family below names what it fixes.

Only what decides a result is here. `test_recipes.py` sees that recipes are whole and models have their sizes.
"""

from __future__ import annotations

import functools
import math
import re
from fractions import Fraction
from typing import Any

import pytest

from ecocseg.config import RunConfig, load, recipe_names

recipe = functools.cache(load)
OWN = ("demo", "demo_ssl", "camvid_day2dusk", "camvid_ssl")
"""Recipes of this project, which nobody else has published."""
SIXTEEN = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 15, 17, 18)
"""Classes of Cityscapes that SYNTHIA has too: all but terrain, truck and train."""
WITHOUT_VIEWS = {"method.jitter": 0.2, "method.jitter_probability": 0.8, "method.blur_probability": 0.5,
                 "method.blur_sigma": (0.15, 1.15)}
ADAPTATION = {
    **WITHOUT_VIEWS, "method.confidence_threshold": 0.968, "method.weighting": "batch", "method.mix_classes": "batch",
    "method.ema_decay": 0.999, "method.average": "all", "method.mixed_weight": 1.0, "optim.kind": "adamw", "optim.lr": 6e-5,
    "optim.decoder_lr_factor": 10, "optim.weight_decay": 0.01, "optim.betas": (0.9, 0.999), "optim.warmup_steps": 1500,
    "optim.warmup_ratio": 1e-6, "optim.schedule": "poly", "optim.power": 1.0, "train.steps": 40000, "train.labeled_batch": 2,
    "train.unlabeled_batch": 2, "coding.codebook.length": 40, "coding.align_corners": False, "data.classes": "cityscapes",
    "data.flip": 0.5, "data.max_class_share": 0.75, "data.scale": (1.0, 1.0), "eval.average": "logits", "model.dropout": 0.1,
    "engine.sync_batch_norm": False}
TRANSFORMER = {
    "model.encoder": "mit_b5", "model.drop_path": 0.1, "data.sampling": "rare_class", "data.rare_temperature": 0.01,
    "data.rare_min_pixels": 3000, "method.feature_distance": 0.005, "method.feature_distance_share": 0.75,
    "method.feature_distance_classes": (6, 7, *range(11, 19)), "optim.no_decay": "norm_and_position"}
VIEWS = {
    "method.jitter": 0.5, "method.jitter_hue": 0.25, "method.jitter_probability": 0.8, "method.blur_probability": 0.5,
    "method.blur_sigma": (0.1, 2.0), "method.cutmix_probability": 0.5, "method.weighting": "by_coding",
    "method.average": "valid", "method.mixed_weight": 1.0, "data.max_class_share": 1.0, "data.sampling": "uniform",
    "coding.align_corners": True, "optim.no_decay": "none", "optim.warmup_steps": 0, "optim.schedule": "poly",
    "optim.power": 0.9, "eval.average": "probabilities"}
PLAIN_VIEWS = {"data.flip": 0.5, "data.scale": (0.5, 2.0), "method.grey_probability": 0.2}
SGD = {"optim.kind": "sgd", "optim.momentum": 0.9, "optim.weight_decay": 1e-4, "engine.sync_batch_norm": True,
       "method.feature_dropout": 0.5, "method.feature_weight": 0.5}
EIGHT = {"train.labeled_batch": 8, "train.unlabeled_batch": 8}
SIXTEENS = {"train.labeled_batch": 16, "train.unlabeled_batch": 16}
DINO = {"model.head": "dpt", "model.dropout": 0.0, "method.ema_decay": 0.996, "method.whole_pairs": 0.5,
        "optim.kind": "adamw", "optim.lr": 5e-6, "optim.decoder_lr_factor": 40, "optim.weight_decay": 0.01}
SMALL, BASE = "vit_small_patch14_dinov2.lvd142m", "vit_base_patch14_dinov2.lvd142m"
HARD = {"method.ohem_threshold": 0.7, "method.ohem_min_pixels": 100000}  # 200,000 of the two images that a GPU had
FAMILIES: dict[str, dict[str, Any]] = {
    r"(dacs|daformer|mic)_.*": ADAPTATION,
    r"dacs_.*": {"method.kind": "self_training", "model.encoder": "resnet101c", "model.head": "deeplabv2",
                 "model.output_stride": 8, "data.sampling": "uniform", "method.feature_distance": 0.0, "method.ignore_top": 0,
                 "method.ignore_bottom": 0, "optim.no_decay": "none"},
    r"daformer_.*": {**TRANSFORMER, "method.kind": "self_training", "model.head": "daformer",
                     "data.rare_crop_min_pixels": 1500},
    r"daformer_.*2cityscapes": {"method.ignore_top": 15, "method.ignore_bottom": 120},
    r"daformer_cityscapes2.*": {"method.ignore_top": 0, "method.ignore_bottom": 0, "data.resize_labeled": (512, 1024)},
    r"(dacs|daformer)_.*": {"data.crop": (512, 512), "eval.mode": "whole"},
    r"(dacs|daformer)_.*2cityscapes": {"data.resize_unlabeled": (512, 1024), "eval.resize": (512, 1024)},
    r"(dacs|daformer)_gta2.*": {"data.resize_labeled": (720, 1280)},
    r"(dacs|daformer)_synthia2.*": {"data.resize_labeled": (760, 1280)},
    r".*_cityscapes2(acdc|darkzurich)": {"eval.scored_classes": None},
    r"daformer_cityscapes2(acdc|darkzurich)": {"data.resize_unlabeled": (540, 960), "eval.resize": (540, 960)},
    r".*_gta2.*": {"eval.scored_classes": None},
    r".*_synthia2.*": {"eval.scored_classes": SIXTEEN},
    r"mic_.*": {**TRANSFORMER, "method.kind": "mic", "model.head": "hrda", "model.detail_weight": 0.1,
                "data.rare_crop_min_pixels": 6000, "data.crop": (1024, 1024), "eval.mode": "slide"},  # more in test_mic.py
    r"mic_gta2.*": {"data.resize_labeled": (1440, 2560), "data.resize_unlabeled": (1024, 2048)},
    r"mic_synthia2.*": {"data.resize_labeled": (1520, 2560), "data.resize_unlabeled": (1024, 2048)},
    r"mic_cityscapes2.*": {"data.resize_labeled": (1024, 2048), "data.resize_unlabeled": (1080, 1920)},
    r"(fixmatch|unimatch|stpp)_.*": VIEWS,
    r"(fixmatch|unimatch|stpp)_(?!v2).*": SGD,
    r"(fixmatch|unimatch|stpp)_(?!acdc|.*_cd_).*": PLAIN_VIEWS,
    r"fixmatch_.*": {"method.kind": "fixmatch"},
    r"unimatch_(?!v2).*": {"method.kind": "unimatch"},
    r"unimatch_v2_.*": {**DINO, "method.kind": "unimatch_v2"},
    r"stpp_.*": {"method.kind": "stpp", "method.stable_share": 0.5, "method.label_scales": (0.5, 0.75, 1.0, 1.5, 2.0),
                 "method.cutout_probability": 0.5, "data.crop": (321, 321)},
    r"(fixmatch|unimatch|stpp)_voc_.*": {
        **EIGHT, "model.head": "deeplabv3plus", "model.output_stride": 16, "optim.lr": 0.001, "optim.decoder_lr_factor": 10,
        "method.confidence_threshold": 0.95, "method.ohem_threshold": None, "eval.mode": "whole", "data.classes": "voc",
        "coding.codebook.length": 40},
    r"(fixmatch|unimatch|stpp)_voc_.*_r50.*": {"model.encoder": "resnet50s"},
    r"(fixmatch|unimatch|stpp)_voc_\d+_\d+(_321)?": {"model.encoder": "resnet101s"},
    r"(fixmatch|unimatch)_voc_\d+_\d+(_r50)?": {"data.crop": (513, 513)},
    r"unimatch_voc_.*_321": {"data.crop": (321, 321)},
    r"(fixmatch|unimatch)_cityscapes_.*": {
        **EIGHT, **HARD, "model.encoder": "resnet101s", "model.head": "deeplabv3plus", "model.output_stride": 16,
        "data.crop": (801, 801), "optim.lr": 0.005, "optim.decoder_lr_factor": 1, "method.confidence_threshold": 0.0,
        "eval.mode": "slide", "eval.crop": (801, 801), "eval.stride": (534, 534), "coding.codebook.length": 40},
    r"unimatch_coco_.*": {
        **EIGHT, "model.encoder": "xception65", "model.head": "deeplabv3plus", "data.crop": (513, 513), "optim.lr": 0.004,
        "optim.decoder_lr_factor": 10, "method.confidence_threshold": 0.95, "coding.codebook.length": 60},
    r"unimatch_(whu|levir)_cd_.*": {
        **EIGHT, "model.encoder": "resnet50s", "model.head": "pspnet", "model.output_stride": 8, "model.siamese": True,
        "data.scale": (0.8, 1.2), "data.crop": (256, 256), "data.flip": 0.5, "method.grey_probability": 0.0,
        "optim.lr": 0.02, "optim.decoder_lr_factor": 1, "method.confidence_threshold": 0.95, "method.dice": False,
        "eval.scored_classes": (1,)},
    r"unimatch_acdc_.*": {
        "train.labeled_batch": 12, "train.unlabeled_batch": 12, "model.encoder": "unet", "model.head": "unet",
        "model.pretrained": None, "model.in_channels": 1, "data.resize_labeled": (256, 256), "data.crop": (256, 256),
        "data.turn": True, "method.grey_probability": 0.0, "method.dice": True, "optim.lr": 0.01,
        "optim.decoder_lr_factor": 1, "method.confidence_threshold": 0.95, "eval.metric": "dice",
        "eval.scored_classes": (1, 2, 3)},
    r"unimatch_v2_(?!cityscapes).*": {"data.crop": (518, 518), "eval.mode": "whole", "eval.multiple": 14},
    r"unimatch_v2_.*(?<!_cityscapes)": {"method.confidence_threshold": 0.95},
    r"unimatch_v2_voc_\d+": {**SIXTEENS, "model.encoder": SMALL, "coding.codebook.length": 40},
    r"unimatch_v2_voc_\d+_base": {**SIXTEENS, "model.encoder": BASE, "coding.codebook.length": 40},
    r"unimatch_v2_coco_.*": {**SIXTEENS, "model.encoder": BASE, "coding.codebook.length": 60},
    r"unimatch_v2_ade20k_.*": {**EIGHT, "model.encoder": BASE},
    r"unimatch_v2_cityscapes_.*": {**EIGHT, **HARD, "model.encoder": BASE, "data.crop": (798, 798), "eval.mode": "slide",
                                   "eval.crop": (798, 798), "eval.stride": (532, 532), "coding.codebook.length": 40},
}
VOC, CITYSCAPES, COCO, ADE20K = 10582, 2975, 118287, 20210
"""Training images."""
SPLITS = {"voc": {"1_16": 662, "1_8": 1323, "1_4": 2646}, "cityscapes": {"1_16": 186, "1_8": 372, "1_4": 744, "1_2": 1488},
          "coco": {f"1_{n}": round(COCO / n + 0.49) for n in (512, 256, 128, 64, 32)},
          "ade20k": {f"1_{n}": ADE20K // n for n in (64, 32, 16, 8)}}
"""Labelled images."""
SCHEDULES = {  # pattern: images in all, passes over the unlabelled ones, GPUs of the release
    r"(?:fixmatch|unimatch|stpp)_(voc)_(1_\d+)(?:_r50)?(?:_321)?": (VOC, 80, 4),
    r"(?:fixmatch|unimatch)_(cityscapes)_(1_\d+)": (CITYSCAPES, 240, 4),
    r"unimatch_(coco)_(1_\d+)": (COCO, 30, 8),
    r"unimatch_v2_(voc)_(\d+)(?:_base)?": (VOC, 60, 4),
    r"unimatch_v2_(cityscapes)_(1_\d+)": (CITYSCAPES, 180, 4),
    r"unimatch_v2_(coco)_(1_\d+)": (COCO, 20, 4),
    r"unimatch_v2_(ade20k)_(1_\d+)": (ADE20K, 60, 4),
    r"unimatch_(whu_cd)_(\d+)": (5947, 80, 1),
    r"unimatch_(levir_cd)_(\d+)": (7120, 80, 1),
    r"unimatch_(acdc)_(\d)": (1312, 300, 1),
}
CARDIAC_SLICES = {"1": 32, "3": 68, "7": 136}
PUBLISHED = """
dacs_gta2cityscapes 54.5 52.1
daformer_gta2cityscapes 70.5 68.3
mic_gta2cityscapes 76.9 75.9
dacs_synthia2cityscapes 52.1 48.3
daformer_synthia2cityscapes 63.3 60.9
mic_synthia2cityscapes 69.0 67.3
unimatch_voc_{1_16,1_8,1_4} 79.2 79.8 80.3 78.1 78.4 79.2
unimatch_voc_{1_16,1_8,1_4}_r50 77.1 78.3 78.5 75.8 76.9 76.8
unimatch_voc_{1_16,1_8,1_4}_321 78.1 78.6 78.9 76.5 77.0 77.2
unimatch_voc_{1_16,1_8,1_4}_r50_321 76.4 77.5 77.6 74.5 75.8 76.1
fixmatch_voc_{1_16,1_8,1_4} 76.0 77.8 78.2 74.3 76.3 76.9
fixmatch_voc_{1_16,1_8,1_4}_r50 74.3 75.5 76.3 70.6 73.9 75.1
stpp_voc_{1_16,1_8,1_4} 77.1 77.9 78.0 74.5 76.3 76.6
stpp_voc_{1_16,1_8,1_4}_r50 74.0 76.1 76.5 72.6 74.4 75.4
unimatch_v2_voc_{92,183,366,732,1464} 81.1 86.6 87.1 87.8 88.9 79.0 85.5 85.9 86.7 87.8
unimatch_cityscapes_{1_16,1_8,1_4,1_2} 78.2 79.3 80.5 80.7 76.6 77.9 79.2 79.5
fixmatch_cityscapes_{1_16,1_8,1_4,1_2} 77.3 78.4 78.9 79.4 74.2 76.2 77.2 78.4
unimatch_coco_{1_512,1_256,1_128,1_64,1_32} 34.5 41.8 46.2 49.9 51.6 31.9 38.9 44.4 48.2 49.8
unimatch_whu_cd_{5,10,20,40} 78.0 79.6 83.5 84.6 77.5 78.9 82.9 84.4
unimatch_acdc_{1,3,7} 86.7 90.1 90.5 85.4 88.9 89.9
unimatch_v2_voc_{92,183,366,732,1464}_base - - - - - 86.3 87.9 88.9 90.0 90.8
unimatch_v2_cityscapes_{1_16,1_8,1_4,1_2} - - - - 83.6 84.3 84.5 85.1
unimatch_v2_coco_{1_512,1_256,1_128,1_64,1_32} - - - - - 47.9 55.8 58.7 60.4 63.3
"""
"""Results with ECOC of each recipe of a line, then those without; "-": none is published."""


def value(config: RunConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - set(OWN)))
def test_a_recipe_has_its_familys_constants(name: str) -> None:
    config = recipe(name)
    wanted: dict[str, Any] = {}
    for pattern, constants in FAMILIES.items():
        if re.fullmatch(pattern, name):
            wanted |= constants
    assert {"method.kind", "data.crop", "optim.lr", "train.labeled_batch", "model.encoder"} <= wanted.keys()
    assert {key: value(config, key) for key in wanted} == wanted


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith(("fixmatch", "unimatch", "stpp"))])
def test_steps_are_whole_passes_over_the_unlabelled_images(name: str) -> None:
    """As the releases' loaders give them: each GPU has its share of the pool, rounded up, in whole batches."""
    (pattern, (total, epochs, gpus)), = [item for item in SCHEDULES.items() if re.fullmatch(item[0], name)]
    match = re.fullmatch(pattern, name)
    assert match is not None
    data, split = match.groups()
    if data == "acdc":
        labeled = CARDIAC_SLICES[split]
    elif data.endswith("_cd"):
        labeled = int(total * Fraction(int(split), 100))
    else:
        labeled = SPLITS[data].get(split) or int(split)
    train = recipe(name).train
    each = math.ceil((total - labeled) / gpus) // (train.unlabeled_batch // gpus)
    assert (train.steps, train.eval_every, train.checkpoint_every) == (epochs * each, each, each)
    if name.startswith("stpp"):
        assert recipe(name).method.teacher_steps == epochs * (labeled // 16)


def test_published_results_are_those_of_the_papers() -> None:
    wanted = {}
    for line in PUBLISHED.split("\n")[1:-1]:
        pattern, *numbers = line.split()
        before, braces, after = re.fullmatch(r"([^{]*)(\{.*\})?(.*)", pattern).groups()  # type: ignore[union-attr]
        splits = braces[1:-1].split(",") if braces else [""]
        for split, with_ecoc, without in zip(splits, numbers[:len(splits)], numbers[len(splits):], strict=True):
            wanted[before + split + after] = (with_ecoc, without)
    told = {name: recipe(name).published for name in recipe_names()}
    for name, text in told.items():
        if text is None:
            assert name not in wanted
            continue
        unit = "Dice by case" if "acdc_" in name else "IoU of the changed class" if "_cd_" in name else "mIoU"
        with_ecoc, without = wanted.pop(name)
        assert text.startswith(f"{without} {unit} without ECOC; none with" if with_ecoc == "-" else
                               f"{with_ecoc} {unit} with ECOC, {without} without"), name
    assert not wanted
