"""The routing simulation as a command."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simulate_routing
from wrong_arguments import refusal

from distmoe.metrics.routing_trace import RankTrace, TraceFacts, write_trace

TOOL = str(Path(__file__).parents[2] / "tools/simulate_routing.py")
Simulate = Callable[..., tuple[int, str, str]]
SMALL = ["--ranks", "2", "--experts", "8", "--top_k", "2", "--tokens", "64", "--tile", "8"]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Simulate:
    """The command in this process: exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [TOOL, *arguments])
        return simulate_routing.main(arguments), *capsys.readouterr()

    return run


def test_a_sweep_has_a_table_per_setting_and_one_of_all(simulate: Simulate, tmp_path: Path) -> None:
    sizes = ["--ranks", "2,4", "--experts", "8,16", "--top_k", "2", "--tokens", "64"]
    files = ["--json", str(tmp_path / "o.json"), "--picture", str(tmp_path / "o.png")]
    code, output, _ = simulate(*sizes, "--tile", "8,16", "--skew", "0.5", *files)
    assert code == 0
    settings = json.loads((tmp_path / "o.json").read_text())["settings"]
    found = {(s["ranks"], s["num_experts"], s["tile"]) for s in settings}
    assert len(settings) == 8
    assert found == {(p, e, m) for p in (2, 4) for e in (8, 16) for m in (8, 16)}
    names = [outcome["name"] for outcome in settings[1]["outcomes"]]
    assert names[0] == "top-k, padded"
    assert {"balance", "nearest", "up", "down", "stochastic"} <= set(names)
    assert output.count(" a rank, M=") == 8
    assert "P=2 E=8 K=2 T=64 a rank, M=8, skew 0.5: 4.0 tiles an expert" in output
    rows = output.partition("all settings: busiest rank over the mean")[2].splitlines()
    assert sum(line.startswith(" P ") for line in rows) == 8
    assert (tmp_path / "o.png").stat().st_size > 1000
    assert "all settings" not in simulate(*sizes, "--tile", "8", "--skew", "0.5")[1]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The folder of a run with a trace: two steps, two ranks, blocks 1 and 2, M = 8."""
    folder = tmp_path / "run" / "routing"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for step in (1, 2):
        for rank in (0, 1):
            facts = TraceFacts(step, rank, 2, 2, top_k=2, tile=8, layers=(1, 2))
            key_LMTE = generator.integers(0, 1 << 20, (2, 3, 64, 8), dtype=np.int32)
            write_trace(folder, RankTrace(facts, key_LMTE, key_LMTE))
    return tmp_path / "run"


def test_a_trace_has_a_table_per_layer_and_tile(
    simulate: Simulate, trace: Path, tmp_path: Path
) -> None:
    options = ["--rules", "nearest,balance", "--capacity", "1,1.5"]
    json_file = ["--json", str(tmp_path / "o.json")]
    code, output, _ = simulate("--trace", str(trace), *options, *json_file)
    assert code == 0
    for layer in (1, 2):
        assert f"layer {layer}: P=2 E=8 K=2 T=64 a rank, M=8: 4.0 tiles an expert" in output
    assert "skew" not in output
    facts = json.loads((tmp_path / "o.json").read_text())
    assert "--trace" in facts["command"]
    assert [(s["layer"], s["tile"]) for s in facts["settings"]] == [(1, 8), (2, 8)]
    names = [outcome["name"] for outcome in facts["settings"][0]["outcomes"]]
    capacities = [
        f"balance, capacity {factor} of {of}"
        for factor in ("1", "1.5")
        for of in ("ranks", "experts")
    ]
    assert names == [
        "top-k, padded", "nearest", "balance", *capacities, "balance, each rank alone"
    ]  # fmt: skip
    top_k = facts["settings"][0]["outcomes"][0]
    assert top_k["worst_busiest_over_mean"] > top_k["busiest_over_mean"] > 1
    _, other, _ = simulate(
        "--trace", str(trace / "routing"), "--tile", "4,16", "--rules", "balance"
    )
    assert [other.count(f", M={tile}: ") for tile in (4, 8, 16)] == [2, 0, 2]


def test_a_broken_trace_is_a_failure_in_one_line(simulate: Simulate, trace: Path) -> None:
    missing = trace / "routing" / "step-00000002-rank-0001.npz"
    missing.unlink()
    code, _, errors = simulate("--trace", str(trace), "--rules", "balance")
    assert code == 1
    assert errors.startswith(f"simulate_routing: error: {missing} is missing: rank 0 of step 2")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    "sizes", [["--tokens", "8"], ["--experts", "8"], ["--skew", "1"], ["--seed", "1"]]
)
def test_a_trace_has_its_own_sizes(
    trace: Path, sizes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(simulate_routing.main, ["--trace", str(trace), *sizes], capsys)
    assert f"{sizes[0]} and --trace: a trace has its own; only --tile can be changed" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "2,3"], "--experts is 8; --ranks (3) must divide it"),
        (["--top_k", "2,x"], "argument --top_k: 'x' must be an integer, at least 1"),
        (["--json", "no/such/folder/file"], "there is no folder 'no/such/folder'"),
        (["--experts", "9"], "--experts is 9; --ranks (2) must divide it"),
        (["--top_k", "9"], "--top_k is 9; it must be at most 8"),
        (["--tile", "0"], "argument --tile: '0' must be an integer, at least 1"),
        (["--capacity", "2,0.5"], "--capacity is 0.5; it must be at least 1"),
        (["--rules", "x"], "argument --rules: unknown 'x'; known: none, nearest, balance"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(simulate_routing.main, [*SMALL, *arguments], capsys)


def test_a_folder_without_a_trace_is_a_wrong_argument(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(simulate_routing.main, ["--trace", str(tmp_path)], capsys)
    assert f"--trace: {tmp_path} has no routing trace" in said
