"""The interpreter of Gluon kernels: right kernels give exact results, planted faults are found."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from gluon_interpreter import KernelError, timing
from torch import Tensor
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")

# Triton 3.9 has other names than 3.6.
cp_async = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)
tma_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
tma_store = getattr(tma, "async_store", tma.async_copy_shared_to_global)


@gluon.jit
def produce(
    x_ptr, row_ptr, w, a_ring, b_ring, full, empty, tiles_m, tiles_n,
    K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, FAULT: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, BM, gl.SliceLayout(1, layout))
    cols = gl.arange(0, BK, gl.SliceLayout(0, layout))
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
            cp_async(a_ring.index(stage), pointers + k)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1


@gluon.jit
def consume(
    out_ptr, a_ring, b_ring, full, empty, tiles_m, tiles_n,
    K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, FAULT: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16]
    )
    rows = gl.arange(0, BM, gl.SliceLayout(1, layout))
    cols = gl.arange(0, BN, gl.SliceLayout(0, layout))
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        acc = gl.zeros([BM, BN], gl.float32, layout)
        for k in range(0, K, BK):
            stage = step % STAGES
            if FAULT != "no wait for full":
                mbarrier.wait(full.index(stage), step // STAGES & 1)
            if FAULT != "no fence":
                fence_async_shared()
            acc = warpgroup_mma(
                a_ring.index(stage), b_ring.index(stage).permute((1, 0)), acc, is_async=True
            )
            # The product before this one is over then, and its buffers free.
            acc = warpgroup_mma_wait(1, deps=[acc])
            if FAULT == "early release":
                mbarrier.arrive(empty.index(stage))
            else:
                before = (step + STAGES - 1) % STAGES
                mbarrier.arrive(empty.index(before), pred=k > 0)
            step += 1
        if FAULT != "no wait for the product":
            acc = warpgroup_mma_wait(0, deps=[acc])
        if FAULT != "early release":
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        out_row = tile // tiles_n * BM + rows
        out_col = tile % tiles_n * BN + cols
        pointers = out_ptr + out_row[:, None] * (tiles_n * BN) + out_col[None, :]
        gl.store(pointers, acc.to(gl.bfloat16))


@gluon.jit
def gathered_matmul(
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
        if FAULT == "count":
            mbarrier.init(full.index(i), count=128)
        else:
            mbarrier.init(full.index(i), count=129)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    out_ptr, a_ring, b_ring, full, empty, tiles_m, tiles_n,
                    K, BM, BN, BK, STAGES, FAULT,
                ),
            ),
            (
                produce,
                (
                    x_ptr, row_ptr, w, a_ring, b_ring, full, empty, tiles_m, tiles_n,
                    K, BM, BN, BK, STAGES, FAULT,
                ),
            ),
        ],
        [4],
        [40],
    )  # fmt: skip


@dataclass
class Matmul:
    x: Tensor
    row: Tensor
    w: Tensor
    out: Tensor

    def run(self, fault: str = "", programs: int = 3) -> None:
        BM, BN, BK = 64, 32, 32
        layout = gl.NVMMASharedLayout.get_default_for([BN, BK], gl.bfloat16)
        w = TensorDescriptor.from_tensor(self.w, [BN, BK], layout)
        tiles = len(self.row) // BM, len(self.w) // BN
        gathered_matmul[(programs,)](
            self.x, self.row, w, self.out, *tiles, K=self.x.shape[1], BM=BM, BN=BN, BK=BK,
            STAGES=3, FAULT=fault, num_warps=4,
        )  # fmt: skip

    @property
    def exact(self) -> Tensor:
        return (self.x[self.row.long()].float() @ self.w.float().T).bfloat16()


@pytest.fixture
def matmul() -> Matmul:
    """Small integers, whose sums are exact in fp32 and, below 256, in bf16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (40, 128), generator=generator).bfloat16()
    w = torch.randint(-2, 3, (96, 128), generator=generator).bfloat16()
    row = torch.randint(0, 40, (128,), generator=generator, dtype=torch.int32)
    return Matmul(x, row, w, torch.full((128, 96), float("nan"), dtype=torch.bfloat16))


@pytest.mark.parametrize("landing", ["late", "at once", "random"])
def test_a_warp_specialised_matmul(matmul: Matmul, landing: str) -> None:
    with timing(landing):
        matmul.run()
    assert torch.equal(matmul.out, matmul.exact)


FAULTS = {
    "no wait for full": r"wgmma of a_ring\[0\], where nothing was written yet"
    "|nothing says that cp.async at .* is over|while cp.async at .* is still in flight",
    "no wait for empty": r"TMA load of b_ring\[.\](, and nothing says that| while)",
    "initial phase": "deadlock; partition 0 .consume. waits for parity 0 of full.* lacks 129 of"
    " 129 arrivals.*; partition 1 .produce. waits for parity 0 of empty",
    "count": r"128 more arrivals at full\[.\], which waits for 127 of 128",
    "early release": "wgmma at .* is (still in flight|over)",
    "no fence": "wgmma of a_ring.* without a fence_async_shared since cp.async",
    "no wait for the product": "the result of wgmma .* is used without warpgroup_mma_wait",
    "bytes": "deadlock; .* lacks 0 of 129 arrivals and 16 bytes",
    "a tile less": "deadlock; partition 0 .consume. waits for .* lacks 129 of 129 arrivals",
}


@pytest.mark.parametrize("landing", ["late", "at once", "random"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_pipeline_is_found(matmul: Matmul, fault: str, landing: str) -> None:
    with timing(landing), pytest.raises(KernelError, match=FAULTS[fault]):
        matmul.run(fault)
