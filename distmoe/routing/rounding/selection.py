"""From targets to this rank's pairs. How many pairs a rank changes is what selections differ in."""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.comm import Exchange
from distmoe.kernels.round_select import load_round_select
from distmoe.registry import SELECTIONS
from distmoe.routing.rounding import Amounts, Change, Population, Selection
from distmoe.routing.routers import Scores


@torch.no_grad()
def select(
    name: str,
    scores: Scores,
    population: Population,
    target_E: Tensor,
    *,
    tile: int,
    exchange: Exchange,
    transport: str,
) -> tuple[Tensor, Amounts]:
    """This rank's pairs [T, E] bool, whose counts over the group are ``target_E``: its best
    eligible pairs of each expert turned over, as many as the selection ``name`` says; and how many
    every rank turned over. Collective.
    """
    selection: Selection = SELECTIONS.load(name)
    round_select = load_round_select(scores.key_TE)
    delta_E = target_E - population.freq_E
    adds_E = delta_E > 0
    priority_ET = round_select.priorities(scores.key_TE, scores.chosen_TE, adds_E)
    change = Change(
        population=population,
        adds_E=adds_E,
        amount_E=delta_E.abs(),
        best=lambda: round_select.best(priority_ET, tile - 1),
    )
    amounts = selection.amounts(change, exchange=exchange, transport=transport)
    selected_TE = round_select.take(
        scores.chosen_TE, priority_ET, amounts.own_E, adds_E, most=tile - 1
    )
    return selected_TE, amounts
