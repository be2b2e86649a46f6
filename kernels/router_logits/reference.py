"""Accumulate in fp64 and round once to fp32.

A BLAS may sum in another order for another number of rows. The sums then differ by about 1e-16,
which the rounding swallows unless the sum lies that near to a tie of fp32: about one logit in 1e7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RouterLogits(torch.autograd.Function):
    """Keeps x in its own dtype, not the fp64 copy; the backward is in fp32."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, w_EH: Tensor) -> Tensor:
        ctx.save_for_backward(x_TH, w_EH)
        return (x_TH.double() @ w_EH.double().T).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TH, w_EH = ctx.saved_tensors
        dx_TH = (dlogits_TE @ w_EH.float()).to(x_TH.dtype)
        dw_EH = (dlogits_TE.T @ x_TH.float()).to(w_EH.dtype)
        return dx_TH, dw_EH


def router_logits(x_TH: Tensor, w_EH: Tensor) -> Tensor:
    """[T, E] fp32 from x [T, H] and w [E, H] of any floating dtype; differentiable in both."""
    logits_TE: Tensor = RouterLogits.apply(x_TH, w_EH)  # type: ignore[no-untyped-call]
    return logits_TE
