"""The energy counter of a rank's device."""

from __future__ import annotations

import math

import torch

from distmoe.metrics.energy import Meter, no_meter
from distmoe.metrics.nvml import NvmlError, gpu_with


def meter_of(device: torch.device) -> Meter:
    """The counter of the whole board of a GPU, by NVML; `no_meter` on a CPU, without pynvml, and on
    a GPU that NVML does not know. A GPU that does not count (older than Volta, MIG) gives nan."""
    if device.type != "cuda":
        return no_meter
    try:
        # str: CUDA gives an object that prints like a UUID.
        gpu = gpu_with(str(torch.cuda.get_device_properties(device).uuid))
    except (NvmlError, AttributeError):
        return no_meter

    def read() -> float:
        joules = gpu.joules()
        return math.nan if joules is None else joules

    return read
