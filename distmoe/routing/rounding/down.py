"""Every started tile is dropped: no pair is added, and tokens lose experts. Costs quality."""

from __future__ import annotations

from torch import Tensor

from distmoe.routing.rounding import KeySums, Rule


def targets(
    freq_E: Tensor, *, tile: int, room: int | Tensor, groups: int, seed: int, key_sums: KeySums
) -> Tensor:
    """floor(f / M) * M."""
    return freq_E // tile * tile


RULE = Rule(targets, most_added=lambda num_experts, tile: 0)
