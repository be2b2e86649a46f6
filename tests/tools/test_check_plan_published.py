"""The plan against published throughput: rows are within the limit, or say why they are not."""

import json
from pathlib import Path

import check_plan_published
import pytest
from wrong_arguments import refusal


def test_rows_are_close_or_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert check_plan_published.main(["--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    close = [row for row in rows if abs(row["error"]) <= 0.25]
    assert len(close) >= 10
    sonicmoe = next(row for row in close if row["row"]["name"] == "SonicMoE 7B")
    assert 64 * 86400 * sonicmoe["row"]["published"] == pytest.approx(213e9)
    assert sonicmoe["row"]["name"] in capsys.readouterr().out
    assert all(row["memory_gib"] < 80 for row in rows if row["row"]["machine"] == "h100")
    assert "FILE is no.json; it must be" in refusal(check_plan_published.main, ["no.json"], capsys)
