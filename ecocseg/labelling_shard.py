"""One shard of a pool labelled by a checkpoint, written whole with a note beside it.

Threads read and decode the next images and encode the last labels while the model runs; images of one size go through it
together. The result has the number, rows and order of the pool's shard and needs nothing else: images are copied.

Shapes: B batch, C channels (6 for pairs), L planes of 8 bits, N classes, H W pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecocseg.checkpoint import Loaded
from ecocseg.data.packing_plan import NOTES, Shard
from ecocseg.data.packing_shard import Packed, note_name
from ecocseg.data.pseudo import encode_bits, encode_mask
from ecocseg.data.shards import PSEUDO_SCHEMA, SCHEMA, Manifest, ShardBuilder, read_row_group
from ecocseg.errors import InputError
from ecocseg.evaluate import EvalSpec, image_of_row, predict_logits
from ecocseg.inference import autocast_dtype
from ecocseg.storage import Storage, join
from ecocseg.target import IGNORE, Target

GPU_BATCH = 8
"""Images in a forward pass on a GPU, where nothing else is asked for."""
WAITING_BATCHES = 8
"""Images that wait for others of their size, in batches; then the largest group goes through as it is."""


@dataclass(frozen=True)
class Labeler:
    """The checkpoint that labels, earlier ones to compare it with, and how they predict. It pickles."""

    last: Loaded
    spec: EvalSpec
    threshold: float
    """Confidence from which a pixel counts towards the image's weight."""
    earlier: tuple[Loaded, ...] = ()
    batch: int = 1
    """Images of one size in a forward pass."""

    def __post_init__(self) -> None:
        for one in self.earlier:
            books = [getattr(loaded.coding, "codebook", None) for loaded in (self.last, one)]
            if one.class_list.names != self.last.class_list.names or len({book and book.hash for book in books}) > 1:
                raise InputError(f"--checkpoints: the one of step {one.step} has other classes or another codebook than the "
                                 f"last, of step {self.last.step}; give checkpoints of one run")

    @property
    def pair(self) -> bool:
        return self.last.config.model.siamese

    def describe(self) -> dict[str, Any]:
        """What the labels follow from, as the manifest tells it."""
        coding = self.last.config.coding
        book = getattr(self.last.coding, "codebook", None)
        told: dict[str, Any] = {"coding": coding.kind, "codebook": None, "bits": None}
        if book is not None:
            told |= {"codebook": book.hash, "bits": self.last.coding.num_outputs, "label_form": coding.label_form,
                     "reliability": coding.reliability, "max_candidates": coding.max_candidates}
        return {**told, "confidence_threshold": self.threshold, "step": self.last.step,
                "stability_steps": [one.step for one in self.earlier], "weights": weights_hash(self.last),
                "earlier_weights": [weights_hash(one) for one in self.earlier], "precision": self.last.config.engine.precision,
                "prediction": dataclasses.asdict(self.spec)}

    def to(self, device: torch.device) -> Labeler:
        for loaded in (self.last, *self.earlier):
            loaded.model.to(device).eval()
        return self

    def target(self, image_BCHW: Tensor) -> Target:
        """Pseudo-labels of uint8 images on the device, at their size, weighed image by image."""
        target = self._guess(self.last, image_BCHW)
        assert target.confidence is not None
        share_B = (target.confidence >= self.threshold).double().mean((1, 2))
        target.weight = share_B[:, None, None].expand(target.weight.shape)
        return target

    def stability(self, image_BCHW: Tensor, labels_BHW: Tensor) -> Tensor | None:
        """Mean over the earlier checkpoints of the IoU of their prediction and the last one's (ST++). Shape: [B]."""
        if not self.earlier:
            return None
        found = [agreement(self._guess(one, image_BCHW).labels, labels_BHW, self.last.class_list.num_classes)
                 for one in self.earlier]
        return torch.stack(found).mean(0)

    def _guess(self, loaded: Loaded, image_BCHW: Tensor) -> Target:
        logits_BKhw = predict_logits(loaded.model, loaded.coding, loaded.normalize(image_BCHW), self.spec,
                                     autocast_dtype(loaded))
        return loaded.coding.pseudo_label(logits_BKhw, image_BCHW.shape[-2:])


def agreement(a_BHW: Tensor, b_BHW: Tensor, num_classes: int) -> Tensor:
    """Mean IoU of two predictions of each image, over the classes that either has. Shape: float64 [B]."""
    offset_B11 = torch.arange(len(a_BHW), device=a_BHW.device)[:, None, None] * num_classes**2
    pairs_P = (offset_B11 + a_BHW * num_classes + b_BHW).reshape(-1)
    counts_BNN = torch.bincount(pairs_P, minlength=len(a_BHW) * num_classes**2).view(-1, num_classes, num_classes).double()
    hits_BN = counts_BNN.diagonal(dim1=1, dim2=2)
    return (hits_BN / (counts_BNN.sum(1) + counts_BNN.sum(2) - hits_BN)).nanmean(1)


