"""The soak as a command: two gloo processes, few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from warm_python import run_python

pytestmark = pytest.mark.processes

TOOL = str(Path(__file__).parents[2] / "tools/soak_layer.py")


def test_readings_of_every_rank_and_a_failure(tmp_path: Path) -> None:
    """A limit that no process keeps: it ends with 1, and tells what it read all the same."""
    file = tmp_path / "soak.json"
    sizes = ["--ranks", "2", "--ranks-per-node", "2", "--steps", "10", "--every", "5"]
    done = run_python(TOOL, *sizes, "--most-growth", "-1000", "--json", str(file))
    assert done.returncode == 1, done.stderr
    assert "MiB allocated, +0 live tensors" in done.stdout
    ranks = json.loads(file.read_text())["ranks"]
    assert [[reading["step"] for reading in readings] for readings in ranks] == [[5, 10]] * 2


def test_wrong_options() -> None:
    done = run_python(TOOL, "--experts", "12")
    assert done.returncode == 2
    assert "--experts is 12; --ranks (8) must divide it" in done.stderr
