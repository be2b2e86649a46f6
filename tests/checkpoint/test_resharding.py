"""Checkpoints cross engines, numbers of ranks and ep: a spanning part of the whole matrix, which is
`python tools/check_resharding.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


def test_every_layout_saves_for_another(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "tools/check_resharding.py", "--subset", "--json", str(report)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    pairs = json.loads(report.read_text())["pairs"]
    layouts = {pair["source"] for pair in pairs}
    assert {pair["target"] for pair in pairs} == layouts
    assert layouts == {"single-1-1", "fsdp2-4-2", "deepspeed-3-4-4"}
    assert len(pairs) == len(layouts)
    for pair in pairs:
        assert pair["different"] == []
        assert pair["loss_error"] <= 1e-5
        # Parameters, two moments and a step of each, and the biases of two layers.
        assert pair["tensors"] > 100
