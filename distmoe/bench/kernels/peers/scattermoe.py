"""ScatterMoE (scattermoe): its two scattered products with a SwiGLU between them."""

from __future__ import annotations

import torch.nn.functional as F
from scattermoe.parallel_experts import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    flatten_sort_count,
    parallel_linear,
)
from torch import Tensor

from distmoe.bench.kernels.peers.top_k import chosen_experts, top_k_subject
from distmoe.bench.kernels.problem import Problem
from distmoe.bench.kernels.subjects import Subject


def subject(problem: Problem) -> Subject:
    """Includes its routing index; scores and their gradients are in the dtype of the rows."""
    chosen_TK = chosen_experts(problem).long()
    K, E = problem.shape.K, problem.shape.E

    def layer(x_RH: Tensor, w_in_eGH: Tensor, w_out_eHI: Tensor, score_TK: Tensor) -> Tensor:
        routing = flatten_sort_count(chosen_TK, num_experts=E)
        z_LG = parallel_linear(x_RH, w_in_eGH.permute(0, 2, 1), K, *routing, grouped_out=True)
        gate, up = z_LG.chunk(2, dim=-1)
        y_RH: Tensor = parallel_linear(
            F.silu(gate) * up,
            w_out_eHI.permute(0, 2, 1),
            1,
            *routing,
            gates=score_TK,
            grouped_in=True,
        )
        return y_RH

    return top_k_subject(layer, problem)
