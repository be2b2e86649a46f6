"""Figures by hand-made numbers."""

from __future__ import annotations

import math
import time

import pytest

from distmoe.metrics.throughput import (
    Clock,
    median_after_warm_up,
    model_flops_utilization,
    slowest_over_mean,
    tokens_per_second_per_rank,
)


def test_tokens_are_shared_by_the_ranks() -> None:
    assert tokens_per_second_per_rank(4096, 2.0, 4) == 512


def test_median_leaves_out_the_first_steps() -> None:
    assert median_after_warm_up([9.0, 9.0, 9.0, 1.0, 3.0, 2.0]) == 2.0
    assert median_after_warm_up([9.0, 9.0, 9.0, 1.0]) == 1.0


def test_median_of_a_run_shorter_than_the_warm_up_is_of_all_its_steps() -> None:
    assert median_after_warm_up([4.0]) == 4.0
    assert median_after_warm_up([4.0, 6.0, 5.0]) == 5.0
    assert math.isnan(median_after_warm_up([]))


def test_slowest_rank() -> None:
    assert slowest_over_mean([1.0, 1.0, 4.0]) == 2.0
    assert slowest_over_mean([3.0]) == 1.0


def test_utilization() -> None:
    share = model_flops_utilization(1e4, flops_per_token=20_000_000_000, peak_flops=1e15)
    assert share == pytest.approx(0.2)


def test_parts_add_up_even_when_one_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 10.0, 14.0, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = Clock(started=0.0)
    with clock.part("data"):
        pass
    with pytest.raises(RuntimeError), clock.part("data"):
        raise RuntimeError
    assert clock.parts == {"data": 2.0 + 4.0}
    assert clock.elapsed() == 20.0
