"""Seconds that a GPU spends in kernels that need no other rank, by events on its stream.

Between two events of a stream lies whatever it waited for, too. So the events stand right before
and behind the calls of the kernels, whose inputs are all on this rank: nothing in between waits for
another one. Recording costs the host some microseconds a call, so only some steps are timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class KernelClock:
    """Of all layers of a rank, between ``begin`` and ``end``; else ``on`` is False."""

    def __init__(self) -> None:
        self.on = False
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        """Time what is called from here on."""
        self.on, self._spans = True, []

    @contextmanager
    def span(self) -> Iterator[None]:
        """Put around kernels that are started on the current stream."""
        begin = _recorded_event()
        yield
        self._spans.append((begin, _recorded_event()))

    def end(self) -> float:
        """Seconds since `begin`, nan without kernels. Does not wait: the device must be through."""
        self.on = False
        spans, self._spans = self._spans, []
        if not spans:
            return math.nan
        return sum(float(begin.elapsed_time(end)) for begin, end in spans) / 1e3


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
