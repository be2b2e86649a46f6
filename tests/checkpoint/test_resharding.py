"""Checkpoints cross engines, numbers of ranks and ep: a spanning part of the whole matrix, which is
`python tools/check_resharding.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from warm_python import run_python

pytestmark = pytest.mark.processes

TOOL = str(Path(__file__).parents[2] / "tools/check_resharding.py")


def test_every_layout_saves_for_another(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    made = run_python(TOOL, "--subset", "--json", str(report), timeout=300)
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
