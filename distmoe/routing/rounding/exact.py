"""The exact global selection: bit for bit the rule on the concatenated tokens of all ranks.

An expert moves by less than a tile, so the pairs that change lie in the union of each rank's M - 1
best candidates in the one direction that the expert moves. Merged, they tell how many of its own
each rank may change, and those are a prefix of its sorted list; see `transports`. One rank has
nothing to merge: it takes as many as the expert has to change.

Order: an add takes the largest key first and, among equal keys, the lowest global token; a drop
takes the smallest key first and, among equal keys, the highest. Tokens are numbered rank by rank.
"""

from __future__ import annotations

from distmoe.comm import Exchange
from distmoe.routing.rounding import Amounts, Change
from distmoe.routing.rounding.transports import transport_for


def amounts(change: Change, *, exchange: Exchange, transport: str) -> Amounts:
    """Each rank's candidates among the best of the group; collective."""
    if exchange.size == 1:
        return Amounts.of_all(change.amount_E[None], exchange)
    accepted = transport_for(transport, exchange, num_experts=len(change.amount_E))
    return accepted(exchange, change.best(), change.adds_E, change.amount_E)
