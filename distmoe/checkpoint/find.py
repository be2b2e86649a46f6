"""The checkpoints that a path on the command line means."""

from __future__ import annotations

from pathlib import Path

from distmoe.checkpoint.store import COMPLETE, step_of


def find_checkpoints(directory: Path, argument: str = "DIR") -> list[Path]:
    """A checkpoint, or those of a run, oldest first. ValueError, naming the argument, if there is
    none."""
    if not directory.is_dir():
        raise ValueError(f"{argument} is '{directory}'; there is no such folder")
    if COMPLETE.fullmatch(directory.resolve().name):
        return [directory]
    below = [*directory.glob("step-*"), *directory.glob("checkpoints/step-*")]
    found = sorted((path for path in below if COMPLETE.fullmatch(path.name)), key=step_of)
    if not found:
        raise ValueError(
            f"{argument} is '{directory}'; it must be a checkpoint or a run that has one"
        )
    return found
