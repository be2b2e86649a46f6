"""Threshold of an expert's column by descending bits, ties by a scan in token order."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def priority_kernel(
    key_ptr, chosen_ptr, adds_ptr, priority_ptr, T,
    E: tl.constexpr, NOTHING: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """priority [E, T] from key and chosen [T, E]: a transposition on the way."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    inside = (token < T)[:, None] & (expert < E)[None, :]
    place = token.to(tl.int64)[:, None] * E + expert[None, :]
    key = tl.load(key_ptr + place, mask=inside, other=0)
    chosen = tl.load(chosen_ptr + place, mask=inside, other=0)
    adds = tl.load(adds_ptr + expert, mask=expert < E, other=0)[None, :]
    priority = tl.where(chosen != adds, tl.where(adds != 0, key, -key), NOTHING)
    transposed = expert.to(tl.int64)[:, None] * T + token[None, :]
    tl.store(priority_ptr + transposed, priority.T, mask=inside.T)


@triton.jit
def column_part(priority_ptr, begin, T, NOTHING: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK priorities of a column from ``begin`` on, NOTHING past its end."""
    token = begin + tl.arange(0, BLOCK)
    return tl.load(priority_ptr + token, mask=token < T, other=NOTHING)


@triton.jit
def count_at_least(
    priority_ptr, whole, limit, T,
    NOTHING: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """How many priorities of the column are >= limit; ``whole`` is the column if WHOLE."""
    if WHOLE:
        count = tl.sum((whole >= limit).to(tl.int32))
    else:
        count = tl.zeros((), tl.int32)
        for begin in range(0, T, BLOCK):
            part = column_part(priority_ptr, begin, T, NOTHING, BLOCK)
            count += tl.sum((part >= limit).to(tl.int32))
    return count


@triton.jit
def threshold(
    priority_ptr, whole, amount, T, NOTHING: tl.constexpr, KEY_LIMIT: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The largest limit that at least ``amount`` priorities reach, bit by bit from the highest.

    -KEY_LIMIT if fewer are eligible.
    """
    limit = tl.full((), -KEY_LIMIT, tl.int32)
    for i in range(BITS):
        higher = limit + (1 << (BITS - 1 - i))
        reached = count_at_least(priority_ptr, whole, higher, T, NOTHING, BLOCK, WHOLE)
        limit = tl.where(reached >= amount, higher, limit)
    return limit


@triton.jit(do_not_specialize=["T"])
def take_kernel(
    priority_ptr, amount_ptr, adds_ptr, taken_ptr, T,
    NOTHING: tl.constexpr, KEY_LIMIT: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """taken [E, T]: 1 for the ``amount`` best of the column. One program per expert.

    All above the threshold, and of those at it the first in token order where the expert adds,
    the last where it drops.
    """
    expert = tl.program_id(0)
    priority_ptr += expert.to(tl.int64) * T
    taken_ptr += expert.to(tl.int64) * T
    amount = tl.load(amount_ptr + expert)
    adds = tl.load(adds_ptr + expert) != 0
    whole = column_part(priority_ptr, 0, T, NOTHING, BLOCK)
    limit = threshold(priority_ptr, whole, amount, T, NOTHING, KEY_LIMIT, BITS, BLOCK, WHOLE)
    above = count_at_least(priority_ptr, whole, limit + 1, T, NOTHING, BLOCK, WHOLE)
    at = count_at_least(priority_ptr, whole, limit, T, NOTHING, BLOCK, WHOLE) - above
    left = amount - above
    # Places among the equals that are taken: the first `left`, or the last.
    low = tl.where(adds, 0, at - left)
    high = tl.where(adds, left, at)
    seen = tl.zeros((), tl.int32)
    for begin in range(0, T, SCAN):
        token = begin + tl.arange(0, SCAN)
        part = column_part(priority_ptr, begin, T, NOTHING, SCAN)
        equal = (part == limit).to(tl.int32)
        place = seen + tl.cumsum(equal, axis=0) - equal
        tie = (equal != 0) & (place >= low) & (place < high)
        tl.store(taken_ptr + token, ((part > limit) | tie).to(tl.uint8), mask=token < T)
        seen += tl.sum(equal)


@triton.jit(do_not_specialize=["T"])
def flip_kernel(
    chosen_ptr, taken_ptr, selected_ptr, T,
    E: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """selected [T, E] = chosen [T, E] xor taken [E, T]."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    inside = (token < T)[:, None] & (expert < E)[None, :]
    transposed = expert.to(tl.int64)[:, None] * T + token[None, :]
    taken = tl.load(taken_ptr + transposed, mask=inside.T, other=0).T
    place = token.to(tl.int64)[:, None] * E + expert[None, :]
    chosen = tl.load(chosen_ptr + place, mask=inside, other=0)
    tl.store(selected_ptr + place, chosen ^ taken, mask=inside)


@triton.jit(do_not_specialize=["T"])
def gather_best_kernel(
    priority_ptr, best_ptr, T, num,
    NOTHING: tl.constexpr, KEY_LIMIT: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """best [E, num], which holds NOTHING: the priorities above the threshold of ``num`` in token
    order, then as many as fit of those at it."""
    expert = tl.program_id(0)
    priority_ptr += expert.to(tl.int64) * T
    best_ptr += expert.to(tl.int64) * num
    whole = column_part(priority_ptr, 0, T, NOTHING, BLOCK)
    limit = threshold(priority_ptr, whole, num, T, NOTHING, KEY_LIMIT, BITS, BLOCK, WHOLE)
    above = count_at_least(priority_ptr, whole, limit + 1, T, NOTHING, BLOCK, WHOLE)
    seen_above = tl.zeros((), tl.int32)
    seen_equal = tl.zeros((), tl.int32)
    for begin in range(0, T, SCAN):
        part = column_part(priority_ptr, begin, T, NOTHING, SCAN)
        over = (part > limit).to(tl.int32)
        equal = (part == limit).to(tl.int32)
        place = tl.where(
            over != 0,
            seen_above + tl.cumsum(over, axis=0) - over,
            above + seen_equal + tl.cumsum(equal, axis=0) - equal,
        )
        fits = ((over | equal) != 0) & (place < num)
        tl.store(best_ptr + place, part, mask=fits)
        seen_above += tl.sum(over)
        seen_equal += tl.sum(equal)


@triton.jit
def sort_kernel(values_ptr, num, NOTHING: tl.constexpr, BLOCK: tl.constexpr):
    """Every row of values [E, num], descending, in place."""
    place = tl.arange(0, BLOCK)
    row = values_ptr + tl.program_id(0).to(tl.int64) * num
    values = tl.load(row + place, mask=place < num, other=NOTHING)
    ordered = tl.sort(values, descending=True)
    # In place: the whole row is read before any of it is written.
    tl.debug_barrier()
    tl.store(row + place, ordered, mask=place < num)
