"""Weight gradients, whose reduction runs over gathered pairs, in specialised warps of Hopper.

M, N, K: BLAS letters.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from distmoe.kernels.moe_mlp.gluon_compat import copy_async, tma_load, viewed
from distmoe.kernels.moe_mlp.gluon_operands import (
    GATHER_ARRIVALS,
    ITEM,
    PRODUCER_WARPS,
    RAGGED,
    halves,
    product_layout,
    row_layout,
)
from distmoe.kernels.moe_mlp.gluon_ring import end_barriers, make_barriers, multiply, next_stage


@gluon.jit
def run_of(offset_ptr, expert, BK: gl.constexpr):
    """(first pair, pair after the last, steps) of an expert. At least one step, of zeros if there
    are no pairs: around a loop that may not run the compiler serialises the tensor cores."""
    begin = gl.load(offset_ptr + expert)
    end = gl.load(offset_ptr + expert + 1)
    return begin, end, gl.maximum((end - begin + BK - 1) // BK, 1)


@gluon.jit
def load(
    loads, num_items, H: gl.constexpr, NUM_H: gl.constexpr, NUM_W: gl.constexpr,
    BH: gl.constexpr, BW: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Producer: rows of an expert's pairs gathered [BK, BH], and rows of v [BK, BW]; both are zero
    past the expert's last pair. The rows' indices are loaded a step ahead."""
    gathered_ptr, row_ptr, v, offset_ptr, gathered_ring, v_ring, barriers = loads
    full, empty, _ = barriers
    LAYOUT: gl.constexpr = row_layout(BH, gl.num_warps())
    place = gl.arange(0, BK, layout=gl.SliceLayout(1, LAYOUT))
    stage, parity = 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        block = item % (NUM_H * NUM_W)
        col = (block // NUM_W) * BH + gl.arange(0, BH, layout=gl.SliceLayout(0, LAYOUT))[None, :]
        w0 = (block % NUM_W) * BW
        begin, end, steps = run_of(offset_ptr, item // (NUM_H * NUM_W), BK)
        pair = begin + place
        row = gl.load(row_ptr + pair, mask=pair < end, other=0)
        for step in range(0, steps):
            inside = (pair < end)[:, None]
            if H % BH != 0:
                inside = inside & (col < H)
            pair += BK
            next_row = gl.load(row_ptr + pair, mask=pair < end, other=0)
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), parity ^ 1)
            mbarrier.expect(ready, BK * BW * ITEM)
            tma_load(
                v, [RAGGED, end, RAGGED - (end - begin) + step * BK, w0], ready, v_ring.index(stage)
            )
            copy_async(
                gathered_ring.index(stage),
                gathered_ptr + row.to(gl.int64)[:, None] * H + col,
                inside,
            )
            async_copy.mbarrier_arrive(ready, increment_count=False)
            row = next_row
            stage, parity = next_stage(stage, parity, STAGES)


@gluon.jit
def store(
    acc, m0, n0, out_ptr, M: gl.constexpr, N: gl.constexpr,
    BM: gl.constexpr, WIDTH: gl.constexpr, CHUNKS: gl.constexpr,
):  # fmt: skip
    """Store WIDTH columns in CHUNKS parts; the pointer is that of the expert's gradient."""
    if CHUNKS > 1:
        HALF: gl.constexpr = WIDTH // 2
        left, right = halves(acc, BM, WIDTH)
        store(left, m0, n0, out_ptr, M, N, BM, HALF, CHUNKS // 2)
        store(right, m0, n0 + HALF, out_ptr, M, N, BM, HALF, CHUNKS // 2)
    else:
        LAYOUT: gl.constexpr = row_layout(WIDTH, gl.num_warps())
        row = m0 + gl.arange(0, BM, layout=gl.SliceLayout(1, LAYOUT))[:, None]
        col = n0 + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))[None, :]
        out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), LAYOUT)
        gl.store(out_ptr + (row * N + col), out, mask=(row < M) & (col < N))


