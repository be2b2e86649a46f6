"""The bench of row exchange as a command: two gloo processes with a device that sleeps."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import bench_dispatch
import pytest
from warm_python import run_python
from wrong_arguments import refusal

from distmoe.bench.dispatch.measure import Timing, slowest

TOOL = str(Path(__file__).parents[2] / "tools/bench_dispatch.py")


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    return run_python(TOOL, *options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("bench")
    sizes = ["--tokens", "64", "--hidden", "32", "--inner", "16", "--tile", "8", "--rounds", "2"]
    sizes += ["--ranks", "4", "--ranks-per-node", "2", "--exposed", "--row-dtypes", "fp8"]
    files = ["--json", str(folder / "o.json"), "--picture", str(folder / "o.png")]
    done = bench(*sizes, *files, "--steps", "2", "--device", "sleep", "--pairs-per-ms", "10")
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "o.json").read_text()), folder


@pytest.mark.processes
def test_times_bytes_and_picture(run: tuple[str, dict[str, Any], Path]) -> None:
    output, facts, folder = run
    assert "rank, by tokens, 2 steps" in output
    ways = [line for line in facts["lines"] if line["predicted_s"] is not None]
    levels = {"copies": 3, "rank": 4, "node": 4}
    assert Counter(line["timing"]["level"] for line in ways) == levels
    short = [line for line in ways if "fp8 rows" in line["timing"]["name"]]
    remote = {line["timing"]["level"]: line["counted"] for line in ways if line not in short}
    assert 0 < remote["node"] < remote["rank"] < remote["copies"]
    for line in ways:
        timing = line["timing"]
        # Rows of 32 fp32 numbers, there and back, forward and backward; or 48 bytes there, 64 home.
        step = 16 if line in short else 4 * 32
        assert timing["row_bytes"] % step == timing["remote_bytes"] % step == 0
        assert timing["row_bytes"] > timing["remote_bytes"]
        # To the byte, on every rank.
        assert line["worst_rank"] == 0
        assert line["counted"] == line["routing"] == pytest.approx(line["formula"], rel=0.2)
        # About 256 pairs a rank, three products of each, at 10 pairs/ms.
        total = [sum(both) for both in zip(timing["forward_s"], timing["backward_s"], strict=True)]
        assert len(total) == 2
        assert statistics.median(total) > 0.06
        assert line["predicted_s"] > 0.06
    for line in short:
        assert line["counted"] == remote[line["timing"]["level"]] * (48 + 64) / (2 * 4 * 32)
    for errors in facts["rounding_errors"].values():
        assert set(errors.values()) == {0.0}
    assert len(facts["rounding_errors"]) == output.count("fp8 rows: checked") == 2
    assert (folder / "o.png").stat().st_size > 1000


@pytest.mark.processes
def test_peers_are_checked_and_timed(run: tuple[str, dict[str, Any], Path]) -> None:
    output, facts, _ = run
    peers = {line["timing"]["name"]: line for line in facts["lines"] if line["predicted_s"] is None}
    copies = next(line for line in facts["lines"] if line["timing"]["level"] == "copies")
    assert peers["all_to_all, a copy a pair"]["counted"] == copies["counted"]
    assert set(facts["peer_errors"]) | set(facts["missing_peers"]) == {"all_to_all", "deepspeed"}
    assert len(peers) == len(facts["peer_errors"])
    for errors in facts["peer_errors"].values():
        assert set(errors) == {"out", "dx", "dw_in", "dw_out", "dscore"}
        assert max(errors.values()) < 1e-5
    for name, reason in facts["missing_peers"].items():
        assert f"{name}: skipped, {reason[:40]}" in output


@pytest.mark.processes
def test_exposed_communication_of_every_way(run: tuple[str, dict[str, Any], Path]) -> None:
    _, facts, _ = run
    assert len(facts["exposed"]) == 11
    for line in facts["exposed"]:
        assert 0 < line["accounted_s"] < line["wall_s"]
        assert line["by_clock_s"] < line["wall_s"]


def test_the_slowest_rank_of_every_round() -> None:
    first = Timing("rank", "rank", "", 10, 5, None, [1.0, 4.0], [2.0, 1.0])
    second = Timing("rank", "rank", "", 12, 3, None, [2.0, 1.0], [0.5, 1.0])
    (worst,) = slowest([[first], [second]])
    assert worst.forward_s == [2.0, 4.0]
    assert worst.total_s == [3.0, 5.0]
    assert (worst.row_bytes, worst.remote_bytes) == (12, 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "1"], "--ranks is 1; it must be at least 2"),
        (["--steps", "2,0"], "'2,0'; it must be integers, at least 1, such as 2,4"),
        (["--ranks", "3"], "--experts is 16; --ranks (3) must divide it"),
        (["--ranks-per-node", "3"], "--ranks-per-node is 3; it must divide --ranks (2)"),
        (["--top-k", "17"], "--top-k is 17; it must be at most 16"),
        (["--peers", "megatron"], "unknown 'megatron'; known: all_to_all, deepspeed"),
        (["--row-dtypes", "fp4"], "unknown 'fp4'; known: bf16, fp8"),
    ],
)
def test_wrong_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refusal(bench_dispatch.main, options, capsys)
