"""Many steps of one expert-parallel layer under skewed routing, with what its process holds.

In every step most tokens of all ranks like one expert, another one each step, and every rank has
another number of tokens, one of them none: sizes change all the time, ranks stand in front of
others, and some experts and ranks have nothing. A leak would show as live tensors that grow. The
resident set also grows by what malloc keeps in fragments, of which malloc_trim(0) gives back whole
pages only, so what malloc has handed out is read, too. glibc only.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from distmoe.moe.layer import MoE

MIB = 2**20
# Of the tokens, those that like the favourite expert of their step.
SKEW = 0.8
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Reading:
    """Of one rank after ``step`` steps: the resident set, in MiB, as it was and after
    malloc_trim(0), what malloc has handed out, and the tensors that Python can reach. ``busiest``:
    pairs of the busiest rank over the mean, in the most uneven step since the last reading."""

    step: int
    seconds: float
    resident_mib: float
    trimmed_mib: float
    allocated_mib: float
    live_tensors: int
    live_mib: float
    busiest: float


def soak(layer: MoE, *, tokens: int, steps: int, every: int) -> list[Reading]:
    """``steps`` forwards, backwards and updates of ``layer``, with up to ``tokens`` tokens, and a
    reading after ``every`` steps; collective."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=LEARNING_RATE)
    readings, began, busiest = [], time.perf_counter(), 1.0
    for step in range(1, steps + 1):
        x_TH = skewed_tokens(layer, step, tokens)
        out_TH, losses = layer(x_TH)
        (out_TH.square().sum() + losses.load_balance + losses.z).backward()
        optimizer.step()
        optimizer.zero_grad()
        busiest = max(busiest, _busiest(layer))
        del x_TH, out_TH, losses
        if step % every == 0 or step == steps:
            readings.append(_read(step, time.perf_counter() - began, busiest))
            busiest = 1.0
    return readings


def skewed_tokens(layer: MoE, step: int, most: int) -> Tensor:
    """[T, H] of this rank in ``step``, T from 0 to ``most``."""
    rank, num_ranks = layer.exchange.rank, layer.exchange.size
    generator = torch.Generator().manual_seed(step * num_ranks + rank)
    count = 0
    if step % num_ranks != rank:
        count = int(torch.randint(1, most + 1, (), generator=generator))
    x_TH = torch.randn(count, layer.router_EH.shape[1], generator=generator)
    # The same on every rank.
    favourite = (step * 7) % layer.config.num_experts
    likes_it_T = torch.rand(count, generator=generator) < SKEW
    direction_H = torch.nn.functional.normalize(layer.router_EH[favourite].detach(), dim=0)
    strength = 4.0 * layer.router_EH.shape[1] ** 0.5
    x_TH += likes_it_T[:, None] * direction_H * strength
    return x_TH.requires_grad_()


def _busiest(layer: MoE) -> float:
    pairs_P = layer.stats.target_E.view(layer.exchange.size, -1).sum(1).float()
    return float(pairs_P.max() / pairs_P.mean())


def _read(step: int, seconds: float, busiest: float) -> Reading:
    gc.collect()
    # isinstance would ask lazy objects of other packages for their class.
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    resident_mib = _resident_mib()
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc_trim(0)
    return Reading(
        step=step,
        seconds=seconds,
        resident_mib=resident_mib,
        trimmed_mib=_resident_mib(),
        allocated_mib=_allocated_mib(libc),
        live_tensors=len(tensors),
        live_mib=sum(t.numel() * t.element_size() for t in tensors) / MIB,
        busiest=busiest,
    )


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


class _MallInfo(ctypes.Structure):
    """struct mallinfo2, by its manual page."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _allocated_mib(libc: ctypes.CDLL) -> float:
    libc.mallinfo2.restype = _MallInfo
    info = libc.mallinfo2()
    return float(info.uordblks + info.hblkhd) / MIB


@dataclass(frozen=True)
class Growth:
    """From the reading at a fifth of a run (what comes before warms up) to the largest after it."""

    trimmed_mib: float
    allocated_mib: float
    live_tensors: int


def growth(readings: list[Reading]) -> Growth:
    """Of one rank."""
    after = [r for r in readings if r.step * 5 >= readings[-1].step]
    first, rest = after[0], after[1:] or after
    return Growth(
        max(r.trimmed_mib for r in rest) - first.trimmed_mib,
        max(r.allocated_mib for r in rest) - first.allocated_mib,
        max(r.live_tensors for r in rest) - first.live_tensors,
    )
