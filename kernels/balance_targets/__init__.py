"""Targets of the rounding rule `balance`: tiles for every expert, the busiest run of experts light.

With k_e = f_e // M, rho_e = f_e mod M, and over the runs r of experts B_r = sum k_e, m_r = experts
that may round up: U = min(floor(sum rho_e / M + 1/2), sum m_r) experts round up, which keeps the
total within M/2 of top-k's; L = the smallest L >= max B_r with sum_r min(m_r, L - B_r) >= U is the
lightest possible busiest run. Experts then round up in the order of (-rho_e, e) while U and their
run's cap min(m_r, L - B_r) last.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distmoe.kernels.backends import fused_or_torch
from distmoe.registry import BALANCE_TARGETS_BACKENDS

# What one program keeps in registers.
MOST_EXPERTS = 4096
# Remainder and number of an expert are one int32.
MOST_KEYS = 1 << 30


class BalanceTargets(Protocol):
    """One backend. ``freq_E`` int64: f; ``room`` int64 [E] or [1]: what no target exceeds;
    ``tile``: M; ``groups``: runs, which divide the experts. Targets int64 [E]."""

    def __call__(self, freq_E: Tensor, room: Tensor, *, tile: int, groups: int) -> Tensor: ...


def balance_targets(
    freq_E: Tensor, room: int | Tensor, *, tile: int, groups: int, backend: str = "auto"
) -> Tensor:
    """See `BalanceTargets`. Integer arithmetic throughout, so that every rank finds the same."""
    if not isinstance(room, Tensor):
        room = torch.full((1,), room, dtype=torch.int64, device=freq_E.device)
    name = backend
    if backend == "auto":
        name = fused_or_torch(freq_E.device) if fits(len(freq_E), tile) else "torch"
    targets: BalanceTargets = BALANCE_TARGETS_BACKENDS.load(name)
    return targets(freq_E, room, tile=tile, groups=groups)


def fits(num_experts: int, tile: int) -> bool:
    """Whether one program can do it."""
    return 0 < num_experts <= MOST_EXPERTS and tile * 2 * num_experts <= MOST_KEYS
