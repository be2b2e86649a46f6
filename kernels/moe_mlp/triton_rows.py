"""Products of contiguous rows with weights: y = a W_out^T and dx = dz W_in. BLAS letters."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from distmoe.kernels.moe_mlp.triton_operands import row_tile, store_rows, weight_tile
from distmoe.kernels.moe_mlp.triton_tile_list import tile_at


# Sizes change from step to step: they must not make another kernel.
@triton.jit(do_not_specialize=["num_tiles"])
def rows_kernel(
    v, w, out, tile_ptr, num_tiles,
    K: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [L, N] = v [L, K] times the expert's w: [N, K] if TRANSPOSED (down), else [K, N] (dx).

    Rows are stored contiguously, never scattered: a scatter in the epilogue costs a fifth of the
    product on Hopper, and the row sum gathers them anyway.
    """
    NUM_N: tl.constexpr = (N + BN - 1) // BN
    tile = tl.program_id(0) // NUM_N
    n0 = (tl.program_id(0) % NUM_N) * BN
    expert, begin, end, exists = tile_at(tile_ptr, num_tiles, tile)
    if not exists:
        return
    WHOLE: tl.constexpr = N % BN == 0 and K % BK == 0
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        rows = row_tile(v, begin, end, 0, k, K, BM, BK, TMA)
        if TRANSPOSED:
            weight = weight_tile(w, expert, n0, k, N, K, BN, BK, WHOLE, TMA).T
        else:
            weight = weight_tile(w, expert, k, n0, K, N, BK, BN, WHOLE, TMA)
        acc = tl.dot(rows, weight, acc, input_precision="ieee")
    store_rows(acc, out, begin, end, n0, N, BM, BN, TMA)
