"""What an expert would give up, or take in, to reach the border of a tile: sums of integer scores.

Keys say which pairs those are; a bias in them is taken out of the sums, so that what is lost over
what is lost and gained stays a share. Of a forced router, which sets keys freely, the keys are
summed as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.comm import Exchange
from distmoe.kernels.round_select import NOTHING, load_round_select
from distmoe.routing.rounding import Population
from distmoe.routing.routers import Scores


@torch.no_grad()
def key_sums(
    scores: Scores, population: Population, *, tile: int, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """int64 [E] twice, at least 0: the keys without bias of the f mod M lowest pairs that top-k
    chose, and of the M - f mod M highest that it did not; 0 where f is a multiple of M. Two small
    all-gathers."""
    rest_E = population.freq_E % tile
    to_next_E = torch.where(rest_E > 0, tile - rest_E, 0)
    lost_E = _best(scores, rest_E, adds=False, tile=tile, exchange=exchange)
    gained_E = _best(scores, to_next_E, adds=True, tile=tile, exchange=exchange)
    return lost_E, gained_E


def _best(scores: Scores, amount_E: Tensor, *, adds: bool, tile: int, exchange: Exchange) -> Tensor:
    """Sum over the ``amount_E`` best candidates of the group. The order of equals changes no
    sum."""
    round_select = load_round_select(scores.key_TE)
    adds_E = torch.full_like(amount_E, adds, dtype=torch.bool)
    priority_ET = round_select.priorities(scores.key_TE, scores.chosen_TE, adds_E)
    best_PEC = exchange.all_gather(round_select.best(priority_ET, tile - 1), kind="key sums")
    best_EX = best_PEC.transpose(0, 1).reshape(len(amount_E), -1).long()
    ordered_EX = best_EX.sort(dim=1, descending=True).values
    place_X = torch.arange(ordered_EX.shape[1], device=amount_E.device)
    counted_EX = (place_X < amount_E[:, None]) & (ordered_EX > NOTHING)
    sum_E = torch.where(counted_EX, ordered_EX, 0).sum(1)
    if not adds:
        # The priority of a drop is the negative key.
        sum_E = -sum_E
    if scores.bias_E is not None:
        # Fewer than wanted where few tokens may take the expert.
        sum_E = sum_E - scores.bias_E * counted_EX.sum(1)
    return sum_E.clamp(min=0)
