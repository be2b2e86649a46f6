"""Asynchronous copies: cp.async (with its groups and barrier arrivals) and TMA loads and stores."""

from __future__ import annotations

from typing import Any

import numpy as np

from gluon_interpreter.barriers import barrier_at
from gluon_interpreter.global_memory import Memory, gather
from gluon_interpreter.partitions import current
from gluon_interpreter.races import Access, Knowledge
from gluon_interpreter.shared_memory import View, check_descriptor
from gluon_interpreter.source import fault
from gluon_interpreter.timing import Landing
from gluon_interpreter.values import Value, unwrap


class Copy:
    """Raw elements on the way to shared memory, whose place is NaN until they land."""

    def __init__(self, destination: View, raw: Any, access: Access) -> None:
        self.destination, self.raw, self.access = destination, raw, access
        destination.poison()

    def land(self, event: tuple[int, int]) -> None:
        """``event``: whoever knows it may use the data."""
        self.destination.array[...] = self.raw
        self.access.done.append(event)

    def __str__(self) -> str:
        return str(self.access)


class BarrierUse:
    """Of a barrier, by something that will arrive there later."""

    def __init__(self, mbarrier: View, what: str) -> None:
        self.barrier = barrier_at(mbarrier, what)
        self.access = mbarrier.access(what, write=False, generic=True, over=False)

    def __str__(self) -> str:
        return str(self.access)


class TmaLoad(BarrierUse):
    """``copy``: lands all at once, and tells the barrier."""

    def __init__(self, copy: Copy, mbarrier: View) -> None:
        super().__init__(mbarrier, "TMA load")
        self.copy = copy

    def land(self) -> None:
        self.copy.land(self.barrier.end_of_phase)
        self.access.done.append(self.barrier.end_of_phase)
        self.barrier.complete(self.copy.destination.nbytes_per_cta, self.access.line)


class CopiesArrival(BarrierUse):
    """Of a partition's threads at a barrier, as soon as their copies have landed."""

    def __init__(self, copies: list[Copy], mbarrier: View, count: int, known: Knowledge) -> None:
        super().__init__(mbarrier, "async_copy.mbarrier_arrive")
        self.copies, self.count, self.known = copies, count, known

    def land(self) -> None:
        for copy in self.copies:
            copy.land(self.barrier.end_of_phase)
        self.access.done.append(self.barrier.end_of_phase)
        self.barrier.arrive(self.count, self.known, self.access.line)


def cp_async(smem: View, pointer: Value, mask: Any = None, **hints: Any) -> None:
    """`async_copy.async_load`; masked elements become zero, as cp.async fills what it ignores."""
    check_descriptor(smem, "the destination")
    if pointer.memory is None or pointer.memory.dtype != smem.dtype:
        raise fault(f"cp.async of {pointer.dtype} to a buffer of {smem.dtype}")
    if smem.shape != pointer.shape:
        raise fault(f"cp.async through pointers of {pointer.shape} to a buffer of {smem.shape}")
    raw = gather(pointer, mask, 0, "cp.async of")
    access = smem.access("cp.async", write=True, generic=True, over=False)
    current().copies.append(Copy(smem, raw, access))


def commit_group() -> None:
    partition = current()
    partition.groups.append(partition.copies)
    partition.copies = []


def wait_group(num_outstanding: Any = 0) -> None:
    partition, left = current(), int(unwrap(num_outstanding))
    while len(partition.groups) > left:
        for copy in partition.groups.pop(0):
            copy.land(partition.now)
    partition.pause()


def mbarrier_arrive(mbarrier: View, increment_count: Any = True) -> None:
    """Every thread of the partition arrives once its copies have landed.

    With ``increment_count`` the phase first expects as many arrivals more (PTX ISA,
    cp.async.mbarrier.arrive without and with .noinc).
    """
    partition, threads = current(), 32 * current().num_warps
    copies = [copy for group in [*partition.groups, partition.copies] for copy in group]
    arrival = CopiesArrival(copies, mbarrier, threads, partition.known.copy())
    if unwrap(increment_count):
        arrival.barrier.pending += threads
    partition.copies, partition.groups = [], []
    partition.tick()
    partition.program.launch(arrival)
    partition.pause()


class BlockType:
    def __init__(self, dtype: Any, shape: list[int]) -> None:
        self.element_ty, self.shape = dtype, shape
        self.nbytes = int(np.prod(shape)) * dtype.primitive_bitwidth // 8


class Descriptor:
    """A tensor_descriptor. ``host``: gluon's TensorDescriptor of a CPU tensor."""

    def __init__(self, name: str, host: Any) -> None:
        self.memory = Memory(name, host.base)
        self.shape, self.strides = list(host.shape), list(host.strides)
        self.block_shape, self.layout, self.dtype = (
            list(host.block_shape),
            host.layout,
            self.memory.dtype,
        )
        self.block_type = BlockType(self.dtype, self.block_shape)
        self.nbytes_per_cta = self.block_type.nbytes
        self.padding = np.nan if host.padding == "nan" else 0

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
        self.memory.check(np.array([min(offset, 2**62), min(last, 2**62)]), "TMA of")
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
    raw = np.full(result.shape, tensor_desc.padding, elements.dtype)
    raw[part] = elements
    access = result.access("TMA load", write=True, generic=False, over=False)
    current().program.launch(TmaLoad(Copy(result, raw, access), barrier))
    current().pause()


class TmaStore:
    """Reads shared memory when it lands, at the latest at `store_wait`."""

    def __init__(
        self, source: View, elements: Any, part: tuple[slice, ...], access: Access
    ) -> None:
        self.source, self.elements, self.part, self.access = source, elements, part, access
        self.landed = False

    def land(self) -> None:
        if not self.landed:
            self.elements[...] = self.source.array[self.part]
        self.landed = True

    def __str__(self) -> str:
        return str(self.access)


def tma_store(tensor_desc: Descriptor, coord: Any, src: View, cache_policy: Any = None) -> None:
    tensor_desc.check(src)
    elements, part = tensor_desc.inside(coord)
    access = src.access("TMA store", write=False, generic=False, over=False)
    store, partition = TmaStore(src, elements, part, access), current()
    partition.stores.append(store)
    if partition.program.timing.landing is Landing.AT_ONCE:
        store.land()
    partition.pause()


def store_wait(pendings: Any) -> None:
    partition, left = current(), int(unwrap(pendings))
    while len(partition.stores) > left:
        store = partition.stores.pop(0)
        store.land()
        store.access.done.append(partition.now)
    partition.pause()
