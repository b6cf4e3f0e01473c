"""Coding maths on a CPU in one pass over the pixels (coding.cpp), behind the Coding interface; torch is the fallback and the
reference.

The file is compiled at its first use by the machine's C++ compiler, for its processor, and kept in `ECOCSEG_CACHE`
(~/.cache/ecocseg). Without a compiler, in float64, or where a row of labels does not lie over its cells in a repeating
pattern (a whole number of pixels per cell, or corners aligned likewise), torch computes.

Rows are shared out over torch's threads in blocks of a fixed size, so results are the same bits for any number of threads.
Shapes: B batch, N classes, K outputs, C maps, h w cells of the logits, H W pixels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecocseg.metrics import NUM_BINS, confusion
from ecocseg.target import Target

if TYPE_CHECKING:
    from ecocseg.losses import EcocWeights
    from ecocseg.pseudo_labels import Tables

SOURCE = Path(__file__).with_name("coding.cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast", "-fPIC",
         "-shared", "-std=c++17")  # not -ffast-math: what is not a number must stay so
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 32  # rows of pixels a task; at least 3 rows of cells, so that every second task touches cells of its own
_FORMS = ("hybrid", "code", "bit")
log = logging.getLogger(__name__)


class _Grid(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("cells_high", "cells_wide", "pixels_high", "pixels_wide", "phases")] + [
        (name, ctypes.c_void_p) for name in ("row_cell", "row_share", "phase_cell", "phase_share")]


class _LossOptions(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("bce", "distance", "contrast", "sharpness")] + [
        ("target_instead", ctypes.c_int64)]


def compiler() -> str | None:
    """Path of the C++ compiler: `CXX`, or the first of the usual names that is there."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)


