"""cp.async: copies of elements by the threads of a partition, which land when the arrival for them
at a barrier takes place. Groups are not emulated."""

from __future__ import annotations

from typing import Any

from gluon_interpreter.copies import BarrierUse, Copy
from gluon_interpreter.global_memory import gather
from gluon_interpreter.partitions import current
from gluon_interpreter.races import Knowledge
from gluon_interpreter.shared_memory import View, check_descriptor
from gluon_interpreter.source import fault
from gluon_interpreter.values import Value, unwrap


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


def cp_async(
    smem: View, pointer: Value, mask: Any = None, cache_modifier: Any = None,
    eviction_policy: Any = None, volatile: Any = False, cache_policy: Any = None,
) -> None:  # fmt: skip
    """`async_copy.async_load`; masked elements become zero, as cp.async fills what it ignores."""
    check_descriptor(smem, "the destination")
    if pointer.memory is None or pointer.memory.dtype != smem.dtype:
        raise fault(f"cp.async of {pointer.dtype} to a buffer of {smem.dtype}")
    if smem.shape != pointer.shape:
        raise fault(f"cp.async through pointers of {pointer.shape} to a buffer of {smem.shape}")
    raw = gather(pointer, mask, 0, "cp.async of")
    access = smem.access("cp.async", write=True, generic=True, over=False)
    current().copies.append(Copy(smem, raw, access))


def mbarrier_arrive(mbarrier: View, increment_count: Any = True) -> None:
    """Every thread of the partition arrives once its copies have landed.

    With ``increment_count`` the phase first expects as many arrivals more (PTX ISA,
    cp.async.mbarrier.arrive without and with .noinc).
    """
    partition, threads = current(), 32 * current().num_warps
    arrival = CopiesArrival(partition.copies, mbarrier, threads, partition.known.copy())
    if unwrap(increment_count):
        arrival.barrier.pending += threads
    partition.copies = []
    partition.tick()
    partition.program.launch(arrival)
    partition.pause()
