"""The user's own path in real processes: train, kill, resume, on other ranks."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from training_runs import (
    STEPS,
    config_file,
    finish,
    learning,
    records,
    start,
    wait_for_step,
    worker,
)

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_file(tmp_path_factory.mktemp("unbroken"), data)
    finish(start(config))
    return config


def test_kill_9_costs_nothing(unbroken: Path, data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "killed", data)
    process = start(config)
    wait_for_step(process, config, 6)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    output = finish(process, code=1)
    assert "rank 1 was killed by signal 9" in output
    assert len(records(config)) < STEPS
    assert "resumed from" in finish(start(config))
    assert [record["step"] for record in records(config)] == list(range(1, STEPS + 1))
    assert learning(config) == learning(unbroken)


def test_sigterm_saves_and_leaves(unbroken: Path, data: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "stopped", data)
    process = start(config)
    wait_for_step(process, config, 2)
    process.send_signal(signal.SIGTERM)
    output = finish(process, code=75)
    assert "stopped by a signal at step" in output
    stopped_at = len(records(config))
    note = config.parent / "run" / "STOPPED"
    assert note.read_text() == f"step {stopped_at} of {STEPS}\n"
    folder = config.parent / "run" / "checkpoints" / f"step-{stopped_at:08d}"
    assert folder.is_dir()
    assert f"resumed from {folder}" in finish(start(config))
    assert not note.exists()
    assert learning(config) == learning(unbroken)


def test_a_checkpoint_loads_on_other_ranks(unbroken: Path, data: Path, tmp_path: Path) -> None:
    """Two ranks with ep = 2 go on as one rank without FSDP, and as two ranks with ep = 1 that share
    their sequences."""
    last = sorted((unbroken.parent / "run" / "checkpoints").iterdir())[-1]
    losses = []
    for name, options in (
        ("one", ["--launch.nproc", "1", "--parallel.ep", "1"]),
        ("shared", ["--parallel.ep", "1", "--parallel.cp", "2"]),
        ("same", []),
    ):
        config = config_file(tmp_path / name, data)
        options += ["--moe.rounding.rule", "none", "--train.steps", str(STEPS + 2)]
        output = finish(start(config, "--resume", str(last), *options))
        assert f"resumed from {last}" in output
        assert ("sequences over cp 2" in output) == (name == "shared")
        losses.append([record["loss"] for record in records(config)])
        if name == "shared":
            # Two layers, there and back, both ranks: four sequences of 16 positions each, one key
            # and one value of 16 numbers.
            sent = 2 * 2 * 2 * 4 * 16 * 2 * 16 * 4 / 2**20
            assert {record["node_mib"] for record in records(config)} == {sent}
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)


def test_an_error_of_a_rank_is_one_line_and_stops_all(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    shard = tmp_path / "data" / "train-00000.bin"
    os.truncate(shard, shard.stat().st_size // 2)
    config = config_file(tmp_path / "short", tmp_path / "data")
    output = finish(start(config), code=1)
    assert "Traceback" not in output
    assert any(
        line.startswith("rank ") and "train-00000.bin" in line for line in output.splitlines()
    )
    assert len(output.splitlines()) <= 4
