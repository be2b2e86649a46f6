"""The exact global selection: bit for bit the rule on the concatenated tokens of all ranks.

An expert moves by less than a tile, so the pairs that change lie in the union of each rank's M - 1
best candidates in the one direction that the expert moves. One all-gather of candidate keys lets
every rank merge them; a rank's accepted candidates are a prefix of its sorted list.

Order: an add takes the largest key first and, among equal keys, the lowest global token; a drop
takes the smallest key first and, among equal keys, the highest. Tokens are numbered rank by rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.comm import Exchange
from distmoe.routing.routers import KEY_SCALE, Scores

# Priority of a place that holds no candidate: below every key.
NOTHING = -(KEY_SCALE + 2)


@torch.no_grad()
def select(
    scores: Scores, freq_E: Tensor, target_E: Tensor, *, tile: int, exchange: Exchange
) -> Tensor:
    """This rank's pairs [T, E] bool after rounding; collective when a tile is above 1."""
    if tile == 1:
        return scores.chosen_TE
    delta_E = target_E - freq_E
    adds_E = delta_E > 0
    priority_EC, token_EC = _candidates(scores, adds_E, num=tile - 1)
    accepted_E = _accepted(exchange, priority_EC, adds_E, delta_E.abs())
    changed_EC = torch.arange(priority_EC.shape[1], device=delta_E.device) < accepted_E[:, None]
    changed_ET = torch.zeros_like(scores.chosen_TE.T, dtype=torch.bool)
    width = token_EC.shape[1]
    changed_ET.scatter_(1, token_EC, changed_EC[:, :width])
    return scores.chosen_TE ^ changed_ET.T


def _candidates(scores: Scores, adds_E: Tensor, *, num: int) -> tuple[Tensor, Tensor]:
    """Priorities [E, num] int32, best first, and the tokens behind the first min(num, T)."""
    num_tokens = len(scores.key_TE)
    key_ET, eligible_ET = scores.key_TE.T.long(), scores.chosen_TE.T ^ adds_E[:, None]
    token_T = torch.arange(num_tokens, device=key_ET.device)
    sign_E1 = torch.where(adds_E, 1, -1)[:, None]
    # By key, then by the lower token; a drop turns both round. No two are equal, which leaves
    # nothing to the order of an unstable partial sort.
    distinct_ET = (key_ET * num_tokens - token_T) * sign_E1
    distinct_ET.masked_fill_(~eligible_ET, NOTHING * num_tokens)
    width = min(num, num_tokens)
    token_EC = distinct_ET.topk(width, dim=1).indices
    signed_EC = key_ET.gather(1, token_EC) * sign_E1
    priority_EC = torch.full((len(key_ET), num), NOTHING, dtype=torch.int32, device=key_ET.device)
    priority_EC[:, :width] = torch.where(eligible_ET.gather(1, token_EC), signed_EC, NOTHING)
    return priority_EC, token_EC


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
