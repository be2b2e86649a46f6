"""What a run tells about its communication: figures, a trace, and who keeps it waiting."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from slurm_cluster import wait_until
from training_runs import STEPS, config_file, finish, records, start, wait_for_step, worker

pytestmark = pytest.mark.processes

WARNING_S = 1


def test_a_trace_and_figures_of_every_step(data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "traced", data)
    output = finish(start(config, "--train.trace_steps", "3-4", "--train.steps", "5"))
    assert "trace/steps-3-4-rank-0.json" in output
    for record in records(config):
        assert 0 < record["exposed_seconds"] < record["step_seconds"]
        assert record["exposed_share"] == pytest.approx(
            record["exposed_seconds"] / record["step_seconds"]
        )
        # Rows and pairs and counts, all inside the machine.
        assert record["node_mib"] > record["rows_mib"] > 0
        assert record["remote_mib"] == 0
    for rank in range(2):
        path = config.parent / "run" / "trace" / f"steps-3-4-rank-{rank}.json"
        trace = json.loads(path.read_text())
        slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        assert {event["args"]["layer"] for event in slices} == {"layer 1"}
        passes = {(e["args"]["pass"], e["args"]["pass_number"]) for e in slices}
        assert passes == {(p, n) for p in ("forward", "backward") for n in range(2)}
        assert all(event["ts"] >= 0 and event["pid"] == rank for event in slices)


def test_a_rank_that_stands_still_is_named(data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "stalled", data)
    process = start(config, "--launch.stall_warning_s", str(WARNING_S), "--train.steps", "60")
    wait_for_step(process, config, 3)
    stopped = worker(process.pid, 1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        wait_until(lambda: "rank 0 has" in process.said())
    finally:
        os.kill(stopped, signal.SIGCONT)
    output = finish(process)
    line = next(line for line in output.splitlines() if "rank 0 has" in line)
    assert "rank 1" in line
    # Wherever rank 0 was when the other one stopped: in a layer, or between two steps.
    assert "layer 1" in line or "the beginning of step" in line
    assert len(records(config)) == 60


def test_a_rank_that_stays_away_ends_the_run_in_one_line(data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "ended", data)
    # The time-out holds for the start, too, which takes a while where others work.
    options = ["--launch.stall_warning_s", str(WARNING_S), "--launch.timeout_s", str(8 * WARNING_S)]
    process = start(config, *options, "--train.steps", "500")
    wait_for_step(process, config, STEPS)
    os.kill(worker(process.pid, 1), signal.SIGSTOP)
    output = finish(process, code=1)
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("rank 0: ")]
    assert len(errors) == 1
    assert any(line.startswith("rank 0 has") and "rank 1" in line for line in output.splitlines())
