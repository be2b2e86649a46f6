"""When asynchronous things happen, and in which order partitions run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum


class Landing(Enum):
    """LATE: when nothing else can go on. AT_ONCE: at issue. RANDOM: drawn from the seed."""

    LATE = "late"
    AT_ONCE = "at once"
    RANDOM = "random"


@dataclass(frozen=True)
class Timing:
    """``races``: complain about accesses that nothing orders, and ``fences`` about those between
    proxies without a fence; otherwise they have the effect that they have on the numbers."""

    landing: Landing = Landing.LATE
    seed: int = 0
    races: bool = True
    fences: bool = True


_current = Timing()


def current_timing() -> Timing:
    return _current


@contextmanager
def timing(
    landing: str = "late", seed: int = 0, *, races: bool = True, fences: bool = True
) -> Iterator[None]:
    """Launches inside use this `Timing`; ``landing`` is a value of `Landing`.

    ``random`` also switches between partitions where none has to wait.
    """
    global _current
    before, _current = _current, Timing(Landing(landing), seed, races, fences)
    try:
        yield
    finally:
        _current = before
