"""What is noted about the waits of one exchange: always their seconds, on request their intervals,
and a warning when one does not end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from distmoe.comm.kernel_clock import KernelClock
from distmoe.comm.message import Message, Way
from distmoe.comm.timeline import Note, Timeline
from distmoe.comm.watchdog import Wait, Watchdog

_NOTHING = nullcontext()
# A process group's own clock starts a little later than ours.
ALMOST = 0.95


class Observer:
    """``layer``: an opaque label. ``wait_seconds``: that the host waited for this exchange's
    messages; on CUDA the stream waits instead, and only a timeline tells how long.
    ``wait_cpu_seconds``: CPU time of the process meanwhile, as some transports wait by asking.

    ``timeout_s``: after it a wait fails. Transports without a process group end their waits by it;
    the others by the timeout of their group, which should be the same.
    """

    def __init__(self, rank: int, world_ranks: Sequence[int]) -> None:
        self._world_ranks = world_ranks
        self._own_rank = world_ranks[rank]
        self.layer = "an exchange without a name"
        self.timeout_s = 60.0
        self.wait_seconds = 0.0
        self.wait_cpu_seconds = 0.0
        self.kernel_clock: KernelClock | None = None
        self.timeline: Timeline | None = None
        self.watchdog: Watchdog | None = None

    def compute(self, name: str, *, block: int | None = None) -> AbstractContextManager[None]:
        """Put around work that can hide a transfer; costs nothing while no timeline is on."""
        timeline = self._active
        if timeline is None:
            return _NOTHING
        return timeline.span("compute", name, layer=self.layer, block=block)

    def kernels(self) -> AbstractContextManager[None]:
        """Put around kernels that need no other rank; costs nothing while they are not timed."""
        clock = self.kernel_clock
        return _NOTHING if clock is None or not clock.on else clock.span()

    def posting(self, kind: str) -> AbstractContextManager[None]:
        """Put around the start of messages; costs nothing while no timeline is on."""
        timeline = self._active
        return _NOTHING if timeline is None else timeline.span("post", kind, layer=self.layer)

    @property
    def is_timing(self) -> bool:
        """Whether a timeline notes intervals now, or kernels are timed."""
        timed = self.kernel_clock is not None and self.kernel_clock.on
        return timed or self._active is not None

    @property
    def _active(self) -> Timeline | None:
        return self.timeline if self.timeline is not None and self.timeline.on else None

    def begun(self, kind: str) -> None:
        """A transfer or gather of all ranks begins."""
        if self.watchdog is not None:
            self.watchdog.begun(kind, self.layer)

    def posted(self, kind: str, messages: Sequence[Message]) -> None:
        """This rank has sent its part; ``messages`` are in flight, both ways."""
        timeline = self._active
        if timeline is not None:
            for message in messages:
                timeline.follow(message, self._note(timeline, message.way, kind, message))

    def gather(self, kind: str, message: Message) -> None:
        """Wait for a collective that travels only while it is waited for."""
        timeline = self._active
        begin = timeline.mark() if timeline else 0.0
        self.wait(kind, [message])
        if timeline:
            timeline.note(self._note(timeline, message.way, kind, message), begin)

    def wait(self, kind: str, messages: Sequence[Message]) -> None:
        """Wait for all; TimeoutError, in the words of the watchdog, if it took too long."""
        if not messages:
            return
        wait = Wait(self._own_rank, self._world_ranks, self.layer, kind, messages)
        if self.watchdog is not None:
            self.watchdog.waiting = wait
        cpu_then = time.process_time()
        try:
            for message in messages:
                self._wait_for(kind, message)
        except Exception as error:
            seconds = time.perf_counter() - wait.began
            if seconds < ALMOST * self.timeout_s:
                raise
            raise TimeoutError(wait.line(seconds, self.watchdog)) from error
        finally:
            if self.watchdog is not None:
                self.watchdog.waiting = None
            self.wait_seconds += time.perf_counter() - wait.began
            self.wait_cpu_seconds += time.process_time() - cpu_then

    def _wait_for(self, kind: str, message: Message) -> None:
        timeline, began = self._active, time.perf_counter()
        begin = timeline.mark() if timeline else 0.0
        message.wait()
        if timeline:
            timeline.note(self._note(timeline, "wait", kind, message), begin)
        if self.watchdog is not None and message.peer is not None:
            self.watchdog.waited[self._world_ranks[message.peer]] += time.perf_counter() - began

    def _note(
        self, timeline: Timeline, what: Way | Literal["wait"], kind: str, message: Message
    ) -> Note:
        peer = None if message.peer is None else self._world_ranks[message.peer]
        where = timeline.current_pass(self.layer)
        return Note(what, kind, where, peer, message.num_bytes)
