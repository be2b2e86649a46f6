"""Router logits: logits_TE = x_TH w_EH^T in fp32, batch-invariant.

A row's logits may not depend on how many rows there are or how they are cut into ranks, or the
routing decision would. `reference` is the specification; `triton` computes bf16 rows on tensor
cores, always with the same tiles, so that a row meets the same instructions wherever it lies.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distmoe.kernels.backends import fused_or_torch
from distmoe.registry import ROUTER_LOGITS_BACKENDS


class RouterLogitsBackend(Protocol):
    """One backend; no gradients of its own."""

    def forward(self, x_TH: Tensor, w_EH: Tensor) -> Tensor:
        """[T, E] fp32."""
        ...

    def backward(self, dlogits_TE: Tensor, x_TH: Tensor, w_EH: Tensor) -> tuple[Tensor, Tensor]:
        """dx [T, H] and dw [E, H], in the dtypes of x and w."""
        ...


class _RouterLogits(torch.autograd.Function):
    """Keeps x in its own dtype, and no copy of it."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, w_EH: Tensor, backend: RouterLogitsBackend) -> Tensor:
        ctx.save_for_backward(x_TH, w_EH)
        ctx.backend = backend
        return backend.forward(x_TH, w_EH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor, Tensor, None]:
        dx_TH, dw_EH = ctx.backend.backward(dlogits_TE, *ctx.saved_tensors)
        return dx_TH, dw_EH, None


def router_logits(x_TH: Tensor, w_EH: Tensor, *, backend: str = "auto") -> Tensor:
    """[T, E] fp32 from x [T, H] and w [E, H] of any floating dtype; differentiable in both."""
    if backend == "auto":
        # The kernels are for bf16 training; fp32 is for tests.
        in_bf16 = x_TH.dtype == w_EH.dtype == torch.bfloat16
        backend = fused_or_torch(x_TH.device) if in_bf16 else "torch"
    implementation: RouterLogitsBackend = ROUTER_LOGITS_BACKENDS.load(backend)()
    logits_TE: Tensor = _RouterLogits.apply(x_TH, w_EH, implementation)  # type: ignore[no-untyped-call]
    return logits_TE
