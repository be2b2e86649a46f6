"""torchrun's agent as job scripts start it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import wait_until
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from distmoe.launch import agent


@pytest.mark.processes
def test_second_signal_does_not_end_it_before_its_ranks(tmp_path: Path) -> None:
    options = ["--standalone", "--nproc-per-node=2", "--signals-to-handle=SIGTERM"]
    program = str(Path(__file__).with_name("slow_rank.py"))
    with (tmp_path / "errors").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "distmoe.launch.agent", *options, program, str(tmp_path)],
            stderr=log,
        )
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    errors = tmp_path / "errors"
    wait_until(lambda: "the ranks of this node have left after SIGTERM" in errors.read_text())
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "Traceback" not in errors.read_text()


@pytest.mark.parametrize(
    ("codes", "expected", "lines"),
    [
        ({2: 75, 3: 75}, 75, []),
        ({2: 2}, 2, []),
        ({2: 1, 3: -9}, 1, ["rank 2 ended with 1", "rank 3 ended with -9"]),
    ],
)
def test_it_ends_as_its_ranks_did(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    codes: dict[int, int],
    expected: int,
    lines: list[str],
) -> None:
    def run(options: object) -> None:
        failures = {rank: ProcessFailure(rank, 1, code, "") for rank, code in codes.items()}
        raise ChildFailedError("distmoe", failures)

    monkeypatch.setattr(agent, "run", run)
    monkeypatch.setattr(agent.api, "_terminate_process_handler", lambda *signal: None)
    assert agent.main(["-m", "distmoe"]) == expected
    assert capsys.readouterr().err.splitlines() == lines


def test_a_finished_run_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "run", lambda options: None)
    monkeypatch.setattr(agent.api, "_terminate_process_handler", lambda *signal: None)
    assert agent.main(["-m", "distmoe"]) == 0
