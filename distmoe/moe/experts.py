"""The experts of this rank: parameters, and one call of the expert-parallel function."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.moe.ep_function import ExpertParallel, expert_parallel
from distmoe.moe.rows import Rows


class Experts(nn.Module):
    """``w_in_eGH`` [e, G, H] and ``w_out_eHI`` [e, H, I]; e experts live here. Gated activations
    have G = 2I, gate then up, as in the checkpoints of Hugging Face; others G = I.

    A module of its own, so that FSDP shards it over its own axes and gathers it just in time.
    """

    def __init__(
        self,
        *,
        num_local: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "swiglu",
    ) -> None:
        super().__init__()
        width = activation_called(activation).width(intermediate_size)
        self.w_in_eGH = nn.Parameter(torch.empty(num_local, width, hidden_size))
        self.w_out_eHI = nn.Parameter(torch.empty(num_local, hidden_size, intermediate_size))

    def forward(self, x_TH: Tensor, score_N: Tensor, ep: ExpertParallel, rows: Rows) -> Tensor:
        """[T, H] -> [T, H]; collective over the expert-parallel group. ``rows``: those of x."""
        w_in_eGH, w_out_eHI = _local(self.w_in_eGH), _local(self.w_out_eHI)
        return expert_parallel(x_TH, score_N, w_in_eGH, w_out_eHI, ep, rows)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
