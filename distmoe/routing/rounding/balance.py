"""Round to tiles so that the busiest rank is as light as floor or ceiling choices allow.

Its arithmetic is in `kernels.balance_targets`.
"""

from __future__ import annotations

from torch import Tensor

from distmoe.kernels.balance_targets import balance_targets
from distmoe.routing.rounding import KeySums, Rule


def targets(
    freq_E: Tensor, *, tile: int, room: int | Tensor, groups: int, seed: int, key_sums: KeySums
) -> Tensor:
    """ValueError if ``groups`` does not divide the number of experts."""
    if len(freq_E) % groups:
        raise ValueError(f"balance_groups is {groups}; it must divide the {len(freq_E)} experts")
    return balance_targets(freq_E, room, tile=tile, groups=groups)


# The experts that round up are sum(rest) / M, rounded, or fewer.
RULE = Rule(targets, most_added=lambda num_experts, tile: tile // 2)
