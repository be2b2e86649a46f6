"""Copies on their way to shared memory, and those who wait for them at a barrier."""

from __future__ import annotations

from typing import Any

from gluon_interpreter.barriers import barrier_at
from gluon_interpreter.races import Access
from gluon_interpreter.shared_memory import View


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
