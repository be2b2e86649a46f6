"""The figures of a run by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from distmoe.metrics.record import StepRecord
from distmoe.metrics.tally import Tally

Make = Callable[..., StepRecord]


def tally_of(*records: StepRecord) -> Tally:
    tally = Tally()
    for record in records:
        tally.add(record.flat())
    return tally


def test_medians_leave_out_the_first_steps_of_every_start(record: Make) -> None:
    speeds = [1.0, 2.0, 3.0, 60.0, 70.0, 80.0, 4.0, 5.0, 6.0, 90.0]
    steps = [
        record(n, tokens_per_second_per_rank=speed, warm_up=speed < 10)
        for n, speed in enumerate(speeds, 1)
    ]
    figures = tally_of(*steps).figures()
    assert (figures.steps, figures.measured) == (10, 4)
    assert figures.medians["tokens_per_second_per_rank"] == 75.0
    assert figures.warm_up_speed == 3.5
    assert figures.tokens_per_second == 150.0
    assert figures.tokens_per_day == 150.0 * 24 * 60 * 60


def test_a_run_of_first_steps_only_is_measured_by_them(record: Make) -> None:
    figures = tally_of(record(1, slowest_over_mean=1.0), record(2, slowest_over_mean=3.0)).figures()
    assert (figures.measured, figures.medians["slowest_over_mean"]) == (2, 2.0)
    with pytest.raises(ValueError, match="no step"):
        Tally().figures()


def test_a_skipped_step_trains_nothing(record: Make) -> None:
    figures = tally_of(record(1), record(2, skipped=True), record(3, tokens=10)).figures()
    assert (figures.trained_tokens, figures.sums["tokens"], figures.skipped) == (24, 38, 1)


def test_the_parts_of_a_step_add_up(record: Make) -> None:
    step = record(
        1,
        step_seconds=10.0,
        data_seconds=1.0,
        forward_backward_seconds=6.0,
        optimizer_seconds=2.0,
        exposed_seconds=0.5,
    )
    split = tally_of(step, step).figures().split
    assert split == {"data": 2, "compute": 11, "exposed": 1, "optimizer": 4, "rest": 2}


def test_what_no_step_has_is_nan_and_the_worst_is_kept(record: Make) -> None:
    steps = [
        record(4, memory_gib=2.0, slowest_rank=1, mfu=0.5),
        record(5, memory_gib=1.0, slowest_rank=0, mfu=math.nan, routing="forced"),
        record(6, memory_gib=1.5, slowest_rank=0),
    ]
    figures = tally_of(*steps).figures()
    assert (figures.memory_gib, figures.slowest_rank, figures.routing) == (2.0, 0, "forced")
    assert figures.medians["mfu"] == 0.5
    assert math.isnan(figures.medians["palm_mfu"])
    # A line of metrics.jsonl has null for nan.
    tally = Tally()
    tally.add({**steps[0].flat(), "mfu": None, "slowest_rank": None, "slowest_over_mean": None})
    assert math.isnan(tally.figures().medians["mfu"])
    assert tally.figures().slowest_rank is None
    tally.add(steps[0].flat())
    assert tally.figures().slowest_rank == 1