@gluon.jit
def consume(
    data, num_items, H: gl.constexpr, W: gl.constexpr, GATHERED_FIRST: gl.constexpr,
    BH: gl.constexpr, BW: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    CHUNKS: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    gathered_ring, v_ring, barriers, offset_ptr, dw_ptr = data
    NUM_H: gl.constexpr = (H + BH - 1) // BH
    NUM_W: gl.constexpr = (W + BW - 1) // BW
    M: gl.constexpr = H if GATHERED_FIRST else W
    N: gl.constexpr = W if GATHERED_FIRST else H
    BM: gl.constexpr = BH if GATHERED_FIRST else BW
    BN: gl.constexpr = BW if GATHERED_FIRST else BH
    LAYOUT: gl.constexpr = product_layout(BN, gl.num_warps())
    turn, passed = 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        expert = item // (NUM_H * NUM_W)
        begin, end, steps = run_of(offset_ptr, expert, BK)
        if turn % GROUPS == GROUP:
            block = item % (NUM_H * NUM_W)
            h0, w0 = (block // NUM_W) * BH, (block % NUM_W) * BW
            acc = gl.zeros((BM, BN), gl.float32, layout=LAYOUT)
            if GATHERED_FIRST:
                acc = multiply(
                    gathered_ring, v_ring, barriers, turn, passed, steps, acc,
                    STAGES, GROUP, GROUPS, True, False, True,
                )  # fmt: skip
            else:
                acc = multiply(
                    v_ring, gathered_ring, barriers, turn, passed, steps, acc,
                    STAGES, GROUP, GROUPS, True, False, True,
                )  # fmt: skip
            m0, n0 = (h0, w0) if GATHERED_FIRST else (w0, h0)
            store(acc, m0, n0, dw_ptr + expert.to(gl.int64) * (H * W), M, N, BM, BN, CHUNKS)
        turn += 1
        passed += steps


# One expert must not make another kernel.
@gluon.jit(do_not_specialize=["num_experts"])
def wgrad_kernel(
    gathered_ptr, row_ptr, v, offset_ptr, dw_ptr, num_experts,
    H: gl.constexpr, W: gl.constexpr, GATHERED_FIRST: gl.constexpr,
    BH: gl.constexpr, BW: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    CHUNKS: gl.constexpr, GROUPS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """What `triton_wgrad.wgrad_kernel` computes, by programs that walk all experts' blocks."""
    dtype: gl.constexpr = dw_ptr.dtype.element_ty
    NUM_H: gl.constexpr = (H + BH - 1) // BH
    NUM_W: gl.constexpr = (W + BW - 1) // BW
    G_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BH], dtype)
    V_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BW], dtype)
    gathered_ring = gl.allocate_shared_memory(dtype, [STAGES, BK, BH], G_LAYOUT)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BK, BW], v.layout)
    v_ring = viewed(v_tiles, [STAGES, BK, BW], V_LAYOUT)
    barriers = make_barriers(STAGES, GATHER_ARRIVALS)
    num_items = num_experts * (NUM_H * NUM_W)
    loads = (gathered_ptr, row_ptr, v, offset_ptr, gathered_ring, v_tiles, barriers)
    data = (gathered_ring, v_ring, barriers, offset_ptr, dw_ptr)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (
                    consume,
                    (data, num_items, H, W, GATHERED_FIRST, BH, BW, BK, STAGES, CHUNKS, 0, 1),
                ),
                (load, (loads, num_items, H, NUM_H, NUM_W, BH, BW, BK, STAGES)),
            ],
            [PRODUCER_WARPS],
            [PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    consume,
                    (data, num_items, H, W, GATHERED_FIRST, BH, BW, BK, STAGES, CHUNKS, 0, 2),
                ),
                (
                    consume,
                    (data, num_items, H, W, GATHERED_FIRST, BH, BW, BK, STAGES, CHUNKS, 1, 2),
                ),
                (load, (loads, num_items, H, NUM_H, NUM_W, BH, BW, BK, STAGES)),
            ],
            [4, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    end_barriers(barriers, STAGES)
