"""DeepSpeed's launcher starts the same run as ours, and fsdp2 goes on from its checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import config_file, finish, learning, records, start

from distmoe.launch.ports import free_port

pytestmark = pytest.mark.processes

OPTIONS = ["--parallel.engine=deepspeed", "--deepspeed.zero_stage=3", "--train.steps=4"]
OPTIONS += ["--launch.threads=1", "--checkpoint.every=2"]


@pytest.fixture(scope="module")
def by_distmoe(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_file(tmp_path_factory.mktemp("deepspeed"), data)
    output = finish(start(config, *OPTIONS))
    assert "ranks from      local" in output
    # DeepSpeed and the collectives that it calls have nothing to say.
    assert "[INFO]" not in output
    assert "Warning" not in output
    return config


def test_the_deepspeed_launcher_starts_the_same_run(
    by_distmoe: Path, data: Path, tmp_path: Path
) -> None:
    """On each host, without ssh."""
    config, hosts = config_file(tmp_path / "deepspeed", data), tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    there = f"--no_ssh --node_rank=0 --master_addr=127.0.0.1 --master_port={free_port()}"
    by_hand = f"--launcher-args=--hostfile={hosts} {there}"
    run = subprocess.run(
        [sys.executable, "-m", "distmoe", "launch", "deepspeed", str(config), by_hand, *OPTIONS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout
    assert "ranks from      deepspeed" in run.stdout
    assert learning(config) == learning(by_distmoe)


def test_fsdp2_goes_on_from_a_checkpoint_of_deepspeed(
    by_distmoe: Path, data: Path, tmp_path: Path
) -> None:
    config = config_file(tmp_path / "fsdp2", data)
    checkpoint = by_distmoe.parent / "run" / "checkpoints" / "step-00000002"
    engine = "--parallel.engine=fsdp2"
    output = finish(start(config, *OPTIONS, engine, "--resume", str(checkpoint)))
    assert f"resumed from {checkpoint}" in output
    unbroken = [record["loss"] for record in records(by_distmoe)]
    assert [record["loss"] for record in records(config)] == pytest.approx(unbroken[2:], rel=1e-5)
