"""Launches of the router logits: one tiling for every number of rows, or bits would differ."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from distmoe.kernels.router_logits.triton_router_logits import dw_kernel, dx_kernel, logits_kernel

BLOCKS = {"BT": 64, "BE": 64, "BH": 64}
LAUNCH = {"num_warps": 4, "num_stages": 2}
# Tokens over which one program of the weight gradient sums, so that many work at a time.
ROWS_PER_SLICE = 1024


class TritonRouterLogits:
    """x and w bf16; CUDA, ROCm and the interpreter."""

    def forward(self, x_TH: Tensor, w_EH: Tensor) -> Tensor:
        (T, H), E = x_TH.shape, len(w_EH)
        logits_TE = torch.empty(T, E, dtype=torch.float32, device=x_TH.device)
        if T:
            logits_kernel[(triton.cdiv(T, BLOCKS["BT"]) * triton.cdiv(E, BLOCKS["BE"]),)](
                x_TH.contiguous(), w_EH.contiguous(), logits_TE, T,
                H=H, E=E, **BLOCKS, **LAUNCH,
            )  # fmt: skip
        return logits_TE

    def backward(self, dlogits_TE: Tensor, x_TH: Tensor, w_EH: Tensor) -> tuple[Tensor, Tensor]:
        (T, H), E = x_TH.shape, len(w_EH)
        dx_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
        if not T:
            return dx_TH, torch.zeros_like(w_EH)
        dlogits_TE = dlogits_TE.contiguous()
        columns = triton.cdiv(H, BLOCKS["BH"])
        dx_kernel[(triton.cdiv(T, BLOCKS["BT"]), columns)](
            dlogits_TE, w_EH.contiguous(), dx_TH, T,
            H=H, E=E, **BLOCKS, **LAUNCH,
        )  # fmt: skip
        num_slices = triton.cdiv(T, ROWS_PER_SLICE)
        partial = torch.empty(num_slices, E, H, dtype=torch.float32, device=x_TH.device)
        dw_kernel[(triton.cdiv(E, BLOCKS["BE"]), columns, num_slices)](
            dlogits_TE, x_TH.contiguous(), partial, T, ROWS_PER_SLICE,
            H=H, E=E, **BLOCKS, **LAUNCH,
        )  # fmt: skip
        return dx_TH, partial.sum(0).to(w_EH.dtype)
