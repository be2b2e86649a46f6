"""The specification of moe_mlp in plain PyTorch: a loop over experts, gradients by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.kernels.moe_mlp import PairIndex, Runs
from distmoe.kernels.moe_mlp.activations import activation_called


def moe_mlp(
    x_RH: Tensor,
    w_in_eGH: Tensor,
    w_out_eHI: Tensor,
    *,
    row_L: Tensor,
    expert_L: Tensor,
    score_L: Tensor,
    activation: str = "swiglu",
) -> Tensor:
    """y_RH of the module's formula, differentiable in x, both weights and the scores.

    ``row_L`` and ``expert_L`` need no order; the sum over a row's pairs is in fp32.
    """
    act = activation_called(activation)
    y_RH = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device)
    for expert in range(w_in_eGH.shape[0]):
        pair = (expert_L == expert).nonzero().flatten()
        row = row_L[pair].long()
        y = act(x_RH[row] @ w_in_eGH[expert].T) @ w_out_eHI[expert].T
        y_RH = y_RH.index_add(0, row, score_L[pair, None].float() * y.float())
    return y_RH.to(x_RH.dtype)


class ReferenceMoeMlp:
    """The pieces of the contract, each as the formula reads and differentiated by autograd."""

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
            z_LG[pairs] = x_RH[index.row_L[pairs].long()] @ w_in_eGH[run.expert].T
            a_LI[pairs] = self.act(z_LG[pairs])
            y_LH[pairs] = a_LI[pairs] @ w_out_eHI[run.expert].T

    def row_sum(
        self,
        v_LH: Tensor,
        *,
        index: PairIndex,
        rows: slice,
        score_L: Tensor | None,
        out_RH: Tensor,
    ) -> None:
        bounds = index.row_offsets_R1[rows.start : rows.stop + 1].tolist()
        for i, row in enumerate(range(rows.start, rows.stop)):
            pairs = index.by_row_L[bounds[i] : bounds[i + 1]].long()
            weight = 1.0 if score_L is None else score_L[pairs, None].float()
            out_RH[row] = (weight * v_LH[pairs].float()).sum(0)

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
            dy = dy_RH[index.row_L[pairs].long()]
            with torch.enable_grad():
                z = z_LG[pairs].detach().requires_grad_()
                score = score_L[pairs].detach().float().requires_grad_()
                a_scaled = score[:, None] * self.act(z).float()
                objective = (a_scaled * (dy @ w_out_eHI[run.expert]).float()).sum()
            dz_LG[pairs], dscore_L[pairs] = torch.autograd.grad(objective, (z, score))
            a_LI[pairs] = a_scaled.detach().to(a_LI.dtype)
            dx_LH[pairs] = dz_LG[pairs] @ w_in_eGH[run.expert]

    def wgrad(
        self, x_RH: Tensor, dy_RH: Tensor, dz_LG: Tensor, a_LI: Tensor, *, index: PairIndex
    ) -> tuple[Tensor, Tensor]:
        bounds = index.offsets_host
        dw_in, dw_out = [], []
        for begin, end in zip(bounds, bounds[1:], strict=False):
            row = index.row_L[begin:end].long()
            dw_in.append(dz_LG[begin:end].T @ x_RH[row])
            dw_out.append(dy_RH[row].T @ a_LI[begin:end])
        return torch.stack(dw_in), torch.stack(dw_out)
