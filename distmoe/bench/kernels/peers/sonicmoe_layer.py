"""The official SonicMoE package called whole, by its public function for any routing."""

from __future__ import annotations

import torch
from sonicmoe import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    moe_general_routing_inputs,
)
from sonicmoe.enums import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    ActivationType,
)
from torch import Tensor

from distmoe.bench.kernels.problem import Problem
from distmoe.bench.kernels.subjects import AutogradSubject, Subject


def subject(problem: Problem) -> Subject:
    """Includes its routing index. It wants the pairs in the order of tokens."""
    order = problem.index.by_row_L.long()
    token_L, expert_L = problem.index.row_L[order], problem.expert_L[order]
    num_experts = problem.shape.E

    def layer(x_RH: Tensor, w_in_eGH: Tensor, w_out_eHI: Tensor, score_L: Tensor) -> Tensor:
        y_RH: Tensor
        y_RH, _ = moe_general_routing_inputs(
            x_RH,
            score_L,
            token_L,
            expert_L,
            w_in_eGH.permute(1, 2, 0),
            None,
            w_out_eHI.permute(1, 2, 0),
            None,
            num_experts,
            torch.cuda.current_stream().cuda_stream,
            ActivationType.SWIGLU,
            concat_layout=True,
        )
        return y_RH

    return AutogradSubject(layer, problem, order=problem.index.by_row_L)
