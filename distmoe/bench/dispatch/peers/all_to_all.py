"""A copy of a row for every expert, in one all-to-all there and one back: the eager path of
torchtitan and of Megatron's `alltoall` dispatcher.

    rows = permute(x)                      a row a pair, by expert
    rows = all_to_all_single(rows)         waited for, split sizes on the host
    y    = experts(rows)                   the same kernels as ours; rows are gathered on load
    y    = all_to_all_single(y)
    out  = unpermute(score * y)            fp32, in the order of the experts

The backward is autograd's: each all-to-all waits inside its own backward, and dX and dW of the
experts come together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distmoe.bench.dispatch.layer import Layer
from distmoe.bench.dispatch.subjects import RowBytes, by_distance
from distmoe.kernels.moe_mlp import MoeMlp, PairIndex, Runs


@dataclass(frozen=True)
class Splits:
    """Pairs for and from every rank, on the host."""

    group: dist.ProcessGroup
    to_P: list[int]
    from_P: list[int]

    def back(self) -> Splits:
        return Splits(self.group, self.from_P, self.to_P)


class AllToAll(torch.autograd.Function):
    """[sum(to_P), H] -> [sum(from_P), H]; the other way round in the backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: Splits) -> Tensor:
        ctx.splits = splits
        return _all_to_all(rows, splits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(drows.contiguous(), ctx.splits.back()), None


def _all_to_all(rows: Tensor, splits: Splits) -> Tensor:
    received = rows.new_empty(sum(splits.from_P), rows.shape[1])
    dist.all_to_all_single(received, rows, splits.from_P, splits.to_P, group=splits.group)
    return received


class ExpertMlp(torch.autograd.Function):
    """(x_LH, w_in_eGH, w_out_eHI) -> y_LH, a row a pair in the order of arrival, by the kernels of
    ``mlp``. Keeps what ours keep: x and z."""

    @staticmethod
    def forward(
        ctx: Any,
        x_LH: Tensor,
        w_in_eGH: Tensor,
        w_out_eHI: Tensor,
        mlp: MoeMlp,
        index: PairIndex,
        runs: Runs,
    ) -> Tensor:
        num_pairs = len(x_LH)
        z_LG = x_LH.new_empty(num_pairs, w_in_eGH.shape[1])
        a_LI = x_LH.new_empty(num_pairs, w_out_eHI.shape[2])
        by_expert_LH, y_LH = torch.empty_like(x_LH), torch.empty_like(x_LH)
        mlp.forward(
            x_LH, w_in_eGH, w_out_eHI, index=index, runs=runs, z_LG=z_LG, a_LI=a_LI,
            y_LH=by_expert_LH,
        )  # fmt: skip
        rows = slice(0, num_pairs)
        mlp.row_sum(by_expert_LH, index=index, rows=rows, score_L=None, out_RH=y_LH)
        ctx.save_for_backward(x_LH, z_LG, w_in_eGH, w_out_eHI)
        ctx.mlp, ctx.index, ctx.runs = mlp, index, runs
        return y_LH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_LH: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x_LH, z_LG, w_in_eGH, w_out_eHI = ctx.saved_tensors
        dz_LG, a_LI = torch.empty_like(z_LG), z_LG.new_empty(len(z_LG), w_out_eHI.shape[2])
        by_expert_LH, dx_LH = torch.empty_like(x_LH), torch.empty_like(x_LH)
        # Scores are multiplied where the tokens live.
        score_L = z_LG.new_ones(len(z_LG), dtype=torch.float32)
        ctx.mlp.dgrad(
            dy_LH, score_L, z_LG, w_in_eGH, w_out_eHI, index=ctx.index, runs=ctx.runs,
            dz_LG=dz_LG, a_LI=a_LI, dx_LH=by_expert_LH, dscore_L=torch.empty_like(score_L),
        )  # fmt: skip
        rows = slice(0, len(x_LH))
        ctx.mlp.row_sum(by_expert_LH, index=ctx.index, rows=rows, score_L=None, out_RH=dx_LH)
        dw_in_eGH, dw_out_eHI = ctx.mlp.wgrad(x_LH, dy_LH, dz_LG, a_LI, index=ctx.index)
        return dx_LH, dw_in_eGH, dw_out_eHI, None, None, None


class CopiesInOneCollective:
    """The layer of `Layer`, every pair with a row of its own."""

    name, level = "all_to_all, a copy a pair", "copies"
    note = "as torchtitan and Megatron: one collective there, one back, nothing overlaps"

    def __init__(self, layer: Layer) -> None:
        self.leaves, self.mlp = layer.leaves, layer.mlp
        num_ranks, routing = layer.exchange.size, layer.routing
        counts_PE = layer.exchange.all_gather(routing.counts_E.int(), kind="counts")
        from_Pe = counts_PE.chunk(num_ranks, dim=1)[layer.exchange.rank]
        to_P = routing.counts_E.view(num_ranks, -1).sum(1)
        self.splits = Splits(layer.group, to_P.tolist(), from_Pe.sum(1).tolist())
        self.token_N, self.num_tokens = routing.token_N.long(), routing.num_tokens
        self.index = arrival_index(from_Pe)
        self.runs = Runs.of_all(self.index)
        row_bytes = layer.shape.row_bytes
        # There and back, forward and backward.
        crossing = zip(self.splits.to_P, self.splits.from_P, strict=True)
        self._row_bytes = by_distance(
            [2 * (to + back) * row_bytes for to, back in crossing],
            rank=layer.exchange.rank,
            ranks_per_node=layer.ranks_per_node,
        )

    def forward(self) -> Tensor:
        x_TH, w_in_eGH, w_out_eHI, score_N = self.leaves
        x_LH = AllToAll.apply(x_TH.index_select(0, self.token_N), self.splits)  # type: ignore[no-untyped-call]
        y_LH = ExpertMlp.apply(x_LH, w_in_eGH, w_out_eHI, self.mlp, self.index, self.runs)  # type: ignore[no-untyped-call]
        y_NH = AllToAll.apply(y_LH, self.splits.back())  # type: ignore[no-untyped-call]
        out_TH = x_TH.new_zeros(self.num_tokens, x_TH.shape[1])
        return out_TH.index_add(0, self.token_N, score_N[:, None] * y_NH)

    def contract_gradients(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        return list(gradients)

    def row_bytes(self) -> RowBytes:
        return self._row_bytes


def arrival_index(from_Pe: Tensor) -> PairIndex:
    """Pairs arrive rank by rank, of every rank expert by expert, and are computed by expert."""
    num_ranks, num_local = from_Pe.shape
    expert_L = torch.arange(num_local).repeat(num_ranks).repeat_interleave(from_Pe.reshape(-1))
    row_L = expert_L.argsort(stable=True)
    num_pairs = len(row_L)
    return PairIndex(
        row_L=row_L.int(),
        offsets_e1=torch.nn.functional.pad(from_Pe.sum(0).cumsum(0), (1, 0)).int(),
        by_row_L=row_L.argsort().int(),
        row_offsets_R1=torch.arange(num_pairs + 1, dtype=torch.int32),
    )


subject = CopiesInOneCollective
