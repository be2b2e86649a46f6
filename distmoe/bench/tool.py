"""What the programs in tools/ share: options of sizes, what they write beside figures, tables."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from distmoe.arguments import positive


def command_line() -> str:
    """Of this program, from the top of the repository, wherever it was called."""
    program = Path(sys.argv[0])
    return shlex.join(["python", f"{program.parent.name}/{program.name}", *sys.argv[1:]])


def circumstances() -> dict[str, Any]:
    """Under which figures were measured; it goes with them into a file."""
    return {
        "command": command_line(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
    }


def console_of(width: int) -> Console:
    """As wide as the terminal; in a file, so many columns."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def table_of(title: str, name: str, figures: Iterable[str]) -> Table:
    """A column of names, and others of ``figures``."""
    table = Table(title=title, title_justify="left", box=None)
    table.add_column(name, no_wrap=True)
    for figure in figures:
        table.add_column(figure, justify="right")
    return table


def add_sizes(parser: argparse.ArgumentParser, sizes: Mapping[str, int]) -> None:
    """An option for each, at least 1, with its default."""
    for name, default in sizes.items():
        parser.add_argument(
            f"--{name}", type=positive, default=default, help="default: %(default)s"
        )


def split_settings(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """A program's own arguments, and what follows --: settings of its runs."""
    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given else len(given)
    return given[:split], given[split + 1 :]


def check_layer(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the program if ranks, experts and top-k do not fit together."""
    a = arguments
    if a.experts % a.ranks:
        parser.error(f"--experts is {a.experts}; --ranks ({a.ranks}) must divide it")
    if a.top_k > a.experts:
        parser.error(f"--top-k is {a.top_k}; it must be at most {a.experts}")
