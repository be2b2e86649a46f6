"""The MoE layers of a step as a table of plain lines."""

from __future__ import annotations

from distmoe.metrics.expert_load import ExpertLoad
from distmoe.metrics.record import StepRecord


def layer_table(record: StepRecord, *, most: int | None = None) -> list[str]:
    """Title, column names, and a line per MoE layer, within 120 characters.

    ``most``: with more layers than that, only those whose busiest rank is furthest above the mean,
    the worst first.
    """
    layers = list(record.layers.items())
    title = f"experts of each layer at step {record.step}"
    if most is not None and len(layers) > most:
        title += f": the {most} worst of {len(layers)} by tiles"
        layers.sort(key=lambda item: -item[1].tiles_max_over_mean)
        layers = layers[:most]
    rows = [_cells(layer, load) for layer, load in layers]
    heading = "  ".join(f"{name:>{width}}" for name, width, _ in rows[0]) if rows else ""
    lines = ["  ".join(f"{value:>{width}}" for _, width, value in row) for row in rows]
    return [title, heading, *lines]


def _cells(layer: int, load: ExpertLoad) -> list[tuple[str, int, str]]:
    """Name, width and text of every column. The names are those of the step line, and: pairs
    dropped and added (with their scores, over those of top-k), tokens without an expert, mean
    tokens of an expert over the tile, experts without tokens."""
    return [
        ("layer", 5, str(layer)),
        ("tiles", 7, f"{load.tiles_max_over_mean:.2f}x"),
        ("load", 7, f"{load.load_max_over_mean:.2f}x"),
        ("waste", 13, f"{load.tile_waste:.1%} ({load.tile_waste_unrounded:.1%})"),
        ("dropped", 18, f"{load.pairs_dropped:,} ({load.score_dropped_share:.1%})"),
        ("added", 18, f"{load.pairs_added:,} ({load.score_added_share:.1%})"),
        ("no expert", 9, f"{load.tokens_without_expert:,}"),
        ("tokens/tile", 11, f"{load.tokens_per_expert_over_tile:.2f}"),
        ("dead", 5, str(load.dead_experts)),
    ]
