"""Dispatch, experts and combine as one autograd.Function.

One Function, because three of them cannot overlap in the backward: the exchange would wait inside
its own backward, and the experts would give dX and dW together before the way back can start.

Forward: every receive, then every send is posted. Block by block, in the plan's order, the rows
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
from distmoe.moe.plan import Block, DispatchPlan


@dataclass(frozen=True)
class ExpertParallel:
    """What the Function needs beside tensors. ``overlap=False`` waits for each transfer at once."""

    plan: DispatchPlan
    exchange: Exchange
    mlp: MoeMlp
    overlap: bool = True


class RowExchange:
    """The rows of one pass on their way: to the experts, and the partial sums back.

    ``there``: one transfer per peer block, into the block's rows of ``rows_RH``. ``back``: one
    per peer block, home to the rank that owns the tokens.
    """

    def __init__(self, ep: ExpertParallel, source_TH: Tensor, *, pair_values: bool = False) -> None:
        self.ep = ep
        plan, exchange = ep.plan, ep.exchange
        self.blocks = {i: b for i, b in enumerate(plan.blocks) if b.source != plan.rank}
        width = source_TH.shape[1]
        self.rows_RH = self._buffer(source_TH, plan.num_rows)
        self.home = {b.source: self._away(b) for b in self.blocks.values()}
        self.back_rows = {
            peer: source_TH.new_empty(self._length(plan.rows_to[peer]), width)
            for peer in self.home.values()
        }
        self.back_values = {
            peer: torch.empty(self._length(plan.pairs_to[peer]), device=source_TH.device)
            for peer in self.home.values()
            if pair_values
        }
        self.there: dict[int, Transfer] = {}
        self.back: dict[int, list[Transfer]] = {}
        for i, block in self.blocks.items():
            rows = self.rows_RH[block.rows]
            self.there[i] = exchange.post_recv("rows", self._some(block.source, rows))
        for i, block in self.blocks.items():
            peer = self.home[block.source]
            self.back[i] = [exchange.post_recv("rows", self._some(peer, self.back_rows[peer]))]
            if pair_values:
                values = self._some(peer, self.back_values[peer])
                self.back[i].append(exchange.post_recv("scores", values))
        self._send_out(source_TH)

    def _buffer(self, source_TH: Tensor, num_rows: int) -> Tensor:
        if self.ep.plan.num_ranks == 1:
            return source_TH
        return source_TH.new_empty(num_rows, source_TH.shape[1])

    def _away(self, block: Block) -> int:
        """The peer that this rank sends to in the step in which ``block`` arrives."""
        plan = self.ep.plan
        return (2 * plan.rank - block.source) % plan.num_ranks

    @staticmethod
    def _length(part: slice) -> int:
        return int(part.stop - part.start)

    @staticmethod
    def _some(peer: int, rows: Tensor) -> dict[int, Tensor]:
        return {peer: rows} if rows.numel() else {}

    def _send_out(self, source_TH: Tensor) -> None:
        ep = self.ep
        for i, block in self.blocks.items():
            peer = self.home[block.source]
            rows = source_TH.index_select(0, ep.plan.tokens_to(peer))
            ep.exchange.post_send(self.there[i], self._some(peer, rows))
        self._place_own(source_TH)
        if not ep.overlap:
            for transfer in self.there.values():
                ep.exchange.wait_recv(transfer)
                ep.exchange.wait_send(transfer)

    def _place_own(self, source_TH: Tensor) -> None:
        plan = self.ep.plan
        if plan.num_ranks == 1:
            return
        own_token = plan.tokens_to(plan.rank)
        done = 0
        for block in plan.blocks:
            if block.source == plan.rank:
                count = block.rows.stop - block.rows.start
                torch.index_select(
                    source_TH, 0, own_token[done : done + count], out=self.rows_RH[block.rows]
                )
                done += count

    def wait_for(self, i: int) -> None:
        """Block until the rows of block ``i`` are here."""
        if i in self.there:
            self.ep.exchange.wait_recv(self.there[i])

    def send_home(self, i: int, rows: Tensor, values: Tensor | None = None) -> None:
        """Send the partial sums of block ``i`` (and one number a pair) to the tokens' rank."""
        source = self.blocks[i].source
        parts = [rows] if values is None else [rows, values]
        for transfer, part in zip(self.back[i], parts, strict=True):
            self.ep.exchange.post_send(transfer, self._some(source, part))
            if not self.ep.overlap:
                self.ep.exchange.wait_recv(transfer)
                self.ep.exchange.wait_send(transfer)

    def finish(self, y_RH: Tensor) -> Tensor:
        """Wait for everything; [T, H] sum of at most P partial rows per token, fp32, rank order."""
        plan, exchange = self.ep.plan, self.ep.exchange
        for transfer in [t for i in self.back for t in self.back[i]]:
            exchange.wait_recv(transfer)
        for transfer in [*self.there.values(), *(t for ts in self.back.values() for t in ts)]:
            exchange.wait_send(transfer)
        if plan.num_ranks == 1:
            return y_RH
        out_TH = torch.zeros(
            plan.num_tokens, y_RH.shape[1], dtype=torch.float32, device=y_RH.device
        )
        own_rows = [y_RH[b.rows] for b in plan.blocks if b.source == plan.rank]
        for peer in range(plan.num_ranks):
            rows = torch.cat(own_rows) if peer == plan.rank else self.back_rows[peer]
            # The tokens of one peer are distinct, so this adds in a fixed order on any device.
            out_TH.index_add_(0, plan.tokens_to(peer), rows.float())
        return out_TH.to(y_RH.dtype)


