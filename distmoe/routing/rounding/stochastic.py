"""Up with probability (f mod M) / M, so that the expected count is f (SR-f of SonicMoE).

The draw is a hash of the seed, the expert and the counts of all experts. Every rank draws the same,
a resumed run draws what the unbroken one would, and no state has to be kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.routing.rounding import KeySums, Rule, may_round_up
from distmoe.routing.splitmix import GOLDEN, mix

# Of a drawn number.
DRAW_BITS = 62


def targets(
    freq_E: Tensor, *, tile: int, room: int | Tensor, groups: int, seed: int, key_sums: KeySums
) -> Tensor:
    """Up iff a number drawn from 0..M-1 is below f mod M, and there are as many tokens."""
    may_E = may_round_up(freq_E, tile=tile, room=room)
    up_E = may_E & (draw(freq_E, seed) % tile < freq_E % tile)
    return (freq_E // tile + up_E) * tile


def draw(freq_E: Tensor, seed: int) -> Tensor:
    """int64 [E] of DRAW_BITS bits, one independent number per expert for every seed and counts."""
    stream_E = torch.arange(1, len(freq_E) + 1, device=freq_E.device) * GOLDEN
    state = mix(mix(stream_E + freq_E).sum() + _signed(seed * GOLDEN))
    return mix(state + stream_E) & ((1 << DRAW_BITS) - 1)


def _signed(x: int) -> int:
    """x modulo 2^64, as a signed number of 64 bits."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


RULE = Rule(targets, most_added=lambda num_experts, tile: num_experts * (tile - 1))
