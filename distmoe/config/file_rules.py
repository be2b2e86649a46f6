"""What a run reads and where it writes: folders, checkpoints, profiles, packages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from distmoe.config.rewound import went_back
from distmoe.config.rule import Rule, adder_to, wrong
from distmoe.config.schema import Config

RULES: list[Rule] = []
rule = adder_to(RULES)


@rule()
def _run_folder(config: Config, world: int) -> Iterator[str]:
    if Path(config.run.dir).exists() and not Path(config.run.dir).is_dir():
        yield wrong(config, "run.dir", "be a folder, and there is a file of that name")
    elif (obstacle := _obstacle(Path(config.run.dir))) is not None:
        yield wrong(config, "run.dir", f"be a folder that can be written, and {obstacle} cannot")


@rule("train.record_routing")
def _routing_folder(config: Config, world: int) -> Iterator[str]:
    if config.train.record_routing:
        folder = Path(config.run.dir) / "routing"
        if (obstacle := _obstacle(folder)) is not None:
            yield wrong(
                config,
                "train.record_routing",
                f"be 0, or {folder} a folder that can be written: {obstacle} cannot",
            )


def _obstacle(folder: Path) -> Path | None:
    """What keeps files from being written into ``folder``: itself or the first above it that
    exists."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    can_be_written = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return None if can_be_written else nearest


@rule()
def _profile(config: Config, world: int) -> Iterator[str]:
    if config.parallel.profile and not Path(config.parallel.profile).is_file():
        yield wrong(
            config,
            "parallel.profile",
            "be empty or a file that `distmoe doctor comm --save` wrote",
        )


@rule()
def _tiles(config: Config, world: int) -> Iterator[str]:
    tiles = config.moe.kernel_tiles
    if tiles not in ("auto", "default") and not Path(tiles).is_file():
        yield wrong(
            config,
            "moe.kernel_tiles",
            "be auto, default or a file that `tools/bench_moe.py --write-tiles` wrote",
        )


@rule()
def _wandb(config: Config, world: int) -> Iterator[str]:
    project = config.metrics.wandb
    if not project:
        return
    if not project.isprintable() or set(project) & set("/\\#?%:"):
        yield wrong(config, "metrics.wandb", "be empty or a name without any of / \\ # ? % :")
    package = find_spec("wandb")
    # A folder wandb/ of runs, in the working folder, would pass for a package without files.
    if package is None or package.origin is None:
        yield wrong(config, "metrics.wandb", "be empty where wandb is missing: pip install wandb")


@rule()
def _resume(config: Config, world: int) -> Iterator[str]:
    resume = config.checkpoint.resume
    # It may have made room for the checkpoints of a run that went back to it.
    done = went_back(Path(config.run.dir), Path(resume))
    if resume not in ("auto", "never") and not done and not _is_complete(Path(resume)):
        allowed = "be auto, never or the folder of a complete checkpoint, which has a manifest.json"
        yield wrong(config, "checkpoint.resume", allowed + _newest_in(resume))


@rule()
def _init_from(config: Config, world: int) -> Iterator[str]:
    source = config.checkpoint.init_from
    own = Path(config.run.dir).resolve() in Path(source).resolve().parents
    if source and config.checkpoint.resume == "never" and own:
        yield wrong(
            config,
            "checkpoint.init_from",
            "be of another run with checkpoint.resume 'never', which sets this one's aside",
        )
    # A run that has something to resume does not look at it.
    elif source and not _is_complete(Path(source)) and not _newest_in(config.run.dir):
        allowed = "be empty or the folder of a complete checkpoint, which has a manifest.json"
        yield wrong(config, "checkpoint.init_from", allowed + _newest_in(source))


def _is_complete(checkpoint: Path) -> bool:
    """Whether the folder is a checkpoint to its end."""
    return (checkpoint / "manifest.json").is_file()


def _newest_in(run: str) -> str:
    """The checkpoint that is meant, where a run was named."""
    found = sorted(Path(run).glob("checkpoints/step-*/manifest.json"))
    return f"; the newest there is {found[-1].parent}" if found else ""
