"""How evenly a step's tokens lay on the experts and their ranks, and what rounding moved."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

# Mean tokens per expert / tile from which rounding is harmless (SonicMoE, arXiv 2512.14080).
HARMLESS_TOKENS_OVER_TILE = 2.0


@dataclass(frozen=True)
class LoadCounts:
    """What a step counted, int64, one row per MoE layer, summed over micro-batches and ranks.

    ``freq_LE``: top-k pairs. ``tiles_L``: tiles that ran; ``unrounded_tiles_L``: those that top-k
    would have run. ``busiest_tiles_L``: tiles of the busiest rank of each ep group, for which the
    others wait. Pairs: ``dropped_L``, ``added_L``. ``without_expert_L``: tokens. Scores of the
    pairs of top-k, of the dropped and of the added ones, as sums of floor(score * 2^24):
    ``chosen_mass_L``, ``dropped_mass_L``, ``added_mass_L``.

    ``tile``: M. ``ranks``: P. ``populations``: whose tokens are rounded together, how many there
    are: micro-batches * ep groups, or micro-batches * ranks where each rank rounds alone.
    """

    freq_LE: IntArray
    tiles_L: IntArray
    busiest_tiles_L: IntArray
    unrounded_tiles_L: IntArray
    dropped_L: IntArray
    added_L: IntArray
    without_expert_L: IntArray
    chosen_mass_L: IntArray
    dropped_mass_L: IntArray
    added_mass_L: IntArray
    tile: int
    ranks: int
    populations: int


@dataclass(frozen=True)
class ExpertLoad:
    """Of one MoE layer, or of several: then numbers are sums and ratios those of the worst layer,
    but shares are taken over all. Shares are fractions of 1.

    ``pairs``: those of top-k. ``score_dropped_share``, ``score_added_share``: scores of the pairs
    that rounding dropped and added, over those of top-k. ``load_max_over_mean``: busiest expert
    under top-k. ``tiles_max_over_mean``: tiles of the busiest rank. ``tile_waste``: padding rows
    over all rows that ran; ``tile_waste_unrounded``: the same if top-k ran without rounding.
    ``tokens_per_expert_over_tile``: mean, of what is rounded together. ``dead_experts``: those that
    no token chose.
    """

    pairs: int
    pairs_dropped: int
    pairs_added: int
    tokens_without_expert: int
    score_dropped_share: float
    score_added_share: float
    load_max_over_mean: float
    tiles_max_over_mean: float
    tile_waste: float
    tile_waste_unrounded: float
    tokens_per_expert_over_tile: float
    dead_experts: int

    @property
    def pairs_moved_share(self) -> float:
        """Pairs that rounding dropped or added, over the pairs of top-k."""
        return (self.pairs_dropped + self.pairs_added) / max(self.pairs, 1)

    @property
    def score_moved_share(self) -> float:
        """Scores of the pairs that rounding dropped or added, over those of top-k."""
        return self.score_dropped_share + self.score_added_share

    @property
    def rounding_costs_quality(self) -> bool:
        """Whether so few tokens reach an expert that rounding moves a harmful share of them."""
        return self.tokens_per_expert_over_tile < HARMLESS_TOKENS_OVER_TILE

    def flat(self) -> dict[str, float | int]:
        """Every figure by its name, which is stable."""
        return {name: getattr(self, name) for name in LOAD_NAMES}


LOAD_NAMES = (*(f.name for f in fields(ExpertLoad)), "pairs_moved_share", "score_moved_share")


def load_of_layer(counts: LoadCounts, row: int) -> ExpertLoad:
    """The load of the MoE layer in ``row``."""
    return _load(counts, slice(row, row + 1))


def load_of_all(counts: LoadCounts) -> ExpertLoad:
    """The load of all layers together; even and empty without any."""
    return _load(counts, slice(None))


def _load(counts: LoadCounts, rows: slice) -> ExpertLoad:
    freq_LE = counts.freq_LE[rows]
    pairs, dropped, added = (
        int(n.sum()) for n in (freq_LE, counts.dropped_L[rows], counts.added_L[rows])
    )
    score = max(int(counts.chosen_mass_L[rows].sum()), 1)
    tokens_L = freq_LE.mean(1) / max(counts.populations, 1)
    return ExpertLoad(
        pairs=pairs,
        pairs_dropped=dropped,
        pairs_added=added,
        tokens_without_expert=int(counts.without_expert_L[rows].sum()),
        score_dropped_share=int(counts.dropped_mass_L[rows].sum()) / score,
        score_added_share=int(counts.added_mass_L[rows].sum()) / score,
        load_max_over_mean=_worst(freq_LE.max(1), freq_LE.mean(1)),
        tiles_max_over_mean=_worst(
            counts.busiest_tiles_L[rows], counts.tiles_L[rows] / counts.ranks
        ),
        tile_waste=_waste(int(counts.tiles_L[rows].sum()) * counts.tile, pairs - dropped + added),
        tile_waste_unrounded=_waste(int(counts.unrounded_tiles_L[rows].sum()) * counts.tile, pairs),
        tokens_per_expert_over_tile=float(tokens_L.min(initial=np.inf)) / counts.tile,
        dead_experts=int((freq_LE == 0).sum()),
    )


def _worst(most_L: IntArray, mean_L: NDArray[np.float64]) -> float:
    """The largest ratio; 1, which is even, where nothing ran."""
    return float((most_L / np.maximum(mean_L, 1e-9))[mean_L > 0].max(initial=1.0))


def _waste(rows_that_ran: int, pairs: int) -> float:
    return (rows_that_ran - pairs) / max(rows_that_ran, 1)


def tiles_of(count_XE: IntArray, tile: int) -> IntArray:
    """Tiles that hold each count."""
    return -(-count_XE // tile)
