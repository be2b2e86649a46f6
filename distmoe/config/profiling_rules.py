"""The settings that say what is recorded of a run, and on which ranks."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.config.keys import value_of
from distmoe.config.rank_list import parse_ranks
from distmoe.config.rule import wrong
from distmoe.config.schema import Config
from distmoe.config.steps import parse_steps

RECORDED_STEPS = ("train.trace_steps", "train.profile", "train.memory_snapshot")

NO_HISTORY = (
    "be empty on the device cpu, whose allocator keeps no history; train.profile tells what every "
    "operator allocates"
)


def profiling_problems(config: Config, world: int) -> Iterator[str]:
    """What is wrong with them, a line each, naming key, value and what is allowed."""
    for key in RECORDED_STEPS:
        if not _are_steps_of_the_run(value_of(config, key), config.train.steps):
            last = f"train.steps ({config.train.steps})"
            yield wrong(config, key, f"be empty or FIRST-LAST within 1..{last}")
    try:
        parse_ranks(config.train.profile_ranks, world)
    except ValueError:
        yield wrong(
            config,
            "train.profile_ranks",
            f"be all, or ranks below the number of ranks ({world}) with commas between",
        )
    if config.train.memory_snapshot and config.run.device == "cpu":
        yield wrong(config, "train.memory_snapshot", NO_HISTORY)


def _are_steps_of_the_run(text: str, steps: int) -> bool:
    try:
        return parse_steps(text).stop <= steps + 1
    except ValueError:
        return False
