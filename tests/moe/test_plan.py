"""The dispatch plan without a network: carried tiles, by hand and by property."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.kernels.moe_mlp import Run
from distmoe.moe.carry import carry_tiles as carry_bounds


def carry_tiles(counts_be: np.ndarray, tile: int) -> tuple[list[list[Run]], list[list[int]]]:
    """With the ranges of each block as runs, without the empty ones."""
    bounds_b2e, ready = carry_bounds(counts_be, tile)
    runs = [
        [Run(i, begin, end) for i, (begin, end) in enumerate(bounds_2e.T.tolist()) if end > begin]
        for bounds_2e in bounds_b2e
    ]
    return runs, ready


def test_tiles_are_carried_to_the_block_that_completes_them() -> None:
    """Tile 4. Expert 0 gets 3, 3, 2 pairs in three blocks, expert 1 gets 0, 4, 1.

    Block 0 completes nothing. Block 1 completes expert 0's first tile (4 of its 6 pairs) and
    expert 1's only whole tile, so block 0 can go home; block 1 has to wait for its last two pairs.
    Block 2 brings the rest: expert 0 is whole, expert 1 runs its ragged pair.
    """
    runs, ready = carry_tiles(np.array([[3, 0], [3, 4], [2, 1]]), 4)
    assert runs == [[], [Run(0, 0, 4), Run(1, 8, 12)], [Run(0, 4, 8), Run(1, 12, 13)]]
    assert ready == [[], [0], [1, 2]]


def test_an_expert_whose_pairs_are_all_here_runs_its_ragged_rest() -> None:
    runs, ready = carry_tiles(np.array([[5, 1], [0, 3]]), 4)
    assert runs == [[Run(0, 0, 5)], [Run(1, 5, 9)]]
    assert ready == [[], [0, 1]]


counts = st.integers(1, 5).flatmap(
    lambda experts: st.lists(
        st.lists(st.integers(0, 20), min_size=experts, max_size=experts), min_size=1, max_size=6
    )
)


@given(counts=counts, tile=st.integers(1, 9))
@settings(deadline=None, derandomize=True)
def test_every_pair_runs_once_and_no_tile_is_added(counts: list[list[int]], tile: int) -> None:
    counts_be = np.array(counts)
    runs, ready = carry_tiles(counts_be, tile)
    ran = sorted(
        (pair, run.expert) for block in runs for run in block for pair in range(run.begin, run.end)
    )
    total_e = counts_be.sum(0)
    assert ran == list(enumerate(np.repeat(np.arange(len(total_e)), total_e).tolist()))
    tiles = sum(-(-(run.end - run.begin) // tile) for block in runs for run in block)
    assert tiles == int((-(-total_e // tile)).sum())
    # Blocks finish in order, each once, and never before their own rows are here.
    assert [b for now in ready for b in now] == list(range(len(counts_be)))
    assert all(b <= step for step, now in enumerate(ready) for b in now)


@given(counts=counts, tile=st.integers(1, 9))
@settings(deadline=None, derandomize=True)
def test_a_finished_block_has_run_completely(counts: list[list[int]], tile: int) -> None:
    counts_be = np.array(counts)
    runs, ready = carry_tiles(counts_be, tile)
    offset_e = np.concatenate([[0], counts_be.sum(0).cumsum()])
    ran: set[int] = set()
    for now_runs, now_ready in zip(runs, ready, strict=True):
        for run in now_runs:
            ran |= set(range(run.begin, run.end))
        for block in now_ready:
            before_e = counts_be[:block].sum(0)
            for expert, count in enumerate(counts_be[block]):
                begin = offset_e[expert] + before_e[expert]
                assert set(range(begin, begin + count)) <= ran
