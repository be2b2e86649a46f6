"""The experts of this rank: parameters, and one call of the expert-parallel function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.moe.autocast import autocast
from distmoe.moe.ep_function import ExpertParallel, expert_parallel
from distmoe.moe.rows import Rows


class Experts(nn.Module):
    """``w_in_eGH`` [e, G, H] and ``w_out_eHI`` [e, H, I]; e experts live here. Gated activations
    have G = 2I, gate then up, as in the checkpoints of Hugging Face; others G = I.

    A module of its own, so that FSDP shards it over its own axes and gathers it just in time.
    ``are_all`` false: other ranks hold others, so no data-parallel wrapper may average them; the
    parameters say so by ``allreduce = False``, as in Megatron and DeepSpeed.
    """

    def __init__(
        self,
        *,
        num_local: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "swiglu",
        are_all: bool = True,
    ) -> None:
        super().__init__()
        self._are_all = are_all
        width = activation_called(activation).width(intermediate_size)
        self.w_in_eGH = nn.Parameter(torch.empty(num_local, width, hidden_size))
        self.w_out_eHI = nn.Parameter(torch.empty(num_local, hidden_size, intermediate_size))
        self.stacked_rows = {"w_in_eGH": (intermediate_size,) * (width // intermediate_size)}
        self._mark()

    def _mark(self) -> None:
        if not self._are_all:
            for parameter in self.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # To leave the meta device makes new parameters.
        self._mark()
        return self

    def forward(self, x_TH: Tensor, score_N: Tensor, ep: ExpertParallel, rows: Rows) -> Tensor:
        """[T, H] -> [T, H]; collective over the expert-parallel group. ``rows``: those of x."""
        w_in_eGH, w_out_eHI = (autocast(_local(w)) for w in (self.w_in_eGH, self.w_out_eHI))
        return expert_parallel(x_TH, score_N, w_in_eGH, w_out_eHI, ep, rows)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
