"""Intervals as a file for Perfetto and chrome://tracing.

A rank is a process of the trace; its rows are computing, posting, waiting, and each way to each
peer. Slices of one row must not overlap, so messages in flight together get rows beside each other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distmoe.comm.exposure import Exposure, exposures
from distmoe.comm.timeline import Interval, Note

MICROSECONDS = 1e6
ORDER = ("compute", "post", "wait", "send", "receive", "exchange")


@dataclass(frozen=True)
class RankClock:
    """``zero``: what this rank's time.perf_counter showed when a barrier of all ranks ended, which
    is the trace's zero. ``error``: seconds that such a barrier took, so that zeros of two ranks
    are apart by at most this."""

    zero: float
    error: float


def write_trace(path: Path, intervals: Sequence[Interval], *, rank: int, clock: RankClock) -> None:
    """Write the file, complete or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(trace(intervals, rank=rank, clock=clock)))
    beside.replace(path)


def trace(intervals: Sequence[Interval], *, rank: int, clock: RankClock) -> dict[str, Any]:
    """The trace as JSON: complete events in microseconds, ``pid`` the rank, ``tid`` a row with a
    name, ``args`` the layer, the pass and the bytes; and the exposure of every layer."""
    rows = _rows(intervals)
    events = [_named("process_name", rank, 0, name=f"rank {rank}")]
    for number, name in enumerate(rows):
        events.append(_named("thread_name", rank, number, name=name))
        events.append(_named("thread_sort_index", rank, number, sort_index=number))
    for number, inside in enumerate(rows.values()):
        events += [_slice(interval, rank, number, clock) for interval in inside]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "rank": rank,
            "time_zero": "end of a barrier of all ranks before the first step",
            "clock_error_us": clock.error * MICROSECONDS,
        },
        "exposure": [_sums(exposure) for exposure in exposures(intervals)],
    }


def _sums(exposure: Exposure) -> dict[str, Any]:
    waited_for = {
        "collectives" if peer is None else str(peer): seconds
        for peer, seconds in exposure.waited_for.items()
    }
    return {**asdict(exposure), "share": exposure.share, "waited_for": waited_for}


def _rows(intervals: Sequence[Interval]) -> dict[str, list[Interval]]:
    """Row name -> intervals that do not overlap; rows in the order in which they are shown."""
    lanes: defaultdict[tuple[int, int, str], list[list[Interval]]] = defaultdict(list)
    for interval in sorted(intervals, key=lambda i: i.begin):
        note = interval.note
        # Waits for any peer are one row: there is one at a time.
        peer = -1 if note.peer is None or note.what == "wait" else note.peer
        row = lanes[ORDER.index(note.what), peer, _row(note)]
        lane = next((lane for lane in row if lane[-1].end <= interval.begin), None)
        if lane is None:
            row.append([interval])
        else:
            lane.append(interval)
    return {
        name + (f" ({place + 1})" if place else ""): lane
        for (_, _, name), row in sorted(lanes.items())
        for place, lane in enumerate(row)
    }


def _row(note: Note) -> str:
    peer = "all" if note.peer is None else str(note.peer)
    words = {"send": f"send to {peer}", "receive": f"receive from {peer}"}
    return words.get(note.what, f"exchange with {peer}" if note.what == "exchange" else note.what)


def _slice(interval: Interval, rank: int, row: int, clock: RankClock) -> dict[str, Any]:
    note = interval.note
    args = {
        "layer": note.where.layer,
        "pass": "backward" if note.where.backward else "forward",
        "pass_number": note.where.number,
        "peer": note.peer,
        "bytes": None if note.what in ("compute", "post") else note.num_bytes,
        "block": note.block,
    }
    return {
        "ph": "X",
        "name": note.name,
        "cat": note.what,
        "pid": rank,
        "tid": row,
        "ts": (interval.begin - clock.zero) * MICROSECONDS,
        "dur": (interval.end - interval.begin) * MICROSECONDS,
        "args": {key: value for key, value in args.items() if value is not None},
    }


def _named(kind: str, rank: int, row: int, **args: object) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": row, "args": args}
