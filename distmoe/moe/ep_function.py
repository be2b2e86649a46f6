"""Dispatch, experts and combine as one autograd.Function.

One Function, because three of them cannot overlap in the backward: the exchange would wait inside
its own backward, and the experts would give dX and dW together before the way back can start.

Forward: every receive, then every send is posted, before the Function is called, so that what does
not need the experts can run in between. Block by block, in the plan's order, the rows
are waited for, the tiles that are complete run, and finished blocks start their way home. Backward
is the same with dy for x and dX for y; all weight gradients come after the last block and before
the last wait, so they hide the way home.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distmoe.comm import Exchange, not_empty
from distmoe.comm.node_links import NodeLinks
from distmoe.kernels.moe_mlp import MoeMlp, check_operands
from distmoe.moe.named_rows import NamedRows
from distmoe.moe.node_rows import NodeRows
from distmoe.moe.plan import DispatchPlan
from distmoe.moe.row_formats import PackedRows, TravelFormats
from distmoe.moe.rows import FlatRows, OwnRows, Rows
from distmoe.named_range import is_profiling, named_range


@dataclass(frozen=True)
class ExpertParallel:
    """What the Function needs beside tensors. ``overlap=False`` waits for each transfer at once.
    ``links``: for plans of level `node`. ``travel``: in what form rows and partial sums travel.
    ``layer``: its name in profiles."""

    plan: DispatchPlan
    exchange: Exchange
    mlp: MoeMlp
    overlap: bool = True
    links: NodeLinks | None = None
    travel: TravelFormats = TravelFormats()
    layer: str = ""

    def post_rows(self, source: PackedRows, gathered: list[Tensor] | None = None) -> Rows:
        """Every receive and then every send of a pass; what they carry must not change until the
        pass is finished. ``gathered``: what leaves, if that was gathered before."""
        with named_range("dispatch, posting", layer=self.layer):
            rows = self._rows(source, gathered)
        return NamedRows(rows, self.layer) if is_profiling() else rows

    def _rows(self, source: PackedRows, gathered: list[Tensor] | None) -> Rows:
        plan, exchange, overlap = self.plan, self.exchange, self.overlap
        if plan.num_ranks == 1:
            return OwnRows(source)
        if self.links is None:
            return FlatRows(plan, exchange, source, gathered, overlap=overlap)
        return NodeRows(plan, exchange, self.links, source, gathered, overlap=overlap)

    def new_sums(self, rows_RH: Tensor) -> Tensor:
        """For the partial sum of every row, in the dtype in which it goes home: `row_sum` rounds
        only once, from fp32."""
        return torch.empty_like(rows_RH, dtype=self.travel.sums.dtype(rows_RH.dtype))

    def combine(self, rows: Rows, y_RH: Tensor) -> Tensor:
        """Wait for everything; [T, H] sum of a token's partial rows, fp32, in rank order."""
        with named_range("combine", layer=self.layer):
            rows.finish(y_RH)
            if self.plan.combine is None:
                return y_RH.to(rows.rows_RH.dtype)
            out_TH = rows.rows_RH.new_empty(self.plan.num_tokens, y_RH.shape[1])
            every = slice(0, self.plan.num_tokens)
            self.mlp.row_sum(
                rows.home_UH, index=self.plan.combine, rows=every, score_L=None, out_RH=out_TH
            )
            return out_TH


