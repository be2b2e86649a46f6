"""The exact global selection: bit for bit the rule on the concatenated tokens of all ranks.

An expert moves by less than a tile, so the pairs that change lie in the union of each rank's M - 1
best candidates in the one direction that the expert moves. One all-gather of candidate priorities
lets every rank merge them; a rank's accepted candidates are a prefix of its sorted list. One rank
has nothing to merge: it takes as many as the expert has to change.

Order: an add takes the largest key first and, among equal keys, the lowest global token; a drop
takes the smallest key first and, among equal keys, the highest. Tokens are numbered rank by rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.comm import Exchange
from distmoe.kernels.round_select import load_round_select
from distmoe.routing.rounding import Population
from distmoe.routing.routers import Scores


@torch.no_grad()
def select(
    scores: Scores, population: Population, target_E: Tensor, *, tile: int, exchange: Exchange
) -> Tensor:
    """This rank's pairs [T, E] bool after rounding; collective when a tile is above 1."""
    if tile == 1:
        return scores.chosen_TE
    round_select = load_round_select(scores.key_TE)
    freq_E = population.freq_E
    adds_E, amount_E = target_E > freq_E, (target_E - freq_E).abs()
    priority_ET = round_select.priorities(scores.key_TE, scores.chosen_TE, adds_E)
    if exchange.size > 1:
        amount_E = _accepted(exchange, round_select.best(priority_ET, tile - 1), adds_E, amount_E)
    return round_select.take(scores.chosen_TE, priority_ET, amount_E, adds_E, most=tile - 1)


def _accepted(exchange: Exchange, priority_EC: Tensor, adds_E: Tensor, amount_E: Tensor) -> Tensor:
    """[E] int64: this rank's candidates among the best ``amount_E`` of the group."""
    gathered_PEC = exchange.all_gather(priority_EC)
    num_ranks, num_experts, num = gathered_PEC.shape
    merged_EPC = gathered_PEC.transpose(0, 1).long()
    # Equal keys: lower ranks win an add, higher ranks lose a drop first.
    rank_P = torch.arange(num_ranks, device=amount_E.device)
    before_EP = torch.where(adds_E[:, None], num_ranks - 1 - rank_P, rank_P)
    distinct_EPC = merged_EPC * num_ranks + before_EP[:, :, None]
    # Inside a rank equal keys keep the rank's own order: a stable sort of lists that are sorted.
    order = distinct_EPC.reshape(num_experts, -1).argsort(dim=1, descending=True, stable=True)
    taken = torch.arange(num_ranks * num, device=amount_E.device) < amount_E[:, None]
    taken_EX = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, taken)
    taken_EPC = taken_EX.view(num_experts, num_ranks, num)
    return taken_EPC[:, exchange.rank].sum(1)
