"""Two hosts on this machine with a slow link between them, by tools/links.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).parents[1] / "tools/links.sh")


@contextmanager
def slow_link(mbit: int) -> Iterator[str]:
    """The name of a pair of hosts of this process's own; skips the test where there can be none."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    name = f"distmoe-test-{os.getpid()}"
    made = subprocess.run([SCRIPT, "up", name, str(mbit)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip().splitlines()[-1]}")
    try:
        yield name
    finally:
        subprocess.run([SCRIPT, "down", name], check=True)


def on_host(name: str, host: int, command: list[str]) -> list[str]:
    """``command`` as it runs on host 0 or 1."""
    return [SCRIPT, "exec", name, str(host), *command]
