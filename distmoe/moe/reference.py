"""The MoE layer as a loop over experts and tokens: no sort, no plan, no exchange."""

from __future__ import annotations

from torch import Tensor

from distmoe.kernels.moe_mlp.reference import moe_mlp
from distmoe.routing.routing import Routing


def moe_reference(x_TH: Tensor, routing: Routing, w_in_EGH: Tensor, w_out_EHI: Tensor) -> Tensor:
    """Weighted sum over each token's experts, with all experts at hand; differentiable.

    The oracle of the expert-parallel layer: with the tokens of all ranks concatenated in rank
    order it gives what the ranks give together.
    """
    return moe_mlp(
        x_TH,
        w_in_EGH,
        w_out_EHI,
        row_L=routing.token_N,
        expert_L=routing.expert_N,
        score_L=routing.score_N,
    )
