"""Maps given out at label size, a strip of rows at a time, and the way back for their gradient.

Bilinear resizing is a product with one matrix along columns and one along rows. The first is made once for each row of
cells, for a band of some strips together; the second once a strip. Both matrices are banded, and what is 0 is left out.

Shapes: C maps, H W pixels, h w cells, r cell rows of a band, P pixels of a strip.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ecocseg.device import to_device

_CPU_STRIP, _GPU_STRIP = 1 << 14, 1 << 20  # pixels of a strip: a map of K of them stays in cache / fills a GPU
_BAND_STRIPS = 4  # strips that share a product along columns
_BLOCK = 128  # pixels of a row made by one product: few enough to leave most zeros of the matrix out


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def strip_rows(width: int, device: torch.device) -> int:
    """Rows of a strip."""
    return max(1, (_CPU_STRIP if device.type == "cpu" else _GPU_STRIP) // width)


def row_strips(height: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(first row, end row) of each strip of an image."""
    rows = strip_rows(width, device)
    for first in range(0, height, rows):
        yield first, min(first + rows, height)


@functools.lru_cache(maxsize=64)
def _axis_weights(source: int, size: int, align_corners: bool) -> tuple[Tensor, list[int], list[int]]:
    """Linear interpolation along one axis as a matrix float64 [size, source], with each row's first and end column."""
    eye = torch.eye(source, dtype=torch.float64)[None, None]
    weights = F.interpolate(eye, (size, source), mode="bilinear", align_corners=align_corners)[0, 0]
    used = weights != 0
    first = used.int().argmax(1)
    end = source - used.flip(1).int().argmax(1)
    return weights, first.tolist(), end.tolist()


def bilinear(map_BKhw: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Maps at this height and width, all at once. Shape: [B, K, H, W]."""
    if map_BKhw.shape[-2:] == size:
        return map_BKhw
    return F.interpolate(map_BKhw, size=size, mode="bilinear", align_corners=align_corners)


class Scratch:
    """Buffers by name, each used again by every strip that asks for it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, pixels: int) -> Tensor:
        """A tensor of any content. Shape: [rows, pixels]."""
        flat = self._flat.get(name)
        if flat is None or flat.numel() < rows * pixels:
            flat = self._flat[name] = torch.empty(rows * pixels, dtype=self.dtype, device=self.device)
        return flat[: rows * pixels].view(rows, pixels)


_kept = threading.local()


def scratch(dtype: torch.dtype, device: torch.device) -> Scratch:
    """Buffers of this thread. On a CPU they stay, some tens of MB: memory that is asked for anew has to be mapped page by
    page, which takes longer than a pass over it. A GPU's allocator keeps memory itself."""
    if device.type != "cpu":
        return Scratch(dtype, device)
    by_dtype: dict[torch.dtype, Scratch] = _kept.__dict__.setdefault("by_dtype", {})
    return by_dtype.setdefault(dtype, Scratch(dtype, device))


Blocks = list[tuple[slice, slice, Tensor]]
"""Pixels of a row, the cells they are made of, and the matrix between them."""


@functools.lru_cache(maxsize=32)
def _matrices(source: tuple[int, int], size: tuple[int, int], align_corners: bool, dtype: torch.dtype,
              device: torch.device) -> tuple[Tensor, list[int], list[int], Blocks]:
    """What resizes rows [H, h], the first and end cell row of each pixel row, and what resizes columns; copied to a device
    once, since a copy makes the host wait for it."""
    rows, first, end = _axis_weights(source[0], size[0], align_corners)
    columns, left, right = _axis_weights(source[1], size[1], align_corners)
    blocks: Blocks = []
    with torch.inference_mode(False):
        for start in range(0, size[1], _BLOCK):
            stop = min(start + _BLOCK, size[1])
            cells = slice(min(left[start:stop]), max(right[start:stop]))
            block = columns[start:stop, cells].t().to(dtype).contiguous()
            blocks.append((slice(start, stop), cells, to_device(block, device)))
        return to_device(rows.to(dtype), device), first, end, blocks


