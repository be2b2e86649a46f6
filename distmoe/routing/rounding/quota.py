"""A selection without a round of its own: every rank changes its share of an expert's pairs.

The share of a rank is in proportion to its eligible pairs (those it could drop, or could add), cut
to integers by the largest remainder, ties to the lower rank. All ranks compute all shares from the
counts that they have. Alignment and balance are exact; which pairs change is not what one process
would choose, and depends on how the tokens are spread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.comm import Exchange
from distmoe.comm.local import LocalExchange
from distmoe.routing.rounding import Amounts, Change, Drops, Population, Selection
from distmoe.routing.rounding.radix_select import KeyedPairs, border


def amounts(change: Change, *, exchange: Exchange, transport: str) -> Amounts:
    """Each rank's share; no communication."""
    counts_PE, room_PE = change.population.counts_PE, change.population.room_PE
    eligible_PE = torch.where(change.adds_E, room_PE - counts_PE, counts_PE)
    return Amounts.of_all(shares(eligible_PE, change.amount_E), exchange)


def overflow(
    pairs: KeyedPairs, population: Population, over_E: Tensor, *, exchange: Exchange
) -> Drops:
    """Each rank's share, its own lowest keys; no communication."""
    amount_PE = shares(population.counts_PE, over_E)
    limit_E, ties_E = border(pairs, amount_PE[exchange.rank], LocalExchange())
    return Drops(limit_E, ties_E, amount_PE)


def shares(eligible_PE: Tensor, amount_E: Tensor) -> Tensor:
    """int64 [P, E] that sum to ``amount_E`` over the ranks, none above its eligible pairs."""
    num_ranks = len(eligible_PE)
    total_E = eligible_PE.sum(0).clamp(min=1)
    wanted_PE = eligible_PE * amount_E
    floor_PE, rest_PE = wanted_PE // total_E, wanted_PE % total_E
    left_E = amount_E - floor_PE.sum(0)
    rank_P1 = torch.arange(num_ranks, device=amount_E.device)[:, None]
    # Distinct numbers, so that the order of equal remainders is not left to the sort.
    order_PE = (rest_PE * num_ranks + (num_ranks - 1 - rank_P1)).argsort(0, descending=True)
    more_PE = torch.zeros_like(floor_PE).scatter_(0, order_PE, (rank_P1 < left_E).long())
    return floor_PE + more_PE


SELECTION = Selection(amounts, overflow)
