"""moe_mlp by one matrix product per run or expert: the default without a GPU.

The same saved tensors and the same order of sums as the fused kernels, with the derivative of the
activation written out, so that nothing but x, z, scores and indices outlives the forward. Loops on
the host, so on a GPU it waits for the counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.kernels.moe_mlp import PairIndex, Runs
from distmoe.kernels.moe_mlp.activations import activation_called


class TorchMoeMlp:
    """Backend of plain matrix products; any device, any floating dtype."""

    def __init__(self, activation: str) -> None:
        self.act = activation_called(activation)

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
        for run in runs.on_host:
            pairs = slice(run.begin, run.end)
            z = z_LG[pairs]
            torch.mm(x_RH.index_select(0, index.row_L[pairs]), w_in_eGH[run.expert].T, out=z)
            torch.mm(self.act(z), w_out_eHI[run.expert].T, out=y_LH[pairs])

    def row_sum(
        self,
        v_LH: Tensor,
        *,
        index: PairIndex,
        rows: slice,
        score_L: Tensor | None,
        out_RH: Tensor,
    ) -> None:
        offsets = index.row_offsets_R1[rows.start : rows.stop + 1]
        begin, end = int(index.row_offsets_host[rows.start]), int(index.row_offsets_host[rows.stop])
        pair = index.by_row_L[begin:end]
        v = v_LH.index_select(0, pair).float()
        if score_L is not None:
            v *= score_L.index_select(0, pair).float()[:, None]
        # Sums every segment front to back: the same order, and so the same bits, on every run.
        out_RH[rows] = torch.segment_reduce(
            v, "sum", offsets=(offsets - begin).long(), axis=0, initial=0.0
        )

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
        for run in runs.on_host:
            pairs = slice(run.begin, run.end)
            dy = dy_RH.index_select(0, index.row_L[pairs])
            da = (dy @ w_out_eHI[run.expert]).float()
            # Rounded as in the forward: dscore and dW_out belong to the value that was used.
            a = self.act(z_LG[pairs]).float()
            score = score_L[pairs].float()[:, None]
            dscore_L[pairs] = (da * a).sum(-1)
            a_LI[pairs] = score * a
            dz_LG[pairs] = self.act.backward(score * da, z_LG[pairs])
            torch.mm(dz_LG[pairs], w_in_eGH[run.expert], out=dx_LH[pairs])

    def wgrad(
        self, x_RH: Tensor, dy_RH: Tensor, dz_LG: Tensor, a_LI: Tensor, *, index: PairIndex
    ) -> tuple[Tensor, Tensor]:
        bounds = index.offsets_host
        num_experts = len(bounds) - 1
        dw_in_eGH = x_RH.new_zeros(num_experts, dz_LG.shape[1], x_RH.shape[1])
        dw_out_eHI = x_RH.new_zeros(num_experts, x_RH.shape[1], a_LI.shape[1])
        for expert in range(num_experts):
            begin, end = bounds[expert], bounds[expert + 1]
            if begin == end:
                continue
            row = index.row_L[begin:end]
            torch.mm(dz_LG[begin:end].T, x_RH.index_select(0, row), out=dw_in_eGH[expert])
            torch.mm(dy_RH.index_select(0, row).T, a_LI[begin:end], out=dw_out_eHI[expert])
        return dw_in_eGH, dw_out_eHI
