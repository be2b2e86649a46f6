"""Median seconds of a piece of work, repeated as often as a budget allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

FEWEST, MOST = 3, 100


def repeats_for(seconds: float, budget_s: float) -> int:
    """How often work of ``seconds`` is repeated."""
    return min(MOST, max(FEWEST, int(budget_s / max(seconds, 1e-9))))


def median_seconds(work: Callable[[], object], device: torch.device, *, budget_s: float) -> float:
    """Wall time until ``device`` has done the work, after a first call that does not count."""
    work()
    repeats = repeats_for(_seconds(work, device), budget_s)
    return statistics.median(_seconds(work, device) for _ in range(repeats))


def wait_for(device: torch.device) -> None:
    """Until the device has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    begun = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - begun
