"""The bench of row exchange as a command: two gloo processes with a device that sleeps."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from distmoe.planner.dispatch_bench import Timing, Way, slowest

TOOL = str(Path(__file__).parents[2] / "tools/bench_dispatch.py")


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *options], capture_output=True, text=True)


@pytest.mark.processes
def test_table_json_and_picture(tmp_path: Path) -> None:
    sizes = ["--tokens", "64", "--hidden", "32", "--inner", "16", "--tile", "8", "--rounds", "2"]
    sizes += ["--ranks", "4", "--ranks-per-node", "2"]
    files = ["--json", str(tmp_path / "o.json"), "--picture", str(tmp_path / "o.png")]
    done = bench(*sizes, *files, "--steps", "2", "--device", "sleep", "--pairs-per-ms", "10")
    assert done.returncode == 0, done.stderr
    assert "rank, by tokens, 2 steps" in done.stdout
    facts = json.loads((tmp_path / "o.json").read_text())
    names = [(way["way"]["level"], way["way"]["overlap"]) for way in facts["ways"]]
    levels = ("copies", "rank", "node")
    assert names == [(level, o) for level in levels for o in (False, True, True)]
    remote = {way["way"]["level"]: way["remote_bytes"] for way in facts["ways"]}
    assert 0 < remote["node"] < remote["rank"] < remote["copies"]
    for way in facts["ways"]:
        # Rows of 32 fp32 numbers, there and back, forward and backward.
        assert way["row_bytes"] % (4 * 32) == way["remote_bytes"] % (4 * 32) == 0
        assert way["row_bytes"] > way["remote_bytes"]
    for way in facts["ways"]:
        # About 256 pairs a rank, three products of each, at 10 pairs/ms.
        total = [sum(both) for both in zip(way["forward_s"], way["backward_s"], strict=True)]
        assert len(total) == 2
        assert statistics.median(total) > 0.06
        assert way["predicted_s"] > 0.06
    assert (tmp_path / "o.png").stat().st_size > 1000


def test_the_slowest_rank_of_every_round() -> None:
    way = Way("rank", True)
    first = Timing(way, 1, [1.0, 4.0], [2.0, 1.0], 10, 5)
    second = Timing(way, 1, [2.0, 1.0], [0.5, 1.0], 12, 3)
    (worst,) = slowest([[first], [second]])
    assert worst.forward_s == [2.0, 4.0]
    assert [f + b for f, b in zip(worst.forward_s, worst.backward_s, strict=True)] == [3.0, 5.0]
    assert (worst.row_bytes, worst.remote_bytes) == (12, 5)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "1"], "--ranks is 1; it must be at least 2"),
        (["--steps", "2,0"], "'2,0'; it must be integers, at least 1, such as 2,4"),
        (["--ranks", "3"], "--experts is 16; --ranks (3) must divide it"),
        (["--ranks-per-node", "3"], "--ranks-per-node is 3; it must divide --ranks (2)"),
        (["--top-k", "17"], "--top-k is 17; it must be at most 16"),
    ],
)
def test_wrong_options(options: list[str], words: str) -> None:
    done = bench(*options)
    assert done.returncode == 2
    assert words in done.stderr
