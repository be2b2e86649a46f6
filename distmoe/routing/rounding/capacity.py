"""A capacity: the most pairs that an expert, or all experts of a rank, may receive.

A run of experts, one expert or those of a rank (of a balance group), may have B tiles: those that
hold factor times the mean pairs of a run, B = ceil(factor * sum_e f_e / (runs * M)), so that a
factor of at least 1 holds the mean, however few tiles that is. Without rounding M is 1. Where the
tiles t_e = ceil(f_e / M) of a run are more, its experts keep c_e = min(t_e, L) or one more: the
level L is what B tiles fill, and the rest of them go to the fullest, ties to the lower expert. An
expert drops its lowest keys beyond M * c_e, and among equals the highest tokens.

Rounding comes after it and sees min(f_e, M * c_e), which no rule rounds up beyond M * c_e.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from distmoe.comm import Exchange
from distmoe.config import RoundingConfig
from distmoe.registry import SELECTIONS
from distmoe.routing.rounding import Population, Selection
from distmoe.routing.rounding.radix_select import KeyedPairs
from distmoe.routing.routers import Scores

# Of a factor, so that products of it and of counts are 64 bits.
LARGEST_DENOMINATOR = 10_000


def capacity(freq_E: Tensor, rounding: RoundingConfig, *, groups: int) -> Tensor:
    """[E] int64: the most pairs of each expert, of the counts ``freq_E`` of its group. ``groups``:
    equal runs of experts, where those of a rank share a capacity; ValueError if they do not divide
    the experts."""
    num_experts = len(freq_E)
    runs = num_experts if rounding.capacity_of == "expert" else groups
    if num_experts % runs:
        raise ValueError(f"balance_groups is {groups}; it must divide the {num_experts} experts")
    tile = 1 if rounding.rule == "none" else rounding.tile
    # No run has more than E times the mean.
    factor = Fraction(min(rounding.capacity_factor, num_experts))
    share = factor.limit_denominator(LARGEST_DENOMINATOR) / (runs * tile)
    budget = -(-share.numerator * freq_E.sum() // share.denominator)
    return _within(freq_E.view(runs, -1), tile, budget).view(-1)


def _within(freq_rx: Tensor, tile: int, budget: Tensor) -> Tensor:
    """The most pairs of each expert in runs of ``budget`` tiles."""
    fullest_rx = (-freq_rx).argsort(dim=1, stable=True)
    tiles_rx = (-(-freq_rx // tile)).gather(1, fullest_rx)
    emptier_rx = tiles_rx.sum(1, keepdim=True) - tiles_rx.cumsum(1)
    place_x = torch.arange(freq_rx.shape[1], device=freq_rx.device)
    # More than the budget even if all fuller ones were cut to as many.
    over_rx = tiles_rx * (place_x + 1) + emptier_rx > budget
    left_r1 = budget - torch.where(over_rx, 0, tiles_rx).sum(1, keepdim=True)
    num_over_r1 = over_rx.sum(1, keepdim=True).clamp(min=1)
    level_rx = left_r1 // num_over_r1 + (place_x < left_r1 % num_over_r1)
    kept_rx = torch.where(over_rx, level_rx, tiles_rx)
    return torch.zeros_like(kept_rx).scatter_(1, fullest_rx, kept_rx * tile)


def cap(
    scores: Scores, population: Population, *, exchange: Exchange, rounding: RoundingConfig
) -> tuple[Scores, Population]:
    """The same without the pairs beyond the capacity; collective."""
    selection: Selection = SELECTIONS.load(rounding.selection)
    pairs = KeyedPairs.of(scores)
    groups = rounding.balance_groups or exchange.size
    most_E = capacity(population.freq_E, rounding, groups=groups)
    over_E = (population.freq_E - most_E).clamp(min=0)
    drops = selection.overflow(pairs, population, over_E, exchange=exchange)
    dropped_N = pairs.below(drops.limit_E) | pairs.last(pairs.at(drops.limit_E), drops.ties_E)
    return (
        replace(scores, chosen_TE=pairs.mask(~dropped_N)),
        replace(population, counts_PE=population.counts_PE - drops.amount_PE),
    )
