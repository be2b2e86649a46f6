"""Where in a kernel something happened, and the error that says so."""

from __future__ import annotations

import linecache
import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = f"{Path(__file__).parent}/"


class KernelError(RuntimeError):
    """A kernel does what a GPU answers with a wrong number, a crash or a hang."""


class Line(NamedTuple):
    path: str
    number: int

    @property
    def text(self) -> str:
        return linecache.getline(self.path, self.number).strip()

    @property
    def assigned(self) -> str:
        """The name that the line gives to its result."""
        found = re.match(r"(\w+)[^=(]*=", self.text)
        return found[1] if found else f"<line {self.number}>"

    def __str__(self) -> str:
        return f"{Path(self.path).name}:{self.number} `{self.text}`"


def line() -> Line:
    """The kernel's line that is being executed: the innermost frame outside of this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(HERE):
        frame = frame.f_back
    return Line(frame.f_code.co_filename, frame.f_lineno)


def fault(words: str, at: Line | None = None) -> KernelError:
    """``at``: the line whose fault it is, if not the one that is being executed."""
    return KernelError(f"{at or line()}: {words}")
