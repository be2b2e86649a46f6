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


def copy_by_tma(fault: str, row: int = 0) -> tuple[Tensor, Tensor]:
    x, out = integers(24, 32), torch.empty(16, 32, dtype=torch.bfloat16)
    gluon_kernels.tma_copy_kernel[(1,)](descriptor(x, [16, 32]), out, row, FAULT=fault)
    return x, out


@pytest.mark.parametrize("landing", LANDINGS)
def test_tma_copies_what_is_inside(landing: str) -> None:
    for row in (0, 5, 16, -10):
        with timing(landing):
            x, out = copy_by_tma("", row)
        assert torch.equal(out, torch.nn.functional.pad(x, (0, 0, 10, 16))[row + 10 : row + 26])


COPY_FAULTS = {
    "no init": "mbarrier.expect of landed, which is not initialised",
    "no wait": "load of box while TMA load at .* is still in flight",
    "invalidated early": "mbarrier.invalidate of landed while TMA load at .* is still in flight",
    "overwritten": "store of box while TMA load at .* is still in flight",
}


@pytest.mark.parametrize("fault", COPY_FAULTS)
def test_a_fault_of_a_copy_is_found(fault: str) -> None:
    with pytest.raises(KernelError, match=COPY_FAULTS[fault]):
        copy_by_tma(fault)


def test_descriptors_that_are_not_emulated_or_do_not_fit_are_refused() -> None:
    out = torch.empty(16, 32, dtype=torch.bfloat16)
    box = descriptor(integers(16, 32), [8, 32])
    with pytest.raises(KernelError, match=r"a box of \[8, 32\] bf16 and a buffer of \(16, 32\)"):
        gluon_kernels.tma_copy_kernel[(1,)](box, out, 0, FAULT="")
    box.padding = "nan"
    with pytest.raises(ValueError, match="x is padded with nan: only zero is emulated"):
        gluon_kernels.tma_copy_kernel[(1,)](box, out, 0, FAULT="")
    with pytest.raises(KernelError, match=r"coordinates \[2147483648, 0\] are no int32"):
        copy_by_tma("", 2**31)


def hand_over(fault: str) -> tuple[Tensor, Tensor]:
    x, out = integers(16, 32), torch.empty(16, 32, dtype=torch.bfloat16)
    gluon_kernels.hand_over_kernel[(1,)](x, out, FAULT=fault)
    return x, out


@pytest.mark.parametrize("landing", LANDINGS)
def test_what_a_partition_did_before_it_arrived(landing: str) -> None:
    with timing(landing):
        x, out = hand_over("")
    assert torch.equal(out, x)


@pytest.mark.parametrize("fault", ["store after the arrival", "store after the copies' arrival"])
def test_what_a_partition_does_after_it_arrived(fault: str) -> None:
    with pytest.raises(KernelError, match="of box, and nothing says that store at .* is over"):
        hand_over(fault)


def join(*, fill_first: bool) -> tuple[Tensor, Tensor]:
    x, out = integers(16, 32), torch.empty(16, 32, dtype=torch.bfloat16)
    gluon_kernels.join_kernel[(1,)](x, out, FILL_FIRST=fill_first)
    return x, out


@pytest.mark.parametrize("landing", LANDINGS)
def test_partitions_end_before_what_follows(landing: str) -> None:
    with timing(landing):
        x, out = join(fill_first=False)
        assert torch.equal(out, x)
        with pytest.raises(KernelError, match="load of box, (and nothing says|where nothing)"):
            join(fill_first=True)


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
    gluon_kernels.ragged_kernel[(1,)](ragged(x, 16), out, begin, end)
    assert torch.equal(out[: end - begin], x[begin:end])
    assert out[end - begin :].count_nonzero() == 0


def test_a_ragged_box_past_the_tensor_is_found() -> None:
    x, out = integers(24, 32), torch.empty(16, 32, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="TMA of element 799 of x, which has 768"):
        gluon_kernels.ragged_kernel[(1,)](ragged(x, 16), out, 20, 25)


ROW = (torch.arange(16) * 5 % 9).int()


def gather(fault: str, row: Tensor = ROW) -> tuple[Tensor, Tensor]:
    x, out = integers(9, 32), torch.empty(16, 32, dtype=torch.bfloat16)
    gluon_kernels.gather_kernel[(1,)](x, row, out, 11, FAULT=fault)
    return x, out


@pytest.mark.parametrize("landing", LANDINGS)
def test_cp_async(landing: str) -> None:
    with timing(landing):
        x, out = gather("")
    assert torch.equal(out[:11], x[ROW.long()][:11])
    assert out[11:].count_nonzero() == 0


def test_faults_of_cp_async_are_found() -> None:
    with pytest.raises(KernelError, match=r"load of box while cp.async at .* in flight"):
        gather("no wait")
    with pytest.raises(KernelError, match="cp.async of element 319 of x_ptr, which has 288"):
        gather("", torch.where(torch.arange(16) == 3, 9, ROW).int())


def test_copies_do_not_outlive_the_kernel() -> None:
    with timing(races=False):
        with pytest.raises(KernelError, match="the kernel ends and nothing waited for TMA load"):
            copy_by_tma("no wait")
        with pytest.raises(KernelError, match="the kernel ends and never waited for the copy"):
            gather("no wait")


def test_a_seed_repeats_a_run() -> None:
    """Which partition comes first, and with it how the fault shows."""

    def words(seed: int) -> str:
        with timing("random", seed), pytest.raises(KernelError) as error:
            join(fill_first=True)
        return str(error.value)

    seen = [words(seed) for seed in range(9)]
    assert seen == [words(seed) for seed in range(9)]
    assert len(set(seen)) == 2
