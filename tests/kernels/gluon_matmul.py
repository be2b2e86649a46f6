"""A warp-specialised matmul that the interpreter is tested with; FAULT as in `gluon_kernels`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from distmoe.kernels.moe_mlp.gluon_compat import copy_async, tma_load


@gluon.jit
def produce(
    x_ptr, row_ptr, w, rings, tiles_m, tiles_n,
    K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, FAULT: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    rows = gl.arange(0, BM, gl.SliceLayout(1, layout))
    cols = gl.arange(0, BK, gl.SliceLayout(0, layout))
    a_ring, b_ring, full, empty = rings
    tiles = tiles_m * tiles_n
    if FAULT == "a tile less":
        tiles -= 1
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = gl.load(row_ptr + tile // tiles_n * BM + rows).to(gl.int64)
        pointers = x_ptr + row[:, None] * K + cols[None, :]
        for k in range(0, K, BK):
            stage = step % STAGES
            phase = step // STAGES & 1
            ready = full.index(stage)
            if FAULT == "initial phase":
                mbarrier.wait(empty.index(stage), phase)
            elif FAULT != "no wait for empty":
                mbarrier.wait(empty.index(stage), phase ^ 1)
            if FAULT == "bytes":
                mbarrier.expect(ready, w.block_type.nbytes + 16)
            else:
                mbarrier.expect(ready, w.block_type.nbytes)
            tma_load(w, [tile % tiles_n * BN, k], ready, b_ring.index(stage))
            copy_async(a_ring.index(stage), pointers + k)
            async_copy.mbarrier_arrive(ready, increment_count=FAULT == "increments")
            step += 1


@gluon.jit
def consume(
    out_ptr, rings, tiles_m, tiles_n,
    K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, FAULT: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    rows = gl.arange(0, BM, gl.SliceLayout(1, layout))
    cols = gl.arange(0, BN, gl.SliceLayout(0, layout))
    a_ring, b_ring, full, empty = rings
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        acc = gl.zeros([BM, BN], gl.float32, layout)
        for k in range(0, K, BK):
            stage = step % STAGES
            if FAULT == "fence too early":
                fence_async_shared()
            if FAULT != "no wait for full":
                mbarrier.wait(full.index(stage), step // STAGES & 1)
            if FAULT != "no fence" and FAULT != "fence too early":
                fence_async_shared()
            b = b_ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(a_ring.index(stage), b, acc, is_async=True)
            # The product before this one is over then, and its stage free.
            acc = warpgroup_mma_wait(1, deps=[acc])
            if FAULT == "early release":
                mbarrier.arrive(empty.index(stage))
            else:
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        if FAULT != "no wait for the product":
            acc = warpgroup_mma_wait(0, deps=[acc])
        if FAULT != "early release":
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        if FAULT == "released twice":
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        out_row = tile // tiles_n * BM + rows
        out_col = tile % tiles_n * BN + cols
        pointers = out_ptr + out_row[:, None] * (tiles_n * BN) + out_col[None, :]
        gl.store(pointers, acc.to(gl.bfloat16))


@gluon.jit
def matmul_kernel(
    x_ptr, row_ptr, w, out_ptr, tiles_m, tiles_n,
    K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, FAULT: gl.constexpr,
):  # fmt: skip
    """out = x[row] w^T: persistent, one producer and one consumer with a ring of stages."""
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], gl.bfloat16)
    a_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, BK], a_layout)
    b_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, BK], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # 128 threads that copy, and one that expects the bytes of w.
        mbarrier.init(full.index(i), count=128 if FAULT == "count" else 129)
        mbarrier.init(empty.index(i), count=1)
    rings = (a_ring, b_ring, full, empty)
    gl.warp_specialize(
        [
            (consume, (out_ptr, rings, tiles_m, tiles_n, K, BM, BN, BK, STAGES, FAULT)),
            (produce, (x_ptr, row_ptr, w, rings, tiles_m, tiles_n, K, BM, BN, BK, STAGES, FAULT)),
        ],
        [4],
        [40],
    )
