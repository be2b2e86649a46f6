"""What a run says of its time, against the time that passes, with all that interrupts training."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from training_runs import config_file

from distmoe.config import RankInfo, load_config, resolve
from distmoe.data.cli import main as data_main
from distmoe.metrics.report.cli import main as report
from distmoe.metrics.throughput import Clock, Lap
from distmoe.train.trainer import train

OPTIONS = [
    "--launch.nproc=1",
    "--parallel.ep=1",
    "--checkpoint.every=3",
    "--train.validate_every=2",
]
OPTIONS += ["--optim.schedule=constant", "--metrics.tensorboard=false"]


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    texts = [f"{n}: " + " ".join(f"word{n * k % 97}" for k in range(60)) for n in range(80)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    command = ["prepare", str(tmp_path / "texts.jsonl"), "--vocab-size", "300"]
    assert data_main([*command, "--out", str(tmp_path / "data")]) == 0
    return tmp_path / "data"


# Checkpoints of a single rank.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_lines_have_all_the_time_of_a_run_that_is_resumed(
    tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps a stopwatch shows the second one's time and what lay between them."""
    at: list[float] = []
    lap = Clock.lap

    def watched(clock: Clock) -> Lap:
        at.append(time.perf_counter())
        return lap(clock)

    monkeypatch.setattr(Clock, "lap", watched)
    file = config_file(tmp_path, small_data)
    for steps in (7, 12):
        config = load_config(str(file), [*OPTIONS, f"--train.steps={steps}"])
        assert train(resolve(config, 1), RankInfo())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["warm_up"] for line in lines] == [
        n not in (4, 5, 6, 7, 11, 12) for n in range(1, 13)
    ]
    # The stopwatch did not see the resume between steps 7 and 8.
    watched_s = at[6] - at[0] + at[11] - at[7]
    parts = ("step_seconds", "validation_seconds", "checkpoint_seconds")
    told_s = [sum(line[name] for name in parts) for line in lines]
    assert sum(told_s[1:7] + told_s[8:]) == pytest.approx(watched_s, rel=0.02)
    assert [n for n, line in enumerate(lines, 1) if line["checkpoint_seconds"]] == [4, 7, 10]
    assert [n for n, line in enumerate(lines, 1) if line["validation_seconds"]] == [3, 5, 7, 9, 11]
    for line in lines:
        inside = ("data_seconds", "forward_backward_seconds", "optimizer_seconds")
        assert all(line[name] > 0 for name in inside)
        assert sum(line[name] for name in inside) < line["step_seconds"]
    assert report([str(tmp_path / "run"), "--json", str(tmp_path / "report.json")]) == 0
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert (run["figures"]["state"], run["figures"]["starts"]) == ("done", 2)
    assert run["figures"]["measured_steps"] == 6
