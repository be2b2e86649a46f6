"""Takes back the last lines of a file with one JSON object a step, however long the file is."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO


def cut_after(path: Path, step: int) -> float:
    """Cut the lines behind the last one of ``step`` or before it, and those that are no step, such
    as one that a kill cut off; the step that the file ends with, -inf if it is empty.

    Steps rise in the file, which is read from its end and cut in place: a kill in this moment
    leaves all lines, or those that are kept. The last one gets its end if a kill has come before
    that. Step 0 is before all lines.
    """
    if not path.exists() or path.stat().st_size == 0:
        return -math.inf
    with path.open("r+b") as file:
        for begin, line in _from_the_end(file) if step > 0 else ():
            if (found := _step_of(line)) <= step:
                file.truncate(begin + len(line))
                if not line.endswith(b"\n"):
                    file.seek(0, os.SEEK_END)
                    file.write(b"\n")
                return found
        file.truncate(0)
    return -math.inf


def _from_the_end(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Every line with where it begins, the last one first."""
    with mmap(file.fileno(), 0, access=ACCESS_READ) as text:
        end = len(text)
        while end > 0:
            begin = text.rfind(b"\n", 0, end - 1) + 1
            yield begin, text[begin:end]
            end = begin


def _step_of(line: bytes) -> float:
    """The step of a line; infinity for one that a kill cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
