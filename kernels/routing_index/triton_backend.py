"""Launches of the routing index kernels; positions by scans, so no atomics and no sort."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from distmoe.kernels.routing_index import RoutingIndex, no_pairs
from distmoe.kernels.routing_index.triton_routing_index import (
    by_token_kernel,
    count_kernel,
    place_kernel,
)

BLOCK_TOKENS, BLOCK_EXPERTS = 64, 32
# Tokens times experts that one program of `by_token_kernel` scans.
SCANNED = 2048


def build(selected_TE: Tensor, max_pairs: int) -> RoutingIndex:
    """See `routing_index`."""
    num_tokens, num_experts = selected_TE.shape
    if not max_pairs or not selected_TE.numel():
        return no_pairs(selected_TE, max_pairs)
    selected = selected_TE.view(torch.uint8)
    num_blocks = triton.cdiv(num_tokens, BLOCK_TOKENS)
    grid = (num_blocks, triton.cdiv(num_experts, BLOCK_EXPERTS))
    counts_EB = torch.empty(num_experts, num_blocks, dtype=torch.int32, device=selected.device)
    tile = {"E": num_experts, "BT": BLOCK_TOKENS, "BE": BLOCK_EXPERTS, "num_warps": 4}
    count_kernel[grid](selected, counts_EB, num_tokens, num_blocks, **tile)
    first_EB = counts_EB.view(-1).cumsum(0, dtype=torch.int32) - counts_EB.view(-1)
    # Every one begins at a multiple of 16 bytes.
    zeros = counts_EB.new_zeros(3, triton.cdiv(max_pairs, 4) * 4)
    token_N, expert_N, by_token_N = zeros[:, :max_pairs].unbind()
    pair_TE = torch.empty(num_tokens, num_experts, dtype=torch.int32, device=selected.device)
    place_kernel[grid](
        selected, first_EB, token_N, expert_N, pair_TE, num_tokens, num_blocks, max_pairs, **tile
    )
    per_token_T = selected_TE.sum(1, dtype=torch.int32)
    token_offsets_T1 = F.pad(per_token_T.cumsum(0, dtype=torch.int32), (1, 0))
    padded, block = padded_experts_and_tokens(num_experts)
    by_token_kernel[(triton.cdiv(num_tokens, block),)](
        selected, pair_TE, token_offsets_T1, by_token_N, num_tokens, max_pairs,
        E=num_experts, E_POW2=padded, BT=block, num_warps=4,
    )  # fmt: skip
    return RoutingIndex(
        token_N, expert_N, counts_EB.sum(1, dtype=torch.int32), by_token_N, token_offsets_T1
    )


def padded_experts_and_tokens(num_experts: int) -> tuple[int, int]:
    """Experts as a power of two, and the tokens that one program of `by_token_kernel` scans."""
    padded = triton.next_power_of_2(num_experts)
    return padded, max(1, SCANNED // padded)
