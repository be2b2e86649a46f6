"""Loads by hand, and laws of any counts. Ranks and micro-batches are in tests/train."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from load_counts import load_counts

from distmoe.metrics.expert_load import IntArray, load_of_all, load_of_layer


def test_by_hand() -> None:
    """Tile 4, two ranks with two experts each: top-k pads 1 + 0 + 3 + 2 of 20 rows; rounding drops
    a pair and adds three."""
    freq, target = np.array([[3, 8, 1, 2]]), np.array([[4, 8, 0, 4]])
    counts = load_counts(freq, target, tile=4, ranks=2)
    load = load_of_layer(counts, 0)
    assert load.load_max_over_mean == pytest.approx(8 / 3.5)
    assert load.tiles_max_over_mean == pytest.approx(3 / 2)
    assert load.tile_waste == 0
    assert load.tile_waste_unrounded == pytest.approx(6 / 20)
    assert load.tokens_per_expert_over_tile == pytest.approx(3.5 / 4)
    assert load.rounding_costs_quality
    assert load.dead_experts == 0
    assert (load.pairs, load.pairs_dropped, load.pairs_added) == (14, 1, 3)
    assert load.pairs_moved_share == 4 / 14
    assert load == load_of_all(counts)


def test_scores_moved_are_over_those_of_top_k() -> None:
    counts = replace(
        load_counts(np.array([[4, 4]]), np.array([[4, 4]]), tile=4, ranks=1),
        chosen_mass_L=np.array([2**60]),
        dropped_mass_L=np.array([2**57]),
        added_mass_L=np.array([2**58]),
    )
    load = load_of_layer(counts, 0)
    assert (load.score_dropped_share, load.score_added_share) == (1 / 8, 1 / 4)
    assert load.score_moved_share == 3 / 8


def test_all_layers_are_the_worst_the_sum_or_the_whole() -> None:
    freq = np.array([[4, 4, 4, 4], [15, 0, 0, 1]])
    counts = load_counts(freq, np.array([[4, 4, 4, 4], [16, 0, 0, 0]]), tile=2, ranks=2)
    first, second, load = load_of_layer(counts, 0), load_of_layer(counts, 1), load_of_all(counts)
    assert (first.tiles_max_over_mean, second.tiles_max_over_mean) == (1, 2)
    assert load.tiles_max_over_mean == 2
    assert load.load_max_over_mean == 15 / 4
    assert load.dead_experts == 2
    assert load.pairs_dropped == load.pairs_added == 1
    assert load.score_dropped_share == 1 / 32
    assert second.score_dropped_share == 1 / 16
    assert load.tokens_per_expert_over_tile == 2
    assert load.tile_waste_unrounded == 2 / 34
    assert load.tokens_without_expert == 2
    assert not load.rounding_costs_quality


def test_populations_share_the_tokens() -> None:
    """As many pairs in two micro-batches are half as many tokens an expert in each."""
    counts = load_counts(np.array([[8, 8]]), np.array([[8, 8]]), tile=2, ranks=1)
    assert load_of_all(counts).tokens_per_expert_over_tile == 4
    assert load_of_all(replace(counts, populations=2)).tokens_per_expert_over_tile == 2


def test_no_layers_are_even() -> None:
    empty = np.zeros((0, 4), dtype=np.int64)
    load = load_of_all(load_counts(empty, empty, tile=2, ranks=2))
    assert (load.load_max_over_mean, load.tiles_max_over_mean, load.tile_waste) == (1, 1, 0)
    assert not load.rounding_costs_quality


@given(
    arrays(np.int64, array_shapes(min_dims=2, max_dims=2), elements=st.integers(0, 1000)),
    st.integers(1, 128),
)
def test_laws(freq: IntArray, tile: int) -> None:
    rounded = -(-freq // tile) * tile
    load = load_of_all(load_counts(freq, rounded, tile=tile, ranks=1))
    assert load.tile_waste == 0
    assert 0 <= load.tile_waste_unrounded < 1
    assert load.tile_waste_unrounded == (rounded.sum() - freq.sum()) / max(rounded.sum(), 1)
    assert 1 <= load.load_max_over_mean <= freq.shape[1] + 1e-6
    assert load.tiles_max_over_mean == 1
    assert load.pairs_added == rounded.sum() - freq.sum()
