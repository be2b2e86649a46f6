"""What happens before what, and which accesses to shared memory nothing orders.

Vector clocks: each partition and each barrier is an actor that counts its own events. A partition
passes what it knows to a barrier when it arrives there, and learns what the barrier knows when it
has waited for it. Two accesses to the same bytes, one of them a write, must be ordered. Between a
write by threads and a use by TMA or wgmma there must be a proxy fence, by either side: the PTX
memory model asks for one along the path of synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gluon_interpreter.source import Line, fault
from gluon_interpreter.timing import Timing


class Clock(dict[int, int]):
    """Actor -> how many of its events are known."""

    def join(self, other: Clock) -> None:
        for actor, events in other.items():
            if events > self.get(actor, 0):
                self[actor] = events

    def knows(self, event: tuple[int, int]) -> bool:
        actor, count = event
        return self.get(actor, 0) >= count


@dataclass
class Knowledge:
    """``seen``: events that happened before now; ``fenced``: before the last proxy fence."""

    seen: Clock = field(default_factory=Clock)
    fenced: Clock = field(default_factory=Clock)

    def join(self, other: Knowledge) -> None:
        self.seen.join(other.seen)
        self.fenced.join(other.fenced)

    def copy(self) -> Knowledge:
        return Knowledge(Clock(self.seen), Clock(self.fenced))


class Region:
    """The bytes of ``array``, a view of some allocation, which lie from ``low`` to ``high``."""

    def __init__(self, name: str, array: Any) -> None:
        self.name, self.array = name, array
        self.low: int = array.__array_interface__["data"][0]
        steps = zip(array.shape, array.strides, strict=True)
        self.high: int = self.low + array.itemsize + sum((n - 1) * stride for n, stride in steps)

    @property
    def solid(self) -> bool:
        return self.high - self.low == int(self.array.nbytes)

    def overlaps(self, other: Region) -> bool:
        return np.shares_memory(self.array, other.array)

    def covers(self, other: Region) -> bool:
        """False where it is not easily seen."""
        if self.solid:
            return self.low <= other.low and other.high <= self.high
        here, there = self.array, other.array
        return self.low == other.low and (here.shape, here.strides) == (there.shape, there.strides)


@dataclass
class Access:
    """``done``: events after each of which it is over; none while it is in flight.

    ``generic``: by threads or cp.async; otherwise by TMA or wgmma, through the async proxy.
    """

    what: str
    line: Line
    region: Region
    write: bool
    generic: bool
    done: list[tuple[int, int]] = field(default_factory=list)

    def is_over(self, clock: Clock) -> bool:
        return any(clock.knows(event) for event in self.done)

    def __str__(self) -> str:
        return f"{self.what} at {self.line}"


class History:
    """The accesses to one allocation that later ones may conflict with."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.accesses: list[Access] = []

    def add(self, new: Access, known: Knowledge) -> None:
        """``known``: to the partition that makes the access; KernelError if it should not."""
        if not self.timing.races:
            return
        written = False
        for old in self.accesses:
            if (old.write or new.write) and old.region.overlaps(new.region):
                self._check(old, new, known)
                written = written or old.write
        if not new.write and not written:
            raise fault(f"{new.what} of {new.region.name}, where nothing was written yet")
        self.accesses = [old for old in self.accesses if not self._stands_for(new, old, known)]
        self.accesses.append(new)

    def _check(self, old: Access, new: Access, known: Knowledge) -> None:
        words = f"{new.what} of {new.region.name}"
        if not old.done:
            raise fault(f"{words} while {old} is still in flight")
        if not old.is_over(known.seen):
            raise fault(f"{words}, and nothing says that {old} is over")
        crossing = old.write and old.generic and not new.generic
        if self.timing.fences and crossing and not old.is_over(known.fenced):
            raise fault(f"{words} without a fence_async_shared since {old}")

    @staticmethod
    def _stands_for(new: Access, old: Access, known: Knowledge) -> bool:
        """Whoever is ordered after the new access is ordered after the old one too."""
        settles = new.write or not old.write
        return settles and new.region.covers(old.region) and old.is_over(known.seen)
