"""Time of one call, with cold caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# Larger than any L2 or L3 cache in use.
CPU_FLUSH_BYTES = 32 << 20
GPU_FLUSH_BYTES = 256 << 20
# The device is busy with them for about a millisecond, in which the host queues the launches of
# the timed call: what is measured is then the device, unless the call itself waits for the device.
GPU_FLUSHES = 10


Clock = Callable[[Callable[[], object]], float]
"""Milliseconds of a call; caches are flushed before it starts."""


def cpu_clock() -> Clock:
    """Wall time."""
    flushed = torch.empty(CPU_FLUSH_BYTES, dtype=torch.uint8)

    def clock(work: Callable[[], object]) -> float:
        flushed.zero_()
        began = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - began)

    return clock


def cuda_clock(device: torch.device) -> Clock:
    """Time between two events on the current stream."""
    flushed = torch.empty(GPU_FLUSH_BYTES, dtype=torch.uint8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def clock(work: Callable[[], object]) -> float:
        for _ in range(GPU_FLUSHES):
            flushed.zero_()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    return clock


def make_clock(device: torch.device) -> Clock:
    return cpu_clock() if device.type == "cpu" else cuda_clock(device)


@dataclass
class Samples:
    """Milliseconds of repeated calls."""

    ms: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third."""
        if len(self.ms) < 2:
            return self.ms[0], self.ms[0]
        first, _, third = statistics.quantiles(self.ms, method="inclusive")
        return first, third

    def summary(self) -> dict[str, float | list[float]]:
        """For JSON: median, least, quartiles and every sample."""
        first, third = self.quartiles
        return {
            "median_ms": self.median,
            "min_ms": min(self.ms),
            "q1_ms": first,
            "q3_ms": third,
            "samples_ms": self.ms,
        }


def round_robin(
    calls: dict[str, Callable[[], object]], *, rounds: int, clock: Clock
) -> dict[str, Samples]:
    """Time independent calls, in turn, so that a drift of the device's clock meets all alike."""
    samples = {name: Samples() for name in calls}
    order = list(calls)
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name in order:
            samples[name].ms.append(clock(calls[name]))
        order.append(order.pop(0))
    return samples
