"""From timed tile configurations to a file that training reads: which one is chosen, and how the
file is written. `distmoe.kernels.moe_mlp.tile_file` reads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w
import torch

from distmoe.bench.kernels.pieces import Trial
from distmoe.bench.kernels.session import Result
from distmoe.bench.kernels.shapes import Shape
from distmoe.kernels.moe_mlp.tile_file import DTYPES, TileFile, read_tiles
from distmoe.kernels.moe_mlp.tile_table import Origin, TunedLayer, TunedTile, bucket_of
from distmoe.kernels.moe_mlp.tiles import ExpertShape

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Of a TMA load and of an asynchronous copy; other widths have one configuration.
ALIGNED_BYTES = 16
OLDEST = (9, 0)


def why_untunable(shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``shapes`` have no candidates in ``dtype`` on ``device``, if so; see `tiles.py`."""
    if dtype not in DTYPE_NAMES:
        return f"{dtype} has one configuration; tuned are {', '.join(DTYPES)}"
    if device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) < OLDEST
    ):
        return "the candidates are for NVIDIA GPUs of compute capability 9.0 and newer"
    for shape in shapes:
        if shape.H * dtype.itemsize % ALIGNED_BYTES or shape.I * dtype.itemsize % ALIGNED_BYTES:
            return f"{shape}: rows that are no multiple of 16 bytes have one configuration"
    return None


def choose(trials: list[Trial]) -> dict[str, TunedTile]:
    """The configuration of every kernel: the fastest of those that are right and faster than the
    default by more than the larger interquartile range of both, else the default.

    ``trials``: of one backend, the default of a kernel first. A kernel whose default is wrong has
    none: that is to be mended, not to be avoided.
    """
    chosen = {}
    for kernel in dict.fromkeys(trial.kernel for trial in trials):
        default, *others = [trial for trial in trials if trial.kernel == kernel]
        if default.samples is None:
            continue
        faster = [trial for trial in others if default.ms - trial.ms > _spread(trial, default)]
        best = min(faster, key=lambda trial: trial.ms, default=default)
        chosen[kernel] = TunedTile(best.config, best.ms, default.ms, _spread(best, default))
    return chosen


def _spread(*trials: Trial) -> float:
    """The largest interquartile range; 0 without samples, which are slower than any."""
    quartiles = [trial.samples.quartiles for trial in trials if trial.samples is not None]
    return max((third - first for first, third in quartiles), default=0.0)


def tuned_layers(result: Result, dtype: torch.dtype, origin: Origin) -> list[TunedLayer]:
    """What was chosen for the shape of ``result``, by backend; its experts have a gate."""
    shape = result.shape
    experts = ExpertShape(shape.H, shape.I, shape.E, gated=True, dtype=dtype)
    found = []
    for backend, trials in result.trials.items():
        if tiles := choose(trials):
            found.append(TunedLayer(backend, experts, result.size.pairs, tiles, origin))
    return found


def write_tiles(path: Path, device: str, layers: Iterable[TunedLayer]) -> TileFile:
    """Put ``layers`` into the file of ``device``, in the place of those with the same key.
    ValueError if the file that is there is wrong or of another device."""
    merged = {layer.key: layer for layer in [*tiles_of_device(path, device).layers, *layers]}
    written = TileFile(device, tuple(sorted(merged.values(), key=_order)))
    content = {"device": device, "layer": [_as_table(layer) for layer in written.layers]}
    path.write_text(tomli_w.dumps(content), encoding="utf-8")
    return written


def tiles_of_device(path: Path, device: str) -> TileFile:
    """The file at ``path``, which is to be updated; empty if there is none. ValueError as in
    `write_tiles`."""
    if not path.exists():
        return TileFile(device, ())
    found = read_tiles(path)
    if found.device != device:
        raise ValueError(f"'{path}' is of '{found.device}'; it must be of this device, '{device}'")
    return found


def _order(layer: TunedLayer) -> tuple[object, ...]:
    *sizes, dtype = layer.shape
    return layer.backend, *sizes, str(dtype), bucket_of(layer.pairs)


def _as_table(layer: TunedLayer) -> dict[str, Any]:
    shape = layer.shape._asdict() | {"dtype": DTYPE_NAMES[layer.shape.dtype]}
    sizes = {"pairs": layer.pairs, "bucket": bucket_of(layer.pairs)}
    kernels = {kernel: _tile_table(tile) for kernel, tile in layer.tiles.items()}
    return {"backend": layer.backend, **shape, **sizes, **asdict(layer.origin), **kernels}


def _tile_table(tile: TunedTile) -> dict[str, Any]:
    figures = {"ms": tile.ms, "default_ms": tile.default_ms, "spread_ms": tile.spread_ms}
    return asdict(tile.config) | {name: round(ms, 4) for name, ms in figures.items()}