def weights_hash(loaded: Loaded) -> str:
    """sha256 over a model's weights, in hex."""
    digest = hashlib.sha256()
    for name, value in sorted(loaded.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Place:
    """Where a pool is read from and its labels go to."""

    pool: Manifest
    destination: str
    storage: Storage
    threads: int
    """That decode images and encode labels beside the model."""


@dataclass(frozen=True)
class Decoded:
    """A row of the pool by its number in the shard, and its image; or what is wrong with it."""

    number: int
    row: dict[str, Any]
    image_CHW: Tensor | None
    problem: str = ""


def ahead(work: Callable[[Any], Any], items: Iterable[Any], pool: ThreadPoolExecutor, depth: int) -> Iterator[Any]:
    """`map` in order, with `depth` items under way before they are asked for."""
    pending: deque[Future] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > depth:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def label_shard(shard: Shard, labeler: Labeler, place: Place, device: torch.device) -> Packed:
    """Label and write one shard, then its note. Images that do not decode stay, without a label and with weight 0.

    Raises:
        InputError: when the pool cannot be read or the destination written.
    """
    note = join(place.destination, NOTES, note_name(shard.number))
    place.storage.delete(note)  # first: what is there may be of another checkpoint
    groups = place.pool.files[shard.number].row_groups
    columns = [name for name in SCHEMA.names if name not in ("mask", "class_pixels")]

    def read(group: int) -> list[dict[str, Any]]:
        return read_row_group(place.pool, shard.number, group, columns, place.storage).to_pylist()

    def decode(numbered: tuple[int, dict[str, Any]]) -> Decoded:
        try:
            return Decoded(*numbered, image_of_row(numbered[1], labeler.pair))
        except InputError as error:
            return Decoded(*numbered, None, str(error))

    def stack(batch: list[Decoded]) -> tuple[list[Decoded], Tensor]:
        image_BCHW = torch.stack([one.image_CHW for one in batch if one.image_CHW is not None])
        return batch, image_BCHW if device.type == "cpu" else image_BCHW.pin_memory().to(device, non_blocking=True)

    num_classes = labeler.last.class_list.num_classes
    rows: dict[int, Future] = {}
    problems: list[tuple[str, str]] = []

    def encode(one: Decoded, *labels: Any) -> None:
        rows[one.number] = pool.submit(labelled_row, one.row, num_classes, *labels)

    def good(decoded: Iterator[Decoded]) -> Iterator[Decoded]:
        for one in decoded:
            if one.image_CHW is not None:
                yield one
            else:
                problems.append((one.row["image_id"], one.problem))
                encode(one, np.full((one.row["height"], one.row["width"]), IGNORE, np.uint8), None, 0.0, None)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as stacker, ThreadPoolExecutor(place.threads) as pool:
        tables = ahead(read, range(len(groups)), reader, 2)
        numbered = enumerate(row for table in tables for row in table)
        decoded = ahead(decode, numbered, pool, 2 * labeler.batch + place.threads)
        for batch, image_BCHW in ahead(stack, by_size(good(decoded), labeler.batch), stacker, 2):
            labels = label_batch(labeler, image_BCHW)
            for at, one in enumerate(batch):
                encode(one, *labels.of(at))
        builder = ShardBuilder(max(groups), PSEUDO_SCHEMA)
        totals = np.zeros(num_classes, np.int64)
        for number in range(len(rows)):
            row = rows.pop(number).result()
            totals += row["class_pixels"]
            builder.add(row)
    data, file = builder.finish(shard.number)
    place.storage.write_bytes(join(place.destination, file.name), data)
    packed = Packed(shard.number, shard.fingerprint, file, file.rows, tuple(int(t) for t in totals), problems=tuple(problems))
    place.storage.write_bytes(note, packed.to_json())
    return packed


def by_size(decoded: Iterable[Decoded], size: int) -> Iterator[list[Decoded]]:
    """Batches of at most `size` images of one size, in the order in which they fill; a function of the rows alone."""
    waiting: dict[torch.Size, list[Decoded]] = {}
    for one in decoded:
        assert one.image_CHW is not None
        shape = one.image_CHW.shape
        waiting.setdefault(shape, []).append(one)
        if len(waiting[shape]) == size:
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) >= WAITING_BATCHES * size:
            yield waiting.pop(max(waiting, key=lambda key: len(waiting[key])))
    yield from waiting.values()


@dataclass(frozen=True)
class BatchLabels:
    """Labels of a batch on the host: classes, changed bits, weights, stabilities."""

    labels_BHW: NDArray[np.uint8]
    changes_BLHW: NDArray[np.uint8] | None
    weight_B: list[float]
    stability_B: list[float] | None

    def of(self, at: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None, float, float | None]:
        return (self.labels_BHW[at], None if self.changes_BLHW is None else self.changes_BLHW[at], self.weight_B[at],
                None if self.stability_B is None else self.stability_B[at])


@torch.no_grad()
def label_batch(labeler: Labeler, image_BCHW: Tensor) -> BatchLabels:
    """Labels of uint8 images on the labeler's device."""
    target = labeler.target(image_BCHW)
    changes_BLHW = labeler.last.coding.changes(target)
    stability_B = labeler.stability(image_BCHW, target.labels)
    return BatchLabels(target.labels.to(torch.uint8).cpu().numpy(),
                       None if changes_BLHW is None else changes_BLHW.cpu().numpy(), target.weight[:, 0, 0].tolist(),
                       None if stability_B is None else stability_B.tolist())


def labelled_row(row: dict[str, Any], num_classes: int, labels_HW: NDArray[np.uint8], changes_LHW: NDArray[np.uint8] | None,
                 weight: float, stability: float | None) -> dict[str, Any]:
    """A row of the result."""
    counts_N = np.bincount(labels_HW.reshape(-1), minlength=num_classes)[:num_classes]
    return {**row, "mask": encode_mask(labels_HW), "class_pixels": counts_N.tolist(), "weight": weight,
            "bits": None if changes_LHW is None else encode_bits(changes_LHW), "stability": stability}
