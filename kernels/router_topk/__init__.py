"""Scores, integer keys and the top-k choice of every token, from the router's logits.

    score = softmax over all experts | sigmoid | the input itself
    key = floor(clamp(score, 0, 1) * 2^24) + bias    bias an integer, 0 where there is none

A token chooses its ``top_k`` largest keys, ties to the lower expert. Keys are integers, so that the
choice depends on nothing but a token's own row; the product with 2^24 is exact.

A score of NaN, of a run that has diverged, has the key E - 1 - (e - t K) mod E, without the bias:
as in the router `balanced`, tokens t whose scores are all NaN take the experts in turn. Were such
keys equal, the first K experts would get all these tokens, and their rank could run out of memory
before the step is skipped.
Top-k then softmax is the same choice with other weights: the full softmax over its top-k sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distmoe.kernels.backends import fused_or_torch
from distmoe.registry import ROUTER_TOPK_BACKENDS

KEY_SCALE = 1 << 24
# Largest |bias|, in units of keys: as much as a score of 1. Whoever changes a bias clamps it.
BIAS_LIMIT = KEY_SCALE
ACTIVATIONS = ("softmax", "sigmoid", "none")


@dataclass(frozen=True)
class Choice:
    """``score_TE`` fp32, differentiable in the logits; ``key_TE`` int32; ``chosen_TE`` bool."""

    score_TE: Tensor
    key_TE: Tensor
    chosen_TE: Tensor


class RouterTopK(Protocol):
    """One backend; no gradients."""

    def forward(
        self, logits_TE: Tensor, *, top_k: int, activation: str, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score, key and choice, all [T, E]."""
        ...

    def backward(self, dscore_TE: Tensor, score_TE: Tensor, *, activation: str) -> Tensor:
        """dlogits [T, E] fp32."""
        ...


class _Scored(torch.autograd.Function):
    """Keeps the scores, which the weights of the pairs need anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        bias_E: Tensor | None,
        top_k: int,
        activation: str,
        backend: RouterTopK,
    ) -> tuple[Tensor, Tensor, Tensor]:
        score_TE, key_TE, chosen_TE = backend.forward(
            logits_TE, top_k=top_k, activation=activation, bias_E=bias_E
        )
        ctx.save_for_backward(score_TE)
        ctx.mark_non_differentiable(key_TE, chosen_TE)
        ctx.activation, ctx.backend = activation, backend
        return score_TE, key_TE, chosen_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscore_TE: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        (score_TE,) = ctx.saved_tensors
        dlogits_TE = ctx.backend.backward(dscore_TE, score_TE, activation=ctx.activation)
        return dlogits_TE, None, None, None, None


def route_top_k(
    logits_TE: Tensor,
    *,
    top_k: int,
    activation: str,
    bias_E: Tensor | None = None,
    backend: str = "auto",
) -> Choice:
    """``logits_TE`` fp32, or fp64 for references; ``bias_E`` int32, within
    BIAS_LIMIT of 0, added to the keys only.

    ValueError for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}"
        )
    name = fused_or_torch(logits_TE.device) if backend == "auto" else backend
    implementation: RouterTopK = ROUTER_TOPK_BACKENDS.load(name)()
    parts = _Scored.apply(logits_TE, bias_E, top_k, activation, implementation)  # type: ignore[no-untyped-call]
    return Choice(*parts)
