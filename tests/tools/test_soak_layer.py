"""The soak as a command: two gloo processes, few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

TOOL = str(Path(__file__).parents[2] / "tools/soak_layer.py")


def test_readings_of_every_rank(tmp_path: Path) -> None:
    file = tmp_path / "soak.json"
    sizes = ["--ranks", "2", "--ranks-per-node", "2", "--steps", "10", "--every", "5"]
    command = [sys.executable, TOOL, *sizes, "--most-growth", "64", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "+0 live tensors" in done.stdout
    ranks = json.loads(file.read_text())["ranks"]
    assert [[reading["step"] for reading in readings] for readings in ranks] == [[5, 10]] * 2


def test_memory_that_grows_is_a_failure(tmp_path: Path) -> None:
    """No process's memory stays within less than nothing."""
    sizes = ["--ranks", "2", "--ranks-per-node", "2", "--steps", "4", "--every", "2"]
    command = [sys.executable, TOOL, *sizes, "--most-growth", "-1000"]
    assert subprocess.run(command, capture_output=True).returncode == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks-per-node", "3"], "--ranks-per-node is 3; it must divide --ranks (8)"),
        (["--experts", "12"], "--experts is 12; --ranks (8) must divide it"),
    ],
)
def test_wrong_options(options: list[str], words: str) -> None:
    done = subprocess.run([sys.executable, TOOL, *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr
