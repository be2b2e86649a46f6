"""Up-projection: z = x[row] W_in^T with the activation in the epilogue. M, N, K: BLAS letters."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from distmoe.kernels.moe_mlp.triton_activation import act
from distmoe.kernels.moe_mlp.triton_halves import halves
from distmoe.kernels.moe_mlp.triton_operands import columns_from, gathered_pointers, stacked_tiles
from distmoe.kernels.moe_mlp.triton_tile_list import tile_at


# Sizes change from step to step: they must not make another kernel.
@triton.jit(do_not_specialize=["num_tiles"])
def up_kernel(
    x_ptr, row_ptr, w, z_ptr, a_ptr, tile_ptr, num_tiles,
    H: tl.constexpr, I: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: BM pairs by BN columns of a, and the columns of z that they come from.

    ``w`` is [e, 2, I, H], or [e, 1, I, H] without a gate: the weights keep the concatenated layout
    of checkpoints, and the tiles of gate and up still are one operand of one product, whose left
    half is the gate. Neighbouring programs share their gathered rows in L2.
    """
    G: tl.constexpr = 2 * I if GATED else I
    NUM_N: tl.constexpr = (I + BN - 1) // BN
    tile = tl.program_id(0) // NUM_N
    n0 = (tl.program_id(0) % NUM_N) * BN
    expert, begin, end, exists = tile_at(tile_ptr, num_tiles, tile)
    if not exists:
        return
    pair = begin + tl.arange(0, BM)
    live = pair < end
    x_rows = gathered_pointers(x_ptr, row_ptr, pair, live, H, BK)
    PARTS: tl.constexpr = 2 if GATED else 1
    WHOLE: tl.constexpr = I % BN == 0 and H % BK == 0
    acc = tl.zeros((BM, PARTS * BN), tl.float32)
    for k in range(0, H, BK):
        x = columns_from(x_rows, k, H, BK)
        weight = stacked_tiles(w, expert, n0, k, PARTS, I, H, BN, BK, WHOLE, TMA)
        acc = tl.dot(x, weight.T, acc, input_precision="ieee")
    if GATED:
        gate, up = halves(acc, BM, PARTS * BN)
    else:
        gate = acc
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    col = n0 + tl.arange(0, BN)
    inside = live[:, None] if I % BN == 0 else live[:, None] & (col < I)[None, :]
    # 64-bit for where the tile begins, 32-bit inside it, which takes half of the registers.
    place = tl.arange(0, BM)[:, None]
    z_tile = z_ptr + begin.to(tl.int64) * G + (place * G + col[None, :])
    # The backward computes a again from z as it is stored: round first, then activate.
    gate = gate.to(dtype)
    tl.store(z_tile, gate, mask=inside)
    a = act(gate.to(tl.float32), ACTIVATION)
    if GATED:
        up = up.to(dtype)
        tl.store(z_tile + I, up, mask=inside)
        a *= up.to(tl.float32)
    a_tile = a_ptr + begin.to(tl.int64) * I + (place * I + col[None, :])
    tl.store(a_tile, a.to(dtype), mask=inside)
