"""Every started tile is filled."""

from __future__ import annotations

from torch import Tensor

from distmoe.routing.rounding import KeySums, Rule, may_round_up


def targets(
    freq_E: Tensor, *, tile: int, room: int | Tensor, groups: int, seed: int, key_sums: KeySums
) -> Tensor:
    """Up wherever there are as many tokens; else down."""
    return (freq_E // tile + may_round_up(freq_E, tile=tile, room=room)) * tile


RULE = Rule(targets, most_added=lambda num_experts, tile: num_experts * (tile - 1))
