"""A run that a launcher shall start, and what the launcher makes of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distmoe.config import Config
from distmoe.config.own_options import integer_option

PYTHON = sys.executable


@dataclass(frozen=True)
class Job:
    """A checked run of ``nodes * ranks_per_node`` ranks and the options of `distmoe launch`."""

    config: Config
    arguments: tuple[str, ...]
    """What `distmoe train` takes: the file and the settings."""
    nodes: int
    ranks_per_node: int
    min_nodes: int | None
    """Elastic: nodes may come and go while at least so many are here. None: all, all the time."""
    options: Mapping[str, str]
    """Options of the launcher that were given, with their values."""
    launcher_args: tuple[str, ...]
    """Options that the launcher's own program gets as they are."""
    threads: int
    """CPU threads of a rank."""

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node

    def train_command(self) -> tuple[str, ...]:
        """The module and arguments of a rank, after `python -m`."""
        return ("distmoe", "train", *self.arguments)

    def environment(self) -> tuple[str, ...]:
        """The start of a command: variables for its ranks, in a form that can be typed."""
        # The working folder must not shadow installed packages.
        return ("env", f"OMP_NUM_THREADS={self.threads}", "PYTHONSAFEPATH=1")

    def integer(self, option: str, default: int, *, least: int = 0) -> int:
        """The value of an option of the launcher; see `integer_option`."""
        return integer_option(self.options, option, default, least=least)


@dataclass(frozen=True)
class Start:
    """What `distmoe launch` does: write ``files``, then become ``command``."""

    command: tuple[str, ...]
    files: Mapping[Path, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What a user should know of it, a line each."""
    other_nodes: tuple[tuple[str, ...], ...] = ()
    """The same command as it is to be run on the nodes 1, 2, ..."""

    def show(self) -> str:
        """Files and commands, as `--dry-run` prints them."""
        lines = [f"# {note}" for note in self.notes]
        for path, text in self.files.items():
            lines += [f"# file {path}", text.rstrip("\n"), f"# end of {path}"]
        for node, command in enumerate((self.command, *self.other_nodes)):
            lines += [f"# on node {node}"] if self.other_nodes else []
            lines.append(shlex.join(command))
        return "\n".join(lines)
