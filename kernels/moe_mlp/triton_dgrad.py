"""da' = dy[row] W_out with dscore, a_scaled and dz in the epilogue. M, N, K: BLAS letters."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from distmoe.kernels.moe_mlp.triton_activation import act_and_slope
from distmoe.kernels.moe_mlp.triton_halves import first_rows, halves, row_halves
from distmoe.kernels.moe_mlp.triton_operands import columns_from, gathered_pointers, weight_tile
from distmoe.kernels.moe_mlp.triton_tile_list import tile_at


@triton.jit
def epilogue(
    da, place, col0, live, score, z_ptr, dz_ptr, a_ptr,
    I: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Store dz and a_scaled of rows ``place`` and of WIDTH columns, in CHUNKS parts from left to
    right; what they add to dscore, [BM] fp32.

    WHOLE: no column is outside. Pointers are those of the tile's first pair: 32 bits are then
    enough inside the tile, which takes half of the registers.
    """
    if CHUNKS > 1:
        HALF: tl.constexpr = WIDTH // 2
        left, right = halves(da, BM, WIDTH)
        dscore = epilogue(
            left, place, col0, live, score, z_ptr, dz_ptr, a_ptr,
            I, GATED, ACTIVATION, BM, HALF, CHUNKS // 2, WHOLE,
        )  # fmt: skip
        dscore += epilogue(
            right, place, col0 + HALF, live, score, z_ptr, dz_ptr, a_ptr,
            I, GATED, ACTIVATION, BM, HALF, CHUNKS // 2, WHOLE,
        )  # fmt: skip
    else:
        G: tl.constexpr = 2 * I if GATED else I
        dtype: tl.constexpr = z_ptr.dtype.element_ty
        col = col0 + tl.arange(0, WIDTH)[None, :]
        inside = live[:, None] if WHOLE else live[:, None] & (col < I)
        in_z = place[:, None] * G + col
        z = tl.load(z_ptr + in_z, mask=inside, other=0.0).to(tl.float32)
        value, slope = act_and_slope(z, ACTIVATION)
        dz = da * score[:, None]
        if GATED:
            up = tl.load(z_ptr + I + in_z, mask=inside, other=0.0).to(tl.float32)
            tl.store(dz_ptr + I + in_z, (dz * value).to(dtype), mask=inside)
            value *= up
            slope *= up
        tl.store(dz_ptr + in_z, (dz * slope).to(dtype), mask=inside)
        # Rounded as in the forward: dscore and dW_out belong to the value that was used.
        a = value.to(dtype).to(tl.float32)
        tl.store(a_ptr + (place[:, None] * I + col), (a * score[:, None]).to(dtype), mask=inside)
        # Columns outside have z = 0, and a = 0 with every activation.
        dscore = tl.sum(da * a, axis=1)
    return dscore


@triton.jit
def store_gradients(
    da, place, n0, length, score_ptr, z_ptr, dz_ptr, a_ptr, partial_ptr,
    I: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """`epilogue` of rows ``place`` of a tile with ``length`` pairs, and their part of dscore."""
    live = place < length
    score = tl.load(score_ptr + place, mask=live, other=0.0)
    dscore = epilogue(
        da, place, n0, live, score, z_ptr, dz_ptr, a_ptr,
        I, GATED, ACTIVATION, BM, BN, CHUNKS, I % BN == 0,
    )  # fmt: skip
    tl.store(partial_ptr + place, dscore, mask=live)


# Sizes change from step to step: they must not make another kernel.
@triton.jit(do_not_specialize=["num_tiles", "num_pairs"])
def dgrad_kernel(
    dy_ptr, row_ptr, w, score_ptr, z_ptr, dz_ptr, a_ptr, partial_ptr,
    tile_ptr, num_tiles, num_pairs,
    H: tl.constexpr, I: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: BM pairs by BN columns of I. The epilogue handles CHUNKS parts one after the
    other, which keeps the saved z out of registers: two of the rows, and then of the columns, so
    that what a part reads and writes of a row is long.

    ``partial_ptr`` fp32 [ceil(I / BN), num_pairs]: dscore of each column block, summed later in
    fixed order; atomics would make the order of the sum depend on the run.
    """
    G: tl.constexpr = 2 * I if GATED else I
    NUM_N: tl.constexpr = (I + BN - 1) // BN
    tile = tl.program_id(0) // NUM_N
    block = tl.program_id(0) % NUM_N
    n0 = block * BN
    expert, begin, end, exists = tile_at(tile_ptr, num_tiles, tile)
    if not exists:
        return
    pair = begin + tl.arange(0, BM)
    dy_rows = gathered_pointers(dy_ptr, row_ptr, pair, pair < end, H, BK)
    WHOLE: tl.constexpr = I % BN == 0 and H % BK == 0
    da = tl.zeros((BM, BN), tl.float32)
    for k in range(0, H, BK):
        dy = columns_from(dy_rows, k, H, BK)
        weight = weight_tile(w, expert, k, n0, H, I, BK, BN, WHOLE, TMA)
        da = tl.dot(dy, weight, da, input_precision="ieee")
    first = begin.to(tl.int64)
    score_ptr += first
    z_ptr += first * G
    dz_ptr += first * G
    a_ptr += first * I
    partial_ptr += block.to(tl.int64) * num_pairs + first
    if CHUNKS == 1:
        store_gradients(
            da, tl.arange(0, BM), n0, end - begin, score_ptr, z_ptr, dz_ptr, a_ptr, partial_ptr,
            I, GATED, ACTIVATION, BM, BN, 1,
        )  # fmt: skip
    else:
        upper, lower = row_halves(da, BM, BN)
        place = first_rows(BM)
        store_gradients(
            upper, place, n0, end - begin, score_ptr, z_ptr, dz_ptr, a_ptr, partial_ptr,
            I, GATED, ACTIVATION, BM // 2, BN, CHUNKS // 2,
        )  # fmt: skip
        store_gradients(
            lower, place + 8, n0, end - begin, score_ptr, z_ptr, dz_ptr, a_ptr, partial_ptr,
            I, GATED, ACTIVATION, BM // 2, BN, CHUNKS // 2,
        )  # fmt: skip


# Sizes change from step to step: they must not make another kernel.
@triton.jit(do_not_specialize=["num_tiles", "num_pairs"])
def dscore_kernel(
    partial_ptr, dscore_ptr, tile_ptr, num_tiles, num_pairs,
    BLOCKS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dscore_L of one tile's pairs: the partial sums of the column blocks, from left to right."""
    _, begin, end, exists = tile_at(tile_ptr, num_tiles, tl.program_id(0))
    if not exists:
        return
    pair = begin + tl.arange(0, BM)
    live = pair < end
    dscore = tl.zeros((BM,), tl.float32)
    for block in range(BLOCKS):
        offset = tl.cast(block, tl.int64) * num_pairs
        dscore += tl.load(partial_ptr + offset + pair, mask=live, other=0.0)
    tl.store(dscore_ptr + pair, dscore, mask=live)
