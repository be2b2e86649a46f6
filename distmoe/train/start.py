"""What all ranks of a training run must have alike when they start."""

from __future__ import annotations

import torch

from distmoe.config import Config, ConfigError, MoEConfig, corpora
from distmoe.config.keys import key_types, value_of
from distmoe.engines import compute_dtype
from distmoe.kernels.backends import kernels_are_interpreted
from distmoe.kernels.moe_mlp import backend_for
from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.kernels.moe_mlp.find_tiles import find_tiles
from distmoe.kernels.moe_mlp.tile_file import TileFileError
from distmoe.kernels.moe_mlp.tile_table import TileTable
from distmoe.kernels.moe_mlp.tiles import ExpertShape
from distmoe.train.changed_data import manifest_mark

# Machines may differ in these. Ranks of a node are compared where they are used.
OF_A_MACHINE = {
    "run.device",
    "launch.nproc",
    "launch.threads",
    "data.path",
    "data.mix",
    "moe.kernel_tiles",
    "parallel.profile",
    "parallel.ranks_per_node",
}
# Backends that are no wrapper of a package, which would say itself what it needs.
OF_GPUS = ("triton", "gluon")


def common_facts(config: Config, device: torch.device) -> dict[str, str]:
    """Every setting but those of a machine, which tiles the kernels take on ``device``, and which
    data there are; for `meet`. ConfigError for tiles that the device cannot use."""
    facts = {key: repr(value_of(config, key)) for key in key_types() if key not in OF_A_MACHINE}
    facts["the table of moe.kernel_tiles"] = _tiles_in_words(run_tiles(config.moe, device))
    if not config.data.mix:
        facts["the manifest of data.path"] = manifest_mark(config.data.path)
        return facts
    for number, corpus in enumerate(corpora(config.data)):
        facts[f"entry {number} of data.mix"] = (
            f"manifest {manifest_mark(corpus.path)}, weight {corpus.weight}"
        )
    return facts


def run_tiles(moe: MoEConfig, device: torch.device) -> TileTable:
    """The table of tile configurations that the expert kernels of a run use on ``device``;
    ConfigError if it cannot use them, or cannot run the kernels."""
    if moe.kernel in OF_GPUS and device.type == "cpu" and not kernels_are_interpreted():
        raise ConfigError(
            f"moe.kernel is '{moe.kernel}'; on a CPU it must be auto, torch or reference"
        )
    try:
        return find_tiles(moe.kernel_tiles, backend_for(moe.kernel, device), device)
    except TileFileError as error:
        raise ConfigError(f"moe.kernel_tiles: {error}") from error


def expert_shape(config: Config) -> ExpertShape:
    """The experts of a rank of a resolved config, dtype included, as tables of tiles know them."""
    moe = config.moe
    return ExpertShape(
        H=moe.hidden_size,
        I=moe.intermediate_size,
        e=moe.num_experts // config.parallel.ep,
        gated=activation_called(moe.activation).gated,
        dtype=compute_dtype(config),
    )


def _tiles_in_words(tiles: TileTable) -> str:
    return f"{tiles.digest()}... of {tiles.device}" if len(tiles) else "defaults"
