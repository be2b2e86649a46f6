"""Small Gluon kernels that the interpreter is tested with.

FAULT plants one: each name says what is wrong; "" is right. They compile for sm_90.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from distmoe.kernels.moe_mlp.gluon_compat import copy_async, tma_load, viewed

# Triton 3.9 has another name than 3.6; the kernels of the package store nothing by TMA.
tma_store = getattr(tma, "async_store", tma.async_copy_shared_to_global)


@gluon.jit
def silu(x):
    return x / (1.0 + gl.exp(-x))


@gluon.jit
def gated_kernel(x_ptr, out_ptr, n, scale, BLOCK: gl.constexpr, FAULT: gl.constexpr):
    """out = silu(x[:n]) * x[n:] * scale, computed in fp32."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    place = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, layout)
    inside = place < n
    gate = gl.load(x_ptr + place, mask=inside, other=0.0).to(gl.float32)
    up = gl.load(x_ptr + n + place, mask=inside).to(gl.float32)
    out = (silu(gate) * up * scale).to(out_ptr.dtype.element_ty)
    if FAULT == "store of the tail":
        gl.store(out_ptr + place, out)
    else:
        gl.store(out_ptr + place, out, mask=inside)


@gluon.jit
def tma_copy_kernel(x, out, row, FAULT: gl.constexpr):
    """A box of x to the same place of out, plus one; outside of x it reads zeros."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    box = gl.allocate_shared_memory(x.dtype, x.block_type.shape, x.layout)
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if FAULT != "no init":
        mbarrier.init(landed, count=1)
    mbarrier.expect(landed, x.block_type.nbytes)
    tma_load(x, [row, 0], landed, box)
    if FAULT == "invalidated early":
        mbarrier.invalidate(landed)
    if FAULT != "no wait for the load":
        mbarrier.wait(landed, 0)
    value = box.load(layout).to(gl.float32) + 1.0
    box.store(value.to(x.dtype))
    if FAULT != "no fence":
        fence_async_shared()
    tma_store(out, [row, 0], box)
    if FAULT == "overwritten":
        box.store((value + 1.0).to(x.dtype))
    if FAULT != "no wait for the store":
        tma.store_wait(0)
    if FAULT == "":
        box.store(value.to(x.dtype))
    mbarrier.invalidate(landed)


@gluon.jit
def fill_box(x_ptr, box, ready, FAULT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    cols = gl.arange(0, 32, gl.SliceLayout(0, layout))[None, :]
    x = gl.load(x_ptr + rows * 32 + cols)
    if FAULT == "fence too early":
        fence_async_shared()
    box.store(x)
    if FAULT != "fence too early":
        fence_async_shared()
    mbarrier.arrive(ready, count=1)
    if FAULT == "store after the copies' arrival":
        async_copy.mbarrier_arrive(ready, increment_count=False)
    if FAULT == "store after the arrival" or FAULT == "store after the copies' arrival":
        box.store(x)


@gluon.jit
def nothing(ready):
    pass


@gluon.jit
def send_box(out, box, ready, FAULT: gl.constexpr):
    if FAULT == "":
        mbarrier.wait(ready, 0)
    tma_store(out, [0, 0], box)
    if FAULT != "no waits":
        tma.store_wait(0)


@gluon.jit
def join_kernel(x_ptr, out, FILL_FIRST: gl.constexpr, FAULT: gl.constexpr):
    """out = x: one partition puts it in shared memory, and who comes later sends it without a wait,
    which is right if all partitions have ended, and wrong if the other one runs beside it."""
    box = gl.allocate_shared_memory(out.dtype, out.block_type.shape, out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    if FILL_FIRST:
        gl.warp_specialize(
            [(fill_box, (x_ptr, box, ready, "")), (send_box, (out, box, ready, FAULT))], [4], [40]
        )
    else:
        gl.warp_specialize([(nothing, (ready,)), (fill_box, (x_ptr, box, ready, ""))], [4], [40])
        send_box(out, box, ready, FAULT)


@gluon.jit
def hand_over_kernel(x_ptr, out, FAULT: gl.constexpr):
    """out = x, which one partition puts in shared memory and the other one sends."""
    box = gl.allocate_shared_memory(out.dtype, out.block_type.shape, out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=129 if FAULT == "store after the copies' arrival" else 1)
    gl.warp_specialize(
        [(send_box, (out, box, ready, "")), (fill_box, (x_ptr, box, ready, FAULT))], [4], [40]
    )
    mbarrier.invalidate(ready)


@gluon.jit
def joined_kernel(x_ptr, out_ptr, ROWS: gl.constexpr, COLS: gl.constexpr):
    """out = x, in shared memory once as two tiles of ROWS rows and once as one."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLS], gl.bfloat16)
    whole: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * ROWS, COLS], gl.bfloat16)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    all_rows = gl.arange(0, 2 * ROWS, gl.SliceLayout(1, layout))[:, None]
    cols = gl.arange(0, COLS, gl.SliceLayout(0, layout))[None, :]
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, COLS], half)
    for i in gl.static_range(2):
        tiles.index(i).store(gl.load(x_ptr + (i * ROWS + rows) * COLS + cols))
    joined = viewed(tiles, [2 * ROWS, COLS], whole)
    gl.store(out_ptr + all_rows * COLS + cols, joined.load(layout))


