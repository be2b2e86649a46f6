"""Each expert to the nearest multiple of the tile (NR-f of SonicMoE, arXiv 2512.14080)."""

from __future__ import annotations

from torch import Tensor

from distmoe.routing.rounding import KeySums, Rule, may_round_up


def targets(
    freq_E: Tensor, *, tile: int, room: int | Tensor, groups: int, seed: int, key_sums: KeySums
) -> Tensor:
    """Up iff more than half of the last tile is filled; a tie drops."""
    up_E = may_round_up(freq_E, tile=tile, room=room) & (2 * (freq_E % tile) > tile)
    return (freq_E // tile + up_E) * tile


# Up by at most the smaller part of a tile, every expert at the worst.
RULE = Rule(targets, most_added=lambda num_experts, tile: num_experts * ((tile - 1) // 2))
