"""What a checkpoint holds, and that it is whole or not there.

A checkpoint is a folder `checkpoints/step_00000500/` of safetensors files (no pickles), `meta.json`, and `complete.json`,
which lists the size and checksum of every other file and is written last. A folder without it, or whose files differ
from it, is never resumed from. Nothing in it depends on the number of workers that wrote it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from ecocseg.codebook import Codebook
from ecocseg.coding import EcocCoding, OneHotCoding
from ecocseg.config import CodingConfig, ModelConfig, RunConfig
from ecocseg.data.classes import ClassList
from ecocseg.engine import OptimizerState
from ecocseg.errors import InputError, StorageUnavailable
from ecocseg.evaluate import EvalSpec, Normalize
from ecocseg.models.segmenter import Segmenter, build_segmenter
from ecocseg.storage import Storage, join
from ecocseg.tensor_file import TensorFile

FORMAT = 1
Coding = EcocCoding | OneHotCoding


@dataclass
class Snapshot:
    """All a run needs to go on: weights, optimiser, teacher and its step, config, codebook, classes, best score."""

    step: int
    student: dict[str, Tensor]
    teacher: dict[str, Tensor] | None
    optimizer: OptimizerState
    meta: dict[str, Any]


def build_codebook(config: CodingConfig, classes: ClassList) -> Codebook | None:
    """The codebook a configuration asks for; None for one-hot."""
    from ecocseg import codebook

    spec = config.codebook
    if config.kind == "one_hot":
        return None
    if spec.path is not None:
        book = Codebook.load(spec.path)
        if book.num_classes != classes.num_classes:
            raise InputError(f"coding.codebook.path: {spec.path} is for {book.num_classes} classes, the data has "
                             f"{classes.num_classes}; make one for these classes")
        return book
    if spec.kind == "text":
        return codebook.text(classes.names, spec.length, spec.embeddings)
    return replace(_searched(spec.kind, classes.num_classes, spec.length, spec.seed), class_names=classes.names)


@functools.lru_cache(maxsize=16)
def _searched(kind: str, num_classes: int, length: int, seed: int) -> Codebook:
    """A run asks for its codebook several times, and the search takes up to a second."""
    from ecocseg import codebook

    return (codebook.max_min if kind == "max_min" else codebook.random)(num_classes, length, seed)


def build_coding(config: CodingConfig, book: Codebook | None, num_classes: int) -> Coding:
    if book is None:
        return OneHotCoding(num_classes, align_corners=config.align_corners, kernels=config.kernels)
    return EcocCoding(book, reliability=config.reliability, distance_weight=config.distance_weight,
                      contrast_weight=config.contrast_weight, temperature=config.temperature,
                      bce_weight=config.bce_weight, contrast_negatives=config.contrast_negatives,
                      label_form=config.label_form, max_candidates=config.max_candidates,
                      align_corners=config.align_corners, kernels=config.kernels)


def build_model(config: ModelConfig, num_outputs: int, *, pretrained: bool = True, storage: Storage | None = None) -> Segmenter:
    return build_segmenter(
        config.encoder, config.head, num_outputs, pretrained=config.pretrained if pretrained else None,
        allow_missing=config.allow_missing, channels=config.channels, dropout=config.dropout, drop_path=config.drop_path,
        output_stride=config.output_stride, in_channels=config.in_channels, siamese=config.siamese,
        detail_crop=config.detail_crop, detail_weight=config.detail_weight,
        activation_checkpointing=config.activation_checkpointing, storage=storage)


def build_storage(config: RunConfig) -> Storage:
    return Storage(**config.storage.model_dump())


def build_spec(config: RunConfig) -> EvalSpec:
    e = config.eval
    return EvalSpec(mode=e.mode, crop=e.crop, stride=e.stride, flip=e.flip, scales=e.scales, average=e.average,
                    resize=e.resize, scored_classes=e.scored_classes, multiple=e.multiple,
                    align_corners=config.coding.align_corners)


def _flat(optimizer: OptimizerState) -> dict[str, Tensor]:
    return {f"{name}::{key}": value for name, state in optimizer.items() for key, value in state.items()}


def _nested(flat: dict[str, Tensor]) -> OptimizerState:
    nested: OptimizerState = {}
    for joined, value in flat.items():
        name, _, key = joined.rpartition("::")
        nested.setdefault(name, {})[key] = value
    return nested


def cpu_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's weights on the CPU, each its own contiguous copy."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in module.state_dict().items()}


class Checkpoints:
    """The checkpoints of one run, under `<run>/checkpoints`."""

    def __init__(self, run_url: str, storage: Storage) -> None:
        self.url = join(run_url, "checkpoints")
        self.storage = storage

    def url_of(self, step: int) -> str:
        return join(self.url, f"step_{step:08d}")

    def save(self, snapshot: Snapshot) -> str:
        """Write a checkpoint and return its URL; it counts from the moment its last file is there. What a person has to mend,
        such as a full disk, leaves none of its files behind."""
        folder = self.url_of(snapshot.step)
        try:
            self._write(folder, snapshot)
        except InputError:
            with contextlib.suppress(InputError, StorageUnavailable):
                self.storage.soon().delete(folder)
            raise
        return folder

    def _write(self, folder: str, snapshot: Snapshot) -> None:
        meta = json.dumps({"format": FORMAT, "step": snapshot.step, **snapshot.meta}, indent=1).encode()
        tensors = {"student": snapshot.student, "optimizer": _flat(snapshot.optimizer)}
        if snapshot.teacher is not None:
            tensors["teacher"] = snapshot.teacher
        if self.storage.exists(folder):  # the same step again: what is left of one that was cut off, or damaged since
            self.storage.delete(join(folder, "complete.json"))
            self.storage.delete(folder)
        listing = {"meta.json": {"bytes": len(meta), "sha256": hashlib.sha256(meta).hexdigest()}}
        self.storage.write_bytes(join(folder, "meta.json"), meta)
        for name, group in tensors.items():
            file = TensorFile(group)
            self.storage.write_bytes(join(folder, f"{name}.safetensors"), file)
            listing[f"{name}.safetensors"] = {"bytes": len(file), "sha256": file.sha256()}
        self.storage.write_bytes(join(folder, "complete.json"), json.dumps(listing, indent=1).encode())

    def _folders(self) -> tuple[list[str], list[str]]:
        """URLs of the complete checkpoints and of the others, oldest first."""
        names = sorted(name for name in self.storage.list_dirs(self.url) if name.startswith("step_"))
        complete = [name for name in names if self.storage.exists(join(self.url, name, "complete.json"))]
        return ([join(self.url, name) for name in complete],
                [join(self.url, name) for name in names if name not in complete])

    def complete(self) -> list[str]:
        """URLs of the complete checkpoints, oldest first."""
        return self._folders()[0]

    def prune(self, keep: int, best: str | None) -> None:
        """Delete all but the newest `keep` and the best, and what is left of older ones that were not finished."""
        complete, unfinished = self._folders()
        for url in complete[:-keep]:
            if url != best:
                self.storage.delete(join(url, "complete.json"))  # first, so that a half-deleted one is not complete
                self.storage.delete(url)
        for url in unfinished:
            if complete and url < complete[-1]:
                self.storage.delete(url)

    def newest(self) -> tuple[Snapshot, list[str]] | None:
        """The newest checkpoint that is whole, and a message for each newer one that is damaged or was not finished."""
        passed_over: list[str] = []
        complete, unfinished = self._folders()
        for url in reversed(complete):
            try:
                found = read(url, self.storage)
            except InputError as error:
                passed_over.append(str(error))
                continue
            cut_off = [f"checkpoint {other} is not complete; its writing was cut off" for other in unfinished if other > url]
            return found, passed_over + cut_off
        if passed_over:
            raise InputError("no checkpoint of this run is whole:\n  " + "\n  ".join(passed_over))
        return None


def _files(url: str, storage: Storage, names: tuple[str, ...]) -> dict[str, bytes]:
    """Read and verify some files of a checkpoint; those it does not have are left out."""
    try:
        listing = json.loads(storage.read_bytes(join(url, "complete.json")))
        found = {name: storage.read_bytes(join(url, name)) for name in names if name in listing}
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint {url} is not complete ({error}); use another one") from None
    for name, data in found.items():
        if hashlib.sha256(data).hexdigest() != listing[name]["sha256"]:
            raise InputError(f"checkpoint {url} is damaged: {name} has {len(data)} bytes or other content than the "
                             f"{listing[name]['bytes']} written; use another one")
    return found


def read(url: str, storage: Storage) -> Snapshot:
    """Read a checkpoint, verifying every file.

    Raises:
        InputError: when it is incomplete or damaged, naming the file.
    """
    files = _files(url, storage, ("meta.json", "student.safetensors", "teacher.safetensors", "optimizer.safetensors"))
    meta = json.loads(files["meta.json"])
    if meta["format"] != FORMAT:
        raise InputError(f"checkpoint {url} has format {meta['format']}, this version reads {FORMAT}")
    teacher = load(files["teacher.safetensors"]) if "teacher.safetensors" in files else None
    return Snapshot(meta["step"], load(files["student.safetensors"]), teacher,
                    _nested(load(files["optimizer.safetensors"])), meta)


def check_same_task(meta: dict[str, Any], book: Codebook | None, classes: ClassList, where: str) -> None:
    """Refuse weights whose outputs mean something else.

    Raises:
        InputError: naming what differs: the class list or the codebook.
    """
    if tuple(meta["classes"]["names"]) != tuple(classes.names):
        raise InputError(f"{where} was trained on the classes of '{meta['classes']['name']}' "
                         f"({len(meta['classes']['names'])}), the data has those of '{classes.name}' "
                         f"({classes.num_classes}); use the checkpoint's own data, or start a new run")
    theirs = meta["codebook"]["hash"] if meta["codebook"] else None
    ours = book.hash if book is not None else None
    if theirs != ours:
        raise InputError(f"{where} was trained with another codebook ({_short(theirs)}, this configuration makes "
                         f"{_short(ours)}); keep coding.* as it was, or start a new run")


def _short(digest: str | None) -> str:
    return "one-hot, none" if digest is None else digest[:12]


def describe_task(book: Codebook | None, classes: ClassList) -> dict[str, Any]:
    """The part of `meta` that says what the outputs mean."""
    return {"classes": {"name": classes.name, "names": list(classes.names), "palette": [list(c) for c in classes.palette],
                        "thing_ids": list(classes.thing_ids)},
            "codebook": {**book.to_dict(), "hash": book.hash} if book is not None else None}


@dataclass
class Loaded:
    """A model ready to predict, with everything its outputs need to be understood."""

    model: Segmenter
    coding: Coding
    config: RunConfig
    class_list: ClassList
    normalize: Normalize
    spec: EvalSpec
    step: int


def load_for_inference(path: str, which: str = "student", storage: Storage | None = None) -> Loaded:
    """Load `student` or `teacher` of a checkpoint folder, or of a run folder's newest checkpoint.

    Raises:
        InputError: when there is no whole checkpoint, or it has no teacher.
    """
    storage = storage or Storage()
    url = path.rstrip("/")
    if not storage.exists(join(url, "complete.json")):
        found = Checkpoints(url, storage).complete()
        if not found:
            raise InputError(f"{path} is neither a checkpoint nor a run with one; give a folder that holds complete.json, "
                             "or a run's folder")
        url = found[-1]
    name = f"{which}.safetensors"
    files = _files(url, storage, ("meta.json", name))
    if name not in files:
        raise InputError(f"{url} has no {which} (a supervised run keeps no teacher); ask for the student")
    meta = json.loads(files["meta.json"])
    config = RunConfig.model_validate(meta["config"])
    c = meta["classes"]
    classes = ClassList(c["name"], tuple(c["names"]), tuple(tuple(rgb) for rgb in c["palette"]), tuple(c["thing_ids"]))
    book = Codebook.from_dict(meta["codebook"]) if meta["codebook"] else None
    # a run that insisted on a GPU is used on any machine
    portable = config.coding.model_copy(update={"kernels": "auto"}) if config.coding.kernels == "triton" else config.coding
    coding = build_coding(portable, book, classes.num_classes)
    model = build_model(config.model, coding.num_outputs, pretrained=False)
    model.load_state_dict(load(files[name]))
    model.eval()
    normalize = Normalize(config.data.mean, config.data.std)
    return Loaded(model, coding, config, classes, normalize, build_spec(config), meta["step"])


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("ecocseg", "torch", "torchvision", "timm", "segmentation-models-pytorch", "ray", "deepspeed", "pyarrow",
                 "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["cuda"] = torch.version.cuda or "none"
    return found
