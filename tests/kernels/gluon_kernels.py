"""Small Gluon kernels that the interpreter is tested with.

FAULT plants one: each name says what is wrong; "" is right. They compile for sm_90.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from distmoe.kernels.moe_mlp.gluon_compat import copy_async, tma_load, viewed


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
def tma_copy_kernel(x, out_ptr, row, FAULT: gl.constexpr):
    """out = a box of x, which is zero outside of x."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    box = gl.allocate_shared_memory(x.dtype, [16, 32], x.layout)
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if FAULT != "no init":
        mbarrier.init(landed, count=1)
    mbarrier.expect(landed, x.block_type.nbytes)
    tma_load(x, [row, 0], landed, box)
    if FAULT == "invalidated early":
        mbarrier.invalidate(landed)
    if FAULT == "overwritten":
        box.store(gl.zeros([16, 32], x.dtype, layout))
    if FAULT != "no wait":
        mbarrier.wait(landed, 0)
    store_box(out_ptr, box)
    mbarrier.invalidate(landed)


@gluon.jit
def store_box(out_ptr, box):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    cols = gl.arange(0, 32, gl.SliceLayout(0, layout))[None, :]
    gl.store(out_ptr + rows * 32 + cols, box.load(layout))


@gluon.jit
def fill_box(x_ptr, box, ready, FAULT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))[:, None]
    cols = gl.arange(0, 32, gl.SliceLayout(0, layout))[None, :]
    x = gl.load(x_ptr + rows * 32 + cols)
    box.store(x)
    mbarrier.arrive(ready, count=1)
    if FAULT == "store after the copies' arrival":
        async_copy.mbarrier_arrive(ready, increment_count=False)
    if FAULT == "store after the arrival" or FAULT == "store after the copies' arrival":
        box.store(x)


@gluon.jit
def nothing(ready):
    pass


@gluon.jit
def take_box(out_ptr, box, ready, FAULT: gl.constexpr):
    if FAULT == "":
        mbarrier.wait(ready, 0)
    store_box(out_ptr, box)


@gluon.jit
def join_kernel(x_ptr, out_ptr, FILL_FIRST: gl.constexpr):
    """out = x: one partition puts it in shared memory, and who comes later takes it without a wait,
    which is right if all partitions have ended, and wrong if the other one runs beside it."""
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 32], gl.bfloat16)
    box = gl.allocate_shared_memory(gl.bfloat16, [16, 32], shared)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    if FILL_FIRST:
        gl.warp_specialize(
            [(fill_box, (x_ptr, box, ready, "")), (take_box, (out_ptr, box, ready, "no wait"))],
            [4],
            [40],
        )
    else:
        gl.warp_specialize([(nothing, (ready,)), (fill_box, (x_ptr, box, ready, ""))], [4], [40])
        store_box(out_ptr, box)


@gluon.jit
def hand_over_kernel(x_ptr, out_ptr, FAULT: gl.constexpr):
    """out = x, which one partition puts in shared memory and the other one takes."""
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 32], gl.bfloat16)
    box = gl.allocate_shared_memory(gl.bfloat16, [16, 32], shared)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=129 if FAULT == "store after the copies' arrival" else 1)
    gl.warp_specialize(
        [(take_box, (out_ptr, box, ready, "")), (fill_box, (x_ptr, box, ready, FAULT))], [4], [40]
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
def ragged_kernel(x, out_ptr, begin, end):
    """Rows begin to end of x by the descriptor of `ragged`, zeros up to 16."""
    flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, 32], gl.bfloat16)
    box = gl.allocate_shared_memory(x.dtype, [1, 1, 1, 16, 32], x.layout)
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(landed, count=1)
    mbarrier.expect(landed, x.block_type.nbytes)
    tma_load(x, [1073741824, end, 1073741824 - (end - begin), 0], landed, box.index(0))
    mbarrier.wait(landed, 0)
    store_box(out_ptr, viewed(box, [16, 32], flat))


@gluon.jit
def gather_kernel(x_ptr, row_ptr, out_ptr, live, FAULT: gl.constexpr):
    """out = x[row], zero from row ``live`` on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))
    cols = gl.arange(0, 32, gl.SliceLayout(0, layout))
    box = gl.allocate_shared_memory(gl.bfloat16, [16, 32], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(landed, count=128)
    row = gl.load(row_ptr + rows).to(gl.int64)
    copy_async(box, x_ptr + row[:, None] * 32 + cols[None, :], (rows < live)[:, None])
    if FAULT != "no wait":
        async_copy.mbarrier_arrive(landed, increment_count=False)
        mbarrier.wait(landed, 0)
    store_box(out_ptr, box)
