"""Tables of tile configurations, small enough for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from distmoe.bench.kernels.tuning import write_tiles
from distmoe.kernels.moe_mlp.tile_table import Origin, TunedLayer, TunedTile
from distmoe.kernels.moe_mlp.tiles import ExpertShape, TileConfig

SMALL = TileConfig(16, 16, 16, num_warps=4, num_stages=2)
SHAPE = ExpertShape(H=32, I=16, e=2, gated=True, dtype=torch.float16)
ORIGIN = Origin("2030-12-31", "580.1", "2.11.0", "3.6.0", "python tools/bench_moe.py --tune")


def layer_of(
    tiles: Mapping[str, TileConfig], *, pairs: int, shape: ExpertShape = SHAPE
) -> TunedLayer:
    """``tiles`` by kernel, as if they had been measured."""
    tuned = {kernel: TunedTile(config, 1.0, 1.25, 0.125) for kernel, config in tiles.items()}
    return TunedLayer("triton", shape, pairs, tuned, ORIGIN)


def table_file(path: Path, *, device: str = "cpu", m: int = 16) -> Path:
    """A file of one entry."""
    write_tiles(path, device, [layer_of({"up": replace(SMALL, m=m)}, pairs=64)])
    return path
