"""Weight gradients: the tokens are the reduction, and one operand is gathered along it."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from distmoe.kernels.moe_mlp.triton_operands import row_tile


@triton.jit
def wgrad_kernel(
    gathered_ptr, row_ptr, v, offset_ptr, dw_ptr,
    H: tl.constexpr, W: tl.constexpr, GATHERED_FIRST: tl.constexpr,
    TMA: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dW of one expert: sum over its pairs of gathered[row] [H] times v [W].

    GATHERED_FIRST: dW is [H, W] (dW_out, v = a_scaled), else [W, H] (dW_in, v = dz). Rows of v past
    the expert's last are zero, so the gathered operand needs no mask: it reads the last row again.
    An expert without pairs gets zeros. Blocks of one expert are neighbours and share rows in L2.
    """
    NUM_H: tl.constexpr = (H + BH - 1) // BH
    NUM_W: tl.constexpr = (W + BW - 1) // BW
    expert = tl.program_id(0) // (NUM_H * NUM_W)
    block = tl.program_id(0) % (NUM_H * NUM_W)
    h0 = (block // NUM_W) * BH
    w0 = (block % NUM_W) * BW
    begin = tl.load(offset_ptr + expert)
    end = tl.load(offset_ptr + expert + 1)
    col_h = h0 + tl.arange(0, BH)
    # Columns past the last are read from the front and never stored.
    gathered_cols = gathered_ptr + (col_h if H % BH == 0 else col_h % H)[None, :]
    shape: tl.constexpr = (BH, BW) if GATHERED_FIRST else (BW, BH)
    acc = tl.zeros(shape, tl.float32)
    # At least one step: with a loop that may not run the compiler serialises the tensor cores.
    steps = tl.maximum(tl.cdiv(end - begin, BK), 1)
    tl.assume(steps > 0)
    last = tl.maximum(end - 1, 0)
    for step in tl.range(0, steps, num_stages=STAGES):
        pair = tl.minimum(begin + step * BK + tl.arange(0, BK), last)
        row = tl.load(row_ptr + pair).to(tl.int64)
        gathered = tl.load(gathered_cols + row[:, None] * H)
        rows = row_tile(v, begin, end, step * BK, w0, W, BK, BW, TMA)
        if GATHERED_FIRST:
            acc = tl.dot(gathered.T, rows, acc, input_precision="ieee")
        else:
            acc = tl.dot(rows.T, gathered, acc, input_precision="ieee")
    col_w = w0 + tl.arange(0, BW)
    dw = dw_ptr + expert.to(tl.int64) * (H * W)
    if GATHERED_FIRST:
        target = dw + (col_h[:, None] * W + col_w[None, :])
        inside = (col_h < H)[:, None] & (col_w < W)[None, :]
    else:
        target = dw + (col_w[:, None] * H + col_h[None, :])
        inside = (col_w < W)[:, None] & (col_h < H)[None, :]
    tl.store(target, acc.to(dw_ptr.dtype.element_ty), mask=inside)
