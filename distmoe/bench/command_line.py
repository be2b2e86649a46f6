"""The command of a tool, as it goes into the files that it writes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command_line() -> str:
    """From the top of the repository, wherever the tool was called."""
    program = Path(sys.argv[0])
    return shlex.join(["python", f"{program.parent.name}/{program.name}", *sys.argv[1:]])
