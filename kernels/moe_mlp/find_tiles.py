"""Which table of tile configurations a run uses: the one that ships for its device, or a user's."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from math import inf
from pathlib import Path

import torch

from distmoe.kernels.moe_mlp.tile_file import TileFile, TileFileError, read_tiles
from distmoe.kernels.moe_mlp.tile_table import DEFAULTS, TileTable
from distmoe.kernels.moe_mlp.tiles import TileSpace
from distmoe.registry import MOE_MLP_TILES

SHIPPED = Path(__file__).parent / "tuned"
"""A file for each device that was measured."""


@cache
def find_tiles(setting: str, backend: str, device: torch.device) -> TileTable:
    """The table that ``backend`` uses on ``device``, read once: `auto` is the shipped one if there
    is one, `default` none, and all else the file of that name. TileFileError if that is wrong, of
    another device, or has configurations that cannot run on this one."""
    if setting == "default" or backend not in MOE_MLP_TILES:
        return DEFAULTS
    name = device_name(device)
    path = shipped_file(name) if setting == "auto" else Path(setting)
    if setting == "auto" and not path.exists():
        return DEFAULTS
    found = read_tiles(path)
    if found.device != name:
        raise TileFileError(
            f"device is '{found.device}' in '{path}'; it must be this device, '{name}'"
        )
    check_shared_memory(found, path, most=shared_memory(device))
    return found.table(backend)


def device_name(device: torch.device) -> str:
    """As the driver calls it; "cpu" is Triton's interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def shipped_file(device: str) -> Path:
    """Where the table of a device is, if it has one."""
    return SHIPPED / f"{re.sub(r'[^A-Za-z0-9.]+', '-', device)}.toml"


def triton_version() -> str:
    """Of this environment; "" without Triton."""
    if find_spec("triton") is None:
        return ""
    import triton

    found: str = triton.__version__
    return found


def shared_memory(device: torch.device) -> float:
    """Bytes that one program may use; no limit in the interpreter."""
    if device.type != "cuda":
        return inf
    properties = torch.cuda.get_device_properties(device)
    # ROCm has no larger limit to ask for.
    plain = properties.shared_memory_per_block
    return float(getattr(properties, "shared_memory_per_block_optin", plain))


def check_shared_memory(found: TileFile, path: Path, *, most: float) -> None:
    """TileFileError for the first entry that needs more than ``most`` bytes."""
    for layer in found.layers:
        space: TileSpace = MOE_MLP_TILES.load(layer.backend)
        for kernel, tile in layer.tiles.items():
            needed = space.shared_bytes(kernel, tile.config, layer.shape)
            if needed > most:
                raise TileFileError(
                    f"{layer}, {kernel} in '{path}': {tile.config} needs {needed} bytes of shared "
                    f"memory; it must be at most {most:.0f}"
                )
