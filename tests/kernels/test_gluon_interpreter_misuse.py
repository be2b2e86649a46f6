"""The interpreter of Gluon kernels: what a kernel may not do, one thing after another."""

from __future__ import annotations

import gluon_kernels
import pytest
import torch
from gluon_interpreter import KernelError
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")


@gluon.jit
def misuse_kernel(x_ptr, n, WHAT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 4, gl.SliceLayout(1, layout))
    cols = gl.arange(0, 8, gl.SliceLayout(0, layout))
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    box = gl.allocate_shared_memory(gl.float32, [4, 8], shared)
    if WHAT == "axis":
        gl.store(x_ptr + cols[:, None], 0.0)
    elif WHAT == "rank":
        gl.store(x_ptr + (cols + cols[None, :]), 0.0)
    elif WHAT == "layout":
        gl.zeros([4], gl.float32, layout)
    elif WHAT == "load":
        gl.load(x_ptr + n + rows)
    elif WHAT == "value":
        gl.load(rows)
    elif WHAT == "pointers":
        gl.load(gl.where(rows < n, x_ptr + rows, x_ptr))
    elif WHAT == "spread":
        gl.store(x_ptr, rows)
    elif WHAT == "condition":
        gl.store(x_ptr, 1.0 if rows < n else 2.0)
    elif WHAT == "dtype":
        box.store(gl.zeros([4, 8], gl.float16, layout))
    elif WHAT == "shape":
        box.store(gl.zeros([8, 4], gl.float32, layout))
    elif WHAT == "index":
        box.index(n)
    elif WHAT == "size":
        box.reinterpret(gl.float32, [8, 8], shared)
    elif WHAT == "empty":
        box.load(layout)
    else:
        gl.static_assert(WHAT == "", "what is this")


MISUSES = {
    "axis": r"a tensor of SliceLayout\(0\) gets a new axis 1",
    "rank": r"shapes \[\(8,\), \(1, 8\)\] have different ranks",
    "layout": r"a layout of rank 2 for a tensor of \(4,\)",
    "load": "load of element 32 of x_ptr, which has 32",
    "value": "load through int32, which is no pointer",
    "pointers": "pointers are only added to",
    "spread": r"a tensor of \(4,\) is stored through pointers of \(\)",
    "condition": "a tensor is used as a condition",
    "dtype": r"a tensor of \(4, 8\) fp16 is stored in a buffer of \(4, 8\) fp32",
    "shape": r"a tensor of \(8, 4\) fp32 is stored in a buffer of \(4, 8\) fp32",
    "index": "index 29 of box, which has 4",
    "size": r"box of \(4, 8\) fp32 is too small for \(8, 8\) fp32",
    "empty": "load of box, where nothing was written yet",
    "nonsense": "static_assert: what is this",
}


@pytest.mark.parametrize("what", MISUSES)
def test_a_misuse_is_found(what: str) -> None:
    with pytest.raises(KernelError, match=MISUSES[what]) as error:
        misuse_kernel[(1,)](torch.zeros(32), 29, WHAT=what)
    assert "test_gluon_interpreter_misuse.py:" in str(error.value)


@gluon.jit
def do_nothing(x):
    pass


@gluon.jit
def specialise(x):
    gl.warp_specialize([(do_nothing, (x,)), (do_nothing, (x,))], [4], [40])


@gluon.jit
def misuse_barriers_kernel(n, WHAT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    bar = bars.index(0)
    mbarrier.init(bar, count=1)
    if WHAT == "init":
        mbarrier.init(bar, count=1)
    elif WHAT == "uninitialised":
        mbarrier.arrive(bars.index(1))
    elif WHAT == "count":
        mbarrier.init(bars.index(1), count=0)
    elif WHAT == "place":
        mbarrier.init(bars, count=1)
    elif WHAT == "arrivals":
        mbarrier.arrive(bar, count=2)
    elif WHAT == "bytes":
        mbarrier.expect(bar, 1048576)
    elif WHAT == "parity":
        mbarrier.wait(bar, n)
    elif WHAT == "stuck":
        mbarrier.wait(bar, 0)
    elif WHAT == "invalidated":
        mbarrier.invalidate(bar)
        mbarrier.wait(bar, 1)
    elif WHAT == "operand" or WHAT == "accumulator" or WHAT == "product" or WHAT == "registers":
        a_type: gl.constexpr = gl.float32 if WHAT == "operand" else gl.float16
        acc_type: gl.constexpr = gl.float16 if WHAT == "accumulator" else gl.float32
        a = gl.zeros([4, 4], a_type, layout)
        b = gl.allocate_shared_memory(a_type, [4, 4], layout, a)
        acc = gl.zeros([4, 8], acc_type, layout)
        if WHAT == "registers":
            warpgroup_mma(a, b, acc, is_async=True)
        warpgroup_mma(b, b, acc, is_async=True)
    elif WHAT == "product of few" or WHAT == "synchronous":
        tile = gl.allocate_shared_memory(gl.float16, [4, 4], layout, gl.zeros([4, 4], gl.float16))
        acc = gl.zeros([4, 4], gl.float32, layout)
        warpgroup_mma(tile, tile, acc, is_async=WHAT != "synchronous")
    elif WHAT == "tensor":
        tensors = (gl.zeros([4, 4], gl.float32, layout),)
        gl.warp_specialize([(do_nothing, (n,)), (do_nothing, (tensors,))], [4], [40])
    elif WHAT == "warps":
        gl.warp_specialize([(do_nothing, (n,)), (do_nothing, (n,))], [4, 4], [40])
    else:
        gl.warp_specialize([(specialise, (n,)), (do_nothing, (n,))], [4], [40])


BARRIER_MISUSES = {
    "init": r"bars\[0\] is initialised twice",
    "uninitialised": r"mbarrier.arrive of bars\[1\], which is not initialised",
    "count": "a barrier counts 1 to 1048575 arrivals, not 0",
    "place": r"a barrier is one int64, not \(2, 1\) int64",
    "arrivals": r"2 more arrivals at bars\[0\], which waits for 1 of 1",
    "bytes": r"bars\[0\] expects 1048576 bytes, at most 1048575",
    "parity": "by a phase of 0 or 1, not 29",
    "stuck": r"deadlock; the kernel waits for parity 0 of bars\[0\]",
    "invalidated": r"mbarrier.wait of bars\[0\], which is not initialised",
    "operand": "wgmma of fp32 and fp32: only fp16 and bf16 are emulated",
    "accumulator": "wgmma accumulates in fp16: only float32 is emulated",
    "product": r"wgmma of \(4, 4\) and \(4, 4\) to \(4, 8\)",
    "registers": "wgmma of Value and View, not shared memory",
    "product of few": "wgmma by 2 warps, which is no whole warp group",
    "synchronous": "wgmma is emulated with is_async=True only",
    "tensor": "worker partitions take no tensors as arguments",
    "warps": "1 worker partitions and 2 numbers for them",
    "nested": "warp_specialize inside of a partition",
}


@pytest.mark.parametrize("what", BARRIER_MISUSES)
def test_a_misuse_of_barriers_and_partitions_is_found(what: str) -> None:
    with pytest.raises(KernelError, match=BARRIER_MISUSES[what]):
        misuse_barriers_kernel[(1,)](29, WHAT=what, num_warps=2 if "few" in what else 4)


def test_arguments_have_to_fit() -> None:
    with pytest.raises(TypeError, match="BLOK"):
        gluon_kernels.gated_kernel[(1,)](
            torch.ones(2, 100), torch.zeros(128), 100, 1.0, BLOCK=128, FAULT="", BLOK=1
        )
