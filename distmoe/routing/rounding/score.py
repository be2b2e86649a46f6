"""Up with the share of score that the drop would lose (NR-s of SonicMoE).

Rounding down loses the scores of the pairs above the last whole tile, rounding up adds those of the
best other tokens. Up with probability lost / (lost + added): a tile that is nearly full of strong
pairs is rarely dropped. Sums are of integer scores (keys without the bias), and the draw is that of
`stochastic`, so every rank finds the same targets. Of the forced routers `hash` weighs its drawn
keys; `balanced`, whose chosen keys exceed all others, nearly always goes up.
"""

from __future__ import annotations

from torch import Tensor

from distmoe.routing.rounding import KeySums, Rule, may_round_up
from distmoe.routing.rounding.stochastic import DRAW_BITS, draw

# Bits of the drawn chance: times a sum of 2^17 scores it fits into 64 bits.
CHANCE_BITS = 20


def targets(
    freq_E: Tensor, *, tile: int, room: int | Tensor, groups: int, seed: int, key_sums: KeySums
) -> Tensor:
    """Up iff a chance drawn from [0, 1) is below lost / (lost + added), and there are as many
    tokens. Compared, not divided with rest: a key that differs in its last bit, as another number
    of ranks may make it, then moves the border by as little."""
    lost_E, added_E = key_sums()
    total_E = (lost_E + added_E).clamp(min=1)
    chance_E = draw(freq_E, seed) >> (DRAW_BITS - CHANCE_BITS)
    may_E = may_round_up(freq_E, tile=tile, room=room)
    up_E = may_E & (chance_E * total_E < lost_E << CHANCE_BITS)
    return (freq_E // tile + up_E) * tile


RULE = Rule(targets, most_added=lambda num_experts, tile: num_experts * (tile - 1))
