"""Traces of runs that end before the last step of train.trace_steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distmoe.config import Config, RankInfo, RunConfig, TrainConfig
from distmoe.runtime import Runtime
from distmoe.train.communication import Communication


@pytest.fixture
def communication(tmp_path: Path) -> Communication:
    config = Config(run=RunConfig(dir=str(tmp_path)), train=TrainConfig(trace_steps="2-4"))
    runtime = Runtime(RankInfo(), torch.device("cpu"), None)
    return Communication.open(config, runtime, torch.nn.Module())  # type: ignore[arg-type]


def run_to(communication: Communication, last: int) -> list[Path | None]:
    traces = []
    for step in range(1, last + 1):
        communication.begin(step)
        traces.append(communication.end(step)[1])
    return traces


def test_a_complete_trace_is_written_once(communication: Communication, tmp_path: Path) -> None:
    path = tmp_path / "trace" / "steps-2-4-rank-0.json"
    assert run_to(communication, 5) == [None, None, None, path, None]
    assert communication.end_trace(5) is None


def test_a_run_that_ends_within_has_a_shorter_trace(
    communication: Communication, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_to(communication, 3) == [None] * 3
    path = tmp_path / "trace" / "steps-2-3-rank-0.json"
    assert communication.end_trace(3) == path
    assert json.loads(path.read_text())["otherData"]["rank"] == 0
    communication.close()
    assert capsys.readouterr().err == ""


def test_a_run_that_fails_within_says_that_there_is_none(
    communication: Communication, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_to(communication, 3)
    communication.close()
    communication.close()
    said = capsys.readouterr().err
    assert said == "rank 0: the trace that began at step 2 was not written\n"
    assert not (tmp_path / "trace").exists()
