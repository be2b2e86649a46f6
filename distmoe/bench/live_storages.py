"""Bytes of tensor storages as they come and go: what PyTorch's allocator would count on a GPU."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LISTED = 8


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The storages that operators made while the mode is on, and that live. Set ``phase`` as the
    work goes on. Sizes are read anew at every operator that makes a storage: FSDP frees and refills
    storages without an operator.

    ``peak``: the most bytes by phase; ``at_peak``: what took them, by operator, dtype and shape,
    the `LISTED` largest. ``collects``: garbage is no peak; Triton's interpreter leaves reference
    cycles, which keep what a launch was given. What other threads and libraries allocate is not
    seen.
    """

    def __init__(self, *, collects: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        self._collects = collects
        self.peak: dict[str, int] = {}
        self.at_peak: dict[str, list[tuple[str, int]]] = {}
        self._live: dict[int, tuple[weakref.ref[Any], str]] = {}
        self._ignored: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """Storages that were there before, and stay."""
        self._ignored |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [self._note(leaf, func) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(made):
            self.read()
        return result

    def _note(self, tensor: Tensor, func: Any) -> bool:
        """Whether the storage is new. Of a DTensor this rank's part."""
        tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if tensor.device.type == "meta":
            return False
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ignored:
            return False
        known = self._live.get(key)
        if known is not None and known[0]() is not None:
            return False
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._live[key] = (weakref.ref(storage), f"{func} {dtype} {list(tensor.shape)}")
        return True

    def read(self) -> int:
        """Bytes that live now; notes a new peak of the phase."""
        now, sizes = 0, []
        for key, (reference, label) in list(self._live.items()):
            storage = reference()
            if storage is None:
                del self._live[key]
                continue
            sizes.append((label, storage.nbytes()))
            now += sizes[-1][1]
        if now > self.peak.get(self.phase, 0):
            if self._collects and gc.collect():
                return self.read()
            self.peak[self.phase] = now
            self.at_peak[self.phase] = _largest(sizes)[:LISTED]
        return now


def _largest(sizes: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Bytes by what made the storages, the largest first."""
    total: dict[str, int] = {}
    for label, size in sizes:
        total[label] = total.get(label, 0) + size
    return sorted(total.items(), key=lambda item: -item[1])
