"""Loads by hand, and laws of any counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from distmoe.metrics.expert_load import IntArray, expert_load


def test_by_hand() -> None:
    """Tile 4, two ranks with two experts each: top-k pads 1 + 0 + 3 + 2 of 20 rows."""
    freq, target = np.array([[3, 8, 1, 2]]), np.array([[4, 8, 0, 4]])
    load = expert_load(freq, target, tile=4, num_ranks=2)
    assert load.load_max_over_mean == pytest.approx(8 / 3.5)
    assert load.tiles_max_over_mean == pytest.approx(3 / 2)
    assert load.tile_waste == 0
    assert load.tile_waste_unrounded == pytest.approx(6 / 20)
    assert load.tokens_per_expert_over_tile == pytest.approx(3.5 / 4)
    assert load.rounding_costs_quality
    assert load.dead_experts == 0


def test_worst_layer_counts_and_dead_experts_add_up() -> None:
    freq = np.array([[4, 4, 4, 4], [16, 0, 0, 0]])
    load = expert_load(freq, freq, tile=2, num_ranks=2)
    assert load.load_max_over_mean == 4
    assert load.tiles_max_over_mean == 2
    assert load.dead_experts == 3
    assert load.tokens_per_expert_over_tile == 2
    assert not load.rounding_costs_quality


@given(
    arrays(np.int64, array_shapes(min_dims=2, max_dims=2), elements=st.integers(0, 1000)),
    st.integers(1, 128),
)
def test_laws(freq: IntArray, tile: int) -> None:
    rounded = -(-freq // tile) * tile
    load = expert_load(freq, rounded, tile=tile, num_ranks=1)
    assert load.tile_waste == 0
    assert 0 <= load.tile_waste_unrounded < 1
    assert load.tile_waste_unrounded == (rounded.sum() - freq.sum()) / max(rounded.sum(), 1)
    assert load.load_max_over_mean <= freq.shape[1] + 1e-6
    assert load.tiles_max_over_mean in (0, 1)
