"""The exact global selection: bit for bit the rule on the concatenated tokens of all ranks.

An expert moves by less than a tile, so the pairs that change lie in the union of each rank's M - 1
best candidates in the one direction that the expert moves. Merged, they tell how many of its own
each rank may change, and those are a prefix of its sorted list; see `transports`. One rank has
nothing to merge: it takes as many as the expert has to change.

A capacity may drop many tiles, so its border is found by counting keys; see `radix_select`.

Order: an add takes the largest key first and, among equal keys, the lowest global token; a drop
takes the smallest key first and, among equal keys, the highest. Tokens are numbered rank by rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.comm import Exchange
from distmoe.routing.rounding import Amounts, Change, Drops, Population, Selection
from distmoe.routing.rounding.radix_select import KeyedPairs, border
from distmoe.routing.rounding.transports import transport_for


def amounts(change: Change, *, exchange: Exchange, transport: str) -> Amounts:
    """Each rank's candidates among the best of the group; collective."""
    if exchange.size == 1:
        return Amounts.of_all(change.amount_E[None], exchange)
    accepted = transport_for(transport, exchange, num_experts=len(change.amount_E))
    return accepted(exchange, change.best(), change.adds_E, change.amount_E)


def overflow(
    pairs: KeyedPairs, population: Population, over_E: Tensor, *, exchange: Exchange
) -> Drops:
    """The group's lowest keys; of equal ones at the border, those of the last ranks. Collective."""
    limit_E, left_E = border(pairs, over_E, exchange)
    own_2E = torch.stack([pairs.count(pairs.below(limit_E)), pairs.count(pairs.at(limit_E))])
    gathered_P2E = exchange.all_gather(own_2E.int(), kind="key ties").long()
    below_PE, at_PE = gathered_P2E.unbind(1)
    after_PE = at_PE.sum(0) - at_PE.cumsum(0)
    ties_PE = (left_E - after_PE).clamp(min=0).minimum(at_PE)
    return Drops(limit_E, ties_PE[exchange.rank], below_PE + ties_PE)


SELECTION = Selection(amounts, overflow)
