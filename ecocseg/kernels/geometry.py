"""How label pixels lie over the cells of the logits: tiles of pixels, and the window of cells that each tile is made of.

A program of a kernel owns a tile of label pixels. Bilinear interpolation makes it from a small window of cells (stride 4,
8 x 8 pixels: 4 x 4 cells), so upsampling is a product of a [P, C] matrix of weights with a window [C, K]; its adjoint is
the transposed product. Everything here is computed once on the host, in float64, as F.interpolate has it.

Shapes: h w cells, H W pixels, P pixels of a tile, C cells of a window.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 8
"""Pixels of a tile along a side. 8 x 8 fills the 64 rows of a tensor core's product, and at stride 4 its window is just the
16 cells that such a product is deep."""
FLAT = 64  # pixels of a tile of labels that are as large as the logits: rows do not matter, memory order does
MAX_WINDOW = 256  # cells; more come up only when logits are more than 1.6 times as large as labels


@dataclass(frozen=True)
class Axis:
    """One axis of a resizing."""

    lower: Tensor
    """First of the two cells between which each pixel lies, int32 [S]; the second is the next one, or itself at the end."""
    part: Tensor
    """Weight of the second cell, float32 [S]."""
    tiles: int
    first: Tensor
    """First tile whose pixels use a cell, int32 [s]."""
    count: Tensor
    """Number of tiles from there on that do; 0 for a cell that none uses (labels smaller than logits), int32 [s]."""
    most: int
    """Largest `count`."""


@functools.lru_cache(maxsize=128)
def axis(source: int, size: int, align_corners: bool, device: torch.device) -> Axis:
    """The axis on which `source` cells become `size` pixels."""
    place_S = torch.arange(size, dtype=torch.float64)
    if align_corners:
        place_S *= (source - 1) / (size - 1) if size > 1 else 0.0
    else:
        place_S = ((place_S + 0.5) * (source / size) - 0.5).clamp_min(0)
    lower_S = place_S.long().clamp_max(source - 1)
    part_S = (place_S - lower_S).float()
    upper_S = (lower_S + 1).clamp_max(source - 1)
    base_T, end_T = lower_S[::TILE].contiguous(), upper_S[[min(i + TILE, size) - 1 for i in range(0, size, TILE)]] + 1
    cell_s = torch.arange(source)
    first_s = torch.searchsorted(end_T, cell_s, right=True)
    count_s = (torch.searchsorted(base_T, cell_s, right=True) - first_s).clamp_min(0)
    return Axis(lower_S.int().to(device), part_S.to(device), len(base_T), first_s.int().to(device),
                count_s.int().to(device), int(count_s.max()))


def span(source: int, size: int, align_corners: bool) -> int:
    """Cells from the first to the last that any tile can use, rounded up to a power of two."""
    if align_corners:
        ratio = (source - 1) / (size - 1) if size > 1 else 0.0
    else:
        ratio = source / size
    needed, power = min(int((TILE - 1) * ratio) + 3, source), 1
    while power < needed:
        power *= 2
    return power


def window(source: tuple[int, int], size: tuple[int, int], align_corners: bool) -> tuple[int, int]:
    """Rows and columns of the window of a tile; their product is at least the 16 that a product of matrices needs."""
    rows, columns = span(source[0], size[0], align_corners), span(source[1], size[1], align_corners)
    while rows * columns < 16:
        rows, columns = (rows, 2 * columns) if columns <= rows else (2 * rows, columns)
    return rows, columns


def output_pieces(number: int) -> tuple[int, int]:
    """Length and number of the pieces in which a kernel holds so many outputs: of 16, the depth of a tensor core's product, so
    with as little padding as there can be (40 bits take 48 columns, not 64)."""
    return 16, -(-number // 16)


def class_pieces(number: int) -> tuple[int, int]:
    """The same for classes, of which longer pieces make fewer products: as little padding, then as few as there can be."""
    return min(((size, -(-number // size)) for size in (64, 32, 16)), key=lambda piece: (piece[0] * piece[1], piece[1]))
