"""The comparison of rounding by its loss as a command, on runs of two steps."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import compare_routing_quality
import pytest
from warm_python import run_python
from wrong_arguments import refusal

from distmoe.data.cli import main as data_main

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools/compare_routing_quality.py")
TINY = ["--launch.nproc", "1", "--parallel.ep", "1", "--parallel.engine", "single"]
TINY += ["--train.steps", "2", "--optim.warmup_steps", "0", "--train.global_batch_size", "4"]
TINY += ["--data.seq_len", "32", "--train.validation_batches", "1", "--moe.num_experts", "8"]
TINY += ["--model.hidden_size", "32", "--model.n_layers", "2", "--moe.intermediate_size", "8"]


def compare(*options: str) -> subprocess.CompletedProcess[str]:
    return run_python(TOOL, *options)


def test_runs_table_json_and_no_run_twice(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert data_main(["prepare", "--builtin", "shakespeare", "--out", str(data)]) == 0
    options = ["--ways", "top-k,down", "--ratios", "2", "--seeds", "1"]
    options += ["--config", str(ROOT / "configs/routing_quality.toml"), "--runs", str(tmp_path)]
    options += ["--json", str(tmp_path / "o.json"), "--picture", str(tmp_path / "o.png")]
    options += ["--", "--data.path", str(data), *TINY]
    done = compare(*options)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "o.json").read_text())
    # Four sequences of 32 tokens, top 4 of 8 experts: 64 tokens an expert, tiles of 32.
    assert [(run["way"], run["tile"]) for run in facts["runs"]] == [("top-k", 1), ("down", 32)]
    assert facts["runs"][0]["dropped"] == 0
    assert facts["runs"][1]["dropped"] > facts["runs"][1]["added"] == 0
    assert facts["runs"][0]["validation_loss"] != facts["runs"][1]["validation_loss"]
    assert (tmp_path / "o.png").stat().st_size > 1000
    before = (tmp_path / "down-tile-32-seed-1" / "log").stat().st_mtime_ns
    assert compare(*options).returncode == 0
    assert (tmp_path / "down-tile-32-seed-1" / "log").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--ways", "x"],
            "argument --ways: unknown 'x'; known: top-k, balance, nearest, d",
        ),
        (["--ratios", "0"], "argument --ratios: '0' must be a number above 0"),
        (["--config", "nowhere.toml"], "there is no config file 'nowhere.toml'"),
        (["--", "--train.steps", "0"], "train.steps is 0"),
    ],
)
def test_wrong_options_start_nothing(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--config", str(ROOT / "configs/routing_quality.toml")]
    arguments = ["--runs", str(tmp_path / "runs"), *config, *options]
    assert words in refusal(compare_routing_quality.main, arguments, capsys)
    assert not (tmp_path / "runs").exists()
