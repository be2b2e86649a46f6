"""Figures by hand-made numbers."""

from __future__ import annotations

import time

import pytest

from distmoe.metrics.throughput import (
    WARM_UP_STEPS,
    Clock,
    RunPart,
    model_flops_utilization,
    slowest_over_mean,
    tokens_per_second_per_rank,
)


def test_tokens_are_shared_by_the_ranks() -> None:
    assert tokens_per_second_per_rank(4096, 2.0, 4) == 512


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
    with clock.part(RunPart.DATA):
        pass
    with pytest.raises(RuntimeError), clock.part(RunPart.DATA):
        raise RuntimeError
    assert clock.parts == {"data": 2.0 + 4.0}
    assert clock.elapsed() == 20.0


def test_a_lap_is_all_the_time_but_validation_and_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    now = 100.0
    clock.begin()
    found = []
    for _ in range(WARM_UP_STEPS + 1):
        for part, seconds in (
            (RunPart.DATA, 1.0),
            (RunPart.TRAINING, 4.0),
            (RunPart.VALIDATION, 16.0),
        ):
            with clock.part(part):
                now += seconds
            if part == RunPart.TRAINING:
                found.append(clock.lap())
        now += 2.0
        with clock.part(RunPart.CHECKPOINT):
            now += 32.0
    assert [lap.step for lap in found] == [5.0, 7.0, 7.0, 7.0]
    assert found[0].parts == {"data": 1.0, "training": 4.0}
    assert found[1].parts == {"data": 1.0, "training": 4.0, "validation": 16.0, "checkpoint": 32.0}
    assert [lap.warm_up for lap in found] == [True] * WARM_UP_STEPS + [False]


@pytest.mark.parametrize("part", RunPart)
def test_only_data_and_training_are_in_a_step(
    monkeypatch: pytest.MonkeyPatch, part: RunPart
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    clock.begin()
    with clock.part(part):
        now += 4.0
    inside = part in (RunPart.DATA, RunPart.TRAINING)
    assert clock.lap().step == (4.0 if inside else 0.0)
