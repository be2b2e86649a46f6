"""torch.nn.functional.grouped_mm with a permute before and after it, as torchtitan's layer runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distmoe.bench.kernels.problem import Problem
from distmoe.bench.kernels.subjects import AutogradSubject, Subject


def subject(problem: Problem) -> Subject:
    """Rows are copied for every pair, gradients are autograd's."""
    row_L, ends_e = problem.index.row_L.long(), problem.index.offsets_e1[1:].clone()

    def layer(x_RH: Tensor, w_in_eGH: Tensor, w_out_eHI: Tensor, score_L: Tensor) -> Tensor:
        x_LH = x_RH.index_select(0, row_L)
        gate, up = F.grouped_mm(x_LH, w_in_eGH.mT, offs=ends_e).chunk(2, dim=-1)
        y_LH = F.grouped_mm(F.silu(gate) * up, w_out_eHI.mT, offs=ends_e)
        weighted = y_LH.float() * score_L[:, None]
        y_RH = torch.zeros_like(x_RH, dtype=torch.float32).index_add(0, row_L, weighted)
        return y_RH.to(x_RH.dtype)

    return AutogradSubject(layer, problem)
