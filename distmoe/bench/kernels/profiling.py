"""Which kernels ran: one iteration of a subject under torch.profiler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from distmoe.bench.kernels.subjects import Subject


@dataclass(frozen=True)
class KernelTime:
    """Milliseconds on the device (on a CPU: of the operator itself) over ``calls``."""

    name: str
    calls: int
    ms: float


def profile_subject(subject: Subject, mode: str, device: torch.device) -> list[KernelTime]:
    """Kernels of one warm iteration of ``mode``, the longest first."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    subject.prepare(mode)
    subject.run(mode)
    subject.prepare(mode)
    _wait(device)
    with profile(activities=activities) as profiler:
        subject.run(mode)
        _wait(device)
    subject.release()
    found = []
    for event in profiler.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if micros > 0:
            found.append(KernelTime(event.key, event.count, micros / 1e3))
    return sorted(found, key=lambda kernel: -kernel.ms)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
