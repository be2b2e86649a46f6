"""The problem: the experts of one layer, their tokens and routing, on every rank of a group.

Rows and weights are random, a random router routes them, every expert's count is rounded. The
device is real, or sleeps (`sleeping_mlp`): then communication and computation can be made equally
slow without a fight for the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from distmoe.bench.dispatch.sleeping_mlp import SleepingMlp
from distmoe.bench.dispatch.ways import Way
from distmoe.comm import Exchange, make_exchange
from distmoe.comm.node_links import NodeLinks, make_node_groups
from distmoe.kernels.moe_mlp import MoeMlp, load_backend
from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.moe.dispatch import plan_dispatch
from distmoe.moe.plan import DispatchPlan
from distmoe.moe.schedule import Schedule
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.row_volumes import RankLayout
from distmoe.routing.round_tokens import round_tokens
from distmoe.routing.routing import Routing


@dataclass(frozen=True)
class Device:
    """What computes: the matrix products of this machine, or, with ``pairs_per_s`` for each of the
    three products of a pair, a device that sleeps."""

    pairs_per_s: float = 0.0

    @property
    def sleeps(self) -> bool:
        return self.pairs_per_s > 0

    def mlp(self) -> MoeMlp:
        return SleepingMlp(self.pairs_per_s) if self.sleeps else load_backend("torch")


class Layer:
    """The experts of this rank, its tokens and their routing; collective over ``group``.

    ``leaves``: x_TH, w_in_eGH, w_out_eHI and score_N, by which every way is differentiated.
    ``rule``: how counts are rounded; "none" is plain top-k.
    """

    def __init__(
        self,
        shape: LayerShape,
        group: dist.ProcessGroup,
        *,
        ranks_per_node: int,
        device: Device,
        rule: str = "balance",
    ) -> None:
        self.shape, self.group, self.device = shape, group, device
        self.ranks_per_node = ranks_per_node
        self.exchange: Exchange = make_exchange(group, ranks_per_node=ranks_per_node)
        self.links: NodeLinks | None = None
        if 1 < ranks_per_node < self.exchange.size:
            self.links = NodeLinks.over(make_node_groups(group, ranks_per_node))
        self.mlp = device.mlp()
        H, I, E = shape.hidden, shape.intermediate, shape.num_experts
        G = activation_called("swiglu").width(I)
        shared = torch.Generator().manual_seed(0)
        self.router_EH = torch.randn(E, H, generator=shared).mul_(H**-0.5)
        own = torch.Generator().manual_seed(1 + self.exchange.rank)
        num_local = E // self.exchange.size
        self.x_TH = torch.randn(shape.num_tokens, H, generator=own)
        self.dout_TH = torch.randn(shape.num_tokens, H, generator=own)
        self.w_in_eGH = torch.randn(num_local, G, H, generator=own).mul_(H**-0.5)
        self.w_out_eHI = torch.randn(num_local, H, I, generator=own).mul_(I**-0.5)
        self.routing: Routing = round_tokens(
            (self.x_TH @ self.router_EH.T).softmax(1),
            shape.top_k,
            tile=shape.tile,
            rule=rule,
            exchange=self.exchange,
        ).trimmed()
        score_N = self.routing.score_N.detach()
        self.leaves = [self.x_TH, self.w_in_eGH, self.w_out_eHI, score_N]
        for leaf in self.leaves:
            leaf.requires_grad_()

    def schedule(self, way: Way) -> Schedule:
        """What ``way`` is on these ranks."""
        return way.schedule(RankLayout(self.exchange.size, self.ranks_per_node))

    def links_for(self, schedule: Schedule) -> NodeLinks | None:
        return self.links if schedule.level == "node" else None

    def plan(self, way: Way) -> DispatchPlan:
        """Collective."""
        schedule = self.schedule(way)
        return plan_dispatch(
            self.routing,
            self.exchange,
            tile=self.shape.tile,
            schedule=schedule,
            links=self.links_for(schedule),
        )
