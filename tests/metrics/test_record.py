"""The flat record is the file format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from distmoe.metrics.record import GROUPS, StepRecord

Make = Callable[..., StepRecord]

# What lines of runs have, in their order: readers of other projects depend on it.
LOAD_NAMES = [
    "pairs",
    "pairs_dropped",
    "pairs_added",
    "tokens_without_expert",
    "score_dropped_share",
    "score_added_share",
    "load_max_over_mean",
    "tiles_max_over_mean",
    "tile_waste",
    "tile_waste_unrounded",
    "tokens_per_expert_over_tile",
    "dead_experts",
    "pairs_moved_share",
    "score_moved_share",
]
NAMES = [
    "step",
    "loss",
    "load_balance_loss",
    "z_loss",
    "lr",
    "grad_norm",
    "skipped",
    "tokens",
    "ranks",
    "warm_up",
    "step_seconds",
    "data_seconds",
    "forward_backward_seconds",
    "optimizer_seconds",
    "checkpoint_seconds",
    "validation_seconds",
    "tokens_per_second_per_rank",
    "tflops_per_rank",
    "palm_tflops_per_rank",
    "mfu",
    "palm_mfu",
    "energy_joules",
    "watts_per_rank",
    "tokens_per_joule",
    "slowest_over_mean",
    "slowest_rank",
    "memory_gib",
    "rows_mib",
    "rows_mib_with_copies",
    "exposed_seconds",
    "exposed_share",
    "node_mib",
    "remote_mib",
    "routing",
    "not_finite",
    "samples_left_out",
    *LOAD_NAMES,
]


def test_names_are_stable(record: Make) -> None:
    assert list(record(1).flat()) == NAMES
    assert {name for names in GROUPS.values() for name in names} <= set(NAMES)
    assert set(GROUPS["experts"]) == set(LOAD_NAMES) - {"pairs"}


def test_every_name_is_explained() -> None:
    text = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    assert [name for name in sorted(NAMES) if f"`{name}`" not in text] == []


def test_every_line_says_whether_the_routing_was_real(record: Make) -> None:
    assert record(1).flat()["routing"] == "real"
    assert record(1, routing="forced").flat()["routing"] == "forced"


def test_the_layers_by_block_have_lines_of_their_own(record: Make) -> None:
    line = record(1).line()
    loads = record(1).load_line(np.array([[3, 8], [0, 10]]))
    assert list(line) == [*NAMES, "corpora"]
    assert list(loads) == ["step", "pairs", "layers"]
    assert loads["pairs"] == {1: [3, 8], 2: [0, 10]}
    assert [layer["layer"] for layer in loads["layers"]] == [1, 2]
    assert all(list(layer) == ["layer", *LOAD_NAMES] for layer in loads["layers"])
    assert [layer["pairs_dropped"] for layer in loads["layers"]] == [1, 2]
    assert line["pairs_dropped"] == 3
