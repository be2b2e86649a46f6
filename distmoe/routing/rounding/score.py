"""Up with the share of score that the drop would lose (NR-s of SonicMoE).

Rounding down loses the scores of the pairs above the last whole tile, rounding up adds those of the
best other tokens. Up with probability lost / (lost + added): a tile that is nearly full of strong
pairs is rarely dropped. Sums are of integer keys, and the draw is that of `stochastic`, so every
rank finds the same targets.
"""

from __future__ import annotations

from torch import Tensor

from distmoe.routing.rounding import KeySums, Rule, may_round_up
from distmoe.routing.rounding.stochastic import draw


def targets(
    freq_E: Tensor, *, tile: int, room: int | Tensor, groups: int, seed: int, key_sums: KeySums
) -> Tensor:
    """Up iff a number drawn below lost + added is below lost, and there are as many tokens."""
    lost_E, added_E = key_sums()
    total_E = (lost_E + added_E).clamp(min=1)
    may_E = may_round_up(freq_E, tile=tile, room=room)
    up_E = may_E & (draw(freq_E, seed) % total_E < lost_E)
    return (freq_E // tile + up_E) * tile


RULE = Rule(targets, most_added=lambda num_experts, tile: num_experts * (tile - 1))
