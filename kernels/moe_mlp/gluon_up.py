"""z = x[row] W_in^T with the activation in the epilogue, in specialised warps of Hopper.

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

act = gluon.jit(triton_activation.act.fn)


@gluon.jit
def store_activated(
    gate, up, n0, begin, end, z_ptr, a_ptr,
    I: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    BM: gl.constexpr, WIDTH: gl.constexpr, CHUNKS: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Store z and a of WIDTH columns, in CHUNKS parts. Pointers are those of the tile's first pair.
    WHOLE: no column is outside. ``up`` is not looked at if not GATED."""
    if CHUNKS > 1:
        HALF: gl.constexpr = WIDTH // 2
        left_gate, right_gate = halves(gate, BM, WIDTH)
        left_up, right_up = halves(up, BM, WIDTH)
        store_activated(
            left_gate, left_up, n0, begin, end, z_ptr, a_ptr,
            I, GATED, ACTIVATION, BM, HALF, CHUNKS // 2, WHOLE,
        )  # fmt: skip
        store_activated(
            right_gate, right_up, n0 + HALF, begin, end, z_ptr, a_ptr,
            I, GATED, ACTIVATION, BM, HALF, CHUNKS // 2, WHOLE,
        )  # fmt: skip
    else:
        G: gl.constexpr = 2 * I if GATED else I
        LAYOUT: gl.constexpr = row_layout(WIDTH, gl.num_warps())
        dtype: gl.constexpr = z_ptr.dtype.element_ty
        place = gl.arange(0, BM, layout=gl.SliceLayout(1, LAYOUT))[:, None]
        col = n0 + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))[None, :]
        inside = begin + place < end
        if not WHOLE:
            inside = inside & (col < I)
        in_z = place * G + col
        # The backward computes a again from z as it is stored: round first, then activate.
        gate = gl.convert_layout(gate.to(dtype), LAYOUT)
        gl.store(z_ptr + in_z, gate, mask=inside)
        a = act(gate.to(gl.float32), ACTIVATION)
        if GATED:
            up = gl.convert_layout(up.to(dtype), LAYOUT)
            gl.store(z_ptr + I + in_z, up, mask=inside)
            a *= up.to(gl.float32)
        gl.store(a_ptr + (place * I + col), a.to(dtype), mask=inside)


@gluon.jit
def consume(
    data, H: gl.constexpr, I: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    CHUNKS: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Gate and up are the left and the right half of one accumulator."""
    x_ring, w_ring, barriers, z_ptr, a_ptr, tile_ptr, num_tiles = data
    G: gl.constexpr = 2 * I if GATED else I
    NUM_N: gl.constexpr = (I + BN - 1) // BN
    STEPS: gl.constexpr = (H + BK - 1) // BK
    WIDTH: gl.constexpr = 2 * BN if GATED else BN
    LAYOUT: gl.constexpr = product_layout(WIDTH, gl.num_warps())
    turn = GROUP
    item = gl.program_id(0) + GROUP * gl.num_programs(0)
    expert, begin, end = tile_at(tile_ptr, num_tiles, item // NUM_N)
    while expert >= 0:
        n0 = (item % NUM_N) * BN
        item += GROUPS * gl.num_programs(0)
        next_expert, next_begin, next_end = tile_at(tile_ptr, num_tiles, item // NUM_N)
        acc = gl.zeros((BM, WIDTH), gl.float32, layout=LAYOUT)
        acc = multiply(
            x_ring, w_ring, barriers, turn, turn * STEPS, STEPS, acc,
            STAGES, GROUP, GROUPS, False, True, True,
        )  # fmt: skip
        if GATED:
            gate, up = halves(acc, BM, WIDTH)
        else:
            gate, up = acc, acc
        first = begin.to(gl.int64)
        store_activated(
            gate, up, n0, begin, end, z_ptr + first * G, a_ptr + first * I,
            I, GATED, ACTIVATION, BM, BN, CHUNKS, I % BN == 0,
        )  # fmt: skip
        turn += GROUPS
        expert, begin, end = next_expert, next_begin, next_end


# Sizes change from step to step: they must not make another kernel.
@gluon.jit(do_not_specialize=["num_tiles"])
def up_kernel(
    x_ptr, row_ptr, w, z_ptr, a_ptr, tile_ptr, num_tiles,
    H: gl.constexpr, I: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    CHUNKS: gl.constexpr, GROUPS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """What `triton_up.up_kernel` computes, by programs that walk the tiles.

    Neighbouring programs have the same gathered rows, and then the same weights. The two tiles of
    gate and up lie one behind the other in a stage, and are one operand of the products.
    """
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    PARTS: gl.constexpr = 2 if GATED else 1
    # Rows of at most 128 bytes, the width of a swizzle: two tiles behind each other are one.
    gl.static_assert(BK <= 64)
    X_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], dtype)
    W_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PARTS * BN, BK], dtype)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], X_LAYOUT)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES * PARTS, 1, BN, BK], w.layout)
    w_ring = viewed(w_tiles, [STAGES, PARTS * BN, BK], W_LAYOUT)
    barriers = make_barriers(STAGES, GATHER_ARRIVALS)
    loads = (x_ptr, row_ptr, w, x_ring, w_tiles, barriers, tile_ptr, num_tiles)
    data = (x_ring, w_ring, barriers, z_ptr, a_ptr, tile_ptr, num_tiles)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (consume, (data, H, I, GATED, ACTIVATION, BM, BN, BK, STAGES, CHUNKS, 0, 1)),
                (load_rows_and_weight, (loads, H, I, PARTS, True, BM, BN, BK, STAGES)),
            ],
            [PRODUCER_WARPS],
            [PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (data, H, I, GATED, ACTIVATION, BM, BN, BK, STAGES, CHUNKS, 0, 2)),
                (consume, (data, H, I, GATED, ACTIVATION, BM, BN, BK, STAGES, CHUNKS, 1, 2)),
                (load_rows_and_weight, (loads, H, I, PARTS, True, BM, BN, BK, STAGES)),
            ],
            [4, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    end_barriers(barriers, STAGES)
