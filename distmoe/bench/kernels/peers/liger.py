"""Liger's fused MoE (liger-kernel): Triton kernels after SonicMoE, called whole."""

from __future__ import annotations

from liger_kernel.ops.fused_moe import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    LigerFusedMoEFunction,
)
from torch import Tensor

from distmoe.bench.kernels.peers.top_k import chosen_experts, top_k_subject
from distmoe.bench.kernels.problem import Problem
from distmoe.bench.kernels.subjects import Subject


def subject(problem: Problem) -> Subject:
    """Includes its routing index; gradients of scores are in the dtype of the rows."""
    chosen_TK = chosen_experts(problem)

    def layer(x_RH: Tensor, w_in_eGH: Tensor, w_out_eHI: Tensor, score_TK: Tensor) -> Tensor:
        y_RH: Tensor = LigerFusedMoEFunction.apply(x_RH, w_in_eGH, w_out_eHI, chosen_TK, score_TK)
        return y_RH

    return top_k_subject(layer, problem)
