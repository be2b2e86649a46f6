"""What rounding costs as a command: two gloo processes, bytes by formula."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import measure_routing_cost
import pytest
from warm_python import run_python
from wrong_arguments import refusal

pytestmark = pytest.mark.processes

TOOL = str(Path(__file__).parents[2] / "tools/measure_routing_cost.py")
E, M = 8, 16
SMALL = ["--ranks", "2", "--tokens", "64", "--experts", str(E), "--top-k", "2", "--tile", str(M)]
SMALL += ["--hidden", "16", "--inner", "8", "--repeats", "1"]


def measure(*options: str) -> subprocess.CompletedProcess[str]:
    return run_python(TOOL, *options)


def test_bytes_and_rounds_of_every_way(tmp_path: Path) -> None:
    done = measure(*SMALL, "--json", str(tmp_path / "o.json"))
    assert done.returncode == 0, done.stderr
    assert "balance, exact by owner" in done.stdout
    for rank in json.loads((tmp_path / "o.json").read_text())["ranks"]:
        by_name = {cost["name"]: cost for cost in rank}
        sent = {name: dict(cost["bytes_sent"]) for name, cost in by_name.items()}
        for cost in rank:
            assert cost["rounding_s"] > 0
            assert cost["layer_s"] > 0
            assert cost["row_bytes"] % (16 * 4) == 0
            assert sent[cost["name"]].pop("pairs") % 8 == 0
        counts = {"counts": 4 * (E + 1)}
        candidates = 4 * E * (M - 1)
        assert sent["top-k"] == sent["balance, quota"] == counts
        assert sent["balance, exact by all-gather"] == counts | {"candidates": candidates}
        owner = {"candidates": candidates // 2, "accepted": 4 * E // 2}
        assert sent["balance, exact by owner"] == counts | owner
        weighed = {"key sums": 2 * candidates, "candidates": candidates}
        assert sent["score, exact by all-gather"] == counts | weighed
        # Each rank sends the addends of a half, and the sums of its own; three times.
        keys = {"key counts": 3 * 4 * E * 512, "key ties": 4 * 2 * E}
        assert sent["capacity, exact"] == counts | keys
        assert sent["capacity, quota"] == counts
        assert by_name["top-k"]["rounds"] == {"counts": 1, "pairs": 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--experts", "9", "--ranks", "2"], "--experts is 9; --ranks (2) must divide it"),
        (["--top-k", "999"], "--top-k is 999; it must be at most 256"),
        (["--tile", "0"], "--tile: '0' must be an integer, at least 1"),
    ],
)
def test_wrong_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refusal(measure_routing_cost.main, options, capsys)
