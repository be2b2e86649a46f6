"""da' = dy[row] W_out with dscore, a_scaled and dz in the epilogue, in specialised warps of Hopper.

M, N, K: BLAS letters.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from distmoe.kernels.moe_mlp import triton_activation
from distmoe.kernels.moe_mlp.gluon_compat import viewed
from distmoe.kernels.moe_mlp.gluon_operands import (
    GATHER_ARRIVALS,
    PRODUCER_WARPS,
    halves,
    load_rows_and_weight,
    product_layout,
    row_layout,
    tile_at,
)
from distmoe.kernels.moe_mlp.gluon_ring import end_barriers, make_barriers, multiply

act_and_slope = gluon.jit(triton_activation.act_and_slope.fn)


@gluon.jit
def store_gradients(
    da, n0, begin, end, score_ptr, z_ptr, dz_ptr, a_ptr,
    I: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    BM: gl.constexpr, WIDTH: gl.constexpr, CHUNKS: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Store dz and a_scaled of WIDTH columns in CHUNKS parts, from left to right; what they add to
    dscore, [BM] fp32. Pointers are those of the tile's first pair. WHOLE: no column is outside."""
    if CHUNKS > 1:
        HALF: gl.constexpr = WIDTH // 2
        left, right = halves(da, BM, WIDTH)
        dscore = store_gradients(
            left, n0, begin, end, score_ptr, z_ptr, dz_ptr, a_ptr,
            I, GATED, ACTIVATION, BM, HALF, CHUNKS // 2, WHOLE,
        )  # fmt: skip
        dscore += store_gradients(
            right, n0 + HALF, begin, end, score_ptr, z_ptr, dz_ptr, a_ptr,
            I, GATED, ACTIVATION, BM, HALF, CHUNKS // 2, WHOLE,
        )  # fmt: skip
    else:
        G: gl.constexpr = 2 * I if GATED else I
        LAYOUT: gl.constexpr = row_layout(WIDTH, gl.num_warps())
        dtype: gl.constexpr = z_ptr.dtype.element_ty
        place = gl.arange(0, BM, layout=gl.SliceLayout(1, LAYOUT))
        col = n0 + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))[None, :]
        live = begin + place < end
        inside = live[:, None]
        if not WHOLE:
            inside = inside & (col < I)
        in_z = place[:, None] * G + col
        # Converted once: everything else is loaded and stored by rows.
        da = gl.convert_layout(da, LAYOUT)
        z = gl.load(z_ptr + in_z, mask=inside, other=0.0).to(gl.float32)
        value, slope = act_and_slope(z, ACTIVATION)
        score = gl.load(score_ptr + place, mask=live, other=0.0)
        dz = da * score[:, None]
        if GATED:
            up = gl.load(z_ptr + I + in_z, mask=inside, other=0.0).to(gl.float32)
            gl.store(dz_ptr + I + in_z, (dz * value).to(dtype), mask=inside)
            value *= up
            slope *= up
        gl.store(dz_ptr + in_z, (dz * slope).to(dtype), mask=inside)
        # Rounded as in the forward: dscore and dW_out belong to the value that was used.
        a = value.to(dtype).to(gl.float32)
        a_scaled = (a * score[:, None]).to(dtype)
        gl.store(a_ptr + (place[:, None] * I + col), a_scaled, mask=inside)
        # Columns outside have z = 0, and a = 0 with every activation.
        dscore = gl.sum(da * a, axis=1)
    return dscore


@gluon.jit
def consume(
    data, num_tiles, num_pairs,
    H: gl.constexpr, I: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    CHUNKS: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    dy_ring, w_ring, barriers, score_ptr, z_ptr, dz_ptr, a_ptr, partial_ptr, tile_ptr = data
    G: gl.constexpr = 2 * I if GATED else I
    NUM_N: gl.constexpr = (I + BN - 1) // BN
    STEPS: gl.constexpr = (H + BK - 1) // BK
    LAYOUT: gl.constexpr = product_layout(BN, gl.num_warps())
    ROWS: gl.constexpr = gl.SliceLayout(1, row_layout(BN // CHUNKS, gl.num_warps()))
    turn = GROUP
    item = gl.program_id(0) + GROUP * gl.num_programs(0)
    expert, begin, end = tile_at(tile_ptr, num_tiles, item // NUM_N)
    while expert >= 0:
        block = item % NUM_N
        item += GROUPS * gl.num_programs(0)
        acc = gl.zeros((BM, BN), gl.float32, layout=LAYOUT)
        acc = multiply(
            dy_ring, w_ring, barriers, turn, turn * STEPS, STEPS, acc,
            STAGES, GROUP, GROUPS, False, False, True,
        )  # fmt: skip
        first = begin.to(gl.int64)
        dscore = store_gradients(
            acc, block * BN, begin, end,
            score_ptr + first, z_ptr + first * G, dz_ptr + first * G, a_ptr + first * I,
            I, GATED, ACTIVATION, BM, BN, CHUNKS, I % BN == 0,
        )  # fmt: skip
        pair = begin + gl.arange(0, BM, layout=ROWS)
        partial = partial_ptr + block.to(gl.int64) * num_pairs
        gl.store(partial + pair, dscore, mask=pair < end)
        turn += GROUPS
        # Not ahead, as elsewhere: registers are short, and the other group multiplies meanwhile.
        expert, begin, end = tile_at(tile_ptr, num_tiles, item // NUM_N)


# Sizes change from step to step: they must not make another kernel.
@gluon.jit(do_not_specialize=["num_tiles", "num_pairs"])
def dgrad_kernel(
    dy_ptr, row_ptr, w, score_ptr, z_ptr, dz_ptr, a_ptr, partial_ptr,
    tile_ptr, num_tiles, num_pairs,
    H: gl.constexpr, I: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    CHUNKS: gl.constexpr, GROUPS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """What `triton_dgrad.dgrad_kernel` computes, by programs that walk the tiles.

    ``partial_ptr`` fp32 [ceil(I / BN), num_pairs]: dscore of each column block, summed later in
    fixed order.
    """
    dtype: gl.constexpr = dy_ptr.dtype.element_ty
    DY_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], dtype)
    W_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BN], dtype)
    dy_ring = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], DY_LAYOUT)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, BK, BN], w.layout)
    w_ring = viewed(w_tiles, [STAGES, BK, BN], W_LAYOUT)
    barriers = make_barriers(STAGES, GATHER_ARRIVALS)
    loads = (dy_ptr, row_ptr, w, dy_ring, w_tiles, barriers, tile_ptr, num_tiles)
    data = (dy_ring, w_ring, barriers, score_ptr, z_ptr, dz_ptr, a_ptr, partial_ptr, tile_ptr)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (
                    consume,
                    (data, num_tiles, num_pairs, H, I, GATED, ACTIVATION,
                     BM, BN, BK, STAGES, CHUNKS, 0, 1),
                ),
                (load_rows_and_weight, (loads, H, I, 1, False, BM, BN, BK, STAGES)),
            ],
            [PRODUCER_WARPS],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    consume,
                    (data, num_tiles, num_pairs, H, I, GATED, ACTIVATION,
                     BM, BN, BK, STAGES, CHUNKS, 0, 2),
                ),
                (
                    consume,
                    (data, num_tiles, num_pairs, H, I, GATED, ACTIVATION,
                     BM, BN, BK, STAGES, CHUNKS, 1, 2),
                ),
                (load_rows_and_weight, (loads, H, I, 1, False, BM, BN, BK, STAGES)),
            ],
            [4, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    end_barriers(barriers, STAGES)
