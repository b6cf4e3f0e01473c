"""One run, described completely: nested, typed and frozen. A recipe is a YAML file that holds only what differs.

`load` reads a recipe (with `base:`), applies dotted overrides and checks everything, reporting all problems at once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from ecocseg.data.classes import CLASS_LISTS
from ecocseg.errors import InputError

RECIPES = Path(__file__).parent / "recipes"
CONSISTENCY = ("fixmatch", "unimatch", "unimatch_v2")
"""Methods in which a weak view's labels teach strong views of the same image."""
PROFILE_WARM_UP = 5
"""Steps before a profile: tables, kernels and memory pools are made in them."""
Size = tuple[PositiveInt, PositiveInt]
Range = tuple[PositiveFloat, PositiveFloat]
MOST_SEED = 2**63 - 1


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


AnySection = TypeVar("AnySection", bound=Section)


class DataConfig(Section):
    labeled: str | None = None
    """URL of the labelled shards (local path or s3://bucket/key)."""
    unlabeled: str | None = None
    """URL of the unlabelled shards; masks in them are read with method.pseudo_labels alone."""
    eval: dict[str, str] = Field(default_factory=dict)
    """URLs of labelled evaluation shards by name; the first is the one that counts."""
    classes: str | None = None
    """Built-in class list the shards must have (see ecocseg/data/classes.py); null = whatever they have."""
    prepare: Literal["demo", "demo_ssl"] | None = None
    """Data set to make at these URLs when they hold nothing yet: built-in scenes of two domains, or of one with few labels."""
    crop: Size = (512, 512)
    """Pixels (height, width) of a training crop."""
    resize_labeled: Size | None = None
    """Pixels (height, width) labelled images are resized to before cropping; null = as they are."""
    resize_unlabeled: Size | None = None
    """Pixels (height, width) unlabelled images are resized to before cropping; null = as they are."""
    unlabeled_margins: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt] = (0, 0, 0, 0)
    """Pixels (top, bottom, left, right) along the borders of an unlabelled image, as resized, that are never learned: marked
    before cropping. HRDA and MIC on Cityscapes 30, 240, 30, 30."""
    scale: Range = (1.0, 1.0)
    """Factors between which an image is rescaled at random before cropping."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    turn: bool = False
    """Turn images as cardiac slices are: quarter turns with a flip, or within 20 degrees, in half of the cases each."""
    max_class_share: float = Field(0.75, gt=0, le=1)
    """Share of a labelled crop from which one class makes it be redrawn (up to 10 times); 1 = never. DAFormer 0.75."""
    sampling: Literal["uniform", "rare_class"] = "uniform"
    """Order of the labelled stream: uniform passes, or DAFormer's rare class sampling."""
    rare_temperature: float = Field(0.01, gt=0)
    """Temperature of the class distribution of rare class sampling. DAFormer 0.01."""
    rare_min_pixels: int = Field(3000, ge=1)
    """Pixels of a class an image must exceed to be drawn for it, at full label resolution. DAFormer 3000."""
    rare_crop_min_pixels: int = Field(1500, ge=0)
    """Pixels of the drawn class a crop should exceed (redrawn up to 10 times); 0 = not asked. DAFormer 1500."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, on [0, 1]; subtracted from images."""
    std: tuple[PositiveFloat, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, on [0, 1]; images are divided by it."""
    loader: Literal["ray", "torch"] = "ray"
    """How shards reach a worker: Ray Data, or threads in the worker. Same rows, same order."""
    lanes: int | None = Field(None, ge=1)
    """Number of lanes the sample order is woven from; workers must divide it. null = batch size, up to 64."""
    prefetch_mb: int = Field(256, ge=1)
    """Megabytes of encoded images read ahead per stream and worker."""
    decode: Literal["beside", "ray"] = "beside"
    """Where images are decoded and cropped: beside the trainer by its threads, or by Ray tasks on nodes with free CPUs."""
    decode_threads: int = Field(1, ge=1)
    """Number of decoding threads per stream and worker; with decode=ray, of its tasks under way, each with one CPU."""
    damage_limit: float = Field(0.001, ge=0, le=1)
    """Share of a stream's rows that may be damaged: they are put aside and listed in the run's folder; more end the run."""
    watchdog_seconds: float = Field(300.0, gt=0)
    """Seconds without a batch after which a worker gives up, naming the stage that is stuck; it warns at half of them."""
    read_cpus: float = Field(0.25, gt=0)
    """CPUs reserved for each Ray Data read task."""


class ModelConfig(Section):
    encoder: str = "mit_b5"
    """Encoder: mit_b0..mit_b5, unet, or any timm model that gives feature maps (plain ViTs too)."""
    head: str = "daformer"
    """Decoder: daformer, deeplabv2, segformer, deeplabv3plus, pspnet, dpt, unet, hrda, or smp:<Architecture>."""
    pretrained: str | None = None
    """Encoder weights: `default` (the encoder's own from its hub), a hub name, a path or URL; null = from scratch."""
    allow_missing: tuple[str, ...] = ()
    """Patterns of encoder keys that the pretrained weights need not hold."""
    channels: int | None = Field(None, ge=8)
    """Number of channels inside the decoder; null = the published one: 256, for dpt and pspnet by the encoder's width."""
    in_channels: int = Field(3, ge=1)
    """Number of channels the encoder sees; 1 = grey, the mean of an image's three."""
    siamese: bool = False
    """Compare two dates of a place: the decoder sees the absolute difference of their features."""
    detail_crop: Size | None = None
    """Pixels (height, width) of the part of a crop that head hrda sees at full size; null = half the crop. HRDA 512, 512."""
    detail_weight: float = Field(0.1, ge=0, le=1)
    """Share of the loss on that part alone in the loss of head hrda. HRDA 0.1."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Probability of dropout before the classifier."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Probability of stochastic depth in the encoder's last block. DAFormer 0.1."""
    output_stride: int | None = Field(None, ge=1)
    """Stride of the encoder's last feature map; null = the encoder's own."""
    activation_checkpointing: bool = False
    """Recompute encoder activations in the backward pass: less memory, about a third more time."""

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Columns of the shards that make an image: its name and one date, or two."""
        return ("image_id", "image", "image_b") if self.siamese else ("image_id", "image")


class CodebookConfig(Section):
    kind: Literal["max_min", "text", "random"] = "max_min"
    """How codewords are made: well separated, from class-name embeddings, or by random search."""
    length: int = Field(40, ge=1, le=512)
    """Number of bits of a codeword; about 10 log2(classes)."""
    seed: int = Field(0, ge=0, le=MOST_SEED)
    """Seed of the codebook, apart from the training seed."""
    embeddings: str | None = None
    """File (.npy, .safetensors) of class-name embeddings for `text`; null = the shipped ones."""
    path: str | None = None
    """File of a saved codebook; replaces kind, length and seed."""


class CodingConfig(Section):
    kind: Literal["ecoc", "one_hot"] = "ecoc"
    """How a class is written as outputs: the bits of a codeword, or one output per class (the baseline)."""
    codebook: CodebookConfig = CodebookConfig()
    reliability: float = Field(0.95, ge=0.5, le=1)
    """Mean confidence T at which shared bits count as reliable. 0.5 = code-wise, 1 = bit-wise labels."""
    label_form: Literal["hybrid", "code", "bit"] = "hybrid"
    """Form of pseudo-labels: reliable bits from the codeword and the rest bit by bit, all code-wise, or all bit-wise."""
    bce_weight: float = Field(1.0, ge=0)
    """Weight of the bit cross-entropy."""
    distance_weight: float = Field(5.0, ge=0)
    """Weight lambda1 of the pixel-code distance."""
    contrast_weight: float = Field(2.0, ge=0)
    """Weight lambda2 of the pixel-code contrast."""
    temperature: float = Field(0.5, gt=0)
    """Temperature tau of the contrast; 0.1 suits training from scratch."""
    contrast_negatives: Literal["codewords", "target_and_negatives"] = "codewords"
    """What the contrast is summed over: all codewords (released code), or the target and the other codewords (text)."""
    max_candidates: int | None = Field(None, ge=1)
    """Number of candidate classes bit mining looks at; null = all. The released code stops at 8."""
    align_corners: bool = False
    """Bilinear convention by which logits are resized to labels, in training and evaluation. UDA code false, UniMatch true."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes pseudo-labels and losses: auto = Triton kernels on CUDA devices, C++ (compiled at its first use) on CPUs
    where there is a compiler, torch elsewhere; torch = torch alone; triton = as auto, and an error without a CUDA device."""


class MethodConfig(Section):
    kind: Literal["supervised", "self_training", "mic", "stpp", "fixmatch", "unimatch", "unimatch_v2"] = "self_training"
    """How unlabelled images are used: not at all, by a teacher's pseudo-labels on mixed images (self_training: DACS, DAFormer)
    and on masked ones too (mic), by labels made between one run and the next (stpp: ST++), or by labels of a weak view that
    teach strong ones (FixMatch, UniMatch, UniMatch V2)."""
    pseudo_labels: bool = False
    """With supervised: learn data.unlabeled too, by the labels that jobs/pseudo_label.py gave it, in strong views."""
    cutout_probability: float = Field(0.5, ge=0, le=1)
    """Probability of a box of noise without label on a strong view of an image labelled that way. ST++ 0.5."""
    teacher_steps: int | None = Field(None, ge=2)
    """Number of steps of ST++'s first run, of labelled images alone, labeled_batch + unlabeled_batch of them a step; null =
    train.steps."""
    stable_share: float = Field(0.5, gt=0, lt=1)
    """Share of the unlabelled images, the most stable ones, that ST++'s first student learns. ST++ 0.5."""
    label_scales: tuple[PositiveFloat, ...] = ()
    """Scales over which ST++ averages its labels, each with its mirror image; none = predicted as in evaluation. ST++ 0.5,
    0.75, 1, 1.5, 2."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the teacher's parameter average, reached from below: min(1 - 1/(t+1), decay)."""
    confidence_threshold: float = Field(0.968, ge=0, le=1)
    """Confidence from which a pixel counts towards the pseudo-label weight. DACS, DAFormer 0.968."""
    weighting: Literal["image", "batch", "pixel", "by_coding"] = "image"
    """Pseudo-label weight: share of the image's confident pixels, of all images that a worker takes at once (released code; so
    more workers, or a smaller train.micro_batch, make it that of fewer images; the run's first line says so), or per pixel;
    by_coding = image with ECOC, pixel with one_hot (what is published of FixMatch and UniMatch; with one_hot ST++ has none)."""
    ignore_top: int = Field(0, ge=0)
    """Rows of pixels at the top of a target crop whose pseudo-labels weigh nothing. DAFormer on Cityscapes 15."""
    ignore_bottom: int = Field(0, ge=0)
    """Rows of pixels at the bottom of a target crop whose pseudo-labels weigh nothing. DAFormer on Cityscapes 120."""
    jitter: float = Field(0.2, ge=0, le=0.5)
    """Strength of colour jitter (brightness, contrast, saturation, hue) on mixed images. DAFormer 0.2, UniMatch 0.5."""
    jitter_hue: float | None = Field(None, ge=0, le=0.5)
    """Strength of the hue's jitter, in full turns; null = as the others. UniMatch 0.25."""
    jitter_probability: float = Field(0.8, ge=0, le=1)
    """Probability of colour jitter, drawn once a step; by FixMatch and UniMatch for each view of an image."""
    grey_probability: float = Field(0.0, ge=0, le=1)
    """Probability that a strong view of FixMatch and UniMatch is made grey. UniMatch 0.2."""
    blur_probability: float = Field(0.5, ge=0, le=1)
    """Probability of Gaussian blur, drawn as that of jitter."""
    blur_sigma: Range = (0.15, 1.15)
    """Pixels between which the blur's standard deviation is drawn. DAFormer 0.15 to 1.15, UniMatch 0.1 to 2."""
    cutmix_probability: float = Field(0.5, ge=0, le=1)
    """Probability that a box of another image is pasted on a strong view of FixMatch and UniMatch."""
    feature_dropout: float = Field(0.5, ge=0, lt=1)
    """Probability with which UniMatch drops a channel in its view of perturbed features."""
    feature_weight: float = Field(0.5, ge=0, le=1)
    """Share of that view in UniMatch's loss on unlabelled images; the strong views have the rest."""
    whole_pairs: float = Field(0.5, ge=0, le=1)
    """Share of images whose two views keep all their channels in UniMatch V2, instead of one half each."""
    mix_classes: Literal["batch", "image"] = "batch"
    """Classes of which ClassMix pastes half: those of all labelled images of the step (DACS, DAFormer, MIC), so that an image
    that has few of them may give all it has or nothing, or those of each labelled image."""
    mixed_weight: float = Field(1.0, ge=0)
    """Weight of the loss on mixed or strong views beside that on labelled images."""
    masked_weight: float = Field(1.0, ge=0)
    """Weight of MIC's loss on masked images beside that on labelled images. MIC 1."""
    mask_ratio: float = Field(0.7, ge=0, lt=1)
    """Probability that MIC blanks a block of an image. MIC 0.7."""
    mask_block: int = Field(64, ge=1)
    """Pixels a side of a block. MIC 64."""
    masked_images: Literal["target", "source_and_target"] = "target"
    """What MIC masks: the unlabelled images (published on Cityscapes), or in every other place a labelled one with its true
    labels (published from Cityscapes to ACDC and Dark Zurich)."""
    masked_colour: bool = True
    """Jitter and blur masked images, by a draw of their own. MIC to Cityscapes true, to ACDC and Dark Zurich false."""
    dice: bool = False
    """Learn labelled images by the mean of the coding's loss and soft Dice, and unlabelled ones by soft Dice alone, over the
    images a worker takes at once. UniMatch on cardiac slices."""
    average: Literal["all", "valid"] = "all"
    """Divisor of the labelled loss: all pixels (DAFormer), or those with a label (UniMatch)."""
    ohem_threshold: float | None = Field(None, gt=0, lt=1)
    """Labelled pixels given this probability or less of being right are learned, the others not; null = all are. With ECOC
    it is the mean over a pixel's bits. UniMatch on Cityscapes 0.7."""
    ohem_min_pixels: int = Field(100000, ge=1)
    """Number of the hardest pixels of each labelled image that are learned in any case. UniMatch on Cityscapes 100000: 200000
    of the two images that a GPU has."""
    feature_distance: float = Field(0.0, ge=0)
    """Weight of the thing-class feature distance; needs a pretrained encoder. DAFormer 0.005."""
    feature_distance_classes: tuple[NonNegativeInt, ...] = ()
    """Class ids the feature distance looks at; DAFormer on Cityscapes 6, 7, 11..18."""
    feature_distance_share: float = Field(0.75, gt=0, le=1)
    """Share of a feature cell one such class must cover."""


class OptimConfig(Section):
    kind: Literal["adamw", "sgd"] = "adamw"
    """Optimiser."""
    lr: float = Field(6e-5, gt=0)
    """Learning rate of the encoder at its highest."""
    decoder_lr_factor: float = Field(10.0, gt=0)
    """Learning rate of the decoder over that of the encoder."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay."""
    no_decay: Literal["norm_and_position", "none"] = "norm_and_position"
    """Parameters without weight decay: norms and position embeddings (DAFormer's MiT), or none (ResNet recipes)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Averaging factors of AdamW."""
    warmup_steps: int = Field(1500, ge=0)
    """Number of steps over which the learning rate rises linearly. DAFormer 1500."""
    warmup_ratio: float = Field(1e-6, ge=0, le=1)
    """Share of the learning rate the warm-up begins with. DAFormer 1e-6."""
    schedule: Literal["poly", "constant"] = "poly"
    """Decay after the warm-up: (1 - step/steps)^power, or none."""
    power: float = Field(1.0, gt=0)
    """Power of the polynomial decay; 1 = linear (DAFormer), 0.9 (UniMatch)."""
    lr_rule: Literal["fixed", "linear", "sqrt"] = "fixed"
    """What another train.labeled_batch than lr_batch does to lr: nothing, multiply it by their ratio, or by its root."""
    lr_batch: int | None = Field(None, ge=1)
    """Labelled images per optimiser step that lr is meant for; null = the recipe's own train.labeled_batch."""
    gradient_clipping: float = Field(0.0, ge=0)
    """Largest norm of the whole gradient; 0 = no clipping."""


class TrainConfig(Section):
    steps: int = Field(40000, ge=1)
    """Number of optimiser steps."""
    seed: int = Field(0, ge=0, le=MOST_SEED)
    """Seed of everything but the codebook: weights, order, augmentation, mixing."""
    labeled_batch: int = Field(2, ge=1)
    """Labelled images per optimiser step, over all workers."""
    unlabeled_batch: int = Field(2, ge=1)
    """Unlabelled images per optimiser step, over all workers."""
    micro_batch: int | None = Field(None, ge=1)
    """Most labelled images a worker takes through the model at once; accumulation follows from it. null = no limit."""
    log_every: int = Field(50, ge=1)
    """Number of steps between log lines (and between host syncs)."""
    eval_every: int = Field(4000, ge=0)
    """Number of steps between evaluations; 0 = only at the end."""
    checkpoint_every: int = Field(2000, ge=0)
    """Number of steps between checkpoints; 0 = only at the end."""
    panels_every: int = Field(1000, ge=0)
    """Number of steps between picture panels; 0 = none."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of latest checkpoints kept, beside the best; with 1 there is none to fall back to when the newest is damaged."""
    async_checkpoints: bool = True
    """Write checkpoints while training goes on, from a copy in host memory; false = the step waits for storage."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: end the run at the next log line, or leave that step's update out."""
    max_skipped: int = Field(20, ge=1)
    """Number of steps in a row that on_nan=skip leaves out before it ends the run, at the next log line."""
    profile: int = Field(0, ge=0)
    """Number of steps, after 5 to warm up, that are profiled: a trace and a table of where a step goes in the run's folder."""
    compare_with_source_only: bool = False
    """Train the same recipe without the unlabelled images first, and show the table before and after adaptation."""


class EngineConfig(Section):
    kind: Literal["deepspeed", "torch"] = "deepspeed"
    """What runs the step: DeepSpeed, or plain torch (DistributedDataParallel)."""
    zero_stage: int = Field(1, ge=0)
    """What DeepSpeed shards over workers: 0 nothing, 1 optimiser state, 2 gradients too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; bf16 is autocast, weights stay fp32."""
    compile: bool = False
    """Compile student and teacher with torch.compile."""
    channels_last: bool = False
    """Keep images and feature maps in channels-last memory order: faster convolutions, on CPU and in bf16 on GPU."""
    sync_batch_norm: bool = False
    """Compute batch norm statistics over all workers (GPU only)."""
    threads: int | None = Field(None, ge=1)
    """Torch threads per worker on CPU; null = its share of the CPUs."""


class LaunchConfig(Section):
    workers: Annotated[int, Field(ge=1)] | tuple[int, int] | None = None
    """Number of training workers, or [least, most] of an elastic run; null = as many of the GPUs as can share the global
    batches, or 1 without GPUs."""
    gpu: bool | None = None
    """Train on GPUs; null = when the cluster has any."""
    cpus_per_worker: float | None = Field(None, gt=0)
    """CPUs reserved by a worker; null = what ingest leaves, up to 4."""
    max_failures: int = Field(3, ge=0)
    """Number of times a run begins again after an error of its own or the death of a worker; after the same error at the same
    step it does so once."""
    max_preemptions: int = Field(100, ge=0)
    """Number of times a run begins again after a node was lost or taken away."""
    resize_seconds: float = Field(60.0, gt=0)
    """Seconds between two looks, of an elastic run, for room for more workers."""
    check_memory: bool = True
    """Refuse a step that is estimated to take more memory than the worker's device has."""
    wait: float = Field(0.0, ge=0)
    """Seconds a run asks a cluster for the nodes that launch.workers needs and waits for them; 0 = what is there must do. For
    clusters that grow by themselves."""


class EvalConfig(Section):
    mode: Literal["whole", "slide"] = "whole"
    """Inference over the whole image, or by sliding windows."""
    crop: Size = (512, 512)
    """Pixels (height, width) of a sliding window."""
    stride: Size = (341, 341)
    """Pixels (vertical, horizontal) between sliding windows."""
    resize: Size | None = None
    """Pixels (height, width) images are resized to; scores return to the label's size. null = as they are."""
    flip: bool = False
    """Average with the mirrored image."""
    scales: tuple[PositiveFloat, ...] = Field((1.0,), min_length=1)
    """Image scales averaged over."""
    average: Literal["logits", "probabilities"] = "logits"
    """What windows, flips and scales are averaged in: logits (UDA) or probabilities (UniMatch)."""
    scored_classes: tuple[NonNegativeInt, ...] | None = Field(None, min_length=1)
    """Class ids mIoU (or Dice) is taken over; null = all. SYNTHIA scores 16 of 19."""
    metric: Literal["iou", "dice"] = "iou"
    """What checkpoints are compared by: mIoU over all pixels, or 3-D Dice of each volume, averaged (medical slices)."""
    multiple: int = Field(1, ge=1)
    """Sides are rounded to a multiple of this many pixels for the model (a ViT's patch); scores return to the label's size."""


class StorageConfig(Section):
    endpoint: str | None = None
    """URL of an S3-compatible server; null = AWS, or AWS_ENDPOINT_URL."""
    region: str | None = None
    """Region of the bucket."""
    path_style: bool | None = None
    """Address buckets in the path instead of the host name; null = with an endpoint of one's own."""
    anonymous: bool = False
    """Read public buckets without credentials; run.directory must then be a local folder, or a bucket anyone may write."""
    retries: int = Field(10, ge=0)
    """Number of times a request is tried again, after pauses of 1/4 s, doubled each time, up to 20 s: 10 last 45 s or more."""
    timeout: float = Field(20.0, gt=0)
    """Seconds without an answer after which a try ends."""
    deadline: float = Field(120.0, gt=0)
    """Seconds after which a request is not tried again."""


class TrackingConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard files in the run's folder."""
    mlflow: str | None = None
    """Tracking URI of an MLflow server, or `local` for a database beside the runs (mlflow.db); null = none. Credentials
    come from MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN where the workers run."""
    wandb: Literal["online", "offline"] | None = None
    """Log to Weights & Biases: to its server (WANDB_API_KEY where the workers run), or into the run's folder, from where
    `wandb sync` sends it; null = none."""
    project: str = "ecocseg"
    """Name of the MLflow experiment and of the W&B project."""
    collapse_after: int = Field(10, ge=0)
    """Number of log lines in which a class is missing from the pseudo-labels, or hardly one is confident, before a warning;
    0 = never warn. Where they cover fewer than 200 unlabelled images it is more lines."""


class NameConfig(Section):
    name: str | None = None
    """Name of the run's folder; null = recipe and time."""
    directory: str = "runs"
    """Folder or URL under which runs are written."""


class RunConfig(Section):
    recipe: str = "custom"
    """Name the recipe was loaded by."""
    description: str = ""
    """One line on what the recipe is."""
    published: str | None = None
    """Published result of this very setting, if there is one."""
    cost: str | None = None
    """Published hours and memory of this very setting, if there are any."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    coding: CodingConfig = CodingConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    launch: LaunchConfig = LaunchConfig()
    eval: EvalConfig = EvalConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()
    run: NameConfig = NameConfig()

    @property
    def needs_unlabeled(self) -> bool:
        return self.method.kind != "supervised" or self.method.pseudo_labels

    @property
    def is_adaptation(self) -> bool:
        """The unlabelled images are of another domain; else labelled and unlabelled ones are of one kind."""
        return self.method.kind not in (*CONSISTENCY, "stpp")

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams a step reads; `partner` is the unlabelled images in an order of their own, for CutMix."""
        if not self.needs_unlabeled:
            return ("labeled",)
        with_partner = self.method.kind in ("fixmatch", "unimatch")
        return ("labeled", "unlabeled", "partner") if with_partner else ("labeled", "unlabeled")

    @property
    def lr_factor(self) -> float:
        """What optim.lr is multiplied by, as optim.lr_rule says."""
        ratio = self.train.labeled_batch / (self.optim.lr_batch or self.train.labeled_batch)
        return {"fixed": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.optim.lr_rule]

    def updated(self, **sections: dict[str, Any]) -> RunConfig:
        """A copy with some keys replaced, section by section: `config.updated(train={"seed": 1})`."""
        plain = self.model_dump(mode="json")
        for section, values in sections.items():
            plain[section] = {**plain[section], **values}
        return RunConfig.model_validate(plain)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("_"))


def load(recipe: str | None = None, file: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe by name or a YAML file, apply `dotted.key=value` overrides, and check the whole.

    Raises:
        InputError: naming every bad key or value at once, with the remedy.
    """
    if file is not None:
        plain, name = read_yaml(Path(file)), Path(file).stem
    else:
        name = recipe or "demo"
        if name not in recipe_names():
            raise InputError(f"no recipe '{name}'{_hint(name, recipe_names())}; --list shows all {len(recipe_names())}")
        plain = read_yaml(RECIPES / f"{name}.yaml")
    if not plain.get("recipe"):
        plain["recipe"] = name
    _note_batch(plain)
    for override in overrides:
        _apply(plain, override)
    return validate(plain)


def _note_batch(plain: dict[str, Any]) -> None:
    """Keep the batch that a recipe's learning rate is meant for, before overrides change it."""
    train, optim = plain.setdefault("train", {}), plain.setdefault("optim", {})
    if isinstance(train, dict) and isinstance(optim, dict) and optim.get("lr_batch") is None:
        optim["lr_batch"] = train.get("labeled_batch", TrainConfig.model_fields["labeled_batch"].default)


def validate(plain: dict[str, Any]) -> RunConfig:
    """Turn plain data into a checked `RunConfig`, or raise one InputError with all problems."""
    config, problems = check_section(RunConfig, plain)
    if config is not None:
        problems += _conflicts(config)
    raise_problems("the configuration", problems)
    assert config is not None
    return config


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A checked copy with the values of some dotted keys replaced; InputError as of `validate`."""
    plain = config.model_dump(mode="json")
    for key, value in values.items():
        _put(plain, key, value)
    return validate(plain)


def check_section(section: type[AnySection], plain: dict[str, Any]) -> tuple[AnySection | None, list[str]]:
    """Plain data as a section, or None, and what is wrong with it: unknown keys, values of another type or size."""
    known = [*sections(section), *(key for key, *_ in keys(section))]
    problems = [f"{key}: no such key{_hint(key, known)}" for key in _unknown(plain, section)]
    try:
        return section.model_validate(plain), problems
    except ValidationError as error:
        for item in error.errors():
            if item["type"] != "extra_forbidden":
                problems.append(f"{'.'.join(map(str, item['loc']))}: {item['msg'][:1].lower()}{item['msg'][1:]}, "
                                f"not {item['input']!r}")
    return None, problems


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raise one InputError with all problems, if there are any."""
    if problems:
        raise InputError(f"{what} has " + (f"{len(problems)} problems:\n  " if len(problems) > 1 else "a problem: ")
                         + "\n  ".join(problems))


def _conflicts(config: RunConfig) -> list[str]:
    """What no single key is to blame for. Each line names the keys and the remedy."""
    problems = []
    if config.data.classes is not None and config.data.classes not in CLASS_LISTS:
        problems.append(f"data.classes: no built-in list '{config.data.classes}'{_hint(config.data.classes, list(CLASS_LISTS))}"
                        f"; there are {', '.join(sorted(CLASS_LISTS))}, or null for whatever the shards have")
    if config.data.labeled is None:
        problems.append("data.labeled: not set; give the URL of labelled shards (jobs/prepare_shards.py makes them)")
    if config.needs_unlabeled and config.data.unlabeled is None:
        problems.append("data.unlabeled: not set; give the URL of unlabelled shards, or method.kind=supervised")
    if config.engine.zero_stage > 2:
        problems.append(f"engine.zero_stage: {config.engine.zero_stage} is refused: stage 3 shards the parameters the fp32 "
                        "teacher is averaged from, and these models fit a worker; use 0, 1 or 2")
    if config.method.feature_distance > 0 and config.model.pretrained is None:
        problems.append("method.feature_distance: compares with the pretrained encoder, and model.pretrained is not set; "
                        "give weights, or method.feature_distance=0")
    if config.method.feature_distance > 0 and not config.method.feature_distance_classes:
        problems.append("method.feature_distance_classes: empty; name the thing classes' ids, or method.feature_distance=0")
    if config.data.decode == "ray" and config.data.loader != "ray":
        problems.append("data.decode: ray needs data.loader=ray; decode beside the trainer, or read with Ray")
    if config.method.ignore_top + config.method.ignore_bottom >= config.data.crop[0]:
        problems.append(f"method.ignore_top + method.ignore_bottom: {config.method.ignore_top + config.method.ignore_bottom} "
                        f"rows leave nothing of data.crop's {config.data.crop[0]}")
    margins, size = config.data.unlabeled_margins, config.data.resize_unlabeled or (1 << 31, 1 << 31)
    if margins[0] + margins[1] >= size[0] or margins[2] + margins[3] >= size[1]:
        problems.append(f"data.unlabeled_margins: {list(margins)} leave nothing of data.resize_unlabeled {list(size)}")
    if config.model.head == "hrda" and config.method.kind not in ("supervised", "self_training", "mic"):
        problems.append(f"model.head: hrda has no one set of features for method.kind={config.method.kind} to perturb; use it "
                        "with supervised, self_training or mic, or choose daformer")
    problems += _consistency_conflicts(config) + _tracking_conflicts(config)
    for key, (low, high) in {"data.scale": config.data.scale, "method.blur_sigma": config.method.blur_sigma}.items():
        if low > high:
            problems.append(f"{key}: [{low:g}, {high:g}] begins above its end; give the smaller number first")
    if len(config.data.mean) != 3 or len(config.data.std) != 3:
        problems.append("data.mean, data.std: one number for each of the 3 channels")
    if config.optim.warmup_steps >= config.train.steps:
        problems.append(f"optim.warmup_steps: {config.optim.warmup_steps} is not below train.steps {config.train.steps}; "
                        f"use {config.train.steps // 10} or fewer")
    if config.train.profile and config.train.steps <= PROFILE_WARM_UP:
        problems.append(f"train.profile: begins after {PROFILE_WARM_UP} steps, and train.steps is {config.train.steps}; use "
                        f"{PROFILE_WARM_UP + config.train.profile} or more")
    return problems


def _consistency_conflicts(config: RunConfig) -> list[str]:
    """What FixMatch, UniMatch and hard pixel mining cannot do together with other keys."""
    method, problems = config.method, []
    if method.kind in CONSISTENCY:
        unused = {"ignore_top": 0, "ignore_bottom": 0, "feature_distance": 0.0}
        problems += [f"method.{key}: method.kind={method.kind} has no such thing; leave it at {default:g}, or use self_training"
                     for key, default in unused.items() if getattr(method, key) != default]
    elif method.kind == "stpp":
        if method.weighting in ("batch", "pixel"):
            problems.append(f"method.weighting: {method.weighting} needs labels made while learning; ST++'s are stored with a "
                            "weight for each image: use image or by_coding")
    elif method.kind != "supervised":  # which has no pseudo-labels to weigh, and learns by Dice too
        if method.dice:
            problems.append(f"method.dice: method.kind={method.kind} has no such loss; use fixmatch or unimatch")
        if method.weighting == "by_coding":
            problems.append("method.weighting: by_coding is published with FixMatch and UniMatch; with "
                            f"method.kind={method.kind} use image, batch or pixel")
    if method.pseudo_labels and method.kind != "supervised":
        problems.append(f"method.pseudo_labels: method.kind={method.kind} makes its labels itself; use supervised, or set "
                        "this to false")
    if method.ohem_threshold is not None and config.model.head == "hrda":
        problems.append("method.ohem_threshold: does not go with model.head=hrda; set it to null")
    return problems


def _tracking_conflicts(config: RunConfig) -> list[str]:
    """Tracking URIs that a worker could not use, or that hold a secret."""
    uri = config.tracking.mlflow or ""
    if uri == "local" and "://" in config.run.directory:
        return ["tracking.mlflow: local keeps a database beside the runs, and run.directory is no local folder "
                f"({config.run.directory}); give a server's URI"]
    if re.match(r"\w+:///[^/]", uri):
        return [f"tracking.mlflow: {uri} is relative to a folder of the worker's; give an absolute path (sqlite:////home/...), "
                "or local"]
    if re.match(r"[\w+]+://[^/@]*:[^/@]*@", uri):
        return ["tracking.mlflow: the URI holds a password, which would be written into the run's folder; leave it out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"]
    return []


def keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Every key as (dotted key, type, default, meaning)."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if _is_section(kind):
            yield from keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", _type_name(kind), field.get_default(call_default_factory=True), field.description or ""


def sections(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every section's dotted name."""
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            yield f"{prefix}{name}"
            yield from sections(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def help_text() -> str:
    """The recipes, and every key with type, default and meaning."""
    return "\n".join(["recipes: " + ", ".join(recipe_names()), "", "keys (dotted.key=value):", *key_lines()])


def key_lines(section: type[BaseModel] = RunConfig) -> Iterator[str]:
    """Two lines a key: its type and default, and its meaning."""
    for key, kind, default, meaning in keys(section):
        yield f"  {key}: {kind} = {yaml.safe_dump(_plain(default), default_flow_style=True).splitlines()[0]}"
        yield f"      {meaning}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _type_name(kind: Any) -> str:
    """A type as a person writes it, without the bounds of its numbers."""
    outer, inner = get_origin(kind), get_args(kind)
    if outer is Annotated:
        return _type_name(inner[0])
    if outer is Literal:
        return "|".join(map(str, inner))
    if outer in (Union, UnionType):
        return " | ".join(map(_type_name, inner))
    if outer is not None:
        return f"{outer.__name__}[{', '.join(map(_type_name, inner))}]"
    return "None" if kind is type(None) else "..." if kind is Ellipsis else getattr(kind, "__name__", str(kind))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file merged over its `base:` (a file beside it, without the ending)."""
    try:
        plain = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a YAML file, or --recipe") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    if not isinstance(plain, dict):
        raise InputError(f"{path}: expected keys and values, found {type(plain).__name__}")
    base = plain.pop("base", None)
    if base is None:
        return plain
    parent = path.parent / f"{base}.yaml"
    if not parent.exists():
        parent = RECIPES / f"{base}.yaml"
    if not parent.exists():
        raise InputError(f"{path}: base: there is neither {base}.yaml beside it nor a recipe '{base}'"
                         f"{_hint(str(base), recipe_names())}")
    return _merge(read_yaml(parent), plain)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(plain: dict[str, Any], override: str) -> None:
    _put(plain, *parse_override(override))


def parse_override(override: str) -> tuple[str, Any]:
    """The dotted key and the value of a word `key=value`."""
    key, equals, text = override.partition("=")
    if not equals:
        raise InputError(f"'{override}' is not key=value; for example train.steps=100")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise InputError(f"{key}: '{text}' is not a YAML value") from None
    if value is not None and not isinstance(value, str) and _is_text(key):
        value = text  # 20260101 and 1_16 are names as well
    elif isinstance(value, str) and not _is_text(key):
        try:  # YAML reads 1e-4 as text; a person means a number
            value = float(value)
        except ValueError:
            pass
    return key, value


def _is_text(key: str) -> bool:
    """Whether a key's value is a string, and nothing else but null."""
    return next((kind for known, kind, *_ in keys() if known == key), "") in ("str", "str | None")


def _put(plain: dict[str, Any], key: str, value: Any) -> None:
    node = plain
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InputError(f"{key}: '{parent}' is a value, not a section{_hint(key, [k for k, *_ in keys()])}")
    node[last] = value


def _unknown(plain: dict[str, Any], section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    for name, value in plain.items():
        field = section.model_fields.get(name)
        if field is None and isinstance(value, dict) and value:  # a misspelt section: each of its keys tells which was meant
            yield from (f"{prefix}{name}.{leaf}" for leaf in _leaves(value))
        elif field is None:
            yield f"{prefix}{name}"
        elif isinstance(value, dict) and _is_section(field.annotation):
            yield from _unknown(value, field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]


def _leaves(plain: dict[str, Any]) -> Iterator[str]:
    for name, value in plain.items():
        yield from (f"{name}.{leaf}" for leaf in _leaves(value)) if isinstance(value, dict) and value else [str(name)]


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:  # the right leaf in the wrong section, or a leaf alone
        leaf = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
        close = [leaf[name] for name in difflib.get_close_matches(word.rsplit(".", 1)[-1], list(leaf), n=1, cutoff=0.8)]
    return f"; did you mean '{close[0]}'?" if close else ""