class Upsample:
    """Bilinear resizing from (h, w) cells to (H, W) pixels as matrices; equal to F.interpolate."""

    def __init__(self, source: tuple[int, int], size: tuple[int, int], align_corners: bool, like: Tensor) -> None:
        self.source, self.size, self.dtype, self.device = source, size, compute_dtype(like), like.device
        self.identity = source == size
        if not self.identity:
            self.rows_Hh, self.first, self.end, self.blocks = _matrices(source, size, align_corners, self.dtype, self.device)


class Strips:
    """The maps of an image strip by strip, and their gradient's way back. One object serves all images of a batch."""

    def __init__(self, upsample: Upsample, scratch: Scratch) -> None:
        self.upsample, self.scratch = upsample, scratch
        self.low = self.high = 0  # cell rows of the band
        self.maps_Chw = self.band_CrW = torch.empty(0)
        self.total_Chw: Tensor | None = None
        self.grad_CrW = torch.empty(0)

    def begin(self, maps_Chw: Tensor, total_Chw: Tensor | None = None) -> None:
        """Go to an image. Its gradient is added to `total_Chw` (with equal sizes: written to it), by `end` at the latest."""
        self.maps_Chw, self.total_Chw, self.low, self.high = maps_Chw, total_Chw, 0, 0

    def values(self, first: int, end: int) -> Tensor:
        """Rows first to end at label size; not to be written to, and valid until the next call. Shape: [C, P]."""
        u = self.upsample
        if u.identity:
            return self.maps_Chw[:, first:end].to(u.dtype).flatten(1)
        low, high = u.first[first], u.end[end - 1]
        if not self.low <= low < high <= self.high:
            self._next_band(first)
        num_maps, width = len(self.maps_Chw), u.size[1]
        values_CP = self.scratch("strip", num_maps, (end - first) * width)
        torch.matmul(u.rows_Hh[first:end, low:high], self.band_CrW[:, low - self.low : high - self.low],
                     out=values_CP.view(num_maps, end - first, width))
        return values_CP

    def _next_band(self, first: int) -> None:
        """The product along columns for the strips from row `first` on."""
        self.end()
        u = self.upsample
        last = min(u.size[0], first + _BAND_STRIPS * strip_rows(u.size[1], u.device)) - 1
        self.low, self.high = u.first[first], u.end[last]
        shape = (len(self.maps_Chw), self.high - self.low, u.size[1])
        maps_Rw = self.maps_Chw[:, self.low : self.high].to(u.dtype).reshape(-1, u.source[1])
        band_RW = self.scratch("band", len(maps_Rw), u.size[1])
        for pixels, cells, block in u.blocks:
            torch.mm(maps_Rw[:, cells], block, out=band_RW[:, pixels])
        self.band_CrW = band_RW.view(shape)
        if self.total_Chw is not None:
            self.grad_CrW = self.scratch("band gradient", len(maps_Rw), u.size[1]).zero_().view(shape)

    def gradient_buffer(self, first: int, end: int) -> Tensor:
        """Where the gradient of these rows is to be written, before `add_gradient`. Shape: [C, P]."""
        if self.upsample.identity:
            assert self.total_Chw is not None
            return self.total_Chw[:, first:end].flatten(1)
        return self.scratch("gradient", len(self.maps_Chw), (end - first) * self.upsample.size[1])

    def add_gradient(self, grad_CP: Tensor, first: int, end: int) -> None:
        """Carry what was written to the buffer of the strip given out last back to its cells."""
        u = self.upsample
        if u.identity:
            return
        low, high = u.first[first], u.end[end - 1]
        num_maps = len(grad_CP)
        part_CrW = self.grad_CrW[:, low - self.low : high - self.low]
        part_CrW.baddbmm_(u.rows_Hh[first:end, low:high].t().expand(num_maps, -1, -1), grad_CP.view(num_maps, end - first, -1))

    def end(self) -> None:
        """Add the gradient of the band to that of the image."""
        if self.total_Chw is None or self.upsample.identity or self.high == 0:
            return
        num_maps, num_rows, width = self.grad_CrW.shape
        grad_RW = self.grad_CrW.view(-1, width)
        for pixels, cells, block in self.upsample.blocks:
            part_Rw = torch.mm(grad_RW[:, pixels], block.t())
            self.total_Chw[:, self.low : self.high, cells] += part_Rw.view(num_maps, num_rows, -1)
