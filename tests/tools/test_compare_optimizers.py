"""The comparison of optimizers as a command, on runs that are finished, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compare_optimizers
import finished_runs
import pytest
from wrong_arguments import refusal

from distmoe.config import load_config, to_toml

CONFIG = str(Path(__file__).parents[2] / "configs/quickstart.toml")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the checks of the data are of no interest."""
    monkeypatch.setattr(finished_runs, "check", lambda config, world: None)
    return tmp_path


def finish(runs: Path, optimizer: str, *settings: str, optimizer_s: float) -> None:
    """A run of four steps of a second each, as it lies there when it is done."""
    folder = runs / f"{optimizer}-lr-0.003-seed-1"
    folder.mkdir(parents=True)
    options = [*settings, "--run.dir", str(folder), "--run.seed", "1"]
    options += ["--optim.name", optimizer, "--optim.lr", "0.003"]
    (folder / "finished.toml").write_text(to_toml(load_config(CONFIG, options)))
    steps = [{"step": s, "step_seconds": 1.0, "optimizer_seconds": optimizer_s} for s in (3, 4)]
    slow = [{"step": s, "step_seconds": 9.0, "optimizer_seconds": 9.0} for s in (1, 2)]
    loss = {"adamw": 5.0, "muon": 4.5}[optimizer]
    validation = [{"step": s, "validation_loss": loss + 4 - s} for s in (2, 4)]
    for name, lines in (("metrics", slow + steps), ("validation", validation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_table_and_json(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--train.steps", "4", "--optim.warmup_steps", "0"]
    finish(data, "adamw", *settings, optimizer_s=0.1)
    finish(data, "muon", *settings, optimizer_s=0.3)
    options = ["--runs", str(data), "--json", str(data / "o.json"), "--seeds", "1"]
    arguments = [CONFIG, *options, "--warm-up", "2", "--", *settings]
    assert compare_optimizers.main(arguments) == 0
    output = capsys.readouterr().out
    assert [line.split() for line in output.splitlines()[2:]] == [
        ["adamw", "0.003", "1", "7.0000", "5.0000", "1.000", "0.100", "10.0%"],
        ["muon", "0.003", "1", "6.5000", "4.5000", "1.000", "0.300", "30.0%"],
    ]
    record: dict[str, Any] = json.loads((data / "o.json").read_text())
    assert [run["validation"] for run in record["runs"]] == [
        {"2": 7.0, "4": 5.0},
        {"2": 6.5, "4": 4.5},
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--optimizers", "sgd"], "argument --optimizers: unknown 'sgd'; known: adamw, muon"),
        (["--", "--train.steps", "20"], "--warm-up is 20; it must be below train.steps (20)"),
    ],
)
def test_wrong_options(
    data: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [CONFIG, "--runs", str(data / "runs"), *options]
    assert words in refusal(compare_optimizers.main, arguments, capsys)
    assert not (data / "runs").exists()
