"""How evenly a step's tokens lay on the experts and their ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class ExpertLoad:
    """Over the MoE layers of a step. Shares are fractions of 1.

    ``load_max_over_mean``: busiest expert under top-k, worst layer. ``tiles_max_over_mean``:
    busiest rank in tiles that ran, worst layer. ``tile_waste``: rows that ran as padding;
    ``tile_waste_unrounded``: what top-k alone would have padded. ``tokens_per_expert_over_tile``:
    mean; rounding costs quality below 2.
    """

    load_max_over_mean: float
    tiles_max_over_mean: float
    tile_waste: float
    tile_waste_unrounded: float
    tokens_per_expert_over_tile: float
    dead_experts: int


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


def heat_map(freq_LE: IntArray, *, cell: int = 12) -> NDArray[np.uint8]:
    """Image [L * cell, E * cell, 3]: white is no load, dark blue twice the mean of the layer."""
    share = freq_LE / np.maximum(freq_LE.mean(1, keepdims=True), 1e-9)
    shade = np.clip(share / 2, 0, 1)[..., None]
    white, blue = np.array([255, 255, 255]), np.array([8, 48, 107])
    image = (white + shade * (blue - white)).astype(np.uint8)
    enlarged: NDArray[np.uint8] = image.repeat(cell, 0).repeat(cell, 1)
    return enlarged
