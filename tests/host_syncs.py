"""Finds, on a CPU, what would make a host wait for a GPU: a program that watches every torch operation of a step.

Tensors are told apart by where they come from: what is given to `of_device` (weights, batches) and what is computed from it
would lie on a GPU, all else is the host's. A wait is reading a device tensor's content, an operation whose result's size
depends on that content, or a copy from the host that is not asked for as `non_blocking`.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "__array__", "is_nonzero", "equal"}
SIZED_BY_CONTENT = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "_unique2", "unique_dim",
                    "unique_consecutive", "bincount", "is_nonzero", "equal", "repeat_interleave", "argwhere"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"tensor", "as_tensor", "asarray"}


class HostSyncs:
    """Use as a context; `found` has a line for each wait: what, and where in the code."""

    def __init__(self, given: Iterable[Any] = ()) -> None:
        self.found: list[str] = []
        self._paused = False
        self._storages: dict[int, torch.UntypedStorage] = {}  # they are held, so that no other can take their place
        self.of_device(given)
        self._modes = (_Functions(self), _Operations(self))

    def of_device(self, things: Any) -> Any:
        """Note that these tensors would lie on the device; returns them."""
        for tensor in tensors(things):
            storage = tensor.untyped_storage()
            self._storages.setdefault(storage._cdata, storage)
        return things

    def on_device(self, things: Any) -> bool:
        return any(tensor.untyped_storage()._cdata in self._storages for tensor in tensors(things))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens here is done by a kernel where there is a GPU, and waits for nothing."""
        paused, self._paused = self._paused, True
        yield
        self._paused = paused

    def note(self, what: str) -> None:
        if self._paused:
            return
        frames = [frame for frame in traceback.extract_stack()
                  if "/torch/" not in frame.filename and not frame.filename.endswith("host_syncs.py")]
        self.found.append(f"{what}: {frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}")

    def __enter__(self) -> HostSyncs:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def tensors(things: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(things) if isinstance(leaf, Tensor)]


class _Functions(TorchFunctionMode):
    """What Python calls by name: some of it reads memory without any operation."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in READS and self.syncs.on_device(args):
            self.syncs.note(name)
        to_device = any(isinstance(value, torch.device) for value in (*args[1:], kwargs.get("device")))
        if name == "to" and to_device and not kwargs.get("non_blocking") and not self.syncs.on_device(args[0]):
            self.syncs.note("copy from the host")
        if name in COPIES and kwargs.get("device") is not None and not self.syncs.on_device(args):
            self.syncs.note("copy from the host")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Every operation, those inside torch's own functions and of the backward pass too."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        on_device = self.syncs.on_device((args, kwargs))
        if on_device and name in SIZED_BY_CONTENT and not (name == "repeat_interleave" and isinstance(args[1], int)):
            self.syncs.note(name)
        if on_device and name in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1])):
            self.syncs.note("indexing by a mask")
        result = func(*args, **kwargs)
        if on_device:
            self.syncs.of_device(result)
            if func._schema.is_mutable:
                self.syncs.of_device([value for argument, value in zip(func._schema.arguments, args, strict=False)
                                      if argument.is_write])
        return result