@gluon.jit
def ragged_kernel(x, out_ptr, begin, end, BM: gl.constexpr, BN: gl.constexpr):
    """Rows begin to end of x by the descriptor of `ragged`, zeros up to BM."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    box = gl.allocate_shared_memory(x.dtype, x.block_type.shape, x.layout)
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(landed, count=1)
    mbarrier.expect(landed, x.block_type.nbytes)
    tma_load(x, [1073741824, end, 1073741824 - (end - begin), 0], landed, box)
    mbarrier.wait(landed, 0)
    rows = gl.arange(0, BM, gl.SliceLayout(1, layout))
    cols = gl.arange(0, BN, gl.SliceLayout(0, layout))
    value = box.reshape((BM, BN)).load(layout)
    gl.store(out_ptr + rows[:, None] * BN + cols[None, :], value)


@gluon.jit
def gather_kernel(
    x_ptr, row_ptr, out_ptr, live, BM: gl.constexpr, BN: gl.constexpr, FAULT: gl.constexpr
):
    """out = x[row], zero from row ``live`` on, in two groups of cp.async."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    rows = gl.arange(0, BM, gl.SliceLayout(1, layout))
    cols = gl.arange(0, BN, gl.SliceLayout(0, layout))
    stages = gl.allocate_shared_memory(
        x_ptr.dtype.element_ty, [2, BM, BN], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    )
    for half in gl.static_range(2):
        row = gl.load(row_ptr + half * BM + rows).to(gl.int64)
        pointers = x_ptr + row[:, None] * BN + cols[None, :]
        copy_async(stages.index(half), pointers, (half * BM + rows < live)[:, None])
        async_copy.commit_group()
    for half in gl.static_range(2):
        if FAULT == "no wait":
            async_copy.wait_group(1)
        else:
            async_copy.wait_group(1 - half)
        place = out_ptr + (half * BM + rows)[:, None] * BN + cols[None, :]
        gl.store(place, stages.index(half).load(layout))


@gluon.jit
def product_kernel(a_ptr, b_ptr, out_ptr, M: gl.constexpr, N: gl.constexpr, K: gl.constexpr):
    """out = a b, with the left half of K twice: a in registers and awaited, then all in shared."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, K], gl.bfloat16)
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([K, N], gl.bfloat16)
    m = gl.arange(0, M, gl.SliceLayout(1, layout))[:, None]
    row_of_b = gl.arange(0, K, gl.SliceLayout(1, layout))[:, None]
    k = gl.arange(0, K, gl.SliceLayout(0, layout))[None, :]
    n = gl.arange(0, N, gl.SliceLayout(0, layout))[None, :]
    a = gl.allocate_shared_memory(gl.bfloat16, [M, K], a_layout, gl.load(a_ptr + m * K + k))
    b = gl.allocate_shared_memory(gl.bfloat16, [K, N], b_layout, gl.load(b_ptr + row_of_b * N + n))
    fence_async_shared()
    HALF: gl.constexpr = K // 2
    left = a.slice(0, HALF, 1).load(gl.DotOperandLayout(0, acc_layout, 2))
    wrong = gl.full([M, N], 7.0, gl.float32, acc_layout)
    acc = 2.0 * warpgroup_mma(left, b.slice(0, HALF), wrong, use_acc=False)
    acc = warpgroup_mma(a.slice(HALF, HALF, 1), b.slice(HALF, HALF), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    gl.store(out_ptr + m * N + n, gl.convert_layout(acc, layout))
