"""Tile-carry: cutting the work into blocks adds no tile. See docs/design.md, "Tile-carry"."""

from __future__ import annotations

import numpy as np

from distmoe.moe.int_array import IntArray


def carry_tiles(counts_be: IntArray, tile: int) -> tuple[IntArray, list[list[int]]]:
    """Which pairs run after each block, [blocks, 2, e] first pair and pair after the last one of
    each expert, and which blocks are finished then.

    ``counts_be[b, i]``: pairs of local expert i in block b. An expert's pairs lie in order of
    arrival. After block b it has run its whole tiles, and its ragged rest only if no pair is
    missing, so cutting the work into blocks adds no tile. A block is finished when the tile of
    the last pair of each of its experts has run; blocks finish in order.
    """
    arrived_be = counts_be.cumsum(0)
    total_e = arrived_be[-1]
    done_be = np.where(arrived_be == total_e, total_e, arrived_be // tile * tile)
    offset_e = np.concatenate([[0], total_e.cumsum()[:-1]])
    before_be = np.concatenate([np.zeros_like(done_be[:1]), done_be[:-1]])
    ready: list[list[int]] = []
    finished = 0
    for arrived, done_e in enumerate(done_be, start=1):
        now: list[int] = []
        while finished < arrived:
            needed_e = np.where(counts_be[finished] > 0, arrived_be[finished], 0)
            if (done_e < needed_e).any():
                break
            now.append(finished)
            finished += 1
        ready.append(now)
    return np.stack([before_be, done_be], axis=1) + offset_e, ready
