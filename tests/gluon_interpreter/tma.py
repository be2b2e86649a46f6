"""TMA: loads of boxes that a descriptor tells. The kernels store through pointers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gluon_interpreter.copies import BarrierUse, Copy
from gluon_interpreter.global_memory import Memory
from gluon_interpreter.partitions import current
from gluon_interpreter.shared_memory import View, check_descriptor
from gluon_interpreter.source import fault
from gluon_interpreter.values import unwrap


class BlockType:
    def __init__(self, dtype: Any, shape: list[int]) -> None:
        self.element_ty, self.shape = dtype, shape
        self.nbytes = math.prod(shape) * dtype.primitive_bitwidth // 8


class Descriptor:
    """A tensor_descriptor. ``host``: gluon's TensorDescriptor of a CPU tensor."""

    def __init__(self, name: str, host: Any) -> None:
        if host.padding != "zero":
            raise ValueError(f"{name} is padded with {host.padding}: only zero is emulated")
        self.memory = Memory(name, host.base)
        self.shape, self.strides = list(host.shape), list(host.strides)
        self.block_shape, self.layout = list(host.block_shape), host.layout
        self.dtype = self.memory.dtype
        self.block_type = BlockType(self.dtype, self.block_shape)
        self.nbytes_per_cta = self.block_type.nbytes

    def inside(self, coord: Any) -> tuple[Any, tuple[slice, ...]]:
        """The elements in memory of a box, and the part of the box that they are."""
        starts = [int(unwrap(c)) for c in coord]
        if len(starts) != len(self.shape):
            raise fault(f"{len(starts)} coordinates for a descriptor of {len(self.shape)} axes")
        if not all(-(2**31) <= c < 2**31 for c in starts):
            raise fault(f"coordinates {starts} are no int32")
        low = [max(0, -c) for c in starts]
        high = [min(b, n - c) for b, n, c in zip(self.block_shape, self.shape, starts, strict=True)]
        part = tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))
        sizes = [p.stop - p.start for p in part]
        if 0 in sizes:
            return np.zeros(sizes, self.memory.flat.dtype), part
        return self._window([c + a for c, a in zip(starts, low, strict=True)], sizes), part

    def _window(self, first: list[int], sizes: list[int]) -> Any:
        """A view of memory. Addresses wrap at 2^64 bytes, which ragged descriptors rely on."""
        item = self.memory.flat.itemsize
        offset = sum(c * s for c, s in zip(first, self.strides, strict=True)) * item % 2**64 // item
        strides = [s if n > 1 else 0 for s, n in zip(self.strides, sizes, strict=True)]
        last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
        self.memory.check(offset, last, "TMA of")
        return np.lib.stride_tricks.as_strided(
            self.memory.flat[offset:], sizes, [s * item for s in strides]
        )

    def check(self, view: View) -> None:
        check_descriptor(view, "the buffer of a TMA copy")
        if list(view.shape) != self.block_shape or view.dtype != self.dtype:
            raise fault(
                f"TMA of a box of {self.block_shape} {self.dtype} and a buffer of {view.shape} "
                f"{view.dtype}"
            )


class TmaLoad(BarrierUse):
    """``copy``: lands all at once, and tells the barrier."""

    def __init__(self, copy: Copy, mbarrier: View) -> None:
        super().__init__(mbarrier, "TMA load")
        self.copy = copy

    def land(self) -> None:
        self.copy.land(self.barrier.end_of_phase)
        self.access.done.append(self.barrier.end_of_phase)
        self.barrier.complete(self.copy.destination.nbytes_per_cta, self.access.line)


def tma_load(
    tensor_desc: Descriptor, coord: Any, barrier: View, result: View, pred: Any = True,
    multicast: Any = False, cache_policy: Any = None,
) -> None:  # fmt: skip
    if not unwrap(pred):
        return
    if unwrap(multicast):
        raise fault("multicast is not emulated")
    tensor_desc.check(result)
    elements, part = tensor_desc.inside(coord)
    raw = np.zeros(result.shape, elements.dtype)
    raw[part] = elements
    access = result.access("TMA load", write=True, generic=False, over=False)
    current().program.launch(TmaLoad(Copy(result, raw, access), barrier))
    current().pause()
