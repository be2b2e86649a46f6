"""Settings that say what is recorded of a run."""

from __future__ import annotations

import pytest
from config_problems import MakeConfig, problems

from distmoe.config import check


@pytest.mark.parametrize(
    ("options", "world", "expected"),
    [
        (
            "--train.trace_steps=5-201",
            1,
            "train.trace_steps is 5-201; it must be empty or FIRST-LAST within 1..train.steps "
            "(200)",
        ),
        (
            "--train.trace_steps=5..7",
            1,
            "train.trace_steps is 5..7; it must be empty or FIRST-LAST within 1..train.steps (200)",
        ),
        (
            "--train.profile=0-3",
            1,
            "train.profile is 0-3; it must be empty or FIRST-LAST within 1..train.steps (200)",
        ),
        (
            "--train.profile_ranks=0,2",
            2,
            "train.profile_ranks is 0,2; it must be all, or ranks below the number of ranks (2) "
            "with commas between",
        ),
        (
            "--train.memory_snapshot=3 --run.device=cpu",
            1,
            "train.memory_snapshot is 3; it must be empty on the device cpu, whose allocator",
        ),
    ],
)
def test_impossible_records_are_refused(
    make_config: MakeConfig, options: str, world: int, expected: str
) -> None:
    (problem,) = problems(make_config(*options.split()), world)
    assert problem.startswith(expected)


def test_records_that_fit(make_config: MakeConfig) -> None:
    options = ["--train.profile=1-200", "--train.profile_ranks=1,0", "--train.memory_snapshot=200"]
    check(make_config(*options), 2)
