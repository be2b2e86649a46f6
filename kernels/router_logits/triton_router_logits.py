"""Products of bf16 matrices with fp32 sums, and of the fp32 gradient with them.

The gradient is cut into two bf16 parts that add up to its first 16 bits; what is left out is below
the rounding of the results.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def parts_of(v):
    """Two bf16 numbers that add up to v, but for its last bits."""
    large = v.to(tl.bfloat16)
    return large, (v - large.to(tl.float32)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["T"])
def logits_kernel(
    x_ptr, w_ptr, logits_ptr, T,
    H: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """logits [T, E] = x [T, H] w [E, H]^T. Programs of the same rows are neighbours: x comes from
    memory once."""
    NUM_E: tl.constexpr = (E + BE - 1) // BE
    token = tl.program_id(0) // NUM_E * BT + tl.arange(0, BT)
    expert = tl.program_id(0) % NUM_E * BE + tl.arange(0, BE)
    x_rows = x_ptr + token.to(tl.int64)[:, None] * H
    acc = tl.zeros((BT, BE), tl.float32)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        x = tl.load(x_rows + h[None, :], mask=(token < T)[:, None] & (h < H)[None, :], other=0.0)
        w_mask = (expert < E)[:, None] & (h < H)[None, :]
        w = tl.load(w_ptr + expert[:, None] * H + h[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(x, w.T, acc)
    inside = (token < T)[:, None] & (expert < E)[None, :]
    tl.store(logits_ptr + token.to(tl.int64)[:, None] * E + expert[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["T"])
def dx_kernel(
    dlogits_ptr, w_ptr, dx_ptr, T,
    H: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dx [T, H] = dlogits [T, E] w [E, H]."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    rows = dlogits_ptr + token.to(tl.int64)[:, None] * E
    acc = tl.zeros((BT, BH), tl.float32)
    for e0 in range(0, E, BE):
        expert = e0 + tl.arange(0, BE)
        d_mask = (token < T)[:, None] & (expert < E)[None, :]
        d = tl.load(rows + expert[None, :], mask=d_mask, other=0.0)
        w_mask = (expert < E)[:, None] & (h < H)[None, :]
        w = tl.load(w_ptr + expert[:, None] * H + h[None, :], mask=w_mask, other=0.0)
        large, small = parts_of(d)
        acc = tl.dot(large, w, acc)
        acc = tl.dot(small, w, acc)
    inside = (token < T)[:, None] & (h < H)[None, :]
    dx = dx_ptr + token.to(tl.int64)[:, None] * H + h[None, :]
    tl.store(dx, acc.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "rows_per_slice"])
def dw_kernel(
    dlogits_ptr, x_ptr, partial_ptr, T, rows_per_slice,
    H: tl.constexpr, E: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """partial [slices, E, H] = dlogits^T x over a slice of the tokens, summed later in order."""
    expert = tl.program_id(0) * BE + tl.arange(0, BE)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    part = tl.program_id(2)
    begin = part * rows_per_slice
    end = tl.minimum(begin + rows_per_slice, T)
    acc = tl.zeros((BE, BH), tl.float32)
    for t0 in range(begin, end, BT):
        token = t0 + tl.arange(0, BT)
        d_mask = (token < end)[:, None] & (expert < E)[None, :]
        d_rows = dlogits_ptr + token.to(tl.int64)[:, None] * E
        d = tl.load(d_rows + expert[None, :], mask=d_mask, other=0.0)
        x_mask = (token < end)[:, None] & (h < H)[None, :]
        x = tl.load(x_ptr + token.to(tl.int64)[:, None] * H + h[None, :], mask=x_mask, other=0.0)
        large, small = parts_of(d)
        acc = tl.dot(large.T, x, acc)
        acc = tl.dot(small.T, x, acc)
    inside = (expert < E)[:, None] & (h < H)[None, :]
    target = partial_ptr + part.to(tl.int64) * (E * H) + expert[:, None] * H + h[None, :]
    tl.store(target, acc, mask=inside)
