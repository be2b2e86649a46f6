"""The interpreter of Gluon kernels: copies and partitions, right ones and such with a fault."""

from __future__ import annotations

import gluon_kernels
import pytest
import torch
from gluon_interpreter import KernelError, timing
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from distmoe.kernels.testing import assert_as_good_as

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")

LANDINGS = ["late", "at once", "random"]


def descriptor(x: Tensor, box: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


def ragged(x: Tensor, rows: int) -> TensorDescriptor:
    """As `triton.tools.ragged_tma` makes it: addresses wrap at 2^64."""
    box = [1, 1, rows, x.shape[1]]
    shape, strides = [2**31 - 1, 2**31 - 1, 2**30, box[3]], [2**34 - box[3], box[3], box[3], 1]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
    return TensorDescriptor(x, shape, strides, box, layout)


def integers(*shape: int, most: int = 2) -> Tensor:
    """Whose products and sums are exact in fp32."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-most, most + 1, shape, generator=generator).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_elementwise(dtype: torch.dtype) -> None:
    x = torch.randn(2, 150, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(150, dtype=dtype)
    gluon_kernels.gated_kernel[(3,)](x, out, 150, 0.5, BLOCK=64, FAULT="", num_warps=4)
    want, exact = (
        (gate / (1 + torch.exp(-gate)) * up * 0.5).float() for gate, up in (x.float(), x.double())
    )
    assert_as_good_as(out, want.to(dtype), exact)


def test_a_store_outside_of_a_tensor_is_found() -> None:
    x, out = torch.zeros(2, 150), torch.zeros(151)[:150]
    with pytest.raises(KernelError, match="store to element 191 of out_ptr, which has 150"):
        gluon_kernels.gated_kernel[(3,)](
            x, out, 150, 1.0, BLOCK=64, FAULT="store of the tail", num_warps=4
        )


def copy_by_tma(fault: str, row: int, num_rows: int = 24) -> tuple[Tensor, Tensor]:
    x = integers(num_rows, 32)
    out = torch.full((num_rows, 32), float("nan"), dtype=torch.bfloat16)
    boxes = descriptor(x, [16, 32]), descriptor(out, [16, 32])
    gluon_kernels.tma_copy_kernel[(1,)](*boxes, row, FAULT=fault, num_warps=4)
    return x, out


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize("row", [0, 5, 16, -10])
def test_tma_copies_what_is_inside(row: int, landing: str) -> None:
    with timing(landing):
        x, out = copy_by_tma("", row)
    inside = slice(max(row, 0), row + 16)
    assert torch.equal(out[inside], x[inside] + 1)
    assert out.isnan().sum() == out.numel() - out[inside].numel()


COPY_FAULTS = {
    "no init": "mbarrier.expect of landed, which is not initialised",
    "no wait for the load": "load of box while TMA load at .* is still in flight",
    "invalidated early": "mbarrier.invalidate of landed while TMA load at .* is still in flight",
    "no fence": "TMA store of box without a fence_async_shared since store",
    "overwritten": "store of box while TMA store at .* is still in flight",
    "no wait for the store": "never waited for the TMA store",
}


@pytest.mark.parametrize("fault", COPY_FAULTS)
def test_a_fault_of_a_copy_is_found(fault: str) -> None:
    with pytest.raises(KernelError, match=COPY_FAULTS[fault]):
        copy_by_tma(fault, 0)


def test_padding_that_is_not_emulated_is_refused() -> None:
    box = descriptor(integers(16, 32), [16, 32])
    box.padding = "nan"
    with pytest.raises(ValueError, match="x is padded with nan: only zero is emulated"):
        gluon_kernels.tma_copy_kernel[(1,)](box, box, 0, FAULT="")


def test_coordinates_are_int32() -> None:
    with pytest.raises(KernelError, match=r"coordinates \[2147483648, 0\] are no int32"):
        copy_by_tma("", 2**31)


def hand_over(fault: str) -> tuple[Tensor, Tensor]:
    x, out = integers(16, 32), torch.empty(16, 32, dtype=torch.bfloat16)
    gluon_kernels.hand_over_kernel[(1,)](x, descriptor(out, [16, 32]), FAULT=fault, num_warps=4)
    return x, out


@pytest.mark.parametrize("landing", LANDINGS)
def test_what_a_partition_did_before_it_arrived(landing: str) -> None:
    with timing(landing):
        x, out = hand_over("")
        assert torch.equal(out, x)
        with pytest.raises(KernelError, match="TMA store of box without a fence_async_shared"):
            hand_over("fence too early")


@pytest.mark.parametrize("fault", ["store after the arrival", "store after the copies' arrival"])
def test_what_a_partition_does_after_it_arrived(fault: str) -> None:
    with pytest.raises(KernelError, match="of box, and nothing says that store at .* is over"):
        hand_over(fault)


def join(*, fill_first: bool, fault: str = "no wait") -> tuple[Tensor, Tensor]:
    x, out = integers(16, 32), torch.empty(16, 32, dtype=torch.bfloat16)
    gluon_kernels.join_kernel[(1,)](
        x, descriptor(out, [16, 32]), FILL_FIRST=fill_first, FAULT=fault
    )
    return x, out


@pytest.mark.parametrize("landing", LANDINGS)
def test_partitions_end_before_what_follows(landing: str) -> None:
    with timing(landing):
        x, out = join(fill_first=False)
        assert torch.equal(out, x)
        with pytest.raises(KernelError, match="TMA store of box, (and nothing says|where nothing)"):
            join(fill_first=True)


def test_a_box_that_is_not_the_descriptor_s() -> None:
    boxes = descriptor(integers(16, 32), [16, 32]), descriptor(integers(16, 32), [8, 32])
    with pytest.raises(KernelError, match=r"a box of \[8, 32\] bf16 and a buffer of \(16, 32\)"):
        gluon_kernels.tma_copy_kernel[(1,)](*boxes, 0, FAULT="")


def test_a_missing_fence_can_be_allowed() -> None:
    with timing(fences=False):
        x, out = copy_by_tma("no fence", 0)
    assert torch.equal(out[:16], x[:16] + 1)
    with pytest.raises(KernelError, match="without a fence"):
        copy_by_tma("no fence", 0)


def test_a_buffer_in_another_shape() -> None:
    """A swizzle of 128 bytes keeps 64 columns of all rows together."""
    x, out = integers(16, 64), torch.empty(16, 64, dtype=torch.bfloat16)
    gluon_kernels.joined_kernel[(1,)](x, out, ROWS=8, COLS=64)
    assert torch.equal(out, x)
    for rows, cols in ((8, 128), (4, 64)):
        x = integers(2 * rows, cols)
        with pytest.raises(KernelError, match="elements of tiles .* change places as"):
            gluon_kernels.joined_kernel[(1,)](x, torch.empty_like(x), ROWS=rows, COLS=cols)


@pytest.mark.parametrize(("begin", "end"), [(3, 10), (0, 16), (20, 24), (7, 7)])
def test_ragged_descriptor(begin: int, end: int) -> None:
    x, out = integers(24, 32), torch.empty(16, 32, dtype=torch.bfloat16)
    gluon_kernels.ragged_kernel[(1,)](ragged(x, 16), out, begin, end, BM=16, BN=32, num_warps=4)
    assert torch.equal(out[: end - begin], x[begin:end])
    assert out[end - begin :].count_nonzero() == 0


def test_a_ragged_box_past_the_tensor_is_found() -> None:
    x, out = integers(24, 32), torch.empty(16, 32, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="TMA of element 799 of x, which has 768"):
        gluon_kernels.ragged_kernel[(1,)](ragged(x, 16), out, 20, 25, BM=16, BN=32, num_warps=4)


def gather(fault: str, row: Tensor) -> tuple[Tensor, Tensor]:
    x, out = integers(9, 32), torch.empty(32, 32, dtype=torch.bfloat16)
    gluon_kernels.gather_kernel[(1,)](x, row, out, 20, BM=16, BN=32, FAULT=fault, num_warps=4)
    return x, out


def test_cp_async_in_groups() -> None:
    row = (torch.arange(32) * 5 % 9).int()
    x, out = gather("", row)
    assert torch.equal(out[:20], x[row.long()][:20])
    assert out[20:].count_nonzero() == 0


def test_faults_of_cp_async_are_found() -> None:
    row = (torch.arange(32) * 5 % 9).int()
    with pytest.raises(KernelError, match=r"load of stages\[1\] while cp.async at .* in flight"):
        gather("no wait", row)
    row[3] = 9
    with pytest.raises(KernelError, match="cp.async of element 319 of x_ptr, which has 288"):
        gather("", row)


def test_products_of_slices_and_registers() -> None:
    a, b, out = integers(64, 64), integers(64, 32), torch.empty(64, 32)
    gluon_kernels.product_kernel[(1,)](a, b, out, M=64, N=32, K=64, num_warps=4)
    assert torch.equal(out, a.float() @ b.float() + a[:, :32].float() @ b[:32].float())
    with pytest.raises(KernelError, match="wgmma by 2 warps, which is no whole warp group"):
        gluon_kernels.product_kernel[(1,)](a, b, out, M=64, N=32, K=64, num_warps=2)


def test_copies_do_not_outlive_the_kernel() -> None:
    with timing(races=False):
        with pytest.raises(KernelError, match="the kernel ends and nothing waited for TMA load"):
            copy_by_tma("no wait for the load", 0)
        with pytest.raises(KernelError, match="the kernel ends and never waited for the copy"):
            gather("no wait", torch.zeros(32, dtype=torch.int32))
        words = r"partition 1 \(send_box\) ends and never waited for the TMA store"
        with pytest.raises(KernelError, match=words):
            join(fill_first=True, fault="no waits")


def test_a_seed_repeats_a_run() -> None:
    """Which partition comes first, and with it how the fault shows."""

    def words(seed: int) -> str:
        with timing("random", seed), pytest.raises(KernelError) as error:
            join(fill_first=True)
        return str(error.value)

    seen = [words(seed) for seed in range(9)]
    assert seen == [words(seed) for seed in range(9)]
    assert len(set(seen)) == 2
