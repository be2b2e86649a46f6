"""How evenly a step's tokens lay on the experts and their ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

# Mean tokens per expert / tile from which rounding is harmless (SonicMoE, arXiv 2512.14080).
HARMLESS_TOKENS_OVER_TILE = 2.0


@dataclass(frozen=True)
class ExpertLoad:
    """Over the MoE layers of a step. Shares are fractions of 1.

    ``load_max_over_mean``: busiest expert under top-k, worst layer. ``tiles_max_over_mean``:
    busiest rank in tiles that ran, worst layer. ``tile_waste``: padding rows over all rows that
    ran; ``tile_waste_unrounded``: the same if top-k ran without rounding.
    ``tokens_per_expert_over_tile``: mean. ``dead_experts``: those that no token chose, counted
    once per layer and micro-batch.
    """

    load_max_over_mean: float
    tiles_max_over_mean: float
    tile_waste: float
    tile_waste_unrounded: float
    tokens_per_expert_over_tile: float
    dead_experts: int

    @property
    def rounding_costs_quality(self) -> bool:
        """Whether so few tokens reach an expert that rounding moves a harmful share of them."""
        return self.tokens_per_expert_over_tile < HARMLESS_TOKENS_OVER_TILE


def expert_load(freq_XE: IntArray, target_XE: IntArray, *, tile: int, num_ranks: int) -> ExpertLoad:
    """From top-k and rounded counts of one ep group, [layers and micro-batches, E]."""
    tiles_XP = _tiles(target_XE, tile).reshape(len(target_XE), num_ranks, -1).sum(2)
    return ExpertLoad(
        load_max_over_mean=_worst(freq_XE),
        tiles_max_over_mean=_worst(tiles_XP),
        tile_waste=_waste(target_XE, tile),
        tile_waste_unrounded=_waste(freq_XE, tile),
        tokens_per_expert_over_tile=float(freq_XE.mean()) / tile,
        dead_experts=int((freq_XE == 0).sum()),
    )


def _tiles(counts: IntArray, tile: int) -> IntArray:
    return -(-counts // tile)


def _worst(counts: IntArray) -> float:
    mean = np.maximum(counts.mean(1), 1e-9)
    return float((counts.max(1) / mean).max())


def _waste(counts: IntArray, tile: int) -> float:
    ran = int(_tiles(counts, tile).sum()) * tile
    return (ran - int(counts.sum())) / max(ran, 1)
