"""A capacity: the most pairs that an expert, and so its rank, may receive.

With the mean m = sum_e f_e / E over the population, c = M * ceil(factor * m / M): the tiles that
hold factor * m pairs, so that a factor of at least 1 holds the mean, however few tiles that is. An
expert with f_e > c drops its lowest keys, and among equals the highest tokens. Rounding comes after
it and sees min(f_e, c): it fills no expert beyond c, a multiple of M. Without rounding M is 1.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from torch import Tensor

from distmoe.comm import Exchange
from distmoe.config import RoundingConfig
from distmoe.registry import SELECTIONS
from distmoe.routing.rounding import Population, Selection
from distmoe.routing.rounding.radix_select import KeyedPairs
from distmoe.routing.routers import Scores

# Of a factor, so that products of it and of counts are 64 bits.
LARGEST_DENOMINATOR = 10_000


def capacity(freq_E: Tensor, rounding: RoundingConfig) -> Tensor:
    """c, int64, of an expert whose group has the counts ``freq_E``."""
    tile = 1 if rounding.rule == "none" else rounding.tile
    # No expert has more than E times the mean.
    factor = min(rounding.capacity_factor, len(freq_E))
    share = Fraction(factor).limit_denominator(LARGEST_DENOMINATOR) / (len(freq_E) * tile)
    return -(-share.numerator * freq_E.sum() // share.denominator) * tile


def cap(
    scores: Scores, population: Population, *, exchange: Exchange, rounding: RoundingConfig
) -> tuple[Scores, Population]:
    """The same without the pairs beyond the capacity; collective."""
    selection: Selection = SELECTIONS.load(rounding.selection)
    pairs = KeyedPairs.of(scores)
    over_E = (population.freq_E - capacity(population.freq_E, rounding)).clamp(min=0)
    drops = selection.overflow(pairs, population, over_E, exchange=exchange)
    dropped_N = pairs.below(drops.limit_E) | pairs.last(pairs.at(drops.limit_E), drops.ties_E)
    return (
        replace(scores, chosen_TE=pairs.mask(~dropped_N)),
        replace(population, counts_PE=population.counts_PE - drops.amount_PE),
    )
