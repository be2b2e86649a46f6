"""The interpreter of Gluon kernels: a pipeline of two partitions, right and with planted faults."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
from gluon_interpreter import DeadlockError, KernelError, timing
from gluon_matmul import matmul_kernel
from test_gluon_interpreter import LANDINGS, descriptor, integers
from torch import Tensor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")


@dataclass
class Matmul:
    x: Tensor
    row: Tensor
    w: Tensor
    out: Tensor

    def run(self, fault: str = "", programs: int = 3) -> None:
        BM, BN, BK = 64, 32, 32
        tiles = len(self.row) // BM, len(self.w) // BN
        matmul_kernel[(programs,)](
            self.x, self.row, descriptor(self.w, [BN, BK]), self.out, *tiles, K=self.x.shape[1],
            BM=BM, BN=BN, BK=BK, STAGES=3, FAULT=fault, num_warps=4,
        )  # fmt: skip

    @property
    def exact(self) -> Tensor:
        return (self.x[self.row.long()].float() @ self.w.float().T).bfloat16()


@pytest.fixture
def matmul() -> Matmul:
    row = torch.randint(0, 40, (128,), generator=torch.Generator().manual_seed(0)).int()
    out = torch.full((128, 96), float("nan"), dtype=torch.bfloat16)
    return Matmul(integers(40, 128), row, integers(96, 128), out)


@pytest.mark.parametrize("landing", LANDINGS)
def test_a_warp_specialised_matmul(matmul: Matmul, landing: str) -> None:
    with timing(landing):
        matmul.run()
    assert torch.equal(matmul.out, matmul.exact)


MATMUL_FAULTS = {
    "no wait for full": r"wgmma of a_ring\[.\](, where nothing was written yet"
    "|, and nothing says that cp.async at .* is over| while cp.async at .* is still in flight)",
    "no wait for empty": r"(TMA load of b|cp.async of a)_ring\[.\](, and nothing says that| while)"
    r"|1 more arrivals at full\[.\], which waits for 0 of 129",
    "initial phase": r"deadlock; partition 0 \(consume\) waits for parity 0 of full\[0\], .*"
    r"lacks 129 of 129 arrivals.*; partition 1 \(produce\) waits for parity 0 of empty\[0\]",
    "count": r"mbarrier_arrive.*: 128 more arrivals at full\[.\], which waits for 127 of 128",
    "increments": r"deadlock; .* full\[0\], .* lacks 128 of 129 arrivals and 0 bytes",
    "early release": r"TMA load of b_ring\[.\].* wgmma at .* is (still in flight|over)",
    "released twice": "deadlock; .*waits for parity . of full.*waits for parity . of empty",
    "no fence": r"wgmma of a_ring\[0\] without a fence_async_shared since cp.async",
    "fence too early": r"wgmma of a_ring\[0\] without a fence_async_shared since cp.async",
    "no wait for the product": "the result of wgmma at .* is used without warpgroup_mma_wait",
    "bytes": r"deadlock; .* full\[0\], .* lacks 0 of 129 arrivals and 16 bytes",
    "a tile less": r"deadlock; partition 0 .* lacks 129 of 129 arrivals and 0 bytes[^;]*$",
}


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize("fault", MATMUL_FAULTS)
def test_a_fault_of_a_pipeline_is_found(matmul: Matmul, fault: str, landing: str) -> None:
    threads = threading.active_count()
    with timing(landing), pytest.raises(KernelError, match=MATMUL_FAULTS[fault]) as error:
        matmul.run(fault)
    assert isinstance(error.value, DeadlockError) == MATMUL_FAULTS[fault].startswith("deadlock")
    assert threading.active_count() == threads


@pytest.mark.parametrize(("landing", "spoils"), [("late", True), ("at once", False)])
def test_a_race_spoils_the_numbers(matmul: Matmul, landing: str, spoils: bool) -> None:
    """Copies land late and products read late: what is a race gives wrong results too, which it
    does not if all happens at once."""
    with timing(landing, races=False):
        matmul.run("early release")
        assert torch.equal(matmul.out, matmul.exact) is not spoils


def test_a_missing_fence_can_be_allowed(matmul: Matmul) -> None:
    with timing(fences=False):
        matmul.run("no fence")
    assert torch.equal(matmul.out, matmul.exact)
