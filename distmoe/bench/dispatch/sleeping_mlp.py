"""An emulated device: it sleeps for as long as its products would take, and costs no CPU."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from distmoe.kernels.moe_mlp import PairIndex, Runs


class SleepingMlp:
    """A device of ``pairs_per_s``, for one of the three products of a pair, that has no values:
    outputs are zero."""

    def __init__(self, pairs_per_s: float) -> None:
        self.pairs_per_s = pairs_per_s

    def _sleep(self, pairs: int) -> None:
        time.sleep(pairs / self.pairs_per_s)

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
        self._sleep(runs.max_pairs)

    def row_sum(
        self,
        v_LH: Tensor,
        *,
        index: PairIndex,
        rows: slice,
        score_L: Tensor | None,
        out_RH: Tensor,
    ) -> None:
        out_RH[rows] = 0

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
        self._sleep(runs.max_pairs)
        dscore_L.zero_()

    def wgrad(
        self, x_RH: Tensor, dy_RH: Tensor, dz_LG: Tensor, a_LI: Tensor, *, index: PairIndex
    ) -> tuple[Tensor, Tensor]:
        self._sleep(index.row_L.numel())
        num_experts, width = index.num_experts, x_RH.shape[1]
        return (
            x_RH.new_zeros(num_experts, dz_LG.shape[1], width),
            x_RH.new_zeros(num_experts, width, a_LI.shape[1]),
        )


class SleepingExpert(nn.Module):
    """One expert on such a device, for layers with experts of their own: [..., H] -> [..., H]."""

    def __init__(self, pairs_per_s: float) -> None:
        super().__init__()
        self.pairs_per_s = pairs_per_s

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Sleep.apply(x, x.shape[:-1].numel() / self.pairs_per_s)  # type: ignore[no-untyped-call]
        return y


class _Sleep(torch.autograd.Function):
    """One product's time forward; two, dgrad and wgrad, backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return torch.zeros_like(dy), None
