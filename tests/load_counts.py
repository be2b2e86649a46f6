"""Counts of a step, made from counts per expert."""

from __future__ import annotations

import numpy as np

from distmoe.metrics.expert_load import IntArray, LoadCounts, tiles_of

# Of two layers with four experts; the first has one without tokens.
FREQ_LE: IntArray = np.array([[3, 8, 1, 2], [0, 10, 2, 2]])


def load_counts(freq_LE: IntArray, target_LE: IntArray, *, tile: int, ranks: int) -> LoadCounts:
    """Of one micro-batch on ``ranks`` ranks. Pairs move as little as the counts allow, tokens
    without an expert are 1, and scores are 2^24 for each pair."""
    moved_LE = target_LE - freq_LE
    tiles_LP = (
        tiles_of(target_LE, tile).reshape(len(freq_LE), ranks, freq_LE.shape[1] // ranks).sum(2)
    )
    dropped_L, added_L = -moved_LE.clip(max=0).sum(1), moved_LE.clip(min=0).sum(1)
    return LoadCounts(
        freq_LE=freq_LE,
        tiles_L=tiles_LP.sum(1),
        busiest_tiles_L=tiles_LP.max(1),
        unrounded_tiles_L=tiles_of(freq_LE, tile).sum(1),
        dropped_L=dropped_L,
        added_L=added_L,
        without_expert_L=np.ones(len(freq_LE), dtype=np.int64),
        chosen_mass_L=freq_LE.sum(1) << 24,
        dropped_mass_L=dropped_L << 24,
        added_mass_L=added_L << 24,
        tile=tile,
        ranks=ranks,
        populations=1,
    )
