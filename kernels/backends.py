"""Where the fused kernels run."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def fused_kernels_run_on(device: torch.device) -> bool:
    """Whether ``device`` is a GPU that Triton compiles for: compute capability 8.0 or newer, or
    ROCm. Never raises."""
    return device.type == "cuda" and _supported(device.index or 0)


def fused_or_torch(device: torch.device) -> str:
    """The name of the backend of ops that have these two."""
    return "triton" if fused_kernels_run_on(device) else "torch"


def e4m3_or_torch(device: torch.device) -> str:
    """The same for ops that convert to and from e4m3, which Triton does for CUDA of compute
    capability 8.9 or newer."""
    if fused_or_torch(device) == "torch" or torch.version.hip is not None:
        return "torch"
    return "triton" if torch.cuda.get_device_capability(device) >= (8, 9) else "torch"


def kernels_are_interpreted() -> bool:
    """Whether Triton's interpreter runs them, on a CPU."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _supported(index: int) -> bool:
    if not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)
