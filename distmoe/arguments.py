"""What the parsers of commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from math import inf
from pathlib import Path
from typing import NoReturn, TypeVar

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    """An integer, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be an integer, at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < inf:
        raise argparse.ArgumentTypeError(f"'{text}' must be a number above 0")
    return number


def new_file(text: str) -> Path:
    """A file to be written, in a folder that exists."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a folder; it must be a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}': there is no folder '{path.parent}'")
    return path


def several(kind: Callable[[str], Number]) -> Callable[[str], list[Number]]:
    """Numbers of an option, by comma."""

    def numbers(text: str) -> list[Number]:
        return [kind(part) for part in text.split(",")]

    return numbers


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Names of an option, by comma, each of them ``known``."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; known: {', '.join(known)}")
        return found

    return names
