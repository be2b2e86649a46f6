"""Where the wall time of a run goes, and how fast it trains."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

# Steps after a start or resume that warm caches and pools, and are left out of the figures.
WARM_UP_STEPS = 3

Meter = Callable[[], float]
"""Reads the joules that a device has used since some moment; nan where nobody counts them."""


def no_meter() -> float:
    """The meter of a device that has none."""
    return math.nan


class RunPart(StrEnum):
    """Of a run, by what its time goes into."""

    DATA = "data"
    TRAINING = "training"
    VALIDATION = "validation"
    CHECKPOINT = "checkpoint"
    ROUTING_TRACE = "routing trace"
    PROFILE = "profile"


# Parts of a run that are in no step's time.
BETWEEN_STEPS = (RunPart.VALIDATION, RunPart.CHECKPOINT, RunPart.ROUTING_TRACE, RunPart.PROFILE)


@dataclass(frozen=True)
class Lap:
    """The time since the step before, in seconds. ``step``: without what lies between steps;
    ``parts``: of every part of the run. ``warm_up``: one of the first steps of this start.
    ``joules``: of this rank's device in the same time as ``step``, nan if nobody counts them."""

    step: float
    parts: dict[RunPart, float]
    warm_up: bool
    joules: float = math.nan


@dataclass
class Clock:
    """Seconds by part, and of every step, with the joules of ``meter``.

    A step lasts from the end of the one before to its own, so that what a run does for its figures
    counts, and tokens over seconds is what a stopwatch beside it would show; only BETWEEN_STEPS
    is left out.
    """

    meter: Meter = no_meter
    parts: dict[RunPart, float] = field(default_factory=dict)
    laps: int = 0
    started: float = field(default_factory=time.perf_counter)
    _lap_began: float = field(default_factory=time.perf_counter)
    _parts_then: dict[RunPart, float] = field(default_factory=dict)
    _joules_then: float = math.nan
    _joules_between: float = 0.0

    @contextmanager
    def part(self, name: RunPart) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        begun, between = time.perf_counter(), name in BETWEEN_STEPS
        joules = self.meter() if between else 0.0
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - begun
            if between:
                self._joules_between += self.meter() - joules

    def begin(self) -> None:
        """The first step begins now."""
        self._lap_began, self._parts_then = time.perf_counter(), dict(self.parts)
        self._joules_then, self._joules_between = self.meter(), 0.0

    def lap(self) -> Lap:
        """A step ends, and the next one begins."""
        now, then = time.perf_counter(), self._parts_then
        parts = {name: seconds - then.get(name, 0.0) for name, seconds in self.parts.items()}
        between = sum(parts.get(name, 0.0) for name in BETWEEN_STEPS)
        self.laps += 1
        metered = self.meter()
        lap = Lap(
            now - self._lap_began - between,
            parts,
            warm_up=self.laps <= WARM_UP_STEPS,
            joules=metered - self._joules_then - self._joules_between,
        )
        self._lap_began, self._parts_then = now, dict(self.parts)
        self._joules_then, self._joules_between = metered, 0.0
        return lap

    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.started


def tokens_per_second_per_rank(tokens: int, seconds: float, world: int) -> float:
    """Trained tokens of the global batch / (wall time * world)."""
    return tokens / (max(seconds, 1e-9) * world)


def slowest_over_mean(seconds_by_rank: list[float]) -> float:
    """Own time of the slowest rank over the mean; 1 is even, nan if one is not known."""
    if any(map(math.isnan, seconds_by_rank)):
        return math.nan
    return max(seconds_by_rank) / max(statistics.fmean(seconds_by_rank), 1e-9)


def model_flops_utilization(
    tokens_per_second: float, *, flops_per_token: int, peak_flops: float
) -> float:
    """Share of a device's peak FLOP/s that the model's own FLOPs are; ``tokens_per_second`` is
    that of the one device."""
    return tokens_per_second * flops_per_token / peak_flops
