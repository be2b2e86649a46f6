"""How the rows of a layer of a config travel among the ranks that share its experts."""

from __future__ import annotations

import torch.distributed as dist

from distmoe.comm.node_links import NodeGroups, make_node_groups
from distmoe.config import MoEConfig
from distmoe.moe.schedule import Schedule, auto_schedule


def node_groups_for(
    config: MoEConfig,
    ep_group: dist.ProcessGroup | None,
    ranks_per_node: int,
    *,
    timeout_s: float | None = None,
) -> NodeGroups | None:
    """The groups that layers of ``config`` need to pass rows on inside a node, which they may
    share; None if they send to every rank. Collective; see `make_node_groups`."""
    if ep_group is None:
        return None
    schedule = schedule_for(config, dist.get_world_size(ep_group), ranks_per_node)
    if schedule.level != "node":
        return None
    return make_node_groups(ep_group, schedule.ranks_per_node, timeout_s=timeout_s)


def schedule_for(config: MoEConfig, num_ranks: int, ranks_per_node: int) -> Schedule:
    """The order of work that ``config`` asks for."""
    dispatch = config.dispatch
    return auto_schedule(
        dispatch.level,
        dispatch.order,
        dispatch.steps,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
    )
