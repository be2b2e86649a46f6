"""The comparison by hand-made lines; the run itself is the tool's own."""

from __future__ import annotations

from typing import Any

import check_throughput
import pytest
from wrong_arguments import refusal


def seen(at: float, *, step_seconds: float, **values: float) -> Any:
    line = {"tokens": 100, "ranks": 2, "warm_up": False, "step_seconds": step_seconds}
    line |= {"tokens_per_second_per_rank": 50 / step_seconds}
    line |= {"validation_seconds": 0.0, "checkpoint_seconds": 0.0, **values}
    return check_throughput.Seen(line, at)


def test_both_comparisons() -> None:
    """Steps of 1 s that are reported as 0.8 s; 4 s of validation that are reported in full. Between
    the two starts nobody looks."""
    first = [
        seen(10.0, step_seconds=9.0, warm_up=True),
        seen(11.0, step_seconds=0.8, warm_up=True),
        seen(12.0, step_seconds=0.8),
        seen(17.0, step_seconds=0.8, validation_seconds=4.0),
    ]
    second = [seen(90.0, step_seconds=9.0), seen(91.0, step_seconds=0.8)]
    whole, training = check_throughput.compare([first, second])
    assert (whole.steps, training.steps) == (4, 2)
    assert whole.stopwatch == pytest.approx(400 / 8)
    assert whole.reported == pytest.approx(400 / 7.2)
    assert (training.stopwatch, training.reported) == pytest.approx((100.0, 125.0))
    assert training.error == pytest.approx(0.25)


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(check_throughput.main, ["run.toml", "--steps", "20"], capsys)
    assert "--steps is 20; it must be at least 24" in said
