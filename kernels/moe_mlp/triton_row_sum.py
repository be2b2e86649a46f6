"""out[r] = sum over the pairs of row r of (score *) v, fp32, in the fixed order of by_row_L."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


# Sizes change from step to step: they must not make another kernel.
@triton.jit(do_not_specialize=["first_row"])
def row_sum_kernel(
    v_ptr, score_ptr, by_row_ptr, row_offset_ptr, out_ptr, first_row,
    H: tl.constexpr, SCORED: tl.constexpr, UNROLL: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """One program: BH columns of one row. UNROLL loads are in flight at a time, the rest of a row
    with more pairs follows; loads of pairs that a row does not have are not issued."""
    row = first_row + tl.program_id(0)
    col = tl.program_id(1) * BH + tl.arange(0, BH)
    begin = tl.load(row_offset_ptr + row)
    end = tl.load(row_offset_ptr + row + 1)
    acc = tl.zeros((BH,), tl.float32)
    for first in range(begin, end, UNROLL):
        for i in tl.static_range(UNROLL):
            exists = end - first > i
            pair = tl.load(by_row_ptr + first + i, mask=exists, other=0).to(tl.int64)
            width = tl.where(exists, H, 0)
            v = tl.load(v_ptr + pair * H + col, mask=col < width, other=0.0).to(tl.float32)
            if SCORED:
                v *= tl.load(score_ptr + pair, mask=exists, other=0.0)
            acc += v
    out = out_ptr + row.to(tl.int64) * H + col
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=col < H)
