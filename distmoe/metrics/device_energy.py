"""The energy counter of a rank's device."""

from __future__ import annotations

import math
from functools import partial

import torch

from distmoe.metrics.nvml import Gpu, NvmlError, all_gpus
from distmoe.metrics.throughput import Meter, no_meter


def meter_of(device: torch.device) -> Meter:
    """The counter of the whole board of a GPU, by NVML; `no_meter` on a CPU, without pynvml, and on
    a GPU that NVML does not know. A GPU that does not count (older than Volta, MIG) gives nan."""
    if device.type != "cuda":
        return no_meter
    try:
        gpus = all_gpus()
    except NvmlError:
        return no_meter
    # CUDA_VISIBLE_DEVICES changes numbers, but no UUID.
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    own = next((gpu for gpu in gpus if gpu.uuid() == f"GPU-{uuid}"), None)
    return no_meter if own is None else partial(_joules, own)


def _joules(gpu: Gpu) -> float:
    joules = gpu.joules()
    return math.nan if joules is None else joules
