"""The load of every expert as a picture: a row per layer, a column per expert."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distmoe.metrics.expert_load import IntArray

DEAD = np.array([0, 0, 0])
UNDER = np.array([33, 102, 172])
EVEN = np.array([247, 247, 247])
OVER = np.array([178, 24, 43])
GRID = np.array([160, 160, 160])

# Loads from a quarter of the layer's mean to four times it have shades of their own.
OCTAVES = 2.0

MAX_WIDTH = 1024


def heat_map(freq_LE: IntArray, *, cell: int = 0) -> NDArray[np.uint8]:
    """Image [L * cell, E * cell, 3] of pairs per expert over the mean of the layer.

    Near white is the mean, red above, blue below, black an expert without tokens. ``cell``: pixels
    of a square; 0: as many as a width of about a thousand allows, 4 to 32.
    """
    cell = cell or int(np.clip(MAX_WIDTH // max(freq_LE.shape[1], 1), 4, 32))
    share_LE = freq_LE / np.maximum(freq_LE.mean(1, keepdims=True), 1e-9)
    shade_LE = np.clip(np.log2(np.maximum(share_LE, 1e-9)) / OCTAVES, -1, 1)
    end_LEC = np.where(shade_LE[..., None] > 0, OVER, UNDER)
    color_LEC = EVEN + np.abs(shade_LE)[..., None] * (end_LEC - EVEN)
    color_LEC = np.where(freq_LE[..., None] == 0, DEAD, color_LEC)
    image = np.rint(color_LEC).astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    # Neighbours of one shade are told apart by a line, where there is room for one.
    if cell >= 8:
        image[cell - 1 :: cell] = GRID
        image[:, cell - 1 :: cell] = GRID
    return image
