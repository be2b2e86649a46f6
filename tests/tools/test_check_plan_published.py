"""The plan against published throughput: rows are within the limit, or say why they are not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = str(Path(__file__).parents[2] / "tools/check_plan_published.py")


def test_rows_are_close_or_say_why(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, TOOL, "--json", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())
    close = [row for row in rows if abs(row["error"]) <= 0.25]
    assert len(close) >= 10
    sonicmoe = next(row for row in close if row["row"]["name"] == "SonicMoE 7B")
    assert 64 * 86400 * sonicmoe["row"]["published"] == pytest.approx(213e9)
    assert sonicmoe["row"]["name"] in done.stdout
    assert all(row["memory_gib"] < 80 for row in rows if row["row"]["machine"] == "h100")
