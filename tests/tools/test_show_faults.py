"""docs/faults.md has every fault that the tool causes, and some are caused here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import show_faults
from warm_python import run_python

TOP = Path(__file__).parents[2]
TOOL = str(TOP / "tools/show_faults.py")


def test_the_page_has_them_all() -> None:
    page = (TOP / "docs/faults.md").read_text()
    assert len(show_faults.FAULTS) > 20
    assert [name for name in show_faults.FAULTS if f"`{name}`" not in page] == []


@pytest.mark.processes
def test_what_a_user_sees(tmp_path: Path) -> None:
    """Of two configs, and of weights that are no numbers."""
    names, file = ["different-configs", "nan-router"], tmp_path / "faults.json"
    done = run_python(TOOL, *names, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(file.read_text())
    assert list(seen) == names
    assert [one["code"] for one in seen.values()] == [2, 1]
    lines = "\n".join(seen["different-configs"]["lines"])
    assert "on rank 0 and 0.5 on rank 1; it must be the same on all ranks" in lines


def test_a_fault_that_there_is_not() -> None:
    done = run_python(TOOL, "flood")
    assert done.returncode == 2
    assert "FAULT is 'flood'; it must be one of unknown-key," in done.stderr
