"""Peak memory of this process."""

from __future__ import annotations

import resource

import torch

GIB = 1 << 30


def peak_memory_gib(device: torch.device) -> float:
    """Allocated on the GPU, or resident on the host, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # ru_maxrss is in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