class ExpertParallelFunction(torch.autograd.Function):
    """(x_TH, score_N, w_in_eGH, w_out_eHI) -> out_TH; gradients for all four. The rows of x are on
    their way already: of x itself the forward reads shape, dtype and device."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        score_N: Tensor,
        w_in_eGH: Tensor,
        w_out_eHI: Tensor,
        ep: ExpertParallel,
        rows: Rows,
    ) -> Tensor:
        plan = ep.plan
        z_LG = x_TH.new_empty(plan.num_pairs, w_in_eGH.shape[1])
        a_LI = x_TH.new_empty(plan.num_pairs, w_out_eHI.shape[2])
        y_LH = x_TH.new_empty(plan.num_pairs, x_TH.shape[1])
        y_RH = ep.new_sums(rows.rows_RH)
        for i, block in enumerate(plan.blocks):
            rows.wait_for(i)
            ep.mlp.forward(
                rows.rows_RH,
                w_in_eGH,
                w_out_eHI,
                index=plan.index,
                runs=block.runs,
                z_LG=z_LG,
                a_LI=a_LI,
                y_LH=y_LH,
            )
            for j in block.ready:
                done = plan.blocks[j].rows
                ep.mlp.row_sum(y_LH, index=plan.index, rows=done, score_L=plan.score_L, out_RH=y_RH)
                rows.send_home(j, y_RH)
        out_TH = ep.combine(rows, y_RH)
        ctx.save_for_backward(rows.rows_RH, z_LG, w_in_eGH, w_out_eHI)
        ctx.ep = ep
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout_TH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None, None]:
        ep: ExpertParallel = ctx.ep
        plan = ep.plan
        x_RH, z_LG, w_in_eGH, w_out_eHI = ctx.saved_tensors
        rows = ep.post_rows(ep.travel.pack(dout_TH))
        dz_LG = torch.empty_like(z_LG)
        a_LI = z_LG.new_empty(plan.num_pairs, w_out_eHI.shape[2])
        dx_LH = x_RH.new_empty(plan.num_pairs, x_RH.shape[1])
        dx_RH = ep.new_sums(x_RH)
        # Zero behind the last pair, where anomaly detection would find what nobody wrote.
        dscore_L = torch.zeros_like(plan.score_L)
        for i, block in enumerate(plan.blocks):
            rows.wait_for(i)
            ep.mlp.dgrad(
                rows.rows_RH,
                plan.score_L,
                z_LG,
                w_in_eGH,
                w_out_eHI,
                index=plan.index,
                runs=block.runs,
                dz_LG=dz_LG,
                a_LI=a_LI,
                dx_LH=dx_LH,
                dscore_L=dscore_L,
            )
            for j in block.ready:
                done = plan.blocks[j].rows
                ep.mlp.row_sum(dx_LH, index=plan.index, rows=done, score_L=None, out_RH=dx_RH)
                rows.send_home(j, dx_RH)
        scores = ScoreExchange(ep, dscore_L)
        rows.send_rest()
        # Its rows are summed: the weight gradients may take its memory.
        del dx_LH
        dw_in_eGH, dw_out_eHI = None, None
        # Of experts that are not frozen; all other work is also for ranks whose own are not.
        if any(ctx.needs_input_grad[2:4]):
            dw_in_eGH, dw_out_eHI = ep.mlp.wgrad(x_RH, rows.rows_RH, dz_LG, a_LI, index=plan.index)
        dx_TH = ep.combine(rows, dx_RH)
        return dx_TH, scores.finish(), dw_in_eGH, dw_out_eHI, None, None


class ScoreExchange:
    """dscore of the pairs computed here on its way to the ranks that own their tokens: 4 bytes a
    pair, one transfer."""

    def __init__(self, ep: ExpertParallel, dscore_L: Tensor) -> None:
        self.ep, plan = ep, ep.plan
        self.dscore_N = dscore_L
        if plan.place_L is None:
            return
        in_order_L = dscore_L[plan.place_L]
        self.dscore_N = dscore_L.new_empty(plan.pairs_to[-1].stop)
        peers = [p for p in range(plan.num_ranks) if p != plan.rank]
        receive = {p: self.dscore_N[plan.pairs_to[p]] for p in peers}
        send = {p: in_order_L[plan.pairs_from[p]] for p in peers}
        self.transfer = ep.exchange.post_recv("scores", not_empty(receive))
        ep.exchange.post_send(self.transfer, not_empty(send))
        self.dscore_N[plan.pairs_to[plan.rank]] = in_order_L[plan.pairs_from[plan.rank]]

    def finish(self) -> Tensor:
        """dscore of this rank's own pairs, [N]."""
        if self.ep.plan.place_L is not None:
            self.ep.exchange.wait_recv(self.transfer)
            self.ep.exchange.wait_send(self.transfer)
        return self.dscore_N


def expert_parallel(
    x_TH: Tensor,
    score_N: Tensor,
    w_in_eGH: Tensor,
    w_out_eHI: Tensor,
    ep: ExpertParallel,
    rows: Rows,
) -> Tensor:
    """Sum over each token's pairs of score * expert(x), computed where the experts live.

    Collective over the group of the exchange, in the backward too. ``rows``: those of ``x_TH``,
    posted. ``score_N`` are the weights of the plan's own pairs (their values travelled with the
    plan; this is their gradient's way). ValueError for operands that do not fit together.
    """
    check_operands(x_TH, w_in_eGH, w_out_eHI)
    out_TH: Tensor = ExpertParallelFunction.apply(x_TH, score_N, w_in_eGH, w_out_eHI, ep, rows)  # type: ignore[no-untyped-call]
    return out_TH