@functools.cache
def library() -> Any:
    """The compiled functions; None, and one line in the log, where they cannot be had."""
    command = compiler()
    if command is None:
        log.info("no C++ compiler here: torch computes the coding maths")
        return None
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():  # what -march=native means depends on it, and homes are shared by machines
        processor += "".join(sorted({line for line in Path("/proc/cpuinfo").read_text().splitlines()
                                     if line.startswith(("flags", "Features", "model name"))}))
    key = hashlib.sha256(SOURCE.read_bytes() + "\0".join([*FLAGS, command, processor]).encode()).hexdigest()[:16]
    built = Path(os.environ.get("ECOCSEG_CACHE", "~/.cache/ecocseg")).expanduser() / f"coding-{key}.so"
    try:
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=built.parent) as folder:  # several workers may do so at once
                made = Path(folder) / built.name
                subprocess.run([command, *FLAGS, str(SOURCE), "-o", str(made)], check=True, capture_output=True, timeout=300)
                made.replace(built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        log.warning("the coding maths could not be compiled (%s %s): torch computes it", error, said.decode()[-500:])
        return None


@functools.lru_cache(maxsize=64)
def _axis(cells: int, pixels: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """For each pixel of an axis the cell before it, which may be -1, and the next cell's share in it. int64, float32."""
    place = torch.arange(pixels, dtype=torch.float64)
    if align_corners:
        place *= (cells - 1) / (pixels - 1) if pixels > 1 else 0.0
    else:
        place = (place + 0.5) * (cells / pixels) - 0.5
    cell = place.floor()
    return cell.long(), (place - cell).float()


def _phases(cells: int, pixels: int, align_corners: bool) -> int | None:
    """Pixels of a row after which their place between two cells repeats; None where it does not."""
    if cells == pixels:
        return 1
    whole, rest = divmod(pixels - 1, cells - 1) if align_corners and cells > 1 else divmod(pixels, cells)
    return whole if rest == 0 and whole > 0 and (not align_corners or cells > 1) else None


@functools.lru_cache(maxsize=32)
def _grid(source: tuple[int, int], size: tuple[int, int], align_corners: bool) -> tuple[_Grid, tuple[Tensor, ...]]:
    """The grid, and the tensors that it points into."""
    phases = _phases(source[1], size[1], align_corners)
    assert phases is not None
    with torch.inference_mode(False):
        row_cell, row_share = _axis(source[0], size[0], align_corners)
        cell, share = _axis(source[1], size[1], align_corners)
        kept = (row_cell, row_share, cell[:phases].clone(), share[:phases].clone())
    return _Grid(*source, *size, phases, *(tensor.data_ptr() for tensor in kept)), kept


def supported(logits_BKhw: Tensor, size: tuple[int, int], align_corners: bool) -> bool:
    """Whether these functions take this case."""
    if logits_BKhw.device.type != "cpu" or logits_BKhw.dtype not in DTYPES or not logits_BKhw.numel() or min(size) < 1:
        return False
    return _phases(logits_BKhw.shape[-1], size[1], align_corners) is not None and library() is not None


@functools.lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "ecocseg-coding")


os.register_at_fork(after_in_child=_pool.cache_clear)


def _run(tasks: Iterator[tuple[Any, ...]], task: Callable[..., None]) -> None:
    threads = torch.get_num_threads()
    if threads == 1:
        for arguments in tasks:
            task(*arguments)
    else:
        list(_pool(threads).map(lambda arguments: task(*arguments), tasks))


def _blocks(height: int, cells_high: int, batch: int, parity: int | None = None) -> Iterator[tuple[int, int, int, int]]:
    """Image, number of the block, first and end row, of all blocks or every second one."""
    rows = max(_BLOCK, -(-3 * height // cells_high))
    for image in range(batch):
        for number, first in enumerate(range(0, height, rows)):
            if parity is None or number % 2 == parity:
                yield image, number, first, min(first + rows, height)


class _Loss(torch.autograd.Function):
    """Sums of the terms [3] (one-hot: [1]), of which the first tensor carries the gradient of the weighted sum."""

    @staticmethod
    def forward(ctx: Any, logits_BKhw: Tensor, target: Target, weight_BHW: Tensor, options: EcocWeights | None,
                signs_NK: Tensor | None, align_corners: bool, with_gradient: bool) -> tuple[Tensor, Tensor]:
        maps_BChw = logits_BKhw.detach().float().contiguous()
        batch, num_bits, *source = maps_BChw.shape
        if signs_NK is not None:
            with torch.autocast("cpu", enabled=False):
                maps_BChw = torch.cat([maps_BChw, (signs_NK @ maps_BChw.flatten(2)).view(batch, -1, *source)], 1)
        height, width = weight_BHW.shape[1:]
        grid, _ = _grid((source[0], source[1]), (height, width), align_corners)
        labels_BHW, weight_BHW = target.labels.contiguous(), weight_BHW.float().contiguous()
        words_BXHW = None if target.bits is None else target.bits.contiguous()
        grad_BChw = torch.zeros_like(maps_BChw) if with_gradient else None
        count = 1 + max(number for _, number, *_ in _blocks(height, source[0], 1))
        sums = torch.zeros(batch, count, 3, dtype=torch.float64)

        def task(image: int, number: int, first: int, end: int) -> None:
            grad = None if grad_BChw is None else ctypes.c_void_p(grad_BChw[image].data_ptr())
            where = [ctypes.c_int64(first), ctypes.c_int64(end), ctypes.c_void_p(sums[image, number].data_ptr()), grad]
            maps, labels, weights = (ctypes.c_void_p(t[image].data_ptr()) for t in (maps_BChw, labels_BHW, weight_BHW))
            if options is None:
                library().cross_entropy(ctypes.byref(grid), maps, ctypes.c_int64(num_bits), labels, weights, *where)
                return
            assert words_BXHW is not None
            chosen = _LossOptions(options.bce, options.distance, options.contrast, 1 / options.temperature,
                                  options.negatives == "target_and_negatives")
            library().ecoc_loss(
                ctypes.byref(grid), maps, ctypes.c_int64(num_bits), ctypes.c_int64(maps_BChw.shape[1] - num_bits), labels,
                weights, ctypes.c_void_p(words_BXHW[image].data_ptr()), ctypes.byref(chosen), *where)

        for parity in (0, 1):
            _run(_blocks(height, source[0], batch, parity), task)
        terms_3 = sums.sum((0, 1))
        if options is not None:  # a term of weight 0 reads 0, as in losses.py
            terms_3 *= torch.tensor([options.bce, options.distance, options.contrast]) != 0
        if grad_BChw is not None and signs_NK is not None:
            grad_BChw[:, :num_bits].flatten(2).baddbmm_(signs_NK.t().expand(batch, -1, -1), grad_BChw[:, num_bits:].flatten(2))
        if options is None:
            loss = terms_3[0]
        else:
            loss = options.bce * terms_3[0] + options.distance * terms_3[1] + options.contrast * terms_3[2]
        ctx.gradient = None if grad_BChw is None else grad_BChw[:, :num_bits].to(logits_BKhw.dtype)
        loss, terms_3 = loss.float(), terms_3.float()
        ctx.mark_non_differentiable(terms_3)
        return loss, terms_3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * grad_loss.to(ctx.gradient.dtype), None, None, None, None, None, None


def loss(logits_BKhw: Tensor, target: Target, weight_BHW: Tensor, align_corners: bool, options: EcocWeights | None = None,
         signs_NK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum over pixels of the cross-entropy, or with `options` of the ECOC loss of codewords with these signs; and its
    terms bce, distance and contrast [3]. Weights are over the divisor; ignored pixels need none."""
    with_gradient = torch.is_grad_enabled() and logits_BKhw.requires_grad
    products = signs_NK if options is not None and options.contrast else None
    return _Loss.apply(logits_BKhw, target, weight_BHW, options, products, align_corners, with_gradient)


def _empty_target(logits_BKhw: Tensor, size: tuple[int, int], num_words: int) -> Target:
    shape = (len(logits_BKhw), *size)
    return Target(labels=torch.empty(shape, dtype=torch.int64), weight=torch.ones(shape), confidence=torch.empty(shape),
                  is_true=torch.zeros(shape, dtype=torch.bool),
                  bits=torch.empty(len(logits_BKhw), num_words, *size, dtype=torch.int64) if num_words else None)


def one_hot_pseudo_label(logits_BKhw: Tensor, size: tuple[int, int], align_corners: bool) -> Target:
    """`OneHotCoding.pseudo_label`: the likeliest class of the upsampled logits, and its softmax probability."""
    maps_BKhw = logits_BKhw.detach().float().contiguous()
    source = (maps_BKhw.shape[-2], maps_BKhw.shape[-1])
    target, (grid, _) = _empty_target(logits_BKhw, size, 0), _grid(source, size, align_corners)

    def task(image: int, number: int, first: int, end: int) -> None:
        assert target.confidence is not None
        library().one_hot_pseudo_label(
            ctypes.byref(grid), ctypes.c_void_p(maps_BKhw[image].data_ptr()), ctypes.c_int64(maps_BKhw.shape[1]),
            ctypes.c_int64(first), ctypes.c_int64(end), ctypes.c_void_p(target.labels[image].data_ptr()),
            ctypes.c_void_p(target.confidence[image].data_ptr()))

    _run(_blocks(size[0], source[0], len(maps_BKhw)), task)
    return target


def counts(logits_BKhw: Tensor, labels_BHW: Tensor, tables: Tables | None, align_corners: bool) -> tuple[Tensor, Tensor]:
    """`Coding.counts`: confusion [N, N] and calibration [15, 3] of logits still to be upsampled; no tables: one-hot."""
    maps_BKhw, labels_BHW = logits_BKhw.detach().float().contiguous(), labels_BHW.long().contiguous()
    num_bits, *source = maps_BKhw.shape[1:]
    grid, _ = _grid((source[0], source[1]), (labels_BHW.shape[1], labels_BHW.shape[2]), align_corners)
    classes_BHW, blocks = torch.empty_like(labels_BHW), list(_blocks(labels_BHW.shape[1], source[0], len(maps_BKhw)))
    bins = torch.zeros(len(blocks), NUM_BINS, 3, dtype=torch.int64)

    def task(place: int, image: int, first: int, end: int) -> None:
        maps, labels, classes = (ctypes.c_void_p(t[image].data_ptr()) for t in (maps_BKhw, labels_BHW, classes_BHW))
        where = labels, ctypes.c_int64(first), ctypes.c_int64(end), classes, ctypes.c_void_p(bins[place].data_ptr())
        if tables is None:
            library().one_hot_count(ctypes.byref(grid), maps, ctypes.c_int64(num_bits), *where)
        else:
            library().ecoc_count(ctypes.byref(grid), maps, ctypes.c_int64(num_bits), ctypes.c_int64(tables.words_XN.shape[1]),
                                 ctypes.c_void_p(tables.words_XN.data_ptr()), *where)

    _run(((place, image, first, end) for place, (image, _, first, end) in enumerate(blocks)), task)
    return confusion(classes_BHW, labels_BHW, num_bits if tables is None else tables.words_XN.shape[1]), bins.sum(0)


def ecoc_pseudo_label(logits_BKhw: Tensor, size: tuple[int, int], tables: Tables, *, reliability: float, limit: int,
                      label_form: str, align_corners: bool) -> Target:
    """`EcocCoding.pseudo_label`: the nearest codeword's class, bits mined among at most `limit` candidates, mean confidence."""
    maps_BKhw = logits_BKhw.detach().float().contiguous()
    (num_words, num_classes), num_bits = tables.words_XN.shape, maps_BKhw.shape[1]
    source = (maps_BKhw.shape[-2], maps_BKhw.shape[-1])
    target, (grid, _) = _empty_target(logits_BKhw, size, num_words), _grid(source, size, align_corners)
    reliable_BHW = target.reliable = torch.empty_like(target.weight)
    blocks = list(_blocks(size[0], source[0], len(maps_BKhw)))
    counts = torch.zeros(len(blocks), 2, dtype=torch.int64)

    def task(place: int, image: int, first: int, end: int) -> None:
        assert target.confidence is not None and target.bits is not None
        library().ecoc_pseudo_label(
            ctypes.byref(grid), ctypes.c_void_p(maps_BKhw[image].data_ptr()), ctypes.c_int64(num_bits),
            ctypes.c_int64(num_classes), ctypes.c_void_p(tables.words_XN.data_ptr()),
            ctypes.c_float(reliability), ctypes.c_int64(limit), ctypes.c_int64(_FORMS.index(label_form)),
            ctypes.c_int64(first), ctypes.c_int64(end),
            *(ctypes.c_void_p(t[image].data_ptr()) for t in (target.labels, target.confidence, reliable_BHW, target.bits)),
            ctypes.c_void_p(counts[place].data_ptr()))

    _run(((place, image, first, end) for place, (image, _, first, end) in enumerate(blocks)), task)
    corrected, differing = counts.sum(0) / (target.labels.numel() * num_bits)
    target.metrics = {"reliable_bits": reliable_BHW.mean(), "corrected_bits": corrected, "differing_bits": differing}
    return target
