"""How the warp-specialised kernels walk tiles, gather rows and store. M, N, K: BLAS letters."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from distmoe.kernels.moe_mlp import gluon_tiles, triton_halves
from distmoe.kernels.moe_mlp.gluon_compat import copy_async, tma_load
from distmoe.kernels.moe_mlp.gluon_ring import next_stage
from distmoe.kernels.moe_mlp.triton_operands import RAGGED_ROWS

halves = gluon.jit(triton_halves.halves.fn)

PRODUCER_WARPS: gl.constexpr = gl.constexpr(gluon_tiles.PRODUCER_WARPS)
# Arrivals of every producing thread, and of the one that announces TMA's bytes.
GATHER_ARRIVALS: gl.constexpr = gl.constexpr(gluon_tiles.PRODUCER_WARPS * 32 + 1)
TMA_ARRIVALS: gl.constexpr = gl.constexpr(1)
# Bytes of an element: the kernels are for bf16 and fp16.
ITEM: gl.constexpr = gl.constexpr(2)
RAGGED: gl.constexpr = gl.constexpr(RAGGED_ROWS)


@gluon.constexpr_function
def row_layout(columns, num_warps):
    """Of a tensor [rows, columns] in registers: 16 bytes a thread, rows as whole as can be."""
    across = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // across, across], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def product_layout(columns, num_warps):
    """Of an accumulator: every warpgroup has rows of its own, of all columns."""
    return gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, min(columns, 256), 16])


@gluon.jit
def tile_at(tile_ptr, num_tiles, tile):
    """(expert, first pair, pair after the run) of a tile; expert -1 past the last one."""
    exists = tile < num_tiles
    expert = gl.load(tile_ptr + tile, mask=exists, other=-1)
    begin = gl.load(tile_ptr + num_tiles + tile, mask=exists, other=0)
    end = gl.load(tile_ptr + 2 * num_tiles + tile, mask=exists, other=0)
    return expert, begin, end


@gluon.jit
def load_rows_and_weight(
    loads, K: gl.constexpr, N: gl.constexpr, PARTS: gl.constexpr, W_TRANSPOSED: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Producer of gathered rows of v [R, K] and tiles of w: [e, PARTS * N, K], of which PARTS tiles
    N rows apart are loaded, if W_TRANSPOSED; else [e, K, N]."""
    v_ptr, row_ptr, w, v_ring, w_ring, barriers, tile_ptr, num_tiles = loads
    full, empty, _ = barriers
    NUM_N: gl.constexpr = (N + BN - 1) // BN
    STEPS: gl.constexpr = (K + BK - 1) // BK
    LAYOUT: gl.constexpr = row_layout(BK, gl.num_warps())
    col = gl.arange(0, BK, layout=gl.SliceLayout(0, LAYOUT))
    place = gl.arange(0, BM, layout=gl.SliceLayout(1, LAYOUT))
    stage, parity = 0, 0
    item = gl.program_id(0)
    expert, begin, end = tile_at(tile_ptr, num_tiles, item // NUM_N)
    while expert >= 0:
        n0 = (item % NUM_N) * BN
        item += gl.num_programs(0)
        next_expert, next_begin, next_end = tile_at(tile_ptr, num_tiles, item // NUM_N)
        # Rows past the run's last are row 0, and never stored.
        row = gl.load(row_ptr + begin + place, mask=begin + place < end, other=0)
        v_rows = v_ptr + row.to(gl.int64)[:, None] * K + col[None, :]
        for step in range(0, STEPS):
            k = step * BK
            mbarrier.wait(empty.index(stage), parity ^ 1)
            mbarrier.expect(full.index(stage), PARTS * BN * BK * ITEM)
            for part in gl.static_range(PARTS):
                corner = [expert, part * N + n0, k] if W_TRANSPOSED else [expert, k, n0]
                tma_load(w, corner, full.index(stage), w_ring.index(stage * PARTS + part))
            if K % BK == 0:
                copy_async(v_ring.index(stage), v_rows + k)
            else:
                copy_async(v_ring.index(stage), v_rows + k, (k + col < K)[None, :])
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            stage, parity = next_stage(stage, parity, STAGES)
        expert, begin, end = next_expert, next_begin, next_end
