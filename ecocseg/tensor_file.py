"""Tensors as a safetensors file that is put together while it is read: no second copy in memory, and no long hold of the
interpreter's lock, which training beside it needs (the library's own `save` holds it from the first byte to the last)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
PIECE_BYTES = 4 << 20
"""Most bytes that are copied at a time."""


class TensorFile:
    """The file of contiguous tensors on the CPU, which must stay as they are while it is read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        header: dict[str, dict[str, object]] = {}
        self._parts: list[memoryview] = []
        end = 0
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):  # every tensor is aligned
            tensor = tensors[name]
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            if tensor.nbytes:
                self._parts.append(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._parts.insert(0, memoryview(len(text).to_bytes(8, "little") + text))
        self._size = sum(len(part) for part in self._parts)

    def __len__(self) -> int:
        return self._size

    def pieces(self) -> Iterator[memoryview]:
        """The content, at most `PIECE_BYTES` at a time, not copied."""
        for part in self._parts:
            for first in range(0, len(part), PIECE_BYTES):
                yield part[first:first + PIECE_BYTES]

    def read(self, first: int, size: int) -> bytes:
        """Some of its bytes; fewer at its end."""
        found, at = bytearray(), 0
        for piece in self.pieces():
            if at + len(piece) > first and at < first + size:
                found += piece[max(0, first - at):first + size - at]
            at += len(piece)
        return bytes(found)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()
