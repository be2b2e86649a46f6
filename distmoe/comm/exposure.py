"""How much of the communication the computation hid, from the intervals of one rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from distmoe.comm.timeline import Interval, Pass

Span = tuple[float, float]


@dataclass
class Exposure:
    """Seconds of all forwards, or all backwards, of one layer.

    ``communication``: some message was in flight. ``compute``: something was computed. ``exposed``:
    the rank posted messages or waited for one while nothing was computed. ``duration``: from the
    first to the last moment of each pass. ``waited_for``: waits by rank of the run;
    None: a collective.
    """

    layer: str
    backward: bool
    communication: float = 0.0
    compute: float = 0.0
    exposed: float = 0.0
    duration: float = 0.0
    waited_for: dict[int | None, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the duration, what was exposed."""
        return self.exposed / max(self.duration, 1e-9)


def exposures(intervals: Iterable[Interval]) -> list[Exposure]:
    """One for each layer and direction, in order of their first pass."""
    passes: defaultdict[Pass, list[Interval]] = defaultdict(list)
    for interval in intervals:
        passes[interval.note.where].append(interval)
    found: dict[tuple[str, bool], Exposure] = {}
    for where, inside in passes.items():
        exposure = found.setdefault(
            (where.layer, where.backward), Exposure(where.layer, where.backward)
        )
        _add(exposure, inside)
    return list(found.values())


def _add(exposure: Exposure, intervals: Sequence[Interval]) -> None:
    """Add one pass."""
    compute, busy, flights = (
        union((i.begin, i.end) for i in intervals if i.note.what in kinds)
        for kinds in (("compute",), ("post", "wait"), ("send", "receive", "exchange"))
    )
    exposure.communication += length(flights)
    exposure.compute += length(compute)
    exposure.exposed += length(union([*busy, *compute])) - length(compute)
    exposure.duration += max(i.end for i in intervals) - min(i.begin for i in intervals)
    for interval in intervals:
        if interval.note.what == "wait":
            peer = interval.note.peer
            before = exposure.waited_for.get(peer, 0.0)
            exposure.waited_for[peer] = before + interval.end - interval.begin


def union(spans: Iterable[Span]) -> list[Span]:
    """The same moments as spans that do not touch, in order."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def length(spans: Iterable[Span]) -> float:
    """Seconds of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)
