"""The weights of the selected pairs out of the weights of all pairs, with a gradient of fixed bits.

Indexing would accumulate its gradient, by a sort or by atomics, for pairs that are distinct anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _PickPairs(torch.autograd.Function):
    """``flat_N``: place of each pair in [T, E]; T * E for what lies behind the last pair."""

    @staticmethod
    def forward(ctx: Any, weight_TE: Tensor, flat_N: Tensor) -> Tensor:
        ctx.save_for_backward(flat_N)
        ctx.shape = weight_TE.shape
        if not weight_TE.numel():
            return weight_TE.new_zeros(flat_N.shape)
        return weight_TE.reshape(-1).index_select(0, flat_N.clamp(max=weight_TE.numel() - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight_N: Tensor) -> tuple[Tensor, None]:
        (flat_N,) = ctx.saved_tensors
        num_tokens, num_experts = ctx.shape
        flat = dweight_N.new_zeros(num_tokens * num_experts + 1)
        flat.index_copy_(0, flat_N, dweight_N)
        return flat[:-1].view(num_tokens, num_experts), None


def pick_pairs(
    weight_TE: Tensor, *, token_N: Tensor, expert_N: Tensor, num_pairs: Tensor
) -> Tensor:
    """[N] weights of the pairs, differentiable in ``weight_TE``; the first ``num_pairs`` (0-d, on
    the device) are pairs, what lies behind has any value and no gradient."""
    num_tokens, num_experts = weight_TE.shape
    place_N = torch.arange(len(token_N), device=weight_TE.device)
    flat_N = token_N.long() * num_experts + expert_N
    flat_N = torch.where(place_N < num_pairs, flat_N, num_tokens * num_experts)
    weight_N: Tensor = _PickPairs.apply(weight_TE, flat_N)  # type: ignore[no-untyped-call]
    return weight_N
