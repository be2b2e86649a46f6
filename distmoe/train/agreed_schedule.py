"""The dispatch schedule of a run: resolved once, and the same on all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from distmoe.config import Config
from distmoe.config.keys import with_values
from distmoe.planner.machine_profile import find_profile
from distmoe.planner.schedule_policy import ResolvedSchedule, resolve_schedule
from distmoe.runtime import Runtime


def with_schedule(config: Config, runtime: Runtime) -> tuple[Config, str]:
    """``config`` with what is auto of moe.dispatch for these ranks and links, and why."""
    name = torch.cuda.get_device_name() if runtime.device.type == "cuda" else ""
    ranks = runtime.ranks
    per_node = config.parallel.ranks_per_node or ranks.local_world
    profile = find_profile(config.parallel.profile, name)
    found = resolve_schedule(
        config,
        ranks.world,
        per_node,
        profile,
        # The order of its transfers over several communicators has not been tried on NCCL.
        relays=runtime.device.type != "cuda",
    )
    level, order, steps, why = _agreed(runtime, per_node, found)
    settings = {
        "moe.dispatch.level": level,
        "moe.dispatch.order": order,
        "moe.dispatch.steps": steps,
        "parallel.ranks_per_node": per_node,
    }
    return with_values(config, settings), why


def _agreed(runtime: Runtime, per_node: int, found: ResolvedSchedule) -> ResolvedSchedule:
    """What rank 0 found: ranks that wait for other steps would wait for ever. RuntimeError where
    machines have different numbers of ranks."""
    if runtime.group is None:
        return found
    all_found: list[Any] = [None] * runtime.ranks.world
    dist.all_gather_object(all_found, (per_node, found), group=runtime.group)
    numbers = sorted({number for number, _ in all_found})
    if len(numbers) > 1:
        raise RuntimeError(
            f"parallel.ranks_per_node is {numbers} on different ranks; it must be the same on all: "
            "start as many ranks on every machine, or set it"
        )
    agreed: ResolvedSchedule = all_found[0][1]
    return agreed
