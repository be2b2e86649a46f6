"""Where the wall time of a run goes, and how fast it trains."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# Steps after a start or resume that warm caches and pools, and are left out of the figures.
WARM_UP_STEPS = 3


@dataclass
class Clock:
    """Seconds by part (data, training, validation, checkpoint), and those of every step."""

    parts: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - begun

    def add_step(self, seconds: float) -> None:
        """Note the wall time of one training step, its data included."""
        self.steps.append(seconds)

    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.started


def tokens_per_second_per_rank(tokens: int, seconds: float, world: int) -> float:
    """Trained tokens of the global batch / (wall time * world)."""
    return tokens / (max(seconds, 1e-9) * world)


def median_after_warm_up(values: list[float]) -> float:
    """Median of a value per step, without the warm-up; over all steps if there are no others."""
    return statistics.median(values[WARM_UP_STEPS:] or values or [float("nan")])


def slowest_over_mean(seconds_by_rank: list[float]) -> float:
    """The slowest rank's compute time over the mean; 1 is even."""
    return max(seconds_by_rank) / max(statistics.fmean(seconds_by_rank), 1e-9)


def model_flops_utilization(
    tokens_per_second: float, *, flops_per_token: int, peak_flops: float
) -> float:
    """Share of a device's peak FLOP/s that the model's own FLOPs are; ``tokens_per_second`` is
    that of the one device."""
    return tokens_per_second * flops_per_token / peak_flops
