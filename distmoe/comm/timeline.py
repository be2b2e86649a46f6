"""When this rank computed, when its rows travelled, and when it had to wait for them.

A *pass* is one forward or one backward of one layer; a recomputed forward belongs to the backward
that asked for it. Layers are opaque labels.

When a message is complete is known to whoever waits for it. So while the timeline is on, one thread
for each peer and way waits for that peer's messages in the order in which they were sent, and the
training thread waits for that thread. Completion is exact to a switch of threads (tens of
microseconds on an idle core), unless one message of a peer overtakes another: its end is noted when
the other's is, or when the training thread waits for it.

A received message is in flight from the moment at which this rank sent its own part of the same
transfer: its buffer is posted long before, when nothing travels yet. One that was complete before
that has no length.

On CUDA nothing waits: marks are events, on the current stream for computing and waiting, on a side
stream for transfers. They are read when the timeline is stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal, NamedTuple

import torch

from distmoe.comm.message import Message, Way

# Seconds of time.perf_counter, or an event that will tell.
Mark = float | torch.cuda.Event

DRAIN_S = 5.0


class Pass(NamedTuple):
    """The ``number``-th forward or backward of a layer since the timeline was started."""

    layer: str
    backward: bool
    number: int


@dataclass(frozen=True)
class Note:
    """What happened. ``post``: the training thread started messages, which on gloo includes copies
    into the socket. ``peer``: a rank of the run; None for computing, for posting and for a
    collective. ``name``: what was computed, or the kind of rows. ``block``: which part of the
    pass."""

    what: Way | Literal["compute", "wait", "post"]
    name: str
    where: Pass
    peer: int | None = None
    num_bytes: int = 0
    block: int | None = None


@dataclass(frozen=True)
class Interval:
    """``begin`` and ``end``: seconds on the clock of time.perf_counter."""

    note: Note
    begin: float
    end: float


class Timeline:
    """Intervals of one rank, of all its layers. Notes nothing until it is started."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.on = False
        # A list's append is atomic: waiters and the training thread share it.
        self._noted: list[tuple[Note, Mark, Mark]] = []
        self._passes: dict[str, Pass] = {}
        self._waiters: dict[tuple[Way, int | None], _Waiter] = {}
        self._side: torch.cuda.Stream | None = None
        self._zero: tuple[float, torch.cuda.Event] | None = None

    def start(self) -> None:
        """Begin to note; waits for the device."""
        self._noted, self._passes, self.on = [], {}, True
        if self._device.type == "cuda":
            self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            event = _recorded_event()
            event.synchronize()
            self._zero = time.perf_counter(), event

    def stop(self) -> list[Interval]:
        """End, and give what was noted, by its beginning; waits for the device."""
        self.on = False
        for waiter in self._waiters.values():
            waiter.end()
        self._waiters = {}
        if self._side is not None:
            self._side.synchronize()
            torch.cuda.current_stream(self._device).synchronize()
        intervals = [self._read(*noted) for noted in self._noted]
        return sorted(intervals, key=lambda interval: interval.begin)

    def _read(self, note: Note, begin: Mark, end: Mark) -> Interval:
        begin_s, end_s = self._seconds(begin), self._seconds(end)
        return Interval(note, begin_s, max(begin_s, end_s))

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float):
            return mark
        if self._zero is None:
            raise AssertionError("an event was noted before the timeline was started")
        at, event = self._zero
        return at + float(event.elapsed_time(mark)) / 1e3

    def current_pass(self, layer: str) -> Pass:
        """The pass of ``layer`` that runs now; asked by the thread that runs it."""
        backward = torch._C._current_graph_task_id() != -1
        last = self._passes.get(layer, Pass(layer, False, 0))
        number = last.number + (last.backward and not backward)
        self._passes[layer] = Pass(layer, backward, number)
        return self._passes[layer]

    def mark(self) -> Mark:
        """Now: on the host, or when the current stream gets here."""
        if self._device.type != "cuda":
            return time.perf_counter()
        return _recorded_event()

    def note(self, note: Note, begin: Mark) -> None:
        """``note`` lasted from ``begin`` until now."""
        self._noted.append((note, begin, self.mark()))

    @contextmanager
    def span(
        self, what: Literal["compute", "post"], name: str, *, layer: str, block: int | None = None
    ) -> Iterator[None]:
        """Notes the time inside: of the host, or of the current stream."""
        begin = self.mark()
        yield
        self.note(Note(what, name, self.current_pass(layer), block=block), begin)

    def follow(self, message: Message, note: Note) -> None:
        """Note when ``message``, which was sent now, is complete."""
        if message.on_stream:
            begin = self.mark()
            with torch.cuda.stream(self._side):
                message.wait()
                self.note(note, begin)
            return
        key = (message.way, note.peer)
        if key not in self._waiters:
            self._waiters[key] = _Waiter.open(self._noted)
        self._waiters[key].queue.put((message, note, time.perf_counter()))


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class _Waiter:
    """A thread that waits for messages in order, and notes when each was complete."""

    def __init__(self, noted: list[tuple[Note, Mark, Mark]]) -> None:
        self._noted = noted
        self.queue: SimpleQueue[tuple[Message, Note, float] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="timeline", daemon=True)

    @classmethod
    def open(cls, noted: list[tuple[Note, Mark, Mark]]) -> _Waiter:
        waiter = cls(noted)
        waiter._thread.start()
        return waiter

    def end(self) -> None:
        """Note what is complete by now, and end."""
        self.queue.put(None)
        self._thread.join(DRAIN_S)

    def _run(self) -> None:
        while (item := self.queue.get()) is not None:
            message, note, sent_at = item
            try:
                message.wait()
            except BaseException:  # noqa: BLE001
                # The training thread raises it, too.
                continue
            begin = min(sent_at, message.completed_at)
            self._noted.append((note, begin, message.completed_at))
