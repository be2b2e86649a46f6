"""What the check keeps and refuses; its runs are the tool's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import check_plan_memory
import pytest
from wrong_arguments import refusal

SHAPES = check_plan_memory.published()["shapes"]


def test_figures_of_other_shapes_stay(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    check_plan_memory.save([{"name": "a", "error": 1.0}, {"name": "b", "error": 2.0}], file)
    check_plan_memory.save([{"name": "b", "error": 3.0}], file)
    errors = {row["name"]: row["error"] for row in json.loads(file.read_text())["shapes"]}
    assert errors == {"a": 1.0, "b": 3.0}


def test_unknown_shapes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(check_plan_memory.main, ["experts", "nothing"], capsys)
    assert "SHAPE is 'nothing'; it must be one of experts, " in said


@pytest.mark.parametrize("row", SHAPES, ids=lambda row: row["name"])
def test_every_published_figure_is_within_the_limit_and_what_the_formula_says(
    row: dict[str, Any],
) -> None:
    """A figure that is outside belongs into the formula, not into the docs."""
    assert abs(row["error"]) < check_plan_memory.LIMIT
    assert abs(row["error_of_storages"]) < check_plan_memory.LIMIT
    assert check_plan_memory.predict(row, "cpu")[1].tensors == row["predicted"]["tensors"]