class ExpertParallelFunction(torch.autograd.Function):
    """(x_TH, score_N, w_in_eGH, w_out_eHI) -> out_TH; gradients for all four."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        score_N: Tensor,
        w_in_eGH: Tensor,
        w_out_eHI: Tensor,
        ep: ExpertParallel,
    ) -> Tensor:
        plan = ep.plan
        rows = RowExchange(ep, x_TH.contiguous())
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
                if plan.blocks[j].source != plan.rank:
                    rows.send_home(j, y_RH[done])
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
        rows = RowExchange(ep, dout_TH.contiguous(), pair_values=True)
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
                done = plan.blocks[j]
                ep.mlp.row_sum(dx_LH, index=plan.index, rows=done.rows, score_L=None, out_RH=dx_RH)
                if done.source != plan.rank:
                    rows.send_home(j, dx_RH[done.rows], dscore_L[done.pairs_in_L])
        # Its rows are summed: the weight gradients may take its memory.
        del dx_LH
        dw_in_eGH, dw_out_eHI = ep.mlp.wgrad(x_RH, rows.rows_RH, dz_LG, a_LI, index=plan.index)
        dx_TH = rows.finish(dx_RH)
        return dx_TH, _score_gradient(rows, dscore_L), dw_in_eGH, dw_out_eHI, None


def _score_gradient(rows: RowExchange, dscore_L: Tensor) -> Tensor:
    """dscore of this rank's own pairs, [N], from the ranks that computed them."""
    plan = rows.ep.plan
    if plan.num_ranks == 1:
        return dscore_L
    dscore_N = dscore_L.new_empty(plan.pairs_to[-1].stop)
    for peer, values in rows.back_values.items():
        dscore_N[plan.pairs_to[peer]] = values
    own_N = dscore_N[plan.pairs_to[plan.rank]]
    for block in plan.blocks:
        if block.source == plan.rank:
            place = slice(None) if block.pairs_in_source is None else block.pairs_in_source
            own_N[place] = dscore_L[block.pairs_in_L]
    return dscore_N


def expert_parallel(
    x_TH: Tensor, score_N: Tensor, w_in_eGH: Tensor, w_out_eHI: Tensor, ep: ExpertParallel
) -> Tensor:
    """Sum over each token's pairs of score * expert(x), computed where the experts live.

    Collective over the group of ``ep.exchange``, in the backward too. ``score_N`` are the weights
    of ``plan``'s own pairs (their values travelled with the plan; this is their gradient's way).
    """
    out_TH: Tensor = ExpertParallelFunction.apply(x_TH, score_N, w_in_eGH, w_out_eHI, ep)  # type: ignore[no-untyped-call]
    return out_TH
