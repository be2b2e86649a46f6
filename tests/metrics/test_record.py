"""The flat record is the file format."""

from __future__ import annotations

from collections.abc import Callable

from distmoe.metrics.record import GROUPS, StepRecord

Make = Callable[..., StepRecord]

NAMES = {
    "step",
    "loss",
    "load_balance_loss",
    "z_loss",
    "lr",
    "grad_norm",
    "skipped",
    "tokens",
    "step_seconds",
    "data_seconds",
    "tokens_per_second_per_rank",
    "slowest_over_mean",
    "memory_gib",
    "pairs",
    "pairs_dropped",
    "pairs_added",
    "pairs_moved_share",
    "tokens_without_expert",
    "rows_mib",
    "rows_mib_with_copies",
    "exposed_seconds",
    "exposed_share",
    "node_mib",
    "remote_mib",
    "load_max_over_mean",
    "tiles_max_over_mean",
    "tile_waste",
    "tile_waste_unrounded",
    "tokens_per_expert_over_tile",
    "dead_experts",
}


def test_names_are_stable(record: Make) -> None:
    assert set(record(1).flat()) == NAMES
    assert {name for names in GROUPS.values() for name in names} <= NAMES


def test_moved_pairs(record: Make) -> None:
    assert record(1, pairs=28, pairs_dropped=2, pairs_added=5).flat()["pairs_moved_share"] == 0.25
    assert record(1, pairs=0, pairs_dropped=0, pairs_added=0).pairs_moved_share == 0
