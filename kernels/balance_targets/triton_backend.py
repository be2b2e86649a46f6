"""The launch of the kernel of `balance`: one program, no sort, no atomics, no host sync."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from distmoe.kernels.balance_targets.triton_balance_targets import targets_kernel

# Lanes that a warp computes.
LANES_OF_A_WARP = 256


def targets(freq_E: Tensor, room: Tensor, *, tile: int, groups: int) -> Tensor:
    """See `balance_targets`."""
    target_E = torch.empty_like(freq_E, memory_format=torch.contiguous_format)
    config = targets_config(len(freq_E), tile=tile, groups=groups)
    targets_kernel[(1,)](
        freq_E.contiguous(), room.contiguous(), target_E, ROOMS=len(room), **config
    )
    return target_E


def targets_config(num_experts: int, *, tile: int, groups: int) -> dict[str, int]:
    """Of the kernel, without the length of ``room``."""
    padded, runs, of_a_run = (
        triton.next_power_of_2(n) for n in (num_experts, groups, num_experts // groups)
    )
    return {
        "TILE": tile,
        "E": num_experts,
        "E_POW2": padded,
        "GROUPS": groups,
        "G_POW2": runs,
        "N_POW2": of_a_run,
        "KEY_BITS": (tile * padded - 1).bit_length(),
        "LEVEL_BITS": (num_experts // groups).bit_length(),
        "num_warps": min(max(runs * of_a_run // LANES_OF_A_WARP, 1), 16),
    }
