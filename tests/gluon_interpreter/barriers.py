"""mbarriers: arrivals and bytes end a phase, and waiters wait for the end of one.

PTX ISA, "Parallel synchronization and communication instructions: mbarrier".
"""

from __future__ import annotations

from typing import Any

from gluon_interpreter.partitions import current
from gluon_interpreter.races import Clock, Knowledge
from gluon_interpreter.shared_memory import View, check_descriptor
from gluon_interpreter.source import Line, fault, line
from gluon_interpreter.values import unwrap

# PTX ISA: the bytes that a phase may still expect.
MOST_BYTES = 2**20 - 1


class Barrier:
    """``pending``: arrivals that the phase still lacks, ``bytes``: of copies, below zero where
    they landed before somebody expected them.

    ``arrived``: what those who arrived in this phase know; ``released``: what waiters learn.
    """

    def __init__(self, name: str, count: int, actor: int) -> None:
        self.name, self.count, self.actor = name, count, actor
        self.pending, self.bytes, self.phase = count, 0, 0
        self.arrived, self.released = Knowledge(), Knowledge()

    @property
    def end_of_phase(self) -> tuple[int, int]:
        return self.actor, self.phase + 1

    def arrive(self, count: int, known: Knowledge, at: Line) -> None:
        """``known``: to those who arrive, when they did what they tell the waiters about."""
        if count > self.pending:
            raise fault(
                f"{count} more arrivals at {self.name}, which waits for {self.pending} of "
                f"{self.count}",
                at,
            )
        self.pending -= count
        self.arrived.join(known)
        self._end_phase_if_complete()

    def expect(self, count: int, at: Line) -> None:
        self.bytes += count
        if abs(self.bytes) > MOST_BYTES:
            raise fault(f"{self.name} expects {self.bytes} bytes, at most {MOST_BYTES}", at)

    def complete(self, count: int, at: Line) -> None:
        """Bytes have landed."""
        self.expect(-count, at)
        self._end_phase_if_complete()

    def passes(self, parity: int) -> bool:
        """Whether the last phase that ended has this parity; before the first one that is 1."""
        return self.phase % 2 != parity

    def _end_phase_if_complete(self) -> None:
        if self.pending or self.bytes:
            return
        self.released.join(self.arrived)
        self.released.seen.join(Clock([self.end_of_phase]))
        self.phase, self.pending, self.arrived = self.phase + 1, self.count, Knowledge()

    def state(self) -> str:
        return (
            f"{self.name}, which is in phase {self.phase} and lacks {self.pending} of "
            f"{self.count} arrivals and {self.bytes} bytes"
        )


def init(mbarrier: View, count: Any) -> None:
    check_descriptor(mbarrier, "a barrier")
    if mbarrier.numel != 1 or mbarrier.dtype.name != "int64":
        raise fault(f"a barrier is one int64, not {mbarrier.shape} {mbarrier.dtype}")
    count = int(unwrap(count))
    if not 0 < count < 2**20:
        raise fault(f"a barrier counts 1 to {2**20 - 1} arrivals, not {count}")
    if mbarrier.region.low in mbarrier.home.barriers:
        raise fault(f"{mbarrier.name} is initialised twice")
    mbarrier.access("mbarrier.init", write=True, generic=True, over=True)
    actor = current().program.new_actor()
    mbarrier.home.barriers[mbarrier.region.low] = Barrier(mbarrier.name, count, actor)


def invalidate(mbarrier: View) -> None:
    barrier_at(mbarrier, "mbarrier.invalidate")
    mbarrier.access("mbarrier.invalidate", write=True, generic=True, over=True)
    del mbarrier.home.barriers[mbarrier.region.low]


def barrier_at(mbarrier: View, what: str) -> Barrier:
    check_descriptor(mbarrier, "a barrier")
    barrier = mbarrier.home.barriers.get(mbarrier.region.low)
    if barrier is None:
        raise fault(f"{what} of {mbarrier.name}, which is not initialised")
    assert isinstance(barrier, Barrier)
    return barrier


def used_barrier(mbarrier: View, what: str) -> Barrier:
    barrier = barrier_at(mbarrier, what)
    mbarrier.access(what, write=False, generic=True, over=True)
    return barrier


def arrive_now(barrier: Barrier, count: int) -> None:
    partition = current()
    barrier.arrive(count, partition.known, line())
    partition.tick()
    partition.pause()


def expect(
    mbarrier: View, bytes_per_cta: Any = None, pred: Any = True, *, bytes: Any = None,
    from_cta: Any = None,
) -> None:  # fmt: skip
    """Also arrives once: PTX mbarrier.arrive.expect_tx. ``bytes`` is its name in Triton 3.6."""
    if unwrap(pred):
        barrier = used_barrier(mbarrier, "mbarrier.expect")
        barrier.expect(int(unwrap(bytes_per_cta if bytes is None else bytes)), line())
        arrive_now(barrier, 1)


def arrive(mbarrier: View, *, count: Any = 1, pred: Any = True, from_cta: Any = None) -> None:
    """By one thread of the partition, after all of them came here."""
    if unwrap(pred):
        arrive_now(used_barrier(mbarrier, "mbarrier.arrive"), int(unwrap(count)))


def wait(mbarrier: View, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if not unwrap(pred):
        return
    barrier, parity = used_barrier(mbarrier, "mbarrier.wait"), int(unwrap(phase))
    partition = current()
    if parity not in (0, 1):
        raise fault(f"a barrier is waited for by a phase of 0 or 1, not {parity}")
    if not barrier.passes(parity) or partition.program.rng:
        partition.wait_until(
            lambda: barrier.passes(parity), lambda: f"parity {parity} of {barrier.state()}"
        )
    partition.known.join(barrier.released)
