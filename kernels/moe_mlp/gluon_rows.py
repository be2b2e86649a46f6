"""Contiguous rows times weights, y = a W_out^T and dx = dz W_in, in specialised warps of Hopper.

M, N, K: BLAS letters.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from distmoe.kernels.moe_mlp.gluon_compat import tma_load, viewed
from distmoe.kernels.moe_mlp.gluon_operands import (
    ITEM,
    PRODUCER_WARPS,
    RAGGED,
    TMA_ARRIVALS,
    halves,
    product_layout,
    row_layout,
    tile_at,
)
from distmoe.kernels.moe_mlp.gluon_ring import (
    end_barriers,
    make_barriers,
    multiply,
    next_stage,
)


@gluon.jit
def load(
    loads, K: gl.constexpr, N: gl.constexpr, TRANSPOSED: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Producer: both operands by TMA, zero outside of a run and of the weight."""
    v, w, v_ring, w_ring, barriers, tile_ptr, num_tiles = loads
    full, empty, _ = barriers
    NUM_N: gl.constexpr = (N + BN - 1) // BN
    STEPS: gl.constexpr = (K + BK - 1) // BK
    stage, parity = 0, 0
    item = gl.program_id(0)
    expert, begin, end = tile_at(tile_ptr, num_tiles, item // NUM_N)
    while expert >= 0:
        n0 = (item % NUM_N) * BN
        item += gl.num_programs(0)
        next_expert, next_begin, next_end = tile_at(tile_ptr, num_tiles, item // NUM_N)
        for step in range(0, STEPS):
            k = step * BK
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), parity ^ 1)
            mbarrier.expect(ready, (BM + BN) * BK * ITEM)
            tma_load(v, [RAGGED, end, RAGGED - (end - begin), k], ready, v_ring.index(stage))
            corner = [expert, n0, k] if TRANSPOSED else [expert, k, n0]
            tma_load(w, corner, ready, w_ring.index(stage))
            stage, parity = next_stage(stage, parity, STAGES)
        expert, begin, end = next_expert, next_begin, next_end


@gluon.jit
def store(
    acc, n0, begin, end, out_ptr, N: gl.constexpr,
    BM: gl.constexpr, WIDTH: gl.constexpr, CHUNKS: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Store WIDTH columns in CHUNKS parts. The pointer is that of the tile's first pair. WHOLE: no
    column is outside."""
    if CHUNKS > 1:
        HALF: gl.constexpr = WIDTH // 2
        left, right = halves(acc, BM, WIDTH)
        store(left, n0, begin, end, out_ptr, N, BM, HALF, CHUNKS // 2, WHOLE)
        store(right, n0 + HALF, begin, end, out_ptr, N, BM, HALF, CHUNKS // 2, WHOLE)
    else:
        LAYOUT: gl.constexpr = row_layout(WIDTH, gl.num_warps())
        place = gl.arange(0, BM, layout=gl.SliceLayout(1, LAYOUT))[:, None]
        col = n0 + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))[None, :]
        inside = begin + place < end
        if not WHOLE:
            inside = inside & (col < N)
        out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), LAYOUT)
        gl.store(out_ptr + (place * N + col), out, mask=inside)


@gluon.jit
def consume(
    data, K: gl.constexpr, N: gl.constexpr, TRANSPOSED: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    CHUNKS: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    v_ring, w_ring, barriers, out_ptr, tile_ptr, num_tiles = data
    NUM_N: gl.constexpr = (N + BN - 1) // BN
    STEPS: gl.constexpr = (K + BK - 1) // BK
    LAYOUT: gl.constexpr = product_layout(BN, gl.num_warps())
    turn = GROUP
    item = gl.program_id(0) + GROUP * gl.num_programs(0)
    expert, begin, end = tile_at(tile_ptr, num_tiles, item // NUM_N)
    while expert >= 0:
        n0 = (item % NUM_N) * BN
        item += GROUPS * gl.num_programs(0)
        next_expert, next_begin, next_end = tile_at(tile_ptr, num_tiles, item // NUM_N)
        acc = gl.zeros((BM, BN), gl.float32, layout=LAYOUT)
        acc = multiply(
            v_ring, w_ring, barriers, turn, turn * STEPS, STEPS, acc,
            STAGES, GROUP, GROUPS, False, TRANSPOSED, False,
        )  # fmt: skip
        out = out_ptr + begin.to(gl.int64) * N
        store(acc, n0, begin, end, out, N, BM, BN, CHUNKS, N % BN == 0)
        turn += GROUPS
        expert, begin, end = next_expert, next_begin, next_end


# Sizes change from step to step: they must not make another kernel.
@gluon.jit(do_not_specialize=["num_tiles"])
def rows_kernel(
    v, w, out_ptr, tile_ptr, num_tiles,
    K: gl.constexpr, N: gl.constexpr, TRANSPOSED: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    CHUNKS: gl.constexpr, GROUPS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """What `triton_rows.rows_kernel` computes, by programs that walk the tiles."""
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    V_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], dtype)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BM, BK], v.layout)
    v_ring = viewed(v_tiles, [STAGES, BM, BK], V_LAYOUT)
    ROWS: gl.constexpr = BN if TRANSPOSED else BK
    COLS: gl.constexpr = BK if TRANSPOSED else BN
    W_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLS], dtype)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, ROWS, COLS], w.layout)
    w_ring = viewed(w_tiles, [STAGES, ROWS, COLS], W_LAYOUT)
    barriers = make_barriers(STAGES, TMA_ARRIVALS)
    loads = (v, w, v_tiles, w_tiles, barriers, tile_ptr, num_tiles)
    data = (v_ring, w_ring, barriers, out_ptr, tile_ptr, num_tiles)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (consume, (data, K, N, TRANSPOSED, BM, BN, BK, STAGES, CHUNKS, 0, 1)),
                (load, (loads, K, N, TRANSPOSED, BM, BN, BK, STAGES)),
            ],
            [PRODUCER_WARPS],
            [PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (data, K, N, TRANSPOSED, BM, BN, BK, STAGES, CHUNKS, 0, 2)),
                (consume, (data, K, N, TRANSPOSED, BM, BN, BK, STAGES, CHUNKS, 1, 2)),
                (load, (loads, K, N, TRANSPOSED, BM, BN, BK, STAGES)),
            ],
            [4, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    end_barriers(barriers, STAGES)
