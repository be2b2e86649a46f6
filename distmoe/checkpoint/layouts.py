"""On how many ranks, and with which ep, a run can go on from a checkpoint.

Tensors are saved by logical name and shape, so their files fit any number of ranks as they are; it
is the settings of the run that may not: experts, sequences and batches must divide.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from distmoe.checkpoint.manifest import Manifest
from distmoe.config import Config, ConfigError, check, load_config
from distmoe.config.keys import with_values

# What follows from the number of ranks, and is derived anew.
DERIVED = {
    "parallel.dp_shard": 0,
    "parallel.ranks_per_node": 0,
    "train.micro_batch_size": 0,
    "moe.dispatch.level": "auto",
    "moe.dispatch.order": "auto",
    "moe.dispatch.steps": 0,
}


@dataclass(frozen=True)
class Layout:
    """``problems``: why the run's settings do not allow it."""

    world: int
    ep: int
    problems: tuple[str, ...] = ()


def run_config(manifest: Manifest) -> Config:
    """The settings of the run that wrote a checkpoint. ConfigError if it had others than this
    version."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(str(manifest.about.get("config", "")))
        return load_config(path)


def layouts(config: Config, world: int) -> list[Layout]:
    """Every ep that divides the experts and ``world``, and whether the settings allow it."""
    experts = config.moe.num_experts
    sizes = [ep for ep in range(1, world + 1) if world % ep == 0 and experts % ep == 0]
    return [Layout(world, ep, _problems(config, world, ep)) for ep in sizes]


def _problems(config: Config, world: int, ep: int) -> tuple[str, ...]:
    # One rank alone has an engine that several cannot have.
    engine = "auto" if config.parallel.engine == "single" else config.parallel.engine
    changed = with_values(
        config,
        {**DERIVED, "parallel.engine": engine, "parallel.ep": ep, "launch.nproc": world},
    )
    try:
        check(changed, world)
    except ConfigError as error:
        return tuple(error.problems)
    return ()
