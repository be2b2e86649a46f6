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

from distmoe.comm import Exchange, Transfer
from distmoe.kernels.moe_mlp import MoeMlp
from distmoe.moe.plan import DispatchPlan


@dataclass(frozen=True)
class ExpertParallel:
    """What the Function needs beside tensors. ``overlap=False`` waits for each transfer at once."""

    plan: DispatchPlan
    exchange: Exchange
    mlp: MoeMlp
    overlap: bool = True


class RowExchange:
    """The rows of one pass on their way: to the experts, and the partial sums back.

    ``rows_RH``: what arrives, and the own rows. ``home_UH``: partial sums of the rows that this
    rank's tokens have at all ranks. One transfer a block in each direction.
    """

    def __init__(self, ep: ExpertParallel, source_TH: Tensor) -> None:
        self.ep, self.source_TH = ep, source_TH.contiguous()
        plan, width = ep.plan, source_TH.shape[1]
        self.there: dict[int, Transfer] = {}
        self.back: dict[int, Transfer] = {}
        if plan.num_ranks == 1:
            self.rows_RH = self.source_TH
            return
        self.rows_RH = source_TH.new_empty(plan.num_rows, width)
        self.home_UH = source_TH.new_empty(plan.num_outgoing, width)
        blocks = {i: block for i, block in enumerate(plan.blocks) if block.travels}
        for i, block in blocks.items():
            self.there[i] = self._receive("rows", self.rows_RH, block.receives)
        for i, block in blocks.items():
            self.back[i] = self._receive("rows", self.home_UH, block.sends)
        for i, block in blocks.items():
            self._send(self.there[i], {p: self._rows_of(rows) for p, rows in block.sends.items()})
        self._place_own()

    def _receive(self, kind: str, buffer: Tensor, parts: dict[int, slice]) -> Transfer:
        return self.ep.exchange.post_recv(
            kind, _not_empty({p: buffer[part] for p, part in parts.items()})
        )

    def _send(self, transfer: Transfer, parts: dict[int, Tensor]) -> None:
        self.ep.exchange.post_send(transfer, _not_empty(parts))
        if not self.ep.overlap:
            self.ep.exchange.wait_recv(transfer)
            self.ep.exchange.wait_send(transfer)

    def _rows_of(self, rows: slice) -> Tensor:
        return self.source_TH.index_select(0, self.ep.plan.token[rows])

    def _place_own(self) -> None:
        plan = self.ep.plan
        own = plan.token[plan.rows_to[plan.rank]]
        done = 0
        for block in plan.blocks:
            if not block.travels:
                count = block.rows.stop - block.rows.start
                torch.index_select(
                    self.source_TH,
                    0,
                    own[done : done + count],
                    out=self.rows_RH[block.rows],
                )
                done += count

    def wait_for(self, i: int) -> None:
        """Block until the rows of block ``i`` are here."""
        if i in self.there:
            self.ep.exchange.wait_recv(self.there[i])

    def send_home(self, i: int, y_RH: Tensor) -> None:
        """Send the partial sums of block ``i`` to the ranks that own its tokens."""
        if i in self.back:
            receives = self.ep.plan.blocks[i].receives
            self._send(self.back[i], {p: y_RH[rows] for p, rows in receives.items()})

    def finish(self, y_RH: Tensor) -> Tensor:
        """Wait for everything; [T, H] sum of a token's partial rows, fp32, in rank order."""
        plan, exchange = self.ep.plan, self.ep.exchange
        for transfer in self.back.values():
            exchange.wait_recv(transfer)
        for transfer in (*self.there.values(), *self.back.values()):
            exchange.wait_send(transfer)
        if plan.combine is None:
            return y_RH
        own = self.home_UH[plan.rows_to[plan.rank]]
        torch.cat([y_RH[block.rows] for block in plan.blocks if not block.travels], out=own)
        out_TH = y_RH.new_empty(plan.num_tokens, y_RH.shape[1])
        every = slice(0, plan.num_tokens)
        self.ep.mlp.row_sum(
            self.home_UH, index=plan.combine, rows=every, score_L=None, out_RH=out_TH
        )
        return out_TH


class ExpertParallelFunction(torch.autograd.Function):
    """(x_TH, score_N, w_in_eGH, w_out_eHI) -> out_TH; gradients for all four. The rows of x are on
    their way already."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        score_N: Tensor,
        w_in_eGH: Tensor,
        w_out_eHI: Tensor,
        rows: RowExchange,
    ) -> Tensor:
        ep = rows.ep
        plan = ep.plan
        z_LG = x_TH.new_empty(plan.num_pairs, w_in_eGH.shape[1])
        a_LI = x_TH.new_empty(plan.num_pairs, w_out_eHI.shape[2])
        y_LH = x_TH.new_empty(plan.num_pairs, x_TH.shape[1])
        y_RH = x_TH.new_empty(plan.num_rows, x_TH.shape[1])
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
        out_TH = rows.finish(y_RH)
        ctx.save_for_backward(rows.rows_RH, z_LG, w_in_eGH, w_out_eHI)
        ctx.ep = ep
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        ep: ExpertParallel = ctx.ep
        plan = ep.plan
        x_RH, z_LG, w_in_eGH, w_out_eHI = ctx.saved_tensors
        rows = RowExchange(ep, dout_TH)
        dz_LG = torch.empty_like(z_LG)
        a_LI = z_LG.new_empty(plan.num_pairs, w_out_eHI.shape[2])
        dx_LH = x_RH.new_empty(plan.num_pairs, x_RH.shape[1])
        dx_RH = x_RH.new_empty(plan.num_rows, x_RH.shape[1])
        dscore_L = torch.empty_like(plan.score_L)
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
        # Its rows are summed: the weight gradients may take its memory.
        del dx_LH
        dw_in_eGH, dw_out_eHI = ep.mlp.wgrad(x_RH, rows.rows_RH, dz_LG, a_LI, index=plan.index)
        dx_TH = rows.finish(dx_RH)
        return dx_TH, scores.finish(), dw_in_eGH, dw_out_eHI, None


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
        self.transfer = ep.exchange.post_recv("scores", _not_empty(receive))
        ep.exchange.post_send(self.transfer, _not_empty(send))
        self.dscore_N[plan.pairs_to[plan.rank]] = in_order_L[plan.pairs_from[plan.rank]]

    def finish(self) -> Tensor:
        """dscore of this rank's own pairs, [N]."""
        if self.ep.plan.place_L is not None:
            self.ep.exchange.wait_recv(self.transfer)
            self.ep.exchange.wait_send(self.transfer)
        return self.dscore_N


def _not_empty(parts: dict[int, Tensor]) -> dict[int, Tensor]:
    return {peer: part for peer, part in parts.items() if part.numel()}


def expert_parallel(
    x_TH: Tensor, score_N: Tensor, w_in_eGH: Tensor, w_out_eHI: Tensor, rows: RowExchange
) -> Tensor:
    """Sum over each token's pairs of score * expert(x), computed where the experts live.

    Collective over the group of the exchange, in the backward too. ``rows``: those of ``x_TH``,
    posted. ``score_N`` are the weights of the plan's own pairs (their values travelled with the
    plan; this is their gradient's way).
    """
    out_TH: Tensor = ExpertParallelFunction.apply(x_TH, score_N, w_in_eGH, w_out_eHI, rows)  # type: ignore[no-untyped-call]
    return out_TH
