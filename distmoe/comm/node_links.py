"""The two ways of a row that crosses nodes: along the rail, then inside the node.

Ranks of a group lie node by node. A *rail* joins the ranks of one place in their nodes. Rows fan
out, and partial sums are gathered, over communicators of their own, so that each sees its transfers
in one order on every rank, whatever is ready first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from distmoe.comm import Exchange, make_exchange
from distmoe.comm.torch_group import new_row_group


@dataclass(frozen=True)
class NodeGroups:
    """Process groups of one rank: ``rail`` by node, ``fan`` and ``gather`` by place in the node."""

    rail: dist.ProcessGroup
    fan: dist.ProcessGroup
    gather: dist.ProcessGroup


@dataclass(frozen=True)
class NodeLinks:
    """Exchanges over `NodeGroups`."""

    rail: Exchange
    fan: Exchange
    gather: Exchange

    @staticmethod
    def over(groups: NodeGroups, name: str = "auto") -> NodeLinks:
        """Transport ``name`` over every group."""
        return NodeLinks(
            make_exchange(groups.rail, name, ranks_per_node=1),
            make_exchange(groups.fan, name),
            make_exchange(groups.gather, name),
        )

    def all(self) -> tuple[Exchange, Exchange, Exchange]:
        return self.rail, self.fan, self.gather


def make_node_groups(
    group: dist.ProcessGroup, ranks_per_node: int, *, timeout_s: float | None = None
) -> NodeGroups:
    """Groups of this rank for nodes of ``ranks_per_node`` consecutive ranks of ``group``, whose
    waits end after ``timeout_s``; collective over ``group`` (on NCCL, which splits the default
    communicator, over all ranks). ValueError if the nodes do not divide the group."""
    ranks = dist.get_process_group_ranks(group)
    if ranks_per_node < 1 or len(ranks) % ranks_per_node:
        raise ValueError(
            f"ranks_per_node is {ranks_per_node}; it must divide the {len(ranks)} ranks"
        )
    node, place = divmod(dist.get_rank(group), ranks_per_node)
    inside = ranks[node * ranks_per_node : (node + 1) * ranks_per_node]
    made = [
        new_row_group(members, timeout_s=timeout_s)
        for members in (inside, inside, ranks[place::ranks_per_node])
    ]
    return NodeGroups(rail=made[2], fan=made[0], gather=made[1])
