"""Which of all ranks' candidates change: the threshold of an expert by descending bits, and those
that equal it rank by rank."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def candidates(
    best_ptr, first, P, stride, C: tl.constexpr, C_POW2: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """int32 [BP, C_POW2]: those of BP ranks from ``first`` on; below all others where are none."""
    rank = first + tl.arange(0, BP)[:, None]
    place = tl.arange(0, C_POW2)[None, :]
    pointers = best_ptr + rank.to(tl.int64) * stride + place
    return tl.load(pointers, mask=(rank < P) & (place < C), other=-(1 << 31))


@triton.jit
def reach(
    best_ptr, whole, limit, P, stride,
    C: tl.constexpr, C_POW2: tl.constexpr, BP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """How many candidates are >= limit; ``whole`` are all of them if WHOLE."""
    if WHOLE:
        count = tl.sum((whole >= limit).to(tl.int32))
    else:
        count = tl.zeros((), tl.int32)
        for first in range(0, P, BP):
            part = candidates(best_ptr, first, P, stride, C, C_POW2, BP)
            count += tl.sum((part >= limit).to(tl.int32))
    return count


@triton.jit(do_not_specialize=["P", "num_experts"])
def merge_kernel(
    best_ptr, adds_ptr, amount_ptr, accepted_ptr, P, num_experts,
    NOTHING: tl.constexpr, BITS: tl.constexpr, C: tl.constexpr, C_POW2: tl.constexpr,
    BP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """accepted [P, E] int64: of best [P, E, C] the ``amount`` largest. One program per expert.

    Equal ones are taken from the lowest rank on where the expert adds, else from the highest.
    """
    expert = tl.program_id(0)
    best_ptr += expert.to(tl.int64) * C
    stride = num_experts.to(tl.int64) * C
    amount = tl.load(amount_ptr + expert).to(tl.int32)
    adds = tl.load(adds_ptr + expert) != 0
    whole = candidates(best_ptr, 0, P, stride, C, C_POW2, BP)
    limit = tl.full((), NOTHING, tl.int32)
    for i in range(BITS):
        higher = limit + (1 << (BITS - 1 - i))
        reached = reach(best_ptr, whole, higher, P, stride, C, C_POW2, BP, WHOLE)
        limit = tl.where(reached >= amount, higher, limit)
    above = reach(best_ptr, whole, limit + 1, P, stride, C, C_POW2, BP, WHOLE)
    equal = reach(best_ptr, whole, limit, P, stride, C, C_POW2, BP, WHOLE) - above
    left = amount - above
    # Places among the equals, rank by rank, that are taken: the first `left`, or the last.
    low = tl.where(adds, 0, equal - left)
    high = tl.where(adds, left, equal)
    passed = tl.zeros((), tl.int32)
    for first in range(0, P, BP):
        part = candidates(best_ptr, first, P, stride, C, C_POW2, BP)
        over = tl.sum((part > limit).to(tl.int32), axis=1)
        ties = tl.sum((part == limit).to(tl.int32), axis=1)
        end = passed + tl.cumsum(ties, axis=0)
        taken = tl.maximum(tl.minimum(end, high) - tl.maximum(end - ties, low), 0)
        rank = first + tl.arange(0, BP)
        accepted = tl.where(amount > 0, over + taken, 0).to(tl.int64)
        pointers = accepted_ptr + rank.to(tl.int64) * num_experts + expert
        tl.store(pointers, accepted, mask=rank < P)
        passed += tl.sum(ties)
