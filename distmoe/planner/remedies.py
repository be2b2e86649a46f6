"""What would have to change where no layout of a job fits into the memory of its devices."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from distmoe.config.keys import with_values
from distmoe.planner.hardware import Hardware
from distmoe.planner.layouts import layouts
from distmoe.planner.plan_job import Planner

SMALLEST = {
    "parallel.dp_replicate": 1,
    "train.micro_batch_size": 1,
    "train.activation_checkpoint": "full",
}
OFFLOAD = {
    "parallel.engine": "deepspeed",
    "deepspeed.zero_stage": 3,
    "deepspeed.offload_optimizer": "cpu",
    "deepspeed.offload_parameters": "cpu",
}
FACTORS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Remedy:
    """The layout with ``values`` on ``world`` ranks needs ``bytes`` of each device."""

    world: int
    values: dict[str, Any]
    bytes: int
    fits: bool


def remedies(planner: Planner, pinned: Collection[str]) -> list[Remedy]:
    """The smallest layout, the smallest that keeps its state in host memory, and the smallest on
    more ranks, until one fits; those that are possible, on links that the profile has."""
    smallest = {key: value for key, value in SMALLEST.items() if key not in pinned}
    found = list(_least(planner, planner.world, smallest, pinned))
    if not OFFLOAD.keys() & set(pinned):
        found += _least(planner, planner.world, smallest | OFFLOAD, pinned)
    for factor in FACTORS:
        if planner.hardware.missing_link(planner.world * factor):
            break
        more = list(_least(planner, planner.world * factor, smallest, pinned))
        found += more
        if any(remedy.fits for remedy in more):
            break
    return found


def _least(
    planner: Planner, world: int, values: dict[str, Any], pinned: Collection[str]
) -> Iterator[Remedy]:
    """The possible layout with ``values`` that needs least, if there is one."""
    hardware: Hardware = planner.hardware
    config = with_values(planner.config, values)
    needs = [
        (planner.memory(layout, world, {*pinned, *values}).total, layout.parallel.ep)
        for layout in layouts(
            config,
            world,
            ranks_per_node=hardware.ranks_per_node,
            pinned={*pinned, *values},
        )
    ]
    if needs:
        least, ep = min(needs)
        yield Remedy(world, values | {"parallel.ep": ep}, least, least <= hardware.memory_bytes)
