"""Times of the experts of one layer over ranks: every way to move its rows, in turn.

Routing is random and rounded, weights and rows are random, plans are made before the clock starts.
The device is real, or emulated by sleeping for as long as its products would take: a device that
costs no CPU, on which communication and computation can be made equally slow.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Exchange, make_exchange
from distmoe.comm.node_links import NodeLinks, make_node_groups
from distmoe.kernels.moe_mlp import MoeMlp, PairIndex, Runs, load_backend
from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.moe.dispatch import plan_dispatch
from distmoe.moe.ep_function import ExpertParallel, expert_parallel
from distmoe.moe.schedule import Schedule, auto_schedule
from distmoe.planner.layer_shape import LayerShape
from distmoe.routing.round_tokens import round_tokens
from distmoe.routing.routing import Routing


@dataclass(frozen=True)
class Way:
    """How rows move. ``steps`` 0: as many as the ranks make natural."""

    level: str
    overlap: bool
    order: str = "auto"
    steps: int = 0

    @property
    def name(self) -> str:
        """Of a line of the table."""
        if not self.overlap:
            return f"{self.level}, waiting"
        return f"{self.level}, by {self.order}, {self.steps or 'auto'} steps"


@dataclass(frozen=True)
class Timing:
    """Of one way on one rank: wall seconds of every forward and backward; bytes of rows that it
    sent in one of each, relayed ones too, in all and between nodes."""

    way: Way
    steps: int
    forward_s: list[float]
    backward_s: list[float]
    row_bytes: int
    remote_bytes: int


class SleepingMlp:
    """A device of ``pairs_per_s``, for one of the three products of a pair, that has no values:
    outputs are zero."""

    def __init__(self, pairs_per_s: float) -> None:
        self.pairs_per_s = pairs_per_s

    def _sleep(self, pairs: int) -> None:
        time.sleep(pairs / self.pairs_per_s)

    def forward(
        self,
        x_RH: Tensor,
        w_in_eGH: Tensor,
        w_out_eHI: Tensor,
        *,
        index: PairIndex,
        runs: Runs,
        z_LG: Tensor,
        a_LI: Tensor,
        y_LH: Tensor,
    ) -> None:
        self._sleep(runs.max_pairs)

    def row_sum(
        self,
        v_LH: Tensor,
        *,
        index: PairIndex,
        rows: slice,
        score_L: Tensor | None,
        out_RH: Tensor,
    ) -> None:
        out_RH[rows] = 0

    def dgrad(
        self,
        dy_RH: Tensor,
        score_L: Tensor,
        z_LG: Tensor,
        w_in_eGH: Tensor,
        w_out_eHI: Tensor,
        *,
        index: PairIndex,
        runs: Runs,
        dz_LG: Tensor,
        a_LI: Tensor,
        dx_LH: Tensor,
        dscore_L: Tensor,
    ) -> None:
        self._sleep(runs.max_pairs)
        dscore_L.zero_()

    def wgrad(
        self, x_RH: Tensor, dy_RH: Tensor, dz_LG: Tensor, a_LI: Tensor, *, index: PairIndex
    ) -> tuple[Tensor, Tensor]:
        self._sleep(index.row_L.numel())
        num_experts, width = index.num_experts, x_RH.shape[1]
        return (
            x_RH.new_zeros(num_experts, dz_LG.shape[1], width),
            x_RH.new_zeros(num_experts, width, a_LI.shape[1]),
        )


class Layer:
    """The experts of this rank, a routing of its tokens, and a plan for every way; collective over
    ``group``."""

    def __init__(
        self,
        shape: LayerShape,
        group: dist.ProcessGroup,
        *,
        ranks_per_node: int,
        mlp: MoeMlp | None = None,
    ) -> None:
        self.shape, self.ranks_per_node = shape, ranks_per_node
        self.exchange: Exchange = make_exchange(group, ranks_per_node=ranks_per_node)
        self.links: NodeLinks | None = None
        if 1 < ranks_per_node < self.exchange.size:
            self.links = NodeLinks.over(make_node_groups(group, ranks_per_node))
        self.mlp = mlp or load_backend("torch")
        generator = torch.Generator().manual_seed(self.exchange.rank)
        logits_TE = torch.randn(shape.num_tokens, shape.num_experts, generator=generator)
        self.routing: Routing = round_tokens(
            logits_TE.softmax(1), shape.top_k, tile=shape.tile, exchange=self.exchange
        )
        num_local = shape.num_experts // self.exchange.size
        H, I = shape.hidden, shape.intermediate
        G = activation_called("swiglu").width(I)
        self.x_TH = torch.randn(shape.num_tokens, H, generator=generator).requires_grad_()
        self.dout_TH = torch.randn(shape.num_tokens, H, generator=generator)
        self.w_in_eGH = torch.randn(num_local, G, H, generator=generator).mul_(H**-0.5)
        self.w_out_eHI = torch.randn(num_local, H, I, generator=generator).mul_(I**-0.5)
        self.w_in_eGH.requires_grad_()
        self.w_out_eHI.requires_grad_()

    def schedule(self, way: Way) -> Schedule:
        """What ``way`` is on these ranks."""
        return auto_schedule(
            way.level,
            way.order,
            way.steps,
            num_ranks=self.exchange.size,
            ranks_per_node=self.ranks_per_node,
        )

    def prepare(self, way: Way) -> ExpertParallel:
        """Plan and transports of one way."""
        schedule = self.schedule(way)
        links = self.links if schedule.level == "node" else None
        plan = plan_dispatch(
            self.routing, self.exchange, tile=self.shape.tile, schedule=schedule, links=links
        )
        return ExpertParallel(plan, self.exchange, self.mlp, overlap=way.overlap, links=links)

    def run(self, ep: ExpertParallel) -> tuple[float, float]:
        """Wall seconds of one forward and of one backward; all ranks begin together."""
        leaves = (self.x_TH, self.w_in_eGH, self.w_out_eHI)
        score_N = self.routing.score_N.detach().requires_grad_()
        dist.barrier(self.exchange.group)  # type: ignore[attr-defined]
        begun = time.perf_counter()
        rows = ep.post_rows(self.x_TH.detach())
        out_TH = expert_parallel(self.x_TH, score_N, self.w_in_eGH, self.w_out_eHI, ep, rows)
        middle = time.perf_counter()
        torch.autograd.grad(out_TH, (*leaves, score_N), self.dout_TH)
        return middle - begun, time.perf_counter() - middle

    def row_bytes(self) -> dict[str, int]:
        """Bytes of rows sent until now, by distance: node and remote."""
        exchanges = (self.exchange, *(self.links.all() if self.links is not None else ()))
        sent = {"node": 0, "remote": 0}
        for exchange in exchanges:
            for (kind, distance), count in exchange.traffic.bytes_by_distance.items():
                sent[distance] += count if kind == "rows" else 0
        return sent


def measure_ways(layer: Layer, ways: list[Way], *, rounds: int) -> list[Timing]:
    """Every way in turn, ``rounds`` times after one round that is not counted; collective."""
    prepared = [layer.prepare(way) for way in ways]
    timings = [_first_round(layer, way, ep) for way, ep in zip(ways, prepared, strict=True)]
    for _ in range(rounds):
        for timing, ep in zip(timings, prepared, strict=True):
            forward_s, backward_s = layer.run(ep)
            timing.forward_s.append(forward_s)
            timing.backward_s.append(backward_s)
    return timings


def _first_round(layer: Layer, way: Way, ep: ExpertParallel) -> Timing:
    """Bytes of a round whose time is not counted."""
    before = layer.row_bytes()
    layer.run(ep)
    sent = {distance: count - before[distance] for distance, count in layer.row_bytes().items()}
    return Timing(
        way=way,
        steps=layer.schedule(way).steps,
        forward_s=[],
        backward_s=[],
        row_bytes=sum(sent.values()),
        remote_bytes=sent["remote"],
    )


def default_ways(layer_ranks: int, ranks_per_node: int, steps: list[int]) -> list[Way]:
    """Each level waiting, and overlapped by source and in the given steps by tokens."""
    levels = ["copies", "rank"]
    if 1 < ranks_per_node < layer_ranks:
        levels.append("node")
    ways = []
    for level in levels:
        ways += [Way(level, False, "source"), Way(level, True, "source")]
        ways += [Way(level, True, "tokens", count) for count in steps]
    return ways


def slowest(timings: list[list[Timing]]) -> list[Timing]:
    """Of every way, round by round, the rank that took longest; bytes are those of the busiest."""
    worst = []
    for of_way in zip(*timings, strict=True):
        forward = [max(values) for values in zip(*(t.forward_s for t in of_way), strict=True)]
        total = [
            max(f + b for f, b in values)
            for values in zip(
                *(list(zip(t.forward_s, t.backward_s, strict=True)) for t in of_way), strict=True
            )
        ]
        worst.append(
            replace(
                of_way[0],
                forward_s=forward,
                backward_s=[t - f for t, f in zip(total, forward, strict=True)],
                row_bytes=max(t.row_bytes for t in of_way),
                remote_bytes=max(t.remote_bytes for t in of_way),
            )
        )
    return worst
