"""What all-gathers and reduce-scatters of parameters reach, over what the links would give a ring.

A transport may be far from a ring: gloo reduces a scatter as an all-reduce, and sends one way at a
time where messages are long.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
import torch.distributed as dist

from distmoe.planner.collective_time import Collectives, RankGroup
from distmoe.planner.machine_profile import Profile
from distmoe.planner.timing import median_seconds

TENSOR_BYTES = 4 << 20
"""Of the whole tensor, in fp32; of a few blocks of a small model."""


def measure_collectives(group: dist.ProcessGroup, *, device: torch.device) -> dict[str, float]:
    """Seconds of a "gather" and of a "reduce" of `TENSOR_BYTES` over all ranks; collective."""
    ranks = dist.get_world_size(group)
    part = torch.zeros(TENSOR_BYTES // 4 // ranks, device=device)
    whole = torch.zeros(ranks * len(part), device=device)
    works = {
        "gather": partial(dist.all_gather_into_tensor, whole, part, group=group),
        "reduce": partial(dist.reduce_scatter_tensor, part, whole, group=group),
    }
    with warnings.catch_warnings():
        # Newer versions of torch have other names, older ones only these.
        warnings.simplefilter("ignore", FutureWarning)
        # No budget: the fewest repeats, and so the same number on every rank.
        return {name: median_seconds(work, device, budget_s=0.0) for name, work in works.items()}


def shares_of_a_ring(
    seconds: dict[str, float], profile: Profile, *, ranks: int, ranks_per_node: int
) -> dict[str, float]:
    """The time that `collective_time` gives a ring on the links of ``profile`` over the measured
    ``seconds``, at most 1."""
    group = RankGroup(ranks, min(ranks, ranks_per_node))
    ring = Collectives(profile, ranks_per_node).gather(group, TENSOR_BYTES).seconds
    return {name: min(1.0, ring / measured) for name, measured in seconds.items()}
