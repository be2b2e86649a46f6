"""What the fused kernels hand to a GPU, for every shape and tiling of the bench: grids, and TMA
descriptors by the rules of cuTensorMapEncodeTiled (CUDA driver API), as only a driver enforces."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import pytest
import torch
from compile_kernels import compile_only, forward_and_backward
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from distmoe.bench.kernels.shapes import SHAPES, Shape
from distmoe.kernels.moe_mlp import triton_backend
from distmoe.kernels.moe_mlp.tiles import CANDIDATES, SPACE
from distmoe.kernels.moe_mlp.triton_descriptors import weight

KERNELS = (
    "up_kernel",
    "rows_kernel",
    "dgrad_kernel",
    "dscore_kernel",
    "wgrad_kernel",
    "row_sum_kernel",
    "tile_list_kernel",
)
LARGEST_GRID = (2**31 - 1, 65535, 65535)
LARGEST_STRIDE = 2**40
LARGEST_BOX = 256
# Elements of a coordinate are 32 bits, signed.
LARGEST_DIM = 2**31


@dataclass
class Recorder:
    """Stands for a kernel, and keeps what it is launched with."""

    name: str
    launches: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **constants: self.launches.append((self.name, grid, args))


def faults(descriptor: TensorDescriptor) -> list[str]:
    """What the driver, or a 32-bit coordinate, would refuse."""
    size = descriptor.base.element_size()
    strides = [stride * size for stride in descriptor.strides[:-1]]
    broken = {
        "rank": not 1 <= len(descriptor.shape) <= 5,
        "base": descriptor.base.data_ptr() % 16 != 0,
        "shape": not all(0 < dim <= LARGEST_DIM for dim in descriptor.shape),
        "strides": any(s % 16 or not 0 < s < LARGEST_STRIDE for s in strides),
        "last stride": descriptor.strides[-1] != 1,
        "box": not all(0 < dim <= LARGEST_BOX for dim in descriptor.block_shape),
        "bytes of a row of the box": descriptor.block_shape[-1] * size % 16 != 0,
    }
    return [name for name, wrong in broken.items() if wrong]


def launches_of(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All of a forward and backward; nothing is computed, and no memory taken."""
    kernels = [Recorder(name) for name in KERNELS]
    for kernel in kernels:
        monkeypatch.setattr(triton_backend, kernel.name, kernel)
    forward_and_backward(shape)
    return [launch for kernel in kernels for launch in kernel.launches]


@pytest.mark.parametrize("tiling", range(SPACE.most_candidates))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_grids_and_descriptors(shape: Shape, tiling: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with SPACE.tiling(tiling):
        launches = launches_of(shape, monkeypatch)
    assert {name for name, _, _ in launches} == set(KERNELS)
    descriptors = 0
    for name, grid, args in launches:
        assert 0 < prod(grid), name
        assert all(n <= most for n, most in zip(grid, LARGEST_GRID, strict=False)), (name, grid)
        for argument in args:
            if isinstance(argument, TensorDescriptor):
                assert faults(argument) == [], (name, argument)
                descriptors += 1
    # Weights of up and dgrad, operands and rows of down and dx, one of each weight gradient.
    assert descriptors == 10


def test_weights_that_begin_anywhere_are_aligned_for_tma() -> None:
    flat = torch.zeros(1 + 2 * 16 * 32, dtype=torch.bfloat16)
    config = CANDIDATES["down"][0].fit(32)
    descriptor = weight(flat[1:].view(2, 16, 32), config, rows=16, cols=32)
    assert isinstance(descriptor, TensorDescriptor)
    assert faults(descriptor) == []


@pytest.mark.parametrize(("capability", "tma"), [((8, 0), False), ((9, 0), True)])
def test_tensors_without_memory_are_those_of_the_gpu(
    capability: tuple[int, int], tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `compile_kernels.py` compiles is what this GPU will launch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert triton_backend._has_tma.__wrapped__(torch.device("meta")) == tma


def test_kernels_are_compiled_without_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: seen.append(options))
    with compile_only() as names:
        JITFunction.run(test_grids_and_descriptors, 1, grid=(1,), warmup=False, num_warps=4)
    JITFunction.run(None, warmup=False)
    assert names == ["test_grids_and_descriptors"]
    assert seen == [{"grid": (1,), "warmup": True, "num_warps": 4}, {"warmup": False}]
