"""Accumulate in fp64 and round once to fp32: the specification, and what runs on a CPU.

A BLAS may sum in another order for another number of rows. The sums then differ by about 1e-16,
which the rounding swallows unless the sum lies that near to a tie of fp32: about one logit in 1e7.
"""

from __future__ import annotations

from torch import Tensor


class TorchRouterLogits:
    """Any device and floating dtype; the backward is in fp32."""

    def forward(self, x_TH: Tensor, w_EH: Tensor) -> Tensor:
        return (x_TH.double() @ w_EH.double().T).float()

    def backward(self, dlogits_TE: Tensor, x_TH: Tensor, w_EH: Tensor) -> tuple[Tensor, Tensor]:
        dx_TH = (dlogits_TE @ w_EH.float()).to(x_TH.dtype)
        dw_EH = (dlogits_TE.T @ x_TH.float()).to(w_EH.dtype)
        return dx_TH, dw_EH
