"""The exact global selection: bit for bit the rule on the concatenated tokens of all ranks.

An expert moves by less than a tile, so the pairs that change lie in the union of each rank's M - 1
best candidates in the one direction that the expert moves. Merged, they tell how many of its own
each rank may change, and those are a prefix of its sorted list; see `transports`. One rank has
nothing to merge: it takes as many as the expert has to change.

Order: an add takes the largest key first and, among equal keys, the lowest global token; a drop
takes the smallest key first and, among equal keys, the highest. Tokens are numbered rank by rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.comm import Exchange
from distmoe.kernels.round_select import load_round_select
from distmoe.routing.rounding import Population
from distmoe.routing.rounding.transports import transport_for
from distmoe.routing.routers import Scores


@torch.no_grad()
def select(
    scores: Scores,
    population: Population,
    target_E: Tensor,
    *,
    tile: int,
    exchange: Exchange,
    transport: str,
) -> Tensor:
    """This rank's pairs [T, E] bool after rounding; collective when a tile is above 1."""
    if tile == 1:
        return scores.chosen_TE
    round_select = load_round_select(scores.key_TE)
    freq_E = population.freq_E
    adds_E, amount_E = target_E > freq_E, (target_E - freq_E).abs()
    priority_ET = round_select.priorities(scores.key_TE, scores.chosen_TE, adds_E)
    if exchange.size > 1:
        accepted = transport_for(transport, exchange, num_experts=len(freq_E))
        best_EC = round_select.best(priority_ET, tile - 1)
        amount_E = accepted(exchange, best_EC, adds_E, amount_E)
    return round_select.take(scores.chosen_TE, priority_ET, amount_E, adds_E, most=tile - 1)
