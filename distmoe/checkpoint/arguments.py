"""Arguments of commands that take checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from distmoe.checkpoint.store import COMPLETE, step_of


class Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


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


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be an integer, at least 1")
    return int(text)


def positive_size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' must be a number above 0")
    return size
