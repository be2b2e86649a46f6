"""What can be timed: one of our ways, or somebody else's layer.

Counts, split sizes, plans and gates are made before: a subject moves rows, computes the experts and
moves the results back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from distmoe.bench.dispatch.layer import Layer
from distmoe.bench.dispatch.ways import Way
from distmoe.comm import Exchange
from distmoe.comm.node_links import NodeLinks
from distmoe.comm.traffic import Distance
from distmoe.kernels.moe_mlp import MoeMlp
from distmoe.moe.ep_function import ExpertParallel, expert_parallel
from distmoe.moe.plan import DispatchPlan

RowBytes = Counter[Distance]


class Subject(Protocol):
    """``level``: how often a row crosses, by the names of `moe.schedule`; "" for no such rule.
    ``note``: in what it differs from our ways. ``leaves``: what it is differentiated by."""

    name: str
    level: str
    note: str
    leaves: list[Tensor]

    def forward(self) -> Tensor:
        """out_TH of this rank's tokens; collective, as its backward is."""
        ...

    def contract_gradients(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Those of ``leaves`` as dx_TH, dw_in_eGH, dw_out_eHI, dscore_N."""
        ...

    def row_bytes(self) -> RowBytes:
        """Bytes of rows that this rank has sent since the last forward began, relayed ones too."""
        ...


class OwnWay:
    """Our layer in one ``way``. By default over the exchanges and with the kernels of ``layer``."""

    note = ""

    def __init__(
        self,
        layer: Layer,
        way: Way,
        *,
        plan: DispatchPlan | None = None,
        exchange: Exchange | None = None,
        links: NodeLinks | None = None,
        mlp: MoeMlp | None = None,
    ) -> None:
        self.name, self.way, self.leaves = way.name, way, layer.leaves
        self.schedule = layer.schedule(way)
        self.level = self.schedule.level
        self.plan = plan or layer.plan(way)
        self.ep = ExpertParallel(
            self.plan,
            exchange or layer.exchange,
            mlp or layer.mlp,
            overlap=way.overlap,
            links=links or layer.links_for(self.schedule),
            travel=way.travel,
        )
        self._before = self._sent()

    def forward(self) -> Tensor:
        x_TH, w_in_eGH, w_out_eHI, score_N = self.leaves
        self._before = self._sent()
        rows = self.ep.post_rows(self.ep.travel.pack(x_TH.detach()))
        return expert_parallel(x_TH, score_N, w_in_eGH, w_out_eHI, self.ep, rows)

    def contract_gradients(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        return list(gradients)

    def exchanges(self) -> list[Exchange]:
        links = self.ep.links.all() if self.ep.links is not None else ()
        return [self.ep.exchange, *links]

    def row_bytes(self) -> RowBytes:
        return self._sent() - self._before

    def _sent(self) -> RowBytes:
        sent: RowBytes = Counter()
        for exchange in self.exchanges():
            for (kind, distance), count in exchange.traffic.bytes_by_distance.items():
                if kind == "rows":
                    sent[distance] += count
        return sent


def by_distance(bytes_P: Sequence[int], *, rank: int, ranks_per_node: int) -> RowBytes:
    """Bytes for every rank as bytes inside the node and to others, without the own ones."""
    sent: RowBytes = Counter()
    for peer, count in enumerate(bytes_P):
        if peer != rank:
            same_node = peer // ranks_per_node == rank // ranks_per_node
            sent["node" if same_node else "remote"] += count
    return sent


def gradients_of(subject: Subject, dout_TH: Tensor) -> tuple[Tensor, list[Tensor]]:
    """out_TH, and the gradients in the order of the contract; collective."""
    out_TH = subject.forward()
    gradients = torch.autograd.grad(out_TH, list(subject.leaves), dout_TH)
    return out_TH.detach(), subject.contract_gradients(gradients)
