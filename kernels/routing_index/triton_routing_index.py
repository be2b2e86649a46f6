"""Counts per block of tokens, one scan over them outside, then every pair finds its place."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def selected_tile(selected_ptr, token, expert, T, E: tl.constexpr):
    """int32 [tokens, experts] of selected_TE, 0 outside."""
    inside = (token < T)[:, None] & (expert < E)[None, :]
    pointers = selected_ptr + token.to(tl.int64)[:, None] * E + expert[None, :]
    return tl.load(pointers, mask=inside, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["T", "num_blocks"])
def count_kernel(
    selected_ptr, counts_ptr, T, num_blocks,
    E: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """counts [E, blocks]: pairs of BT consecutive tokens, per expert."""
    block = tl.program_id(0)
    token = block * BT + tl.arange(0, BT)
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    count = tl.sum(selected_tile(selected_ptr, token, expert, T, E), axis=0)
    tl.store(counts_ptr + expert * num_blocks + block, count, mask=expert < E)


@triton.jit(do_not_specialize=["T", "num_blocks", "max_pairs"])
def place_kernel(
    selected_ptr, first_ptr, token_ptr, expert_ptr, pair_ptr, T, num_blocks, max_pairs,
    E: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """token_N, expert_N, and pair_TE: the pair's place in them.

    ``first_ptr`` [E, blocks]: place of the first pair of each block and expert.
    """
    block = tl.program_id(0)
    token = block * BT + tl.arange(0, BT)
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    selected = selected_tile(selected_ptr, token, expert, T, E)
    first = tl.load(first_ptr + expert * num_blocks + block, mask=expert < E, other=0)
    pair = first[None, :] + tl.cumsum(selected, axis=0) - selected
    # Where nothing is selected the place is out of bounds.
    pair = tl.where(selected > 0, pair, max_pairs)
    tl.store(token_ptr + pair, token[:, None] + tl.zeros_like(pair), mask=pair < max_pairs)
    tl.store(expert_ptr + pair, expert[None, :] + tl.zeros_like(pair), mask=pair < max_pairs)
    inside = (token < T)[:, None] & (expert < E)[None, :]
    tl.store(pair_ptr + token.to(tl.int64)[:, None] * E + expert[None, :], pair, mask=inside)


@triton.jit(do_not_specialize=["T", "max_pairs"])
def by_token_kernel(
    selected_ptr, pair_ptr, token_offset_ptr, by_token_ptr, T, max_pairs,
    E: tl.constexpr, E_POW2: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """by_token_N: the pairs of a token in the order of its experts."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    expert = tl.arange(0, E_POW2)
    selected = selected_tile(selected_ptr, token, expert, T, E)
    first = tl.load(token_offset_ptr + token, mask=token < T, other=0)
    order = first[:, None] + tl.cumsum(selected, axis=1) - selected
    order = tl.where(selected > 0, order, max_pairs)
    inside = (token < T)[:, None] & (expert < E)[None, :]
    pointers = pair_ptr + token.to(tl.int64)[:, None] * E + expert[None, :]
    pair = tl.load(pointers, mask=inside, other=0)
    tl.store(by_token_ptr + order, pair, mask=order < max_pairs)
