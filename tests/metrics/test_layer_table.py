"""The table of the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from distmoe.metrics.layer_table import layer_table
from distmoe.metrics.record import StepRecord

Make = Callable[..., StepRecord]


def test_a_line_per_layer(record: Make) -> None:
    assert layer_table(record(7)) == [
        "experts of each layer at step 7",
        "layer    tiles     load          waste             dropped               added  no expert"
        "  tokens/tile   dead",
        "    1    1.50x    2.29x   0.0% (30.0%)            1 (7.1%)           3 (21.4%)          1"
        "         0.88      0",
        "    2    1.50x    2.86x   0.0% (30.0%)           2 (14.3%)           4 (28.6%)          1"
        "         0.88      1",
    ]


def test_many_layers_show_the_worst_by_tiles(record: Make) -> None:
    load = record(7).load
    ratios = {1: 1.5, 2: 1.1, 3: 4.0, 4: 1.6, 5: 1.0}
    layers = {n: replace(load, tiles_max_over_mean=ratio) for n, ratio in ratios.items()}
    title, _, *lines = layer_table(record(7, layers=layers), most=3)
    assert title == "experts of each layer at step 7: the 3 worst of 5 by tiles"
    assert [int(line.split()[0]) for line in lines] == [3, 4, 1]
    for most in (None, 5, 8):
        title, _, *lines = layer_table(record(7, layers=layers), most=most)
        assert "worst" not in title
        assert [int(line.split()[0]) for line in lines] == [1, 2, 3, 4, 5]


def test_large_numbers_stay_in_120_characters(record: Make) -> None:
    load = replace(
        record(7).load,
        pairs_dropped=99_999_999,
        pairs_added=99_999_999,
        score_dropped_share=0.123,
        score_added_share=0.999,
        tokens_without_expert=9_999_999,
        tiles_max_over_mean=256.0,
        load_max_over_mean=256.0,
        tokens_per_expert_over_tile=12345.67,
    )
    _, heading, line, _ = layer_table(record(7, layers={1: load, 99: load}))
    assert len(heading) == len(line) <= 120
